"""The audit under every mechanism that a plan can be: sound ones pass, and faults of each are caught."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from synthward.audit.whitebox import audit_step
from synthward.engine import KeySchedule, PrivacyPlan
from synthward.engine.correlation import banded_inverse_strategy, banded_strategy, blt_strategy
from synthward.engine.noise import DiscreteSums, NoiseSource
from synthward.engine.sampling import CyclicPoissonSampler

DELTA, STEPS = 1e-5, 24
PLAN = PrivacyPlan(
    sample_rate=0.2, noise_multiplier=1.0, max_grad_norm=0.5, steps=STEPS, expected_batch_size=50.0
)
PLANS = {
    "cyclic": replace(PLAN, period=4),
    "banded": replace(PLAN, period=4, strategy=banded_strategy(STEPS, 4)),
    "blt": replace(PLAN, sample_rate=1.0, period=6, strategy=blt_strategy(STEPS, 2, 6)),
    "banded inverse": replace(PLAN, sample_rate=1.0, period=6, strategy=banded_inverse_strategy(STEPS, 3)),
    "discrete": replace(PLAN, arithmetic="discrete"),
    "truncated": replace(PLAN, max_batch_size=90, max_units=200),
}


def audited(plan, seed=5):
    """The checks by name, at sizes that take seconds."""
    keys = KeySchedule.reproducible(seed)
    checks = audit_step(plan, DELTA, keys=keys, canaries=2000, coordinates=200_000)
    return {check.name: check for check in checks}


@pytest.mark.parametrize("name", PLANS)
def test_a_sound_engine_passes(name):
    """On a fixed seed; what is recovered of the claim in full participation is most of it."""
    checks = audited(PLANS[name])
    assert all(check.passed for check in checks.values()), checks
    whole = checks["canaries in every step"]
    assert 0.5 * whole.claimed < whole.lower_bound <= 1.1 * whole.claimed


def forget_the_past(self, std):
    """White noise where that of a strategy is claimed."""
    noise = whole_noise(self, std)
    return replace(noise, correlation=None)


def halve(self, std):
    return whole_noise(self, 0.5 * std)


whole_noise = NoiseSource.next


@pytest.mark.parametrize("name", ["banded", "blt", "banded inverse"])
@pytest.mark.parametrize("damage", [forget_the_past, halve])
def test_faults_of_correlated_noise_are_caught(monkeypatch, name, damage):
    monkeypatch.setattr(NoiseSource, "next", damage)
    assert not all(check.passed for check in audited(PLANS[name]).values())


def test_integers_without_their_noise_are_caught(monkeypatch):
    release = DiscreteSums.release
    monkeypatch.setattr(DiscreteSums, "release", lambda self, noise: release(self, replace(noise, std=0.0)))
    assert not all(check.passed for check in audited(PLANS["discrete"]).values())


def test_integers_with_less_noise_are_caught(monkeypatch):
    release = DiscreteSums.release
    monkeypatch.setattr(
        DiscreteSums, "release", lambda self, noise: release(self, replace(noise, std=0.7 * noise.std))
    )
    assert not all(check.passed for check in audited(PLANS["discrete"]).values())


def test_units_that_come_back_too_early_are_caught(monkeypatch):
    """Everybody in every step, where groups that take turns are claimed."""
    monkeypatch.setattr(CyclicPoissonSampler, "draw", lambda self, step: np.arange(self._num_units))
    checks = audited(replace(PLANS["banded"], noise_multiplier=3.0))
    assert not checks["sampled canaries"].passed


def test_the_plan_of_a_run_is_its_mechanism(tmp_path):
    from synthward.audit.runs import plan_of
    from synthward.run import FitOptions, fit_run
    from synthward.schema import load_schema
    from tests.privacy.test_fit_artifacts import SCHEMA
    from tests.tinydata import table, write_csv

    (tmp_path / "schema.toml").write_text(SCHEMA)
    torch.manual_seed(0)
    folder = fit_run(
        write_csv(tmp_path / "data.csv", table(40, 60)),
        load_schema(tmp_path / "schema.toml"),
        epsilon=3.0,
        delta=1e-5,
        out=tmp_path / "run",
        options=FitOptions(accountant="rdp", steps=6, holdout=0.0, sample_rate=0.1, noise="banded", bands=3),
    )
    plan = plan_of(folder)
    with folder.open_ledger() as ledger:
        assert plan.event() in ledger.events()
    assert plan.strategy is not None and plan.period == 3
    assert plan.expected_batch_size == folder.info["expected_batch_size"]
