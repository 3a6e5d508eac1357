"""Schedules that follow what was released: accounted by the filter that the ledger fixed, or refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from synthward.engine import Ledger
from synthward.engine.correlation import banded_strategy
from synthward.engine.errors import BudgetExceededError, ConfigError, LedgerError, PrivacyError
from tests.privacy.harness import make_plan, make_trainer, step
from tests.privacy.stats import assert_gaussian
from tests.privacy.test_noise import silent_module, silent_units

PLAN = {
    "sample_rate": 0.1,
    "noise_multiplier": 1.0,
    "max_grad_norm": 0.5,
    "expected_batch_size": 4.0,
    "steps": 100,
}


def adaptive(tmp_path, **changes):
    settings = {
        "run_id": "r",
        "unit": "row",
        "delta": 1e-5,
        "key_id": "0" * 32,
        "private": True,
        "accountant": "rdp",
        "adaptive": True,
        "target_epsilon": 3.0,
    }
    return Ledger.create(tmp_path / "ledger.jsonl", **(settings | changes))


def test_the_next_steps_may_follow_what_was_released(tmp_path):
    """Noise and rate are chosen from the last release; each plan's steps are charged as they are run."""
    with adaptive(tmp_path, target_epsilon=8.0) as ledger:
        module = silent_module(300)
        trainer = make_trainer(module, ledger=ledger, **PLAN)
        ledger.lease(trainer.plan.event(1), 0, 2)
        first = step(trainer, module, [silent_units(1, 300)])
        step(trainer, module, [silent_units(1, 300)])
        ledger.close_lease(2)
        spent = ledger.epsilon()
        louder = replace(trainer.plan, noise_multiplier=2.0 + (first[0] > 0), sample_rate=0.2)
        trainer.adapt(louder)
        with pytest.raises(LedgerError):
            trainer.apply()
        ledger.lease(louder.event(1), 2, 1)
        released = step(trainer, module, [silent_units(1, 300)])
        assert_gaussian(released, louder.noise_multiplier * 0.5 / 4.0)
        assert {event.noise_multiplier for event in ledger.events()} == {1.0, louder.noise_multiplier}
        assert {event.sample_rate for event in ledger.events()} == {0.1, 0.2}
        assert ledger.epsilon() > spent


def test_the_filter_stops_whatever_was_chosen(tmp_path):
    with adaptive(tmp_path, target_epsilon=1.0) as ledger:
        trainer = make_trainer(silent_module(10), ledger=ledger, **PLAN)
        with pytest.raises(BudgetExceededError):
            for first in range(0, 100_000, 500):
                ledger.lease(trainer.plan.event(1), first, 500)
                ledger.close_lease(500)
        assert ledger.epsilon() <= 1.0


def test_without_the_filter_nothing_adapts(tmp_path):
    """A PLD sum does not hold for parameters that were chosen on the way."""
    plain = adaptive(tmp_path, adaptive=False, accountant="pld")
    for ledger in (None, plain):
        trainer = make_trainer(silent_module(10), ledger=ledger, **PLAN)
        with pytest.raises(PrivacyError, match="adaptive"):
            trainer.adapt(replace(trainer.plan, noise_multiplier=2.0))
    plain.close()


def test_an_adaptive_ledger_has_an_rdp_filter(tmp_path):
    with pytest.raises((ConfigError, LedgerError, PrivacyError)):
        adaptive(tmp_path, accountant="pld")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"max_grad_norm": 1.0}, "clip"),
        ({"period": 2}, "period"),
        ({"arithmetic": "discrete"}, "arithmetic"),
        ({"strategy": banded_strategy(8, 2), "period": 2}, "strategy|period"),
    ],
)
def test_what_is_fixed_for_a_run_stays(tmp_path, changes, word):
    with adaptive(tmp_path) as ledger:
        trainer = make_trainer(silent_module(10), ledger=ledger, **PLAN)
        with pytest.raises(ConfigError, match=word):
            trainer.adapt(replace(trainer.plan, **changes))


def test_no_change_in_the_middle_of_a_step(tmp_path):
    from tests.privacy.harness import accumulate

    with adaptive(tmp_path) as ledger:
        module = silent_module(10)
        trainer = make_trainer(module, ledger=ledger, **PLAN)
        accumulate(trainer, module, [(torch.randn(1, 10), torch.zeros(1, dtype=torch.int64))])
        with pytest.raises(PrivacyError, match="under way"):
            trainer.adapt(replace(trainer.plan, noise_multiplier=2.0))


def test_plans_are_equal_by_value():
    assert make_plan(**PLAN) == make_plan(**PLAN)
