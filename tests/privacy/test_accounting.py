"""Invariants 5 and 8: what is accounted is what is run, and a spent budget stops the run."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from torch import nn

from tests.oracles import clipped_sum, flat_parameters, per_unit_gradients
from tests.privacy.harness import dummy_loader, engine_step, make_plan, make_private
from tests.privacy.nets import CASES, stack, unit_loss

DELTA = 1e-5


def library_epsilon(rate: float, sigma: float, steps: int, delta: float = DELTA, kind: str = "pld") -> float:
    """dp-accounting's own answer for `steps` Poisson-subsampled Gaussians, add/remove."""
    accountant = PLDAccountant() if kind == "pld" else RdpAccountant()
    step = dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(sigma))
    return accountant.compose(dp_event.SelfComposedDpEvent(step, steps)).get_epsilon(delta)


def poisson_engine(batch_size: int = 8, records: int = 64, accountant: str = "pld", **changes):
    """A private loop over a Poisson loader: (engine, module, optimizer, loader)."""
    from synthward import PrivacyEngine

    case = CASES[0]
    inputs, targets, _ = stack(case.units([1] * records))
    module = case.module()
    engine = PrivacyEngine(accountant=accountant)
    private = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
        data_loader=dummy_loader(inputs, targets, batch_size),
        **({"noise_multiplier": 1.1, "max_grad_norm": 1.0} | changes),
    )
    return (engine, *private)


def run_loop(private, steps: int) -> int:
    """The user's loop of DESIGN section 5, for a number of steps (several passes of the loader)."""
    _, module, optimizer, loader = private
    done = 0
    while done < steps:
        for inputs, targets in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(inputs), targets).backward()
            optimizer.step()
            done += 1
            if done == steps:
                break
    return done


@pytest.mark.parametrize(
    ("rate", "sigma", "steps"), [(0.01, 1.0, 1000), (0.05, 2.0, 200), (0.2, 4.0, 100), (1.0, 10.0, 100)]
)
def test_the_plan_s_event_costs_what_the_library_says(rate, sigma, steps):
    from synthward.engine.accounting import epsilon_of

    event = make_plan(sample_rate=rate, noise_multiplier=sigma, steps=steps).event()
    assert (event.sample_rate, event.noise_multiplier, event.steps) == (rate, sigma, steps)
    assert epsilon_of([event], DELTA) == pytest.approx(library_epsilon(rate, sigma, steps), rel=1e-6)


@pytest.mark.parametrize("kind", ["pld", "rdp"])
def test_the_engine_reports_the_library_s_epsilon(kind):
    """q = 8 / 64, given by the loader that the user declared; T is what ran."""
    private = poisson_engine(accountant=kind)
    run_loop(private, 20)
    expected = library_epsilon(8 / 64, 1.1, 20, kind=kind)
    assert private[0].get_epsilon(delta=DELTA) == pytest.approx(expected, rel=1e-6)


def test_reading_epsilon_changes_nothing():
    private = poisson_engine()
    run_loop(private, 5)
    first = private[0].get_epsilon(delta=DELTA)
    assert private[0].get_epsilon(delta=DELTA) == first
    assert private[0].get_epsilon(delta=1e-7) > first
    assert private[0].get_epsilon(delta=DELTA) == first


def test_epsilon_grows_with_every_step_and_starts_at_nothing():
    private = poisson_engine()
    spent = [private[0].get_epsilon(delta=DELTA)]
    for _ in range(4):
        run_loop(private, 1)
        spent.append(private[0].get_epsilon(delta=DELTA))
    assert spent[0] == 0.0
    assert all(a < b for a, b in itertools.pairwise(spent))


def test_empty_draws_count_and_are_noised():
    """64 records at q = 1/64: most batches have one record or none; every one is a step, and moves the
    weights."""
    private = poisson_engine(batch_size=1)
    _, module, optimizer, loader = private
    empty = steps = 0
    while steps < 60:
        for inputs, targets in loader:
            before = flat_parameters(module)
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(inputs), targets, reduction="mean").backward()
            optimizer.step()
            empty += int(len(targets) == 0 or inputs.abs().sum() == 0)
            moved = before - flat_parameters(module)
            assert np.isfinite(moved).all()
            assert np.count_nonzero(moved) > 0.95 * len(moved), "a step without noise"
            assert 0.5 < moved.std() / 1.1 < 2.0
            steps += 1
    expected = library_epsilon(1 / 64, 1.1, steps)
    assert private[0].get_epsilon(delta=DELTA) == pytest.approx(expected, rel=1e-6)
    assert empty > 0, "with probability 1 - 3e-12 some of sixty draws are empty"


