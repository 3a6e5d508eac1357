"""The white-box audit passes the engine, and fails each engine that was broken in one place.

Keys come from seeds, so that these are checks of fixed draws; a sound engine fails one audit in ten thousand.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from synthward.audit import canaries, law, whitebox
from synthward.audit.canaries import run_canaries, run_full_participation
from synthward.audit.law import examine, run_law_test
from synthward.engine import KeySchedule, PrivacyPlan, PrivateTrainer
from synthward.engine.errors import ConfigError

DELTA = 1e-5
CLIPPINGS = ("flat", "automatic", "per-layer", "grouped", "adaptive")
LAW, EVERY, SAMPLED = "law of the noise", "canaries in every step", "sampled canaries"


def make_plan(**changes: object) -> PrivacyPlan:
    fields = {
        "sample_rate": 0.05,
        "noise_multiplier": 1.3,
        "max_grad_norm": 0.5,
        "steps": 100,
        "expected_batch_size": 400.0,
    }
    return PrivacyPlan(**(fields | changes))


def audit(seed: int = 1, **changes: object) -> dict[str, whitebox.Check]:
    keys = KeySchedule.reproducible(seed)
    checks = whitebox.audit_step(make_plan(**changes), DELTA, keys, coordinates=200_000, steps=60)
    return {check.name: check for check in checks}


def rule(clipping: str) -> object:
    from synthward.engine import ClipSpec

    return ClipSpec(0.5, "grouped", groups=("encoder.",)) if clipping == "grouped" else clipping


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_a_sound_engine_passes_and_most_of_its_claim_is_recovered(clipping):
    found = audit(clipping=rule(clipping))
    assert [name for name, check in found.items() if not check.passed] == []
    every = found[EVERY]
    assert 0.8 * every.claimed < every.lower_bound
    assert every.details["gate"] < every.lower_bound
    assert found[SAMPLED].lower_bound > 0.3 * found[SAMPLED].claimed
    assert all(not check.from_records and check.to_dict()["releasable"] for check in found.values())


@pytest.mark.parametrize(("noise", "steps"), [(0.5, 1), (1.0, 1), (1.3, 2), (3.0, 9), (50.0, 12)])
def test_there_are_as_many_steps_as_show_the_noise(monkeypatch, noise, steps):
    monkeypatch.setattr(canaries, "_MOST_STEPS", 12)
    plan = make_plan(noise_multiplier=noise)
    run = run_full_participation(plan, KeySchedule.reproducible(0), 200)
    assert run.plan.steps == steps and run.plan.sample_rate == 1.0


def test_scores_have_the_mean_and_the_variance_of_the_claim():
    """Six standard deviations of either; over five audits of 5,000 canaries."""
    runs = [run_full_participation(make_plan(), KeySchedule.reproducible(seed)) for seed in range(5)]
    inside = np.concatenate([run.scores[run.included] for run in runs])
    outside = np.concatenate([run.scores[~run.included] for run in runs])
    mu = math.sqrt(2.0) / 1.3
    assert abs(inside.mean() - mu) < 6.0 / math.sqrt(len(inside))
    assert abs(outside.mean()) < 6.0 / math.sqrt(len(outside))
    for group in (inside - mu, outside):
        assert abs((group**2).mean() - 1.0) < 6.0 * math.sqrt(2.0 / len(group))


def test_coins_are_the_key_of_canaries_alone():
    keys = KeySchedule.reproducible(4)
    plan = make_plan(steps=2)
    first, second = run_canaries(plan, keys, 300), run_full_participation(plan, keys, 300)
    assert np.array_equal(first.included, second.included)
    other = run_canaries(plan, KeySchedule.reproducible(5), 300)
    assert not np.array_equal(first.included, other.included)


def test_a_plan_without_noise_is_refused():
    with pytest.raises(ConfigError, match="no noise"):
        whitebox.audit_step(make_plan(noise_multiplier=0.0), DELTA)


def test_a_run_of_no_steps_has_no_sampled_canaries():
    assert list(audit(steps=0)) == [LAW, EVERY]


# Engines that are broken in one place


def update_with(monkeypatch: pytest.MonkeyPatch, change) -> None:
    """Every fused update works on the noise that `change` makes of the right one."""
    from synthward.engine.optim import FusedAdam

    update = FusedAdam.update
    monkeypatch.setattr(
        FusedAdam, "update", lambda self, noise, grad_scale: update(self, change(noise), grad_scale)
    )


def half_the_noise(monkeypatch):
    update_with(monkeypatch, lambda noise: dataclasses.replace(noise, std=0.5 * noise.std))


def nine_tenths_of_the_noise(monkeypatch):
    update_with(monkeypatch, lambda noise: dataclasses.replace(noise, std=0.9 * noise.std))


def noise_of_each_rank(monkeypatch):
    """Four ranks that each add the whole noise: too much of it, which no claim pays for, and still a fault."""
    update_with(monkeypatch, lambda noise: dataclasses.replace(noise, std=2.0 * noise.std))


def the_same_noise_in_each_step(monkeypatch):
    update_with(monkeypatch, lambda noise: dataclasses.replace(noise, step=0))


def noise_on_one_rank_only(monkeypatch):
    """The first half of the coordinates has noise; the shard of the other rank has none."""
    from synthward.engine import optim

    whole = optim.noisy_adam_

    def sharded(parameters, *buffers, start, noise_std, **settings):
        half = len(parameters) // 2
        for part, std in ((slice(0, half), noise_std), (slice(half, None), 0.0)):
            offset = part.start + start
            whole(parameters[part], *(b[part] for b in buffers), start=offset, noise_std=std, **settings)

    monkeypatch.setattr(optim, "noisy_adam_", sharded)


def the_same_noise_for_each_tensor(monkeypatch):
    from synthward.engine import optim

    whole = optim.noisy_adam_

    def repeated(parameters, *buffers, start, **settings):
        half = len(parameters) // 2
        for part in (slice(0, half), slice(half, None)):
            whole(parameters[part], *(b[part] for b in buffers), start=0, **settings)

    monkeypatch.setattr(optim, "noisy_adam_", repeated)


def no_clip(monkeypatch):
    from synthward.engine import contributions

    factors = contributions.clip_factors

    def unclipped(*args, **settings):
        made, norms, counts = factors(*args, **settings)
        return counts.to(made.dtype), norms, counts

    monkeypatch.setattr(contributions, "clip_factors", unclipped)


def division_by_the_real_size(monkeypatch):
    backward, apply = PrivateTrainer.backward, PrivateTrainer.apply
    present = {}

    def counting(self, losses, *, unit_mask, **settings):
        present[self] = present.get(self, 0) + int(unit_mask.sum())
        backward(self, losses, unit_mask=unit_mask, **settings)

    def divide(self):
        self._step._grad_scale = 1.0 / max(1, present.pop(self))
        apply(self)

    monkeypatch.setattr(PrivateTrainer, "backward", counting)
    monkeypatch.setattr(PrivateTrainer, "apply", divide)


def rows_clipped_apart(monkeypatch):
    """Several rows (augmentations) of a unit, each clipped as if it were a unit."""
    forward, backward = canaries.Canaries.forward, PrivateTrainer.backward
    rows = {}

    def remember(self, units):
        made = forward(self, units)
        rows["outputs"] = made
        return made

    def apart(self, losses, *, rows_per_unit, unit_mask):
        scale = (losses.detach() * 0 + 1.0).repeat_interleave(rows_per_unit) * 1e4
        backward(
            self,
            rows["outputs"] * scale,
            rows_per_unit=1,
            unit_mask=unit_mask.repeat_interleave(rows_per_unit),
        )

    monkeypatch.setattr(canaries.Canaries, "forward", remember)
    monkeypatch.setattr(PrivateTrainer, "backward", apart)


def the_whole_bound_in_each_layer(monkeypatch):
    from synthward.engine import step

    make = step.make_groups

    def whole(clip, names):
        groups = make(clip, names)
        groups.bounds[:] = [clip.max_grad_norm] * len(groups.bounds)
        return groups

    monkeypatch.setattr(step, "make_groups", whole)


def a_larger_bound_than_said(monkeypatch):
    from synthward.engine import step

    make = step.make_groups

    def larger(clip, names):
        groups = make(clip, names)
        groups.bounds[:] = [1.25 * bound for bound in groups.bounds]
        return groups

    monkeypatch.setattr(step, "make_groups", larger)


def sampling_too_often(monkeypatch):
    from synthward.engine import sampling

    threshold = sampling.threshold_of
    monkeypatch.setattr(sampling, "threshold_of", lambda rate: 2 * threshold(rate))


def a_sum_that_is_left_over(monkeypatch):
    """What one step summed is in the next one, too."""
    from synthward.engine.optim import FusedAdam

    update = FusedAdam.update

    def keeping(self, noise, grad_scale):
        kept = self._flat.summed_grad.clone()
        update(self, noise, grad_scale)
        self._flat.summed_grad.copy_(kept)

    monkeypatch.setattr(FusedAdam, "update", keeping)


BREAKS = {
    half_the_noise: ({LAW, EVERY, SAMPLED}, "flat"),
    nine_tenths_of_the_noise: ({LAW}, "flat"),
    noise_of_each_rank: ({LAW}, "flat"),
    the_same_noise_in_each_step: ({LAW}, "flat"),
    noise_on_one_rank_only: ({LAW, EVERY}, "flat"),
    the_same_noise_for_each_tensor: ({LAW}, "flat"),
    no_clip: ({EVERY, SAMPLED}, "flat"),
    division_by_the_real_size: ({LAW}, "flat"),
    rows_clipped_apart: ({EVERY, SAMPLED}, "flat"),
    the_whole_bound_in_each_layer: ({EVERY}, "per-layer"),
    a_larger_bound_than_said: ({EVERY}, "flat"),
    sampling_too_often: ({SAMPLED}, "flat"),
    a_sum_that_is_left_over: ({EVERY, SAMPLED}, "flat"),
}


@pytest.mark.parametrize("damage", BREAKS, ids=lambda damage: damage.__name__)
def test_a_broken_engine_fails(monkeypatch, damage):
    caught, clipping = BREAKS[damage]
    damage(monkeypatch)
    found = audit(clipping=clipping)
    assert {name for name, check in found.items() if not check.passed} >= caught


# How sharp it is


@pytest.mark.parametrize(("share", "least"), [(0.8, 0.95), (0.7, 1.0)])
def test_noise_below_its_claim_of_three_is_caught(share, least):
    """40 audits of 5,000 canaries at a claim of epsilon 3: the bound passes the claim in as many as were promised."""
    from synthward.audit.bounds import gaussian_epsilon, mu_of_epsilon

    noise = 1.0 / mu_of_epsilon(3.0, DELTA)
    plan = make_plan(noise_multiplier=share * noise, sample_rate=1.0, steps=1)
    caught = 0
    for seed in range(40):
        run = run_canaries(plan, KeySchedule.reproducible(seed))
        caught += gaussian_epsilon(run.included, run.scores, DELTA, whitebox.SIGNIFICANCE) > 3.0
    assert caught / 40 >= least


@pytest.mark.parametrize("ratio", [0.99, 1.01])
def test_the_law_test_sees_one_per_cent(ratio):
    values = np.random.default_rng(2).normal(size=(law.STEPS, law.COORDINATES)) * ratio
    found = examine(values)
    assert not found.passed
    assert found.std_ratio == pytest.approx(ratio, rel=0.003)


def bad_values(what: str) -> np.ndarray:
    rng = np.random.default_rng(6)
    values = rng.normal(size=(2, 200_000))
    if what == "uniform":
        return rng.uniform(-math.sqrt(3.0), math.sqrt(3.0), size=values.shape)
    if what == "mean":
        return values + 0.02
    if what == "neighbours":
        return (values + np.roll(values, 1, axis=1)) / math.sqrt(2.0)
    if what == "halves":
        values[:, 100_000:] = values[:, :100_000]
    if what == "steps":
        values[1] = values[0]
    if what == "tail":
        values = np.clip(values, -2.5, 2.5)
        return values / values.std()
    if what == "nothing":
        return 0.0 * values
    return values


@pytest.mark.parametrize("what", ["uniform", "mean", "neighbours", "halves", "steps", "tail", "nothing"])
def test_the_law_test_sees_what_is_not_gaussian_noise(what):
    assert not examine(bad_values(what)).passed
    assert examine(bad_values("sound")).passed


def test_the_law_test_runs_through_the_engine():
    found = run_law_test(make_plan(), KeySchedule.reproducible(9), 200_000)
    assert found.passed and 0.99 < found.noise_ratio < found.std_ratio


def test_adaptive_clipping_is_scored_in_the_bound_of_each_step(monkeypatch):
    """The bound moves from step to step; scores stay in units of the one in force."""
    bounds = []
    real = canaries.AuditedStep.step

    def watched(self, units):
        bounds.append(self.bound)
        return real(self, units)

    monkeypatch.setattr(canaries.AuditedStep, "step", watched)
    plan = make_plan(clipping="adaptive", noise_multiplier=3.0)
    run = run_full_participation(plan, KeySchedule.reproducible(2), 1000)
    assert len(set(bounds)) == len(bounds) == 9
    assert run.scores.std() < 2.0 and torch.get_default_dtype() == torch.float32


# Correlated noise


class Correlated:
    """What the audit reads of a plan with a strategy."""

    def __init__(self, strategy, period: int, noise_multiplier: float = 2.0) -> None:
        self.strategy, self.period, self.noise_multiplier = strategy, period, noise_multiplier


@pytest.mark.parametrize("kind", ["banded", "blt", "banded_inverse"])
def test_correlated_noise_is_whitened_and_scored_by_its_matched_filter(kind):
    """Noise C^-1 z and a canary of size 1 in every third step: scores have unit variance, and are moved by exactly the
    sensitivity over the noise multiplier, which is what the accountant charges."""
    from synthward.engine.accounting.matrix import Strategy

    numbers = {
        "banded": ((0.8, 0.5, 0.3), ()),
        "blt": ((0.3, 0.1), (0.9, 0.5)),
        "banded_inverse": ((1.0, -0.5), ()),
    }
    strategy, steps = Strategy(kind, *numbers[kind]), 12
    plan = Correlated(strategy, 3)
    matrix = canaries._matrix(plan, steps)
    white = np.random.default_rng(3).normal(size=(steps, 50_000))
    noise = np.linalg.solve(matrix, white)
    assert canaries.whiten(plan, noise) == pytest.approx(white, abs=1e-9)
    signal = canaries._participation(plan, steps)
    assert signal.tolist() == [1.0, 0.0, 0.0] * 4
    weights = canaries.matched_filter(plan, signal)
    scores = weights @ noise
    assert abs((scores**2).mean() - 1.0) < 6.0 * math.sqrt(2.0 / 50_000)
    assert weights @ signal == pytest.approx(strategy.sensitivity(steps, 3), rel=1e-7)
    assert canaries._mu(plan, steps) == pytest.approx(strategy.sensitivity(steps, 3) / 2.0)


def test_without_a_strategy_all_steps_weigh_the_same():
    plan = make_plan()
    assert canaries.matched_filter(plan, np.ones(4)) == pytest.approx(np.full(4, 0.5))
    assert canaries._mu(plan, 4) == pytest.approx(2.0 / 1.3)
