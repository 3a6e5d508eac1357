"""Coders of single columns: what is encoded comes back, and nothing is drawn that was not declared."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from synthward.encoding import ContinuousCoder, TokenCoder

COUNTS = arrays(np.float64, st.integers(2, 40), elements=st.floats(-50, 5000))


@given(counts=COUNTS, noise=st.floats(0.1, 60), ordered=st.booleans(), missing=st.booleans())
def test_tokens_decode_to_levels_of_the_same_token(counts, noise, ordered, missing):
    coder = TokenCoder.fit("x", counts, noise, ordered=ordered, missing=missing)
    levels = np.arange(-1 if missing else 0, len(counts) - 1)
    tokens = coder.encode(levels)
    assert coder.mass.sum() == pytest.approx(1.0) and (coder.mass > 0).all()
    assert set(tokens) == set(range(coder.size))
    drawn = coder.decode(np.repeat(tokens, 50), np.random.default_rng(0).random(50 * len(tokens)))
    np.testing.assert_array_equal(coder.encode(drawn), np.repeat(tokens, 50))
    assert drawn.max() <= len(counts) - 2
    assert drawn.min() >= (-1 if missing else 0), "a value that may not be missing was drawn missing"


@given(counts=COUNTS, noise=st.floats(0.1, 60))
def test_ordered_tokens_are_runs_of_neighbours(counts, noise):
    coder = TokenCoder.fit("x", counts, noise, ordered=True, missing=True)
    assert (np.diff(coder.group[1:]) >= 0).all() and coder.group[0] not in coder.group[1:]


def test_frequent_levels_stand_alone_and_rare_ones_share_by_public_group():
    counts = np.array([0.0, 1000, 3, 900, 2, 1, 4])
    groups = np.array([0, 0, 0, 1, 1, 1])
    coder = TokenCoder.fit("x", counts, 5.0, ordered=False, missing=True, level_groups=groups)
    tokens = coder.encode(np.arange(-1, 6))
    assert len({tokens[0], tokens[1], tokens[3]}) == 3
    assert tokens[4] == tokens[5] == tokens[6] != tokens[2]


def test_leaf_frequencies_follow_the_histogram():
    counts = np.array([0.0, 30.0, 10.0, 60.0, 1e6])
    coder = TokenCoder.fit("x", counts, 20.0, ordered=True, missing=False)
    token = coder.encode(np.array([0]))[0]
    drawn = coder.decode(np.full(60_000, token), np.random.default_rng(1).random(60_000))
    members = coder.group[1:] == token
    share = counts[1:][members] / counts[1:][members].sum()
    got = np.bincount(drawn, minlength=4)[members] / 60_000
    # Six standard deviations: a false alarm in 1e9 draws of this test.
    assert np.all(np.abs(got - share) <= 6 * np.sqrt(share * (1 - share) / 60_000) + 1e-12)


def test_allowed_levels_are_the_only_ones_drawn():
    counts = np.array([10.0, 30.0, 10.0, 60.0, 1e6])
    coder = TokenCoder.fit("x", counts, 20.0, ordered=True, missing=True)
    allowed = np.array([False, False, True, False, False])
    tokens = np.flatnonzero(coder.allowed_tokens(allowed))
    assert len(tokens) == 1
    drawn = coder.decode(np.repeat(tokens, 100), np.linspace(0, 0.999, 100), allowed)
    assert set(drawn) == {1}


@given(
    counts=arrays(np.float64, 64, elements=st.floats(-50, 5000)),
    noise=st.floats(0.1, 60),
    values=arrays(np.float64, 30, elements=st.floats(-3, 7)),
)
def test_continuous_scores_come_back(counts, noise, values):
    coder = ContinuousCoder.fit("x", counts, noise, -3.0, 7.0)
    scores = coder.encode(values)
    assert np.isfinite(scores).all() and np.abs(scores).max() <= 4.01
    back = coder.decode(scores)
    assert (back >= -3).all() and (back <= 7).all()
    # Values map through the noisy distribution function: what has no mass may move, ranks may not.
    order = np.argsort(values, kind="stable")
    assert (np.diff(back[order]) >= -1e-9).all()


def test_continuous_scores_of_the_histogram_are_standard_normal():
    rng = np.random.default_rng(3)
    values = np.clip(rng.gamma(2.0, 2.0, 200_000), 0, 40)
    counts = np.histogram(values, bins=64, range=(0, 40))[0].astype(float)
    coder = ContinuousCoder.fit("x", counts, 1e-3, 0.0, 40.0)
    scores = coder.encode(values)
    assert abs(scores.mean()) < 0.02 and abs(scores.std() - 1) < 0.02
    np.testing.assert_allclose(coder.decode(scores[:1000]), values[:1000], atol=1e-3)


def test_coders_survive_json():
    coder = TokenCoder.fit("x", np.array([5.0, 3000, 4000, 2, 1]), 7.0, ordered=False, missing=True)
    again = TokenCoder.from_dict(coder.to_dict())
    np.testing.assert_array_equal(again.group, coder.group)
    np.testing.assert_array_equal(again.leaf, coder.leaf)
    smooth = ContinuousCoder.fit("y", np.arange(64.0), 1.0, 0.0, 1.0)
    np.testing.assert_array_equal(ContinuousCoder.from_dict(smooth.to_dict()).cdf, smooth.cdf)
