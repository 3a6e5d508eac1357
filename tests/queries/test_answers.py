"""Answers are right: without noise equal to a plain count, with noise within what they say of themselves."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synthward.engine.queries import (
    Units,
    count_marginals,
    count_rows,
    count_units,
    find_bounds,
    find_quantiles,
)
from synthward.engine.queries.quantiles import _factors
from synthward.engine.queries.units import PARTS
from tests.queries.asking import LEVELS, PAIRS, QUERIES, TABLES, mechanism

SIZES = (0, 1, 2, 7, 101)


@settings(max_examples=100, deadline=None)
@given(table=TABLES)
def test_without_noise_counts_are_exact(table):
    units, exact = Units.from_ids(table.ids), {"noise_multiplier": 0.0}
    assert count_units(mechanism(), units, **exact).value == len(set(table.ids.tolist()))
    having = {int(unit) for unit, inside in zip(table.ids, table.where, strict=True) if inside}
    assert count_units(mechanism(), units, where=table.where, **exact).value == len(having)
    rows = Counter(table.ids.tolist())
    capped = count_rows(mechanism(), units, max_rows_per_unit=3, **exact)
    assert capped.value == sum(min(count, 3) for count in rows.values())


@settings(max_examples=100, deadline=None)
@given(table=TABLES, most=st.none() | st.integers(1, 3))
def test_without_noise_marginals_are_those_of_a_loop(table, most):
    found = count_marginals(
        mechanism(),
        Units.from_ids(table.ids),
        {"small": table.small, "big": table.big},
        LEVELS,
        PAIRS,
        noise_multiplier=0.0,
        max_rows_per_unit=most,
    )
    for names, cells in found.tables.items():
        expected = np.zeros([LEVELS[name] for name in names])
        for unit in set(table.ids.tolist()):
            of_unit = np.stack([getattr(table, name)[table.ids == unit] for name in names], axis=1)
            inside = [
                tuple(c) for c in of_unit if all(0 <= v < LEVELS[n] for v, n in zip(c, names, strict=True))
            ]
            for cell in inside[:most]:
                expected[cell] += 1 / len(inside) if most is None else 1
        assert cells.shape == expected.shape
        assert np.allclose(cells, expected, atol=41 / PARTS if most is None else 0)


@pytest.mark.parametrize("size", SIZES)
def test_offsets_and_ids_say_the_same(size):
    rng = np.random.default_rng(size)
    sizes = rng.integers(1, 4, size)
    by_offsets = Units.from_offsets(np.concatenate([[0], np.cumsum(sizes)]))
    by_ids = Units.from_ids(np.repeat([f"p{n:04d}" for n in range(size)], sizes))
    assert by_offsets.num_units == by_ids.num_units == size
    assert np.array_equal(by_offsets.owner, by_ids.owner)


def test_a_unit_without_rows_is_a_unit():
    units = Units.from_offsets([0, 2, 2, 2])
    assert count_units(mechanism(), units, noise_multiplier=0.0).value == 3
    assert count_units(mechanism(), units, where=[True, True], noise_multiplier=0.0).value == 1


@pytest.mark.parametrize("query", QUERIES)
def test_no_records_are_a_question_like_any_other(query):
    """Charged, noised, answered: whether there are records is private too."""
    from tests.queries.asking import ListLedger, rows

    ledger = ListLedger()
    QUERIES[query](mechanism(ledger=ledger), rows([], [], [], [], []), 2.0)
    assert ledger.charged


@pytest.mark.parametrize(
    ("values", "lower", "upper"),
    [
        ([3.0], 2.0, 4.0),
        ([2.0], 2.0, 4.0),
        ([4.0], 4.0, 8.0),
        ([-4.0], -8.0, -4.0),
        ([0.0], -1.0, 1.0),
        ([0.99, -0.99], -1.0, 1.0),
        ([0.0, 5.0], -1.0, 8.0),
        ([-3.0, 0.0], -4.0, 1.0),
        ([-70.0, 3.0], -128.0, 4.0),
        ([1e300, -np.inf], -256.0, 256.0),
        ([255.9], 128.0, 256.0),
    ],
)
def test_bounds_are_the_powers_of_two_around_the_values(values, lower, upper):
    """A thousand units with each value; exponents from 0 to 8."""
    column = np.repeat(values, 1000)
    found = find_bounds(
        mechanism(),
        Units.of_rows(len(column)),
        column,
        noise_multiplier=1.0,
        smallest_exponent=0,
        largest_exponent=8,
    )
    assert (found.lower, found.upper) == (lower, upper)


def test_bounds_pass_over_what_few_units_have():
    """Three units far out do not pass a threshold of some six deviations of the noise."""
    column = np.concatenate([np.full(5000, 30.0), [1e9, 1e9, -1e9], np.full(100, np.nan)])
    found = find_bounds(mechanism(), Units.of_rows(len(column)), column, noise_multiplier=1.0)
    assert (found.lower, found.upper) == (16.0, 32.0)
    assert 5.5 < found.threshold < 6.5 and found.noise_std == 1.0


def test_an_empty_column_has_no_bounds_but_for_false_alarms():
    """At a stated rate of 2% in all, 3,000 questions about nothing raise at most so many alarms as that allows."""
    from scipy import stats

    asked = mechanism()
    units = Units.of_rows(0)
    alarms = sum(
        find_bounds(asked, units, np.zeros(0), noise_multiplier=1.0, false_alarm=0.02).lower is not None
        for _ in range(3000)
    )
    # 121 bins: the chance that any passes is 1 - (1 - 0.02 / 121)^121 = 0.0198.
    assert stats.binomtest(alarms, 3000, 0.0198).pvalue > 1e-9
    assert alarms > 10


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-20, 120), min_size=1, max_size=80),
    probabilities=st.lists(st.floats(0, 1), min_size=1, max_size=5),
)
def test_without_noise_quantiles_lie_in_the_bin_of_the_exact_one(values, probabilities):
    edges = np.linspace(-20, 120, 57)
    found = find_quantiles(
        mechanism(), Units.of_rows(len(values)), values, probabilities, edges=edges, noise_multiplier=0.0
    )
    assert found.total == pytest.approx(len(values), abs=found.rank_error())
    slack = 2 * found.rank_error()
    assert slack < 0.1, "rounding alone"
    for q, value in zip(probabilities, found.values, strict=True):
        cell = min(max(int(np.searchsorted(edges, value, side="left")), 1), 56)
        below = np.sum(np.searchsorted(edges[1:-1], values, side="right") < cell - 1)
        up_to = np.sum(np.searchsorted(edges[1:-1], values, side="right") <= cell - 1)
        # A value at an edge may belong to the bin on either side of it.
        near = np.isclose(value, edges).any()
        assert below <= q * len(values) + slack or near
        assert up_to >= q * len(values) - slack or near


def test_ranks_of_noisy_quantiles_err_by_what_is_said():
    """The median and both tails of 20,000 units with 1 to 3 rows, 50 times: ranks stay within 2 rank_error + a bin."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 4, 20_000)
    units = Units.from_offsets(np.concatenate([[0], np.cumsum(sizes)]))
    values = rng.exponential(1.0, units.num_rows)
    weights = 1.0 / np.repeat(sizes, sizes)
    asked, edges = mechanism(), np.linspace(0, 12, 401)
    order = np.argsort(values)
    ranks = np.cumsum(weights[order])
    for _ in range(50):
        found = find_quantiles(asked, units, values, [0.01, 0.5, 0.99], edges=edges, noise_multiplier=4.0)
        reach = 2 * found.rank_error(1e-6)
        for q, value in zip(found.probabilities, found.values, strict=True):
            cell = np.clip(np.searchsorted(edges, value, side="left"), 1, 400)
            low, high = (np.searchsorted(values[order], edges[c]) for c in (cell - 1, cell))
            assert ranks[max(low - 1, 0)] <= q * 20_000 + reach
            assert ranks[min(high, len(ranks)) - 1] >= q * 20_000 - reach


