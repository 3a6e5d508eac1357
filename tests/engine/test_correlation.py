"""Correlated noise: optimised strategies against closed forms, published values and other optimisers; schedules."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.linalg import toeplitz
from scipy.optimize import minimize

from synthward.engine.accounting.factorization import _Workload
from synthward.engine.accounting.matrix import Strategy, blt_reciprocal, reciprocal
from synthward.engine.correlation import (
    banded_inverse_strategy,
    banded_strategy,
    blt_strategy,
    expected_error,
    noise_schedule,
    noise_variance,
    state_slots,
)
from synthward.engine.errors import ConfigError

INDEPENDENT = Strategy("banded", (1.0,))


def square_root(n: int) -> np.ndarray:
    """The first coefficients of 1 / sqrt(1 - x): the best Toeplitz strategy for the largest error."""
    return np.concatenate([[1.0], np.cumprod(1.0 - 0.5 / np.arange(1, n))])


def dense(column: np.ndarray) -> np.ndarray:
    return toeplitz(column, np.zeros(len(column)))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(
    "strategy",
    [
        INDEPENDENT,
        Strategy("banded", (0.8, 0.5, 0.3)),
        Strategy("blt", (0.3, 0.2), (0.95, 0.4)),
        Strategy("banded_inverse", (1.0, -0.5, -0.125)),
    ],
    ids=lambda s: s.kind,
)
def test_expected_error_is_that_of_dense_matrices(strategy, momentum):
    n, period = 40, 7
    momenta = dense(momentum ** np.arange(n)) if momentum else np.eye(n)
    rows = np.tri(n) @ momenta @ np.linalg.inv(dense(strategy.column(n)))
    squares = (rows**2).sum(axis=1)
    norm = strategy.sensitivity(n, period)
    for error, square in (("mean", squares.mean()), ("max", squares.max())):
        found = expected_error(strategy, n, period, momentum=momentum, error=error)
        assert found == pytest.approx(norm * math.sqrt(square), rel=1e-10)


@pytest.mark.parametrize("error", ["mean", "max"])
def test_gradients_are_those_of_finite_differences(error):
    n, rng = 30, np.random.default_rng(1)
    workload = _Workload(n, 7, 0.5, error)
    column = np.sort(rng.uniform(0.1, 1.0, n))[::-1]
    inverse = reciprocal(column, n)
    value, by_column = workload.loss_of_column(column, inverse)
    same, by_inverse = workload.loss_of_inverse(column, inverse)
    assert same == value
    for i in range(n):
        step = np.zeros(n)
        step[i] = 1e-6
        ends = [workload.loss_of_column(c, reciprocal(c, n))[0] for c in (column + step, column - step)]
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(by_column[i], rel=1e-5, abs=1e-6)
        ends = [workload.loss_of_inverse(reciprocal(d, n), d)[0] for d in (inverse + step, inverse - step)]
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(by_inverse[i], rel=1e-5, abs=1e-6)


def test_the_largest_error_is_least_for_the_square_root():
    """Among Toeplitz strategies, for single participation (Dvijotham et al. 2024)."""
    n = 256
    best = expected_error(Strategy("banded", tuple(square_root(n))), n, n, error="max")
    found = banded_strategy(n, n, error="max")
    assert expected_error(found, n, n, error="max") == pytest.approx(best, rel=1e-8)
    np.testing.assert_allclose(
        np.array(found.coefficients) / found.coefficients[0], square_root(n), atol=1e-4
    )
    assert best == pytest.approx(float((square_root(n) ** 2).sum()), rel=1e-12)


def test_two_buffers_are_those_that_jax_privacy_finds():
    """The golden values of its test for 100,000 steps, single participation, largest error."""
    found = blt_strategy(100_000, 2, 100_000, error="max")
    np.testing.assert_allclose(found.coefficients, [0.0122853238, 0.1878393665], rtol=1e-5)
    np.testing.assert_allclose(found.decays, [0.9999528892, 0.9857068667], rtol=1e-7)


@pytest.mark.parametrize(
    ("steps", "buffers", "ratio"), [(10, 1, 1.04), (100, 2, 1.03), (1000, 3, 1.03), (10_000, 4, 1.03)]
)
def test_few_buffers_come_as_near_to_the_bound_as_published(steps, buffers, ratio):
    """Ratios to 1 + log(n) / pi in jax_privacy's tests."""
    found = blt_strategy(steps, buffers, steps, error="max")
    assert expected_error(found, steps, steps, error="max") <= ratio * (1 + math.log(steps) / math.pi)