def test_without_poisson_sampling_no_amplification_is_claimed():
    """A loader left alone may visit every record in every step: the charge is that of q = 1."""
    case = CASES[0]
    units = case.units([1] * 64)
    private = make_private(case.module(), units, 8, noise_multiplier=5.0)
    inputs, targets, _ = stack(units)
    for start in range(0, 64, 8):
        engine_step(private, inputs[start : start + 8], targets[start : start + 8])
    spent = private[0].get_epsilon(delta=DELTA)
    assert spent >= library_epsilon(1.0, 5.0, 8) * (1 - 1e-6)


def test_noise_multiplier_zero_is_infinite():
    private = poisson_engine(noise_multiplier=0.0)
    run_loop(private, 2)
    assert private[0].get_epsilon(delta=DELTA) == math.inf


def test_the_denominator_is_not_counted_from_the_records():
    """From N and from N - 1 records, the same given batch gives the same update: the count is private."""
    updates = []
    case = CASES[0]
    for records in (64, 63):
        units = case.units([1] * 64)
        private = make_private(case.module(), units[:records], 8)
        inputs, targets, _ = stack(units[:8])
        updates.append(engine_step(private, inputs, targets))
    assert np.array_equal(*updates)


def test_a_target_epsilon_is_met_from_below():
    from synthward import PrivacyEngine

    case = CASES[0]
    inputs, targets, _ = stack(case.units([1] * 64))
    module = case.module()
    engine = PrivacyEngine()
    private = engine.make_private_with_epsilon(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=dummy_loader(inputs, targets, 8),
        target_epsilon=3.0,
        target_delta=DELTA,
        epochs=2,
        max_grad_norm=1.0,
    )
    run_loop((engine, *private), 16)
    assert 2.9 < engine.get_epsilon(delta=DELTA) <= 3.0


def test_a_spent_budget_stops_training_before_the_step():
    """Two passes were paid for: the step beyond them raises and leaves the parameters as they are."""
    from synthward import PrivacyEngine
    from synthward.engine.errors import BudgetExceededError

    case = CASES[0]
    inputs, targets, _ = stack(case.units([1] * 64))
    module = case.module()
    engine = PrivacyEngine()
    private = engine.make_private_with_epsilon(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=dummy_loader(inputs, targets, 8),
        target_epsilon=2.0,
        target_delta=DELTA,
        epochs=2,
        max_grad_norm=1.0,
    )
    run_loop((engine, *private), 16)
    spent, before = engine.get_epsilon(delta=DELTA), flat_parameters(module)
    with pytest.raises(BudgetExceededError):
        for _ in range(3):
            run_loop((engine, *private), 8)
    assert engine.get_epsilon(delta=DELTA) <= 2.0
    if engine.get_epsilon(delta=DELTA) == spent:
        assert np.array_equal(before, flat_parameters(module))


@pytest.mark.parametrize("bad", [{"noise_multiplier": -1.0}, {"max_grad_norm": 0.0}, {"max_grad_norm": -1.0}])
def test_settings_that_void_the_guarantee_are_refused(bad):
    from synthward.engine.errors import SynthwardError

    with pytest.raises((SynthwardError, ValueError)):
        poisson_engine(**bad)


@pytest.mark.parametrize(
    "bad",
    [
        {"noise_multiplier": float("nan")},
        {"noise_multiplier": -0.1},
        {"max_grad_norm": float("inf")},
        {"max_grad_norm": float("nan")},
        {"sample_rate": 0.0},
        {"sample_rate": 1.1},
        {"expected_batch_size": 0},
        {"steps": -1},
    ],
    ids=str,
)
def test_a_plan_that_is_no_mechanism_is_refused(bad):
    from synthward.engine.errors import SynthwardError

    with pytest.raises((SynthwardError, ValueError)):
        make_plan(**bad)


