"""`PrivacyEngine` and its ledger: keys, checkpoints older than the lease, ledgers that were put back."""

from __future__ import annotations

import shutil

import pytest

from synthward import PrivacyEngine
from synthward.engine import Ledger
from synthward.engine.accounting import CorrelatedGaussianEvent, epsilon_of
from synthward.engine.accounting.matrix import Strategy
from synthward.engine.errors import LedgerError
from tests.engine.test_session import private

DELTA = 1e-5


@pytest.fixture
def ledger(tmp_path):
    with Ledger.create(
        tmp_path / "l.jsonl", run_id="r", unit="row", delta=DELTA, key_id="0", private=True, accountant="rdp"
    ) as made:
        yield made


def take(optimizer, steps):
    for _ in range(steps):
        optimizer.step()


def charged(ledger):
    return sum(event.steps for event in ledger.events())


def test_a_checkpoint_older_than_its_lease_costs_its_steps_again(tmp_path, ledger):
    """Going back under an open lease: what was released stays charged, and the steps are taken with new noise."""
    engine, _, optimizer, _ = private(PrivacyEngine(ledger=ledger), noise_multiplier=1.0)
    take(optimizer, 2)
    engine.save_checkpoint(tmp_path / "c.safetensors")
    take(optimizer, 130)  # into the second lease
    for _ in range(2):
        engine.load_checkpoint(tmp_path / "c.safetensors")
        take(optimizer, 1)
    engine.close()
    assert charged(ledger) == 134
    engine.load_checkpoint(tmp_path / "c.safetensors")
    engine.close()
    assert charged(ledger) == 134
    with Ledger.open(ledger.path, readonly=True) as again:
        assert charged(again) == 134


def test_a_checkpoint_loaded_before_the_first_step(tmp_path, ledger):
    engine, _, optimizer, _ = private(PrivacyEngine(ledger=ledger), noise_multiplier=1.0)
    take(optimizer, 120)
    engine.save_checkpoint(tmp_path / "c.safetensors")
    engine.close()
    other, _, optimizer, _ = private(PrivacyEngine(ledger=ledger), noise_multiplier=1.0)
    other.load_checkpoint(tmp_path / "c.safetensors")
    take(optimizer, 3)
    other.close()
    assert charged(ledger) == 123
    assert [line["first_step"] for line in ledger.lines if line["kind"] == "lease"] == [0, 100, 120]


def test_a_ledger_that_was_put_back_is_refused(tmp_path, ledger):
    engine, _, optimizer, _ = private(PrivacyEngine(ledger=ledger), noise_multiplier=1.0)
    shutil.copy(ledger.path, tmp_path / "old.jsonl")
    take(optimizer, 2)
    engine.save_checkpoint(tmp_path / "c.safetensors")
    with Ledger.open(tmp_path / "old.jsonl") as old:
        resumed = private(PrivacyEngine(ledger=old), noise_multiplier=1.0)[0]
        with pytest.raises(LedgerError, match="cut off"):
            resumed.load_checkpoint(tmp_path / "c.safetensors")
        assert resumed.get_epsilon(DELTA) == 0.0
    engine.close()
    ledger.close()
    with Ledger.open(ledger.path) as whole:
        resumed, _, optimizer, _ = private(PrivacyEngine(ledger=whole), noise_multiplier=1.0)
        resumed.load_checkpoint(tmp_path / "c.safetensors")
        take(optimizer, 1)
        resumed.close()
        assert charged(whole) == 3


def test_each_module_s_key_is_in_the_ledger(ledger):
    engine = PrivacyEngine(ledger=ledger)
    for _ in range(2):
        take(private(engine, noise_multiplier=1.0)[2], 1)
    lines = [line for line in ledger.lines if line["kind"] == "key"]
    assert [line["part"] for line in lines] == ["", "2"]
    assert len({line["key_id"] for line in lines}) == 2 and ledger.is_private


def test_a_later_process_may_lease_correlated_steps_of_its_own(ledger):
    """Its part has a key of its own; the first process's mechanism is not lengthened."""
    event = CorrelatedGaussianEvent(6.0, Strategy("banded", (1.0, 0.5)), period=4, steps=1)
    ledger.lease(event, 0, 8)
    ledger.close()
    with Ledger.open(ledger.path) as again:
        part = again.new_part()
        again.add_key("1" * 32, part=part)
        again.lease(event, 0, 12, part=part)
        both = [event.with_steps(8), event.with_steps(12)]
        assert again.events() == both and again.epsilon() == epsilon_of(both, DELTA, "rdp")
