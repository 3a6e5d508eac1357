"""One unit, with any rows, moves what a query asks by no more than it declares; nothing else of the unit shows.

By record and replay: each query is asked about D and, with the same noise and the recorded input, about D without a
unit. All that it charges and answers must then be equal, and the two inputs within the declared sensitivity.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synthward.engine.queries import Units
from synthward.engine.queries.units import PARTS
from synthward.engine.replay import differences, recording
from tests.queries.asking import LEVELS, PAIRS, QUERIES, SPECIAL, TABLES, ListLedger, mechanism, rows


def asked(query, table, noise, replayed=None):
    """(recording, what was charged, the answer) of one query."""
    ledger = ListLedger()
    with recording(replayed) as made:
        answer = QUERIES[query](mechanism(ledger=ledger), table, noise)
    return made, ledger.charged, answer


@pytest.mark.parametrize("query", QUERIES)
@settings(max_examples=60, deadline=None)
@given(table=TABLES, unit=st.integers(0, 5), noise=st.sampled_from([0.3, 1.0, 7.0]))
def test_one_unit_moves_a_query_by_at_most_its_sensitivity(query, table, unit, noise):
    first, charged, answer = asked(query, table, noise)
    second, charged_again, same = asked(query, table.without(unit), noise, first)
    assert differences(first, second, rounding=0.0) == []
    assert charged == charged_again
    assert repr(answer) == repr(same)


HEAVY = [(0, 1, 7, 3.0, True)] * 4


@pytest.mark.parametrize("query", QUERIES)
def test_the_declared_sensitivity_is_reached_and_not_passed(query):
    """A unit with all rows in one place moves a query by (nearly) all that is declared: noise is not wasted."""
    others = [(1, 1, 7, 3.0, True), (1, 1, 8, 3.0, True), (1, 1, 9, 3.0, True)]
    spread = [(0, 1, code, -100.0, True) for code in (7, 8, 9)]
    unit = spread if "categories" in query else HEAVY if "quantiles" not in query else spread
    table = rows(*zip(*(others + unit), strict=True))
    first, *_ = asked(query, table, 1.0)
    second, *_ = asked(query, table.without(0), 1.0, first)
    release = first.releases[0]
    # Of quantiles the rounding is charged too, which this unit does not use.
    moved = release.distance(second.releases[0])
    assert 0.999 * release.sensitivity <= moved <= release.sensitivity


def test_a_tap_sees_what_is_asked_and_refuses_private_keys():
    """Without the guard the exact counts of a private run could be recorded."""
    from synthward.engine.errors import PrivacyError

    table = rows(*zip(*HEAVY, strict=True))
    with recording(), pytest.raises(PrivacyError, match="operating system"):
        QUERIES["units"](mechanism(seed=None), table, 1.0)


@settings(max_examples=200, deadline=None)
@given(
    ids=st.lists(st.integers(0, 4), max_size=60),
    counted=st.lists(st.booleans(), min_size=60, max_size=60),
    most=st.none() | st.integers(1, 5),
)
def test_the_weights_of_a_unit_sum_to_what_is_said(ids, counted, most):
    """Exactly one for a unit with rows that count, whatever their number; each row within one part of its share."""
    counted = np.array(counted[: len(ids)], dtype=bool)
    weights = Units.from_ids(np.array(ids, dtype=np.int64)).weights(counted, most)
    assert (weights.rows >= 0).all() and (weights.rows[~counted] == 0).all()
    for unit in set(ids):
        own = weights.rows[(np.array(ids) == unit) & counted]
        if most is None:
            assert own.sum() == (PARTS if len(own) else 0)
            assert all(abs(weight - PARTS / len(own)) < 1 for weight in own)
        else:
            assert own.tolist() == [1] * min(len(own), most) + [0] * max(len(own) - most, 0)


def test_a_unit_with_more_rows_than_parts_still_weighs_one():
    units = Units.from_ids(np.repeat([3, 9], [3 * PARTS + 7, 1]))
    weights = units.weights(np.ones(units.num_rows, dtype=bool), None)
    assert weights.rows[:-1].sum() == PARTS and weights.rows[:-1].max() == 1
    assert weights.rows[-1] == PARTS


@settings(max_examples=100, deadline=None)
@given(table=TABLES, seed=st.integers(0, 9))
def test_the_order_of_other_units_rows_changes_nothing(table, seed):
    """Which rows and categories of a unit count follows from its own rows alone."""
    from synthward.engine.queries.discovery import _units_by_category

    order = np.random.default_rng(seed).permutation(6)
    moved = np.argsort(order[table.ids], kind="stable") if len(table.ids) else np.zeros(0, dtype=np.int64)
    before, after = (Units.from_ids(ids) for ids in (table.ids, table.ids[moved]))
    everything = np.ones(len(moved), dtype=bool)
    one = _units_by_category(before, table.big, everything, 2)
    assert one == _units_by_category(after, table.big[moved], everything, 2)
    for most in (None, 2):
        kept = before.weights(everything, most).rows[moved]
        assert np.array_equal(kept, after.weights(everything, most).rows)


def test_every_special_number_is_counted_once_or_missing():
    """Sums of the exact histograms: infinities and extremes are in the outermost bins, NaN in none."""
    table = rows(range(len(SPECIAL)), [0] * len(SPECIAL), [0] * len(SPECIAL), SPECIAL, [True] * len(SPECIAL))
    first, *_ = asked("bounds", table, 1.0)
    counts = first.releases[0].values / PARTS
    assert counts.sum() == len(SPECIAL) - 1
    assert counts[0] == 2 and counts[-1] == 3, "-1e308 and -inf; 1e308, inf and 2^40"
    assert counts[len(counts) // 2] == 3, "0, -0, and the least number above it"


def test_codes_that_are_no_levels_are_not_counted():
    table = rows([0, 1, 2, 3], [-2, -1, 3, 1], [0, 0, 0, 40], [0.0] * 4, [True] * 4)
    first, *_ = asked("marginals", table, 1.0)
    small, big, both = np.split(first.releases[0].values / PARTS, np.cumsum([3, 40]))
    assert small.tolist() == [0, 1, 0] and big.sum() == 3 and both.sum() == 0
    assert (LEVELS["small"], LEVELS["big"], len(PAIRS)) == (3, 40, 3)
