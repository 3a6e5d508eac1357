"""The noise of every clipping rule is its multiplier times the sensitivity that it states, and the count of the
adaptive rule is paid for out of the multiplier that is charged."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from synthward.engine import ClipSpec, KeySchedule, PrivacyPlan, PrivateTrainer
from tests.oracles import flat_parameters
from tests.privacy.harness import step
from tests.privacy.stats import SIX_SIGMA, assert_gaussian
from tests.privacy.test_clipping_rules import (
    RULES,
    Dense,
    accumulate,
    make_trainer,
    make_unit,
    norm_of,
    parts_of,
    rule,
)
from tests.privacy.test_noise import silent_module, silent_units


@pytest.mark.parametrize("name", RULES)
def test_noise_is_the_multiplier_times_the_sensitivity(name):
    """A million coordinates at a false alarm rate of 1e-9; for the adaptive rule at the multiplier that is left
    when the count is paid for."""
    sigma, bound, expected = 1.7, 0.5, 4.0
    clip = rule(name, bound)
    module = nn.Sequential()
    module.add_module("first", silent_module(700))
    module.add_module("last", silent_module(700))
    if clip.clipping == "adaptive":
        clip = ClipSpec(bound, "adaptive", count_noise=1.1)
        left = (sigma**-2 - (2 * 1.1) ** -2) ** -0.5
        assert left > 1.5 * sigma
    else:
        left = sigma
    trainer = make_trainer(module, clip, noise_multiplier=sigma, expected_batch_size=expected)
    noise = step(trainer, module, [silent_units(2, 700)])
    assert_gaussian(noise, left * clip.sensitivity() / expected)


def adaptive_run(steps: int, clip: ClipSpec, sigma: float, expected: float, seed: int = 0):
    """Bounds before each of `steps` empty steps, and after the last."""
    module = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-6)
    plan = PrivacyPlan(0.5, sigma, clip.max_grad_norm, steps, expected, clip)
    trainer = PrivateTrainer(module, optimizer, plan, keys=KeySchedule.reproducible(seed))
    bounds = [trainer._step.quantile.bound]
    for _ in range(steps):
        trainer.apply()
        bounds.append(trainer._step.quantile.bound)
    return np.array(bounds)


@pytest.mark.parametrize("count_noise", [None, 3.0])
def test_the_adaptive_rule_s_count_has_the_noise_that_it_states(count_noise):
    """From the bounds of empty steps alone: they move by the noise of the count and by nothing else."""
    sigma, expected, rate, target = 1.0, 40.0, 0.05, 0.5
    clip = ClipSpec(1.0, "adaptive", count_noise=count_noise, quantile_rate=rate, target_quantile=target)
    bounds = adaptive_run(2000, clip, sigma, expected)
    share = -np.diff(np.log(bounds)) / rate + target
    counts = (share - 0.5) * expected
    stated = expected / 20 if count_noise is None else count_noise
    assert abs((counts**2).mean() / stated**2 - 1) < SIX_SIGMA * (2 / len(counts)) ** 0.5
    assert abs(counts.mean()) < SIX_SIGMA * stated / len(counts) ** 0.5
    assert abs(np.corrcoef(counts[1:], counts[:-1])[0, 1]) < SIX_SIGMA / len(counts) ** 0.5


@pytest.mark.parametrize("sigma", [0.5, 1.0, 7.9])
@pytest.mark.parametrize("count_noise", [4.0, 30.0])
def test_sum_and_count_together_are_the_mechanism_that_is_charged(sigma, count_noise):
    """One Gaussian mechanism over (sum / (z' C), count / count_noise): its sensitivity is 1 / z. A unit moves the
    count of "in or out, less a half" by exactly a half."""
    clip = ClipSpec(2.0, "adaptive", count_noise=count_noise)
    module = nn.Linear(3, 3)
    trainer = make_trainer(module, clip, noise_multiplier=sigma, expected_batch_size=100.0)
    quantile = trainer._step.quantile
    moved_sum, moved_count = 1.0 / quantile.noise_multiplier, 0.5 / quantile._count_noise
    assert math.hypot(moved_sum, moved_count) == pytest.approx(1.0 / sigma, rel=1e-12)
    assert trainer.plan.event(7).noise_multiplier == sigma
    for share in (0.0, 1.0, float("nan")):
        quantile.discard()
        norms = torch.tensor([1.5, 2.5, share * 3.0])
        quantile.observe(0, norms, torch.isfinite(norms))
        before = quantile._total
        quantile.observe(0, torch.tensor([1e9 * share]), torch.tensor([math.isfinite(share)]))
        assert abs(float(quantile._total - before)) in (0.0, 0.5)


def test_a_count_too_small_for_its_noise_is_refused():
    from synthward.engine.errors import ConfigError

    for sigma in (2.0, 2.1):
        with pytest.raises(ConfigError, match="count_noise"):
            make_trainer(nn.Linear(2, 2), ClipSpec(1.0, "adaptive", count_noise=1.0), noise_multiplier=sigma)


def test_the_ledger_is_charged_for_sum_and_count(tmp_path):
    """The event of each step is written at the whole multiplier; the noise on the sum alone is larger than that."""
    from synthward import PrivacyEngine
    from synthward.engine.accounting import PoissonGaussianEvent, epsilon_of
    from tests.privacy.test_ledger import DELTA, create

    sigma, bound, batch, rate = 1.2, 0.5, 10, 0.25
    clip = ClipSpec(bound, "adaptive", count_noise=0.9)
    ledger = create(tmp_path / "ledger.jsonl")
    module = silent_module(1000)
    engine = PrivacyEngine(ledger=ledger)
    data = torch.utils.data.TensorDataset(torch.zeros(40, 1000))
    module, optimizer, loader = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
        data_loader=torch.utils.data.DataLoader(data, batch_size=batch),
        noise_multiplier=sigma,
        max_grad_norm=bound,
        sample_rate=rate,
        clipping=clip,
    )
    before, taken = flat_parameters(module), 0
    for (x,) in loader:
        optimizer.zero_grad()
        module(x).square().sum(1).mean().backward()
        optimizer.step()
        if taken == 0:
            first = before - flat_parameters(module)
        taken += 1
    left = (sigma**-2 - (2 * 0.9) ** -2) ** -0.5
    assert_gaussian(first, left * bound / batch)
    engine.close()
    charged = [PoissonGaussianEvent(rate, sigma, taken)]
    assert ledger.epsilon(DELTA, "pld") == pytest.approx(epsilon_of(charged, DELTA), rel=1e-9)
    assert engine.get_epsilon(DELTA) == pytest.approx(epsilon_of(charged, DELTA), rel=1e-9)


def test_the_adaptive_bound_moves_by_the_noisy_count_alone():
    """Two sets of records of other gradients and equal counts of unclipped units: equal bounds, bit for bit, under
    equal keys. One unit more above the bound: the bound moves by what half a unit moves it."""
    clip = ClipSpec(1.0, "adaptive", count_noise=3.0, quantile_rate=0.4)

    def bound_after(slopes: list[float], seed: int) -> float:
        torch.manual_seed(5)
        module = Dense()
        plan = PrivacyPlan(0.5, 1.0, 1.0, 10, 8.0, clip)
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        trainer = PrivateTrainer(module, optimizer, plan, keys=KeySchedule.reproducible(3))
        units = [make_unit("ordinary", 2, 1.0, slope, seed + i) for i, slope in enumerate(slopes)]
        accumulate(trainer, module, units)
        trainer.apply()
        return trainer._step.quantile.bound

    few = bound_after([1e4, 1e4, 1e-4], 0)
    assert bound_after([1e8, 1e5, 1e-9], 50) == few
    assert bound_after([1e-4, 1e4, 1e7], 90) == few
    more = bound_after([1e4, 1e4, 1e-4, 1e4], 0)
    # Above the bound: one less half in the count, a wider bound.
    assert math.log(more / few) == pytest.approx(0.4 * 0.5 / 8.0, rel=1e-9)
    assert bound_after([1e4, 1e4, 1e-4, float("nan")], 0) == few, "a unit that is left out is not counted"


def test_the_adaptive_bound_of_a_step_is_the_one_before_its_count():
    """All physical batches of a step are clipped to one bound, and its noise is scaled by that one."""
    clip = ClipSpec(1.0, "adaptive", count_noise=0.6, quantile_rate=5.0)
    torch.manual_seed(5)
    module = Dense()
    trainer = make_trainer(module, clip, noise_multiplier=0.0)
    unit = make_unit("ordinary", 2, 1.0, 1e6, 0)
    for _ in range(2):
        accumulate(trainer, module, [unit])
    assert 1.999 <= norm_of(parts_of(trainer)) <= 2.0
    trainer.apply()
    moved = trainer._step.quantile.bound
    assert moved > 100.0, "no unit was within the bound, so it grows"
    accumulate(trainer, module, [unit])
    assert 0.99 * moved <= norm_of(parts_of(trainer)) <= moved


@pytest.mark.parametrize("name", RULES)
def test_the_stated_noise_is_that_of_the_bound_in_force(name):
    """Two steps of the adaptive rule: the second's noise is scaled by the bound that the first one set."""
    clip = rule(name, 0.5)
    if clip.clipping == "adaptive":
        clip = ClipSpec(0.5, "adaptive", count_noise=1.1, quantile_rate=0.3)
    module = nn.Sequential()
    module.add_module("first", silent_module(400))
    trainer = make_trainer(module, clip, noise_multiplier=1.0)
    step(trainer, module, [silent_units(9, 400)])
    bound = trainer._step.quantile.bound if trainer._step.quantile else 0.5
    left = trainer._step.quantile.noise_multiplier if trainer._step.quantile else 1.0
    if clip.clipping == "adaptive":
        assert bound < 0.4, "all nine units were within the bound, eight and a half more than the target"
    noise = step(trainer, module, [silent_units(9, 400)])
    assert_gaussian(noise, left * bound)


def test_the_count_s_noise_left_out_of_the_sum_s_multiplier_is_seen(monkeypatch):
    from synthward.engine.step import Quantile

    original = Quantile.__init__

    def unpaid(self, clip, noise, expected):
        original(self, clip, noise, expected)
        self.noise_multiplier = noise.noise_multiplier

    monkeypatch.setattr(Quantile, "__init__", unpaid)
    with pytest.raises(AssertionError):
        test_noise_is_the_multiplier_times_the_sensitivity("adaptive")