def test_a_plan_cannot_be_changed_after_it_was_accounted():
    plan = make_plan(noise_multiplier=1.0)
    with pytest.raises((AttributeError, TypeError)):
        plan.noise_multiplier = 0.1


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 1e-5), (-1.0, 1e-5), (1.0, 0.0), (1.0, 1.0)])
def test_calibration_refuses_impossible_targets(epsilon, delta):
    from synthward.engine.accounting import calibrate_noise
    from synthward.engine.errors import SynthwardError

    with pytest.raises((SynthwardError, ValueError)):
        calibrate_noise(epsilon, delta, 0.01, 100)


@pytest.mark.parametrize(
    ("epsilon", "rate", "steps"), [(1.0, 0.01, 1000), (3.0, 0.02, 2500), (8.0, 0.1, 100)]
)
def test_calibrated_noise_is_on_the_safe_side(epsilon, rate, steps):
    from synthward.engine.accounting import calibrate_noise

    sigma = calibrate_noise(epsilon, 1e-6, rate, steps)
    spent = library_epsilon(rate, sigma, steps, delta=1e-6)
    assert 0.99 * epsilon < spent <= epsilon


def test_queries_are_charged_to_the_same_budget():
    """A Gaussian query beside the training: the library composes the two the same way."""
    from synthward.engine.accounting import GaussianEvent, PoissonGaussianEvent, epsilon_of

    spent = epsilon_of([PoissonGaussianEvent(0.02, 1.5, 300), GaussianEvent(8.0, 3)], DELTA)
    accountant = PLDAccountant()
    step = dp_event.PoissonSampledDpEvent(0.02, dp_event.GaussianDpEvent(1.5))
    accountant.compose(dp_event.SelfComposedDpEvent(step, 300))
    accountant.compose(dp_event.SelfComposedDpEvent(dp_event.GaussianDpEvent(8.0), 3))
    assert spent == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-6)


def test_a_given_rate_and_denominator_are_what_is_run_and_accounted():
    """q and the expected batch size are public parameters; neither is then read off the records."""
    private = poisson_engine(sample_rate=0.05, expected_batch_size=10, noise_multiplier=2.0)
    _, module, optimizer, loader = private
    nn.init.zeros_(module[0].weight)
    sizes, moved = [], []
    while len(sizes) < 40:
        for inputs, targets in loader:
            before = flat_parameters(module)
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(inputs), targets).backward()
            optimizer.step()
            sizes.append(len(targets))
            moved.append(before - flat_parameters(module))
    expected = library_epsilon(0.05, 2.0, len(sizes))
    assert private[0].get_epsilon(delta=DELTA) == pytest.approx(expected, rel=1e-6)
    spread = float(np.concatenate(moved).std())
    assert 0.9 < spread / (2.0 / 10) < 1.15, "noise of sigma C over the given denominator"


def test_poisson_over_patients_draws_all_rows_of_a_patient_or_none():
    """With one id per record the coin is the patient's, and a batch is clipped patient by patient."""
    from synthward import PrivacyEngine

    case = CASES[0]
    counts = [1, 4, 2, 3, 5, 1, 2, 6]
    units = case.units(counts)
    inputs, targets, offsets = stack(units)
    ids = torch.repeat_interleave(torch.arange(100, 108), offsets.diff())
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(3))
    module = case.module()
    engine = PrivacyEngine()
    module, optimizer, loader = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
        data_loader=dummy_loader(inputs[order], targets[order], 4),
        noise_multiplier=0.0,
        max_grad_norm=0.2,
        sample_rate=0.5,
        expected_batch_size=4,
        unit_ids=ids[order],
    )
    start = {k: v.clone() for k, v in module.state_dict().items()}
    gradients = per_unit_gradients(case.module(), unit_loss, units)
    seen = 0
    while seen < 12:
        for rows, labels in loader:
            module.load_state_dict(start)
            before = flat_parameters(module)
            optimizer.zero_grad()
            with engine.units():
                nn.functional.cross_entropy(module(rows), labels).backward()
            optimizer.step()
            shares = [share_of(unit, rows) for unit in units]
            assert set(shares) <= {0.0, 1.0}, "part of a patient was drawn"
            present = [g for g, share in zip(gradients, shares, strict=True) if share == 1.0]
            expected = clipped_sum(present, 0.2) / 4 if present else np.zeros_like(before)
            np.testing.assert_allclose(before - flat_parameters(module), expected, atol=1e-4)
            seen += 1


def share_of(unit, rows: torch.Tensor) -> float:
    """Which part of the unit's rows stands in a batch."""
    return sum(bool((rows == row).all(dim=1).any()) for row in unit[0]) / len(unit[0])
