"""Noise and rates that are chosen during a run: only under the filter that the ledger fixed before it."""

from __future__ import annotations

import json

import pytest

from synthward.engine import Ledger
from synthward.engine.accounting import (
    CyclicPoissonGaussianEvent,
    GaussianEvent,
    LaplaceEvent,
    PoissonGaussianEvent,
    RdpFilter,
    epsilon_of,
)
from synthward.engine.errors import (
    BudgetExceededError,
    ConfigError,
    LedgerError,
    UnsupportedOperationError,
)

DELTA, TARGET = 1e-5, 3.0
STEPS = [
    PoissonGaussianEvent(0.05, 1.5, 1),
    PoissonGaussianEvent(0.1, 2.0, 1),
    PoissonGaussianEvent(0.02, 1.2, 1),
]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def create(path, **changes):
    options = {"run_id": "r", "unit": "patient", "delta": DELTA, "key_id": "00" * 16, "private": True}
    return Ledger.create(path, **(options | {"adaptive": True, "target_epsilon": TARGET} | changes))


def test_parameters_may_change_and_the_filter_accounts(path):
    with create(path, planned=[STEPS[0].with_steps(200)]) as ledger:
        assert ledger.is_adaptive and ledger.header["accountant"] == "rdp"
        for at, event in enumerate(STEPS):
            ledger.lease(event, 10 * at, 10)
            assert ledger.covers(10 * at, event) and not ledger.covers(10 * at + 1, STEPS[at - 1])
            ledger.close_lease(10)
        ledger.append_event(LaplaceEvent(20.0, 1), note="a count")
        charged = [event.with_steps(10) for event in STEPS] + [LaplaceEvent(20.0, 1)]
        assert sorted(ledger.events(), key=str) == sorted(charged, key=str)
        fixed = RdpFilter.planned([STEPS[0].with_steps(200)], DELTA)
        assert ledger.epsilon() == fixed.epsilon(charged) > epsilon_of(charged, DELTA, "rdp")
    with Ledger.open(path) as ledger:
        assert ledger.epsilon() == fixed.epsilon(charged)


def test_the_filter_is_in_the_first_line_before_anything_is_charged(path):
    create(path).close()
    [line] = path.read_text().splitlines()
    fixed = RdpFilter.from_dict(json.loads(line)["filter"])
    assert fixed.delta == DELTA and len(fixed.orders) == len(fixed.weights) > 100


def test_a_lease_beyond_the_target_is_refused_and_not_written(path):
    with create(path) as ledger:
        ledger.lease(STEPS[0], 0, 100)
        ledger.close_lease(100)
        content = path.read_bytes()
        with pytest.raises(BudgetExceededError):
            ledger.lease(STEPS[1], 100, 5000)
        with pytest.raises(BudgetExceededError):
            ledger.append_event(GaussianEvent(0.5, 1), note="")
        assert path.read_bytes() == content
        steps = 100
        while True:
            try:
                ledger.lease(STEPS[steps % 3], steps, 20)
            except BudgetExceededError:
                break
            ledger.close_lease(20)
            steps += 20
        assert 0.6 * TARGET < ledger.epsilon() <= TARGET


@pytest.mark.parametrize("accountant", ["pld", "prv"])
def test_an_accountant_without_a_filter_is_refused(path, accountant):
    """A sum of privacy losses is no bound where the next one depends on what came out."""
    with pytest.raises(UnsupportedOperationError, match=accountant):
        create(path, accountant=accountant)
    assert not path.exists()


def test_a_guarantee_needs_a_target_that_was_fixed_before(path):
    with pytest.raises(ConfigError, match="target_epsilon"):
        create(path, target_epsilon=None)
    assert not path.exists()


@pytest.mark.parametrize("question", [{"delta": 1e-6}, {"accountant": "pld"}, {"delta": 0.0}])
def test_an_adaptive_ledger_answers_no_other_question(path, question):
    with create(path) as ledger:
        ledger.lease(STEPS[0], 0, 10)
        with pytest.raises(ConfigError, match="adaptive"):
            ledger.epsilon(**question)
        assert ledger.epsilon(DELTA, "rdp") == ledger.epsilon()


def test_mechanisms_of_many_steps_are_fixed_in_advance(path):
    with create(path) as ledger, pytest.raises(UnsupportedOperationError, match="one mechanism"):
        ledger.lease(CyclicPoissonGaussianEvent(0.2, 1.2, period=4, steps=1), 0, 5)


def test_a_ledger_without_a_filter_opens_as_before(path):
    """As an older version wrote it: version 1, no field more."""
    create(path, adaptive=False, target_epsilon=None).close()
    line = json.loads(path.read_text())
    assert line["version"] == 1 and "filter" not in line and line["accountant"] == "pld"
    with Ledger.open(path) as ledger:
        assert not ledger.is_adaptive


def test_a_header_whose_filter_is_of_something_else_is_refused(path, tmp_path):
    """Even with a good hash: written by a program that is not ours."""
    from synthward.engine.chain import Chain
    from synthward.engine.ledger import _FORMAT

    create(path).close()
    header = json.loads(path.read_text())
    fields = {k: v for k, v in header.items() if k not in ("seq", "prev", "time", "kind", "hash")}
    for number, change in enumerate(
        (
            {"delta": 1e-6},
            {"accountant": "pld"},
            {"relation": "replace_one"},
            {"target_epsilon": None},
            {"filter": {}},
        )
    ):
        other = tmp_path / f"other{number}.jsonl"
        Chain.create(other, _FORMAT, **(fields | change)).close()
        with pytest.raises(LedgerError, match="line 1"):
            Ledger.open(other)
