"""AUROC by counting pairs, weights as repeated rows, and the bootstrap over units."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthward.evaluate import auroc
from synthward.evaluate.auroc import RankedScores, bootstrap_auroc, interval

ROWS = st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 3)), min_size=1, max_size=25)


@given(ROWS)
def test_auroc_equals_the_share_of_ordered_pairs(rows):
    scores, positive, weights = (np.array(c) for c in zip(*rows, strict=True))
    wins = total = 0.0
    for s, p, w in rows:
        for t, q, v in rows:
            if p and not q:
                total += w * v
                wins += w * v * (1.0 if s > t else 0.5 if s == t else 0.0)
    found = RankedScores(scores.astype(float), positive).auroc(weights)
    assert math.isnan(found) if total == 0 else found == pytest.approx(wins / total, abs=1e-12)


def test_auroc_at_its_ends():
    truth = np.array([False, False, True, True])
    assert auroc(np.array([0.1, 0.2, 0.3, 0.4]), truth) == 1.0
    assert auroc(np.array([0.4, 0.3, 0.2, 0.1]), truth) == 0.0
    assert auroc(np.zeros(4), truth) == 0.5
    assert math.isnan(auroc(np.zeros(2), np.array([True, True])))


def test_the_bootstrap_draws_whole_units():
    """Repeating every row of each unit must not narrow the interval; independent rows must."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=200)
    truth = scores + rng.normal(size=200) > 0
    width = {}
    for name, units in (("units", np.tile(np.arange(200), 25)), ("rows", np.arange(5000))):
        ((value, draws),) = bootstrap_auroc([np.tile(scores, 25)], np.tile(truth, 25), units, seed=1)
        found = interval(value, draws)
        assert found.low < found.value < found.high
        width[name] = found.high - found.low
    assert width["rows"] < 0.5 * width["units"]


def test_draws_of_two_classifiers_are_paired():
    rng = np.random.default_rng(0)
    scores, truth = rng.normal(size=80), rng.random(80) < 0.5
    (_, left), (_, right) = bootstrap_auroc([scores, 2 * scores + 1], truth, np.arange(80))
    assert np.array_equal(left, right)
    assert np.ptp(left) > 0
