"""Strategies: exact sensitivity against all patterns of participation, inverses, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.linalg import toeplitz

from synthward.engine.accounting import CorrelatedGaussianEvent, GaussianEvent, event_from_dict
from synthward.engine.accounting.matrix import MAX_STEPS, Strategy
from synthward.engine.errors import ConfigError

INDEPENDENT = Strategy("banded", (1.0,))
STRATEGIES = {
    "independent": INDEPENDENT,
    "banded": Strategy("banded", (0.9, 0.4, 0.3, 0.3, 0.05)),
    "flat": Strategy("banded", (1.0, 1.0, 1.0)),
    "blt": Strategy("blt", (0.3, 0.2), (0.95, 0.4)),
    "banded_inverse": Strategy("banded_inverse", (1.0, -0.5, -0.125)),
    "prefix": Strategy("banded_inverse", (1.0, -1.0)),
}


def matrix(strategy: Strategy, n: int) -> np.ndarray:
    """C by the definition of its kind, through dense linear algebra."""
    if strategy.kind == "blt":
        column = [1.0] + [
            sum(a * d**i for a, d in zip(strategy.coefficients, strategy.decays, strict=True))
            for i in range(n - 1)
        ]
    else:
        column = (list(strategy.coefficients) + [0.0] * n)[:n]
    dense = toeplitz(column, np.zeros(n))
    return np.linalg.inv(dense) if strategy.kind == "banded_inverse" else dense


def patterns(n: int, period: int) -> list[tuple[int, ...]]:
    """All sets of steps of which any two are at least `period` apart."""
    return [
        chosen
        for size in range(1, n + 1)
        for chosen in itertools.combinations(range(n), size)
        if all(b - a >= period for a, b in itertools.pairwise(chosen))
    ]


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("period", [1, 2, 3, 4, 20])
def test_sensitivity_is_the_maximum_over_all_patterns_and_signs(name, period):
    strategy = STRATEGIES[name]
    for n in (1, 2, 5, 8):
        dense = matrix(strategy, n)
        moved = [
            np.linalg.norm(dense[:, list(pattern)] @ signs)
            for pattern in patterns(n, period)
            for signs in itertools.product((1.0, -1.0), repeat=len(pattern))
        ]
        found = strategy.sensitivity(n, period)
        assert found == pytest.approx(max(moved), rel=1e-12)
        assert found >= max(moved) * (1 - 1e-15)


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_vector_contributions_move_more(name):
    """Contributions are vectors that may be chosen one by one; aligned ones are the worst."""
    strategy, n, period = STRATEGIES[name], 9, 2
    dense, rng = matrix(strategy, n), np.random.default_rng(5)
    bound = strategy.sensitivity(n, period)
    for pattern in patterns(n, period):
        given = np.zeros((n, 4))
        given[list(pattern)] = rng.normal(size=(len(pattern), 4)) + 2.0 * rng.integers(0, 2)
        given[list(pattern)] /= np.linalg.norm(given[list(pattern)], axis=1, keepdims=True)
        assert np.linalg.norm(dense @ given) <= bound


def exact_square(strategy: Strategy, steps: int, period: int) -> Fraction:
    """The square of the sensitivity in rational arithmetic, from the same float64 parameters."""
    values = [Fraction(v) for v in strategy.coefficients]
    if strategy.kind == "banded":
        column = (values + [Fraction(0)] * steps)[:steps]
    elif strategy.kind == "blt":
        decays = [Fraction(v) for v in strategy.decays]
        column = [Fraction(1)] + [
            sum((a * d**i for a, d in zip(values, decays, strict=True)), Fraction(0))
            for i in range(steps - 1)
        ]
    else:
        column = []
        for t in range(steps):
            known = sum((values[i] * column[t - i] for i in range(1, min(len(values), t + 1))), Fraction(0))
            column.append((Fraction(t == 0) - known) / values[0])
    moved = [sum(column[t::-period], Fraction(0)) for t in range(steps)]
    return sum((value * value for value in moved), Fraction(0))


@pytest.mark.parametrize("name", STRATEGIES)
def test_rounding_never_takes_it_below_the_truth(name):
    for steps, period in itertools.product((1, 7, 40), (1, 3, 5, 50)):
        found = Fraction(STRATEGIES[name].sensitivity(steps, period)) ** 2
        truth = exact_square(STRATEGIES[name], steps, period)
        assert truth <= found <= truth * (1 + Fraction(1, 10**12))


@pytest.mark.parametrize("name", STRATEGIES)
def test_inverse_column_is_that_of_the_inverse(name):
    strategy = STRATEGIES[name]
    for n in (1, 2, 3, 64, 100):
        dense = matrix(strategy, n)
        np.testing.assert_allclose(strategy.column(n), dense[:, 0], rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(strategy.inverse_column(n), np.linalg.inv(dense)[:, 0], atol=1e-12)
    assert strategy.column(0).size == strategy.inverse_column(0).size == 0


def test_long_columns_and_their_inverses_multiply_to_one():
    n = 100_000
    for strategy in (
        Strategy("blt", (0.25, 0.15, 0.1), (0.9999, 0.98, 0.6)),
        Strategy("banded", tuple(1.0 / np.sqrt(np.arange(1, 33)))),
        Strategy("banded_inverse", (1.0, -0.5, -0.125, -0.0625)),
    ):
        size = 2 * n
        product = np.fft.irfft(
            np.fft.rfft(strategy.column(n), size) * np.fft.rfft(strategy.inverse_column(n), size), size
        )[:n]
        assert abs(product[0] - 1.0) < 1e-11 and np.abs(product[1:]).max() < 1e-11


def test_closed_forms():
    for steps, period in ((1, 1), (10, 3), (1000, 7), (10**12, 10**6)):
        assert INDEPENDENT.sensitivity(steps, period) == pytest.approx(
            math.sqrt(-(-steps // period)), rel=1e-14
        )
    # Prefix sums as the strategy: row t holds the participations until t.
    assert STRATEGIES["prefix"].sensitivity(4, 2) == pytest.approx(math.sqrt(1 + 1 + 4 + 4), rel=1e-14)
    for strategy in STRATEGIES.values():
        assert strategy.sensitivity(0, 5) == 0.0
        once = float(np.linalg.norm(strategy.column(50)))
        assert (
            strategy.sensitivity(50, 50) == strategy.sensitivity(50, 10**9) == pytest.approx(once, rel=1e-12)
        )


def test_more_steps_and_shorter_periods_never_cost_less():
    for strategy in STRATEGIES.values():
        for period in (1, 4, 9):
            costs = [strategy.sensitivity(steps, period) for steps in range(1, 60)]
            assert all(after >= before * (1 - 1e-12) for before, after in itertools.pairwise(costs))
        costs = [strategy.sensitivity(50, period) for period in range(1, 60)]
        assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(costs))


def test_bands_and_their_norm():
    assert STRATEGIES["banded"].bands == 5 and STRATEGIES["blt"].bands is None
    assert STRATEGIES["flat"].column_norm == pytest.approx(math.sqrt(3), rel=1e-14)
    for name in ("blt", "banded_inverse"):
        with pytest.raises(ConfigError, match="no end"):
            _ = STRATEGIES[name].column_norm


@pytest.mark.parametrize("name", STRATEGIES)
def test_dictionaries_give_the_same_strategy_back(name):
    strategy = STRATEGIES[name]
    assert Strategy.from_dict(json.loads(json.dumps(strategy.to_dict()))) == strategy
    event = CorrelatedGaussianEvent(1.5, strategy, 4, 30)
    assert event_from_dict(json.loads(json.dumps(event.to_dict()))) == event
    assert event.gaussian == GaussianEvent(1.5 / strategy.sensitivity(30, 4), 1)


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"kind": "banded", "coefficients": [1.0]},
        {"kind": "banded", "coefficients": [1.0], "decays": [], "more": 1},
        {"kind": "dense", "coefficients": [1.0], "decays": []},
        {"kind": ["banded"], "coefficients": [1.0], "decays": []},
        {"kind": "banded", "coefficients": 1.0, "decays": []},
        {"kind": "banded", "coefficients": "12", "decays": []},
        {"kind": "banded", "coefficients": [True], "decays": []},
        {"kind": "banded", "coefficients": ["1"], "decays": []},
        {"kind": "banded", "coefficients": [10**400], "decays": []},
        {"kind": "banded", "coefficients": [1.0] * 5000, "decays": []},
    ],
)
def test_other_dictionaries_are_refused(data):
    with pytest.raises(ConfigError, match="strategy"):
        Strategy.from_dict(data)


@pytest.mark.parametrize(
    ("kind", "coefficients", "decays", "named"),
    [
        ("banded", (), (), "at least one"),
        ("banded", (0.0, 0.0), (), "coefficient 0"),
        ("banded", (-1.0,), (), "coefficient 0"),
        ("banded", (1.0, 0.5, -0.1), (), "coefficient 2"),
        ("banded", (1.0, 0.5, 0.6), (), "coefficient 2"),
        ("banded", (1.0, math.nan), (), "finite"),
        ("banded", (math.inf, 1.0), (), "finite"),
        ("banded", (1e-200, 1e-200), (), "1e-100"),
        ("banded", (1.0,), (0.5,), "decays"),
        ("banded", [1.0], (), "tuple"),
        ("blt", (0.5,), (), "0 decays"),
        ("blt", (0.5, -0.1), (0.5, 0.4), "coefficient 1"),
        ("blt", (0.5, 0.1), (0.5, 1.0), "decay 1"),
        ("blt", (0.5, 0.1), (0.5, 0.0), "decay 1"),
        ("blt", (0.7, 0.4), (0.5, 0.1), "add up to"),
        ("banded_inverse", (0.0, -1.0), (), "coefficient 0"),
        ("banded_inverse", (1.0, -0.5, 0.1), (), "coefficient 2"),
        ("banded_inverse", (1.0, -1.5), (), "entry 1"),
        ("banded_inverse", (1.0, -0.1, -0.5), (), "entry 2"),
    ],
)
def test_strategies_without_an_exact_sensitivity_are_refused(kind, coefficients, decays, named):
    with pytest.raises(ConfigError, match=named):
        Strategy(kind, coefficients, decays)


def test_steps_that_no_array_holds_are_refused_before_it_is_made():
    for name in ("blt", "banded_inverse"):
        with pytest.raises(ConfigError, match="steps"):
            STRATEGIES[name].sensitivity(MAX_STEPS + 1, 10)
    with pytest.raises(ConfigError, match="steps"):
        STRATEGIES["banded"].sensitivity(10**15, 2)
    with pytest.raises(ConfigError, match="period"):
        INDEPENDENT.sensitivity(1, 0)
    for bad in (-1, True, 2.0):
        with pytest.raises(ConfigError, match="steps"):
            INDEPENDENT.sensitivity(bad, 1)
        with pytest.raises(ConfigError, match="period"):
            INDEPENDENT.sensitivity(1, bad)