def generic(make, start, steps: int, period: int) -> float:
    """The least error that a derivative-free search finds; strategies that are refused count as bad."""

    def loss(x):
        try:
            return math.log(expected_error(make(x), steps, period))
        except ConfigError:
            return 50.0

    options = {"maxiter": 4000, "maxfev": 8000, "xatol": 1e-9, "fatol": 1e-12, "adaptive": True}
    return math.exp(minimize(loss, start, method="Nelder-Mead", options=options).fun)


@pytest.mark.parametrize(("steps", "period"), [(20, 20), (20, 5)])
def test_no_generic_search_finds_a_better_strategy(steps, period):
    for bands in (2, 4):
        start = square_root(bands)[1:]
        other = generic(lambda x: Strategy("banded", (1.0, *map(float, x))), start, steps, period)
        assert expected_error(banded_strategy(steps, bands), steps, period) <= other * (1 + 1e-5)
        start = np.array([-0.5, -0.125, -0.0625][: bands - 1])
        other = generic(lambda x: Strategy("banded_inverse", (1.0, *map(float, x))), start, steps, period)
        found = banded_inverse_strategy(steps, bands, period)
        assert expected_error(found, steps, period) <= other * (1 + 1e-3)
    for buffers, start in ((1, [0.3, 0.8]), (2, [0.2, 0.2, 0.9, 0.5])):
        other = generic(
            lambda x: Strategy("blt", tuple(x[: len(x) // 2]), tuple(x[len(x) // 2 :])), start, steps, period
        )
        assert expected_error(blt_strategy(steps, buffers, period), steps, period) <= other * (1 + 1e-3)


def test_errors_fall_in_the_published_order():
    """One pass over 1024 steps: all beat independent noise, more is better, and the best Toeplitz is approached."""
    n = 1024
    independent = expected_error(INDEPENDENT, n, n)
    assert independent == pytest.approx(math.sqrt((n + 1) / 2), rel=1e-9)
    best = expected_error(banded_strategy(n, n), n, n)
    assert best < expected_error(Strategy("banded", tuple(square_root(n))), n, n) < 1 + math.log(n) / math.pi
    for family in (
        [banded_strategy(n, bands) for bands in (2, 4, 16, 64)],
        [blt_strategy(n, buffers, n) for buffers in (1, 2, 3)],
        [banded_inverse_strategy(n, bands) for bands in (2, 4, 16)],
        [banded_inverse_strategy(n, bands, optimized=False) for bands in (2, 4, 16, 64)],
    ):
        errors = [expected_error(strategy, n, n) for strategy in family]
        assert independent > errors[0] and errors == sorted(errors, reverse=True) and errors[-1] > best
    assert expected_error(blt_strategy(n, 3, n), n, n) < 1.001 * best


def test_errors_over_several_passes():
    """Eight passes: what is made for the period beats what is made for one pass, and independent noise by far."""
    n, period = 512, 64
    independent = expected_error(INDEPENDENT, n, period)
    for once, made in (
        (blt_strategy(n, 2, n), blt_strategy(n, 2, period)),
        (banded_inverse_strategy(n, 8), banded_inverse_strategy(n, 8, period)),
    ):
        assert expected_error(made, n, period) < 0.99 * expected_error(once, n, period) < 0.5 * independent
    assert expected_error(banded_strategy(n, period), n, period) < 0.3 * independent


def test_momentum_changes_what_is_best():
    n = 200
    for make in (banded_strategy, banded_inverse_strategy):
        plain, heavy = make(n, 6), make(n, 6, momentum=0.9)
        assert expected_error(heavy, n, n, momentum=0.9) < expected_error(plain, n, n, momentum=0.9)
        assert expected_error(plain, n, n) < expected_error(heavy, n, n)


MADE = {
    "independent": INDEPENDENT,
    "two bands": Strategy("banded", (0.8, 0.6)),
    "banded": banded_strategy(60, 6),
    "blt": blt_strategy(60, 3, 20),
    "banded inverse": banded_inverse_strategy(60, 5, 20),
    "square root": banded_inverse_strategy(60, 5, optimized=False),
}


@pytest.mark.parametrize("name", MADE)
def test_the_schedule_makes_the_noise_of_the_dense_inverse(name):
    strategy, n = MADE[name], 60
    white = np.random.default_rng(3).normal(size=(n, 4))
    state, found = np.zeros((state_slots(strategy), 4)), []
    for step in range(n):
        taps, weights, decays, gains = noise_schedule(strategy, step)
        assert len(weights) == len(decays) == len(gains) == state_slots(strategy)
        noise = sum(tap * white[step - j] for j, tap in enumerate(taps)) - np.array(weights) @ state
        state = np.array(decays)[:, None] * state + np.array(gains)[:, None] * noise
        found.append(noise)
    np.testing.assert_allclose(np.array(found), np.linalg.inv(dense(strategy.column(n))) @ white, atol=1e-12)


@pytest.mark.parametrize("name", ["banded", "blt"])
def test_rounding_of_the_state_to_float32_does_not_grow(name):
    strategy = MADE[name] if name == "banded" else blt_strategy(5000, 3, 1000)
    n = 5000
    white = np.random.default_rng(4).normal(size=(n, 8)).astype(np.float32)
    state, found = np.zeros((state_slots(strategy), 8), dtype=np.float32), []
    for step in range(n):
        taps, weights, decays, gains = (np.array(v, dtype=np.float32) for v in noise_schedule(strategy, step))
        noise = taps[0] * white[step] - weights @ state
        state = decays[:, None] * state + gains[:, None] * noise
        found.append(noise)
    inverse = strategy.inverse_column(n)
    exact = np.stack([np.convolve(inverse, column)[:n] for column in white.T.astype(np.float64)], axis=1)
    assert np.abs(np.array(found) - exact).max() < 2e-5


@pytest.mark.parametrize("name", MADE)
def test_noise_variance_is_that_of_the_rows_of_the_inverse(name):
    inverse = np.linalg.inv(dense(MADE[name].column(150)))
    found = [noise_variance(MADE[name], step) for step in range(150)]
    np.testing.assert_allclose(found, (inverse**2).sum(axis=1), rtol=1e-10)


@pytest.mark.parametrize("name", MADE)
def test_weights_are_what_float32_holds(name):
    """So that a kernel's float32 noise is that of the strategy that is accounted for."""
    for step in (0, 3, 59):
        _, *rest = noise_schedule(MADE[name], step)
        for values in rest:
            rounded = np.array(values, dtype=np.float32).astype(np.float64)
            np.testing.assert_allclose(values, rounded, rtol=1e-15 if name != "two bands" else 1e-7)


def test_columns_have_norm_one_as_cyclic_sampling_wants():
    for bands in (1, 2, 7, 60):
        strategy = banded_strategy(60, bands)
        assert 1 - 1e-12 < strategy.column_norm <= 1.0
        assert strategy.bands == bands and strategy.sensitivity(60, 60) <= 1.0


def test_the_recursion_of_buffers_is_stable():
    for strategy in (blt_strategy(5000, 4, 5000), blt_strategy(5000, 4, 100)):
        scales, decays = np.array(strategy.coefficients), np.array(strategy.decays)
        assert np.abs(np.linalg.eigvals(np.diag(decays) - np.outer(np.ones(4), scales))).max() < 1.0
        assert np.abs(blt_reciprocal(scales, decays, 200_000)[1:]).max() < 1.0


def test_what_can_not_be_made_is_refused_by_name():
    for call, named in (
        (lambda: banded_strategy(10, 11), "bands"),
        (lambda: banded_strategy(10, 0), "bands"),
        (lambda: banded_strategy(0, 1), "steps"),
        (lambda: banded_strategy(True, 1), "steps"),
        (lambda: banded_strategy(10, 2, momentum=1.0), "momentum"),
        (lambda: banded_strategy(10, 2, error="median"), "error"),
        (lambda: blt_strategy(10, 0, 5), "buffers"),
        (lambda: blt_strategy(10, 9, 5), "buffers"),
        (lambda: blt_strategy(10, 2, 0), "period"),
        (lambda: banded_inverse_strategy(10, 2.0), "bands"),
        (lambda: banded_inverse_strategy(10, 2, 0), "period"),
        (lambda: noise_schedule(INDEPENDENT, -1), "step"),
        (lambda: noise_variance(INDEPENDENT, 1.0), "step"),
    ):
        with pytest.raises(ConfigError, match=named):
            call()


def test_one_step_and_one_band_are_independent_noise():
    assert banded_inverse_strategy(10, 1).coefficients == (1.0,)
    assert banded_strategy(10, 1).coefficients == pytest.approx((1.0,), rel=1e-12)
    assert expected_error(blt_strategy(1, 2, 1), 1, 1) == pytest.approx(1.0, rel=1e-12)
