"""Solving at the edges, agreement of what is calibrated with what is charged, and the two commands."""

from __future__ import annotations

import dp_accounting
import pytest
from dp_accounting import pld

from synthward.commands.account import account
from synthward.commands.ledger import show_ledger
from synthward.engine import Ledger
from synthward.engine.accounting import (
    GaussianEvent,
    PoissonGaussianEvent,
    calibrate_noise,
    calibrate_sample_rate,
    epsilon_of,
)
from synthward.engine.errors import ConfigError, LedgerError


@pytest.mark.parametrize("steps", [1, 100, 2000])
def test_at_rate_one_what_was_calibrated_can_be_charged(tmp_path, steps):
    """Steps leased one part after the other may use the budget to the end and not beyond."""
    noise = calibrate_noise(3.0, 1e-5, 1.0, steps)
    with Ledger.create(
        tmp_path / "l", run_id="r", unit="u", delta=1e-5, key_id="ab", private=True, target_epsilon=3.0
    ) as ledger:
        ledger.lease(PoissonGaussianEvent(1.0, noise, 1), 0, steps)
        assert 2.99 < ledger.epsilon() <= 3.0


@pytest.mark.parametrize("kind", [pytest.param("pld", marks=pytest.mark.slow), "rdp"])
def test_solving_where_delta_alone_pays_for_small_rates(kind):
    """Epsilon is exactly 0 there, and has no logarithm."""
    rate = calibrate_sample_rate(0.5, 1e-3, 2.0, 1, kind)
    assert epsilon_of([PoissonGaussianEvent(rate, 2.0, 1)], 1e-3, kind) <= 0.5
    assert epsilon_of([PoissonGaussianEvent(rate * 1.001, 2.0, 1)], 1e-3, kind) > 0.5
    noise = calibrate_noise(0.01, 1e-2, 1e-2, 1, kind)
    assert epsilon_of([PoissonGaussianEvent(1e-2, noise, 1)], 1e-2, kind) <= 0.01


def test_solving_far_from_the_first_guess_stays_cheap():
    """10,000 steps at rate 0.9 and noise 1 would be a PLD of gigabytes."""
    noise = calibrate_noise(1.0, 1e-5, 0.9, 10_000)
    assert 0.999 < epsilon_of([PoissonGaussianEvent(0.9, noise, 10_000)], 1e-5) <= 1.0


@pytest.mark.parametrize("event", [PoissonGaussianEvent(0.01, 0.01, 5), GaussianEvent(1.0, 10_000)])
def test_noise_too_small_for_the_pld_is_refused_in_a_line(event):
    with pytest.raises(ConfigError, match="rdp"):
        epsilon_of([event], 1e-5)
    assert epsilon_of([event], 1e-5, "rdp") > 100


def test_an_unknown_accountant_is_refused_even_where_nothing_was_spent():
    for events in ([], [GaussianEvent(0.0, 1)]):
        with pytest.raises(ConfigError, match="moments"):
            epsilon_of(events, 1e-5, "moments")


def test_kept_distributions_give_what_the_library_gives():
    """The same mechanism for several numbers of steps, as the budget check of each lease asks."""
    for steps in (1, 7, 300):
        built = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
        built.compose(dp_accounting.GaussianDpEvent(6.0), 2)
        built.compose(dp_accounting.PoissonSampledDpEvent(0.03, dp_accounting.GaussianDpEvent(1.4)), steps)
        events = [PoissonGaussianEvent(0.03, 1.4, steps), GaussianEvent(6.0, 2)]
        assert epsilon_of(events, 1e-6) == pytest.approx(built.get_epsilon(1e-6), rel=1e-9)


def test_the_rdp_accountant_is_silent(caplog):
    """The library warns of each order that it drops; a command prints its answer only."""
    epsilon_of([PoissonGaussianEvent(0.5, 1.2, 3)], 1e-5, "rdp")
    assert not caplog.records


@pytest.mark.slow
def test_account_answers_and_solves():
    answer = account(1.5, 0.02, 200, delta=1e-5)
    named = [
        "epsilon",
        "delta",
        "noise_multiplier",
        "sample_rate",
        "steps",
        "accountant",
        "relation",
        "sampling",
    ]
    assert list(answer) == named
    target = answer["epsilon"]
    given = {"noise_multiplier": 1.5, "sample_rate": 0.02, "steps": 200}
    for name, value in given.items():
        solved = account(**(given | {name: None}), delta=1e-5, target_epsilon=target)
        assert solved["epsilon"] <= target
        assert solved[name] == pytest.approx(value, rel=1e-3, abs=1)


@pytest.mark.parametrize(
    ("options", "mention"),
    [
        ({"noise_multiplier": 1.0, "steps": 5, "delta": 1e-5}, "--sample-rate"),
        ({"noise_multiplier": 1.0, "delta": 1e-5, "target_epsilon": 1.0}, "exactly one"),
        (
            {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 5, "delta": 1e-5, "target_epsilon": 1.0},
            "none",
        ),
        ({"noise_multiplier": 1.0, "sample_rate": 0.1, "delta": 1e-5, "target_epsilon": 0.0}, "epsilon"),
        ({"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 5, "delta": 1.0}, "delta"),
        ({"noise_multiplier": -1.0, "sample_rate": 0.1, "steps": 5, "delta": 1e-5}, "noise multiplier"),
        ({"noise_multiplier": 1.0, "sample_rate": 0.0, "steps": 5, "delta": 1e-5}, "sample rate"),
        ({"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": -5, "delta": 1e-5}, "steps"),
        ({"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 5, "delta": 1e-5, "accountant": "x"}, "'x'"),
    ],
)
def test_account_refuses_in_a_line(options, mention):
    with pytest.raises(ConfigError, match=mention) as caught:
        account(**options)
    assert "\n" not in str(caught.value)


def test_show_ledger_recomputes_from_the_ledger_alone(tmp_path):
    path = tmp_path / "ledger.jsonl"
    events = [GaussianEvent(6.0, 1), PoissonGaussianEvent(0.03, 1.4, 40)]
    with Ledger.create(path, run_id="r1", unit="patient", delta=1e-6, key_id="ab", private=False) as ledger:
        ledger.append_event(events[0], note="marginals")
        ledger.lease(PoissonGaussianEvent(0.03, 1.4, 1), 0, 40)
        content = path.read_bytes()
        shown = show_ledger(tmp_path)
        assert path.read_bytes() == content, "looking at a run that is under way writes nothing"
        assert shown["head"] == ledger.head
    assert (shown["run_id"], shown["unit"], shown["private"]) == ("r1", "patient", False)
    assert shown["epsilon"] == epsilon_of(events, 1e-6)
    assert shown["events"] == [event.to_dict() for event in events]


def test_show_ledger_refuses_what_it_can_not_trust(tmp_path):
    with pytest.raises(LedgerError, match="does not exist"):
        show_ledger(tmp_path / "nothing")
    with pytest.raises(LedgerError, match="no ledger"):
        show_ledger(tmp_path)
    path = tmp_path / "ledger.jsonl"
    with Ledger.create(path, run_id="r", unit="u", delta=1e-6, key_id="ab", private=True) as ledger:
        ledger.append_event(GaussianEvent(6.0, 1), note="")
    path.write_bytes(path.read_bytes().replace(b'"noise_multiplier":6.0', b'"noise_multiplier":9.0'))
    with pytest.raises(LedgerError, match="line 2"):
        show_ledger(tmp_path)