def test_the_stated_error_of_a_rank_is_that_of_the_noise():
    """Totals of an empty column have the stated deviation, and it is far below that of a cumulated histogram."""
    from synthward.engine.queries import quantiles as module

    asked, totals = mechanism(), []
    edges = np.linspace(0, 1, 257)
    rising, module._rising = (
        module._rising,
        lambda cumulated: totals.append(cumulated[-1]) or np.abs(cumulated),
    )
    try:
        for _ in range(2000):
            found = find_quantiles(asked, Units.of_rows(0), [], [0.5], edges=edges, noise_multiplier=2.0)
    finally:
        module._rising = rising
    assert abs(np.var(totals) / found.rank_std**2 - 1) < 6.11 * (2 / 2000) ** 0.5
    assert found.rank_std < 2.0 * (1.0 + (math.log(256) + 1.0) / math.pi)
    assert found.rank_std < 0.2 * 2.0 * math.sqrt(256)


@pytest.mark.parametrize("size", [1, 2, 7, 101, 4096])
def test_the_factors_multiply_to_the_cumulation(size):
    """B C = A, whatever C was rounded to; and their norms are those of the best known factorization, to 1%."""
    root, back = _factors(size)
    assert np.allclose(np.convolve(back, root / 2.0**16)[:size], 1.0, atol=1e-9)
    norms = np.linalg.norm(root / 2.0**16) * np.linalg.norm(back)
    exact = np.cumprod(np.concatenate([[1.0], (2 * np.arange(1, size) - 1) / (2 * np.arange(1, size))]))
    assert norms == pytest.approx(float(exact @ exact), rel=1e-2)


def test_answers_of_noise_alone_stay_within_the_edges():
    for query in range(20):
        found = find_quantiles(
            mechanism(query),
            Units.of_rows(1),
            [0.5],
            [0.0, 0.5, 1.0],
            edges=[0, 1, 2, 3],
            noise_multiplier=50.0,
        )
        assert all(0.0 <= value <= 3.0 for value in found.values)
        assert found.total >= 0.0 and list(found.values) == sorted(found.values)


def test_marginals_say_their_noise():
    columns = {"x": np.zeros(10, dtype=np.int64), "y": np.zeros(10, dtype=np.int64)}
    levels = {"x": 300, "y": 300}
    found = count_marginals(
        mechanism(), Units.of_rows(10), columns, levels, [("x",), ("y",), ("x", "y")], noise_multiplier=2.0
    )
    assert found.noise_std == pytest.approx(2.0 * math.sqrt(3))
    cells = found.tables["x", "y"].ravel()[1:]
    assert abs(cells.var() / found.noise_std**2 - 1) < 6.11 * (2 / len(cells)) ** 0.5
