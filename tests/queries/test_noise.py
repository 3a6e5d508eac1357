"""The law of the queries' noise, and that it is the rounded Gaussian mechanism that is charged."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
from scipy import stats

from synthward.engine.queries.mechanism import _grid
from synthward.engine.queries.noise import integer_noise, normals
from synthward.kernels import chacha20_words
from tests.privacy.stats import FALSE_ALARM, assert_gaussian, assert_uncorrelated
from tests.queries.asking import ListLedger, mechanism

KEY = bytes(range(32))
COUNT = 1_000_000


def test_the_normals_are_normal():
    found = normals(COUNT, key=KEY, stream=2, step=0)
    assert found.dtype == np.float64
    assert_gaussian(found, 1.0)
    assert len(np.unique(found)) == COUNT, "float32 noise would repeat values"
    assert_uncorrelated(found[0::2], found[1::2])


TURN = 2 * Decimal("3.14159265358979323846264338327950288419716939937510582097494459")


def cos_sin(x: Decimal) -> tuple[Decimal, Decimal]:
    """By their series."""
    terms = [Decimal(1)]
    for n in range(1, 90):
        terms.append(terms[-1] * x / n)
    signs = (1, 1, -1, -1)
    signed = [term * signs[n % 4] for n, term in enumerate(terms)]
    return sum(signed[0::2], Decimal(0)), sum(signed[1::2], Decimal(0))


def test_each_normal_is_that_of_its_four_words():
    """Box-Muller in 50 digits from the cipher's words, to 2^-50 of the radius."""
    words = [int(w) for w in chacha20_words(KEY, stream=2, step=3, start=0, count=4 * 200)]
    found = normals(399, key=KEY, stream=2, step=3)
    with localcontext() as context:
        context.prec = 50
        for pair in range(200):
            a, b, c, d = words[4 * pair : 4 * pair + 4]
            uniform, turn = ((low + (high << 32) + Decimal("0.5")) / 2**64 for low, high in ((a, b), (c, d)))
            radius = (-2 * uniform.ln()).sqrt()
            for i, wave in zip((0, 1) if pair < 199 else (0,), cos_sin(turn * TURN), strict=False):
                assert abs(Decimal(float(found[2 * pair + i])) - radius * wave) <= radius / 2**50


@pytest.mark.parametrize(
    ("radius", "expected"),
    [
        (0, 9.493),
        (1, 9.377),
        (2**63, 1.1774),
        (2**63 - 1, 1.1774),
        (2**64 - 1, 2.0**-32),
        (2**64 - 2**20, 3.37e-7),
    ],
)
def test_the_radius_has_the_tail_of_64_bits_at_both_ends(monkeypatch, radius, expected):
    """Chosen words: the largest radius is sqrt(130 ln 2), the least 2^-32; none is infinite or NaN."""
    from synthward.engine.queries import noise

    def words(*_, count, **__):
        return np.tile(np.array([radius & 0xFFFFFFFF, radius >> 32, 0, 0], dtype=np.uint32), count // 4)

    monkeypatch.setattr(noise, "chacha20_words", words)
    assert noise.normals(1, key=KEY, stream=2, step=0)[0] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("std", [0.7, 3.0, 50.0])
def test_integer_noise_has_the_law_of_a_rounded_gaussian(std):
    """Kolmogorov-Smirnov on the integers: the exact cumulated law is that of the normal at half steps."""
    found = integer_noise(COUNT, std, key=KEY, stream=2, step=1)
    values, counts = np.unique(found, return_counts=True)
    gap = np.abs(np.cumsum(counts) / COUNT - stats.norm.cdf((values + 0.5) / std)).max()
    # For a discrete law the p-value of the continuous one is an upper bound of the rate of false alarms.
    assert stats.kstwobign.sf(gap * COUNT**0.5) > FALSE_ALARM
    wrong = np.abs(np.cumsum(counts) / COUNT - stats.norm.cdf((values + 0.5) / (0.97 * std))).max()
    assert stats.kstwobign.sf(wrong * COUNT**0.5) < FALSE_ALARM, "3% less noise would be seen"


def test_opendps_discrete_gaussian_has_the_same_law():
    """Two samples of the same law but for the rounding: variances differ by 1 / 12 in 225."""
    import opendp.prelude as dp

    dp.enable_features("contrib")
    space = dp.vector_domain(dp.atom_domain(T=int)), dp.l2_distance(T=int)
    theirs = np.array(dp.m.make_gaussian(*space, scale=15.0)([0] * 60_000))
    ours = integer_noise(60_000, 15.0, key=KEY, stream=2, step=2)
    assert stats.ks_2samp(ours, theirs, method="asymp").pvalue > FALSE_ALARM
    assert stats.ks_2samp(ours, theirs * 1.1, method="asymp").pvalue < FALSE_ALARM


@pytest.mark.parametrize(("noise", "sensitivity"), [(1.0, 1), (3.5, 2), (0.4, 17)])
def test_opendps_privacy_map_gives_the_charge(noise, sensitivity):
    """rho of its Gaussian at our scale and sensitivity is that of our event, 1 / (2 noise_multiplier^2)."""
    import opendp.prelude as dp

    dp.enable_features("contrib")
    space = dp.vector_domain(dp.atom_domain(T=int)), dp.l2_distance(T=float)
    ledger = ListLedger()
    asked = mechanism(ledger=ledger)
    asked.integer_vector(
        np.zeros(3, dtype=np.int64), l2_sensitivity=sensitivity, noise_multiplier=noise, note=""
    )
    rho = dp.m.make_gaussian(*space, scale=noise * sensitivity).map(float(sensitivity))
    assert rho == pytest.approx(1 / (2 * ledger.events[0].noise_multiplier ** 2), rel=1e-9)


@pytest.mark.parametrize("rows", [1, 3, 10])
def test_opendps_stability_maps_give_our_sensitivities(rows):
    """Rows capped per unit: so many insertions move a count, and one cell of a histogram, by as many."""
    import opendp.prelude as dp

    from synthward.engine.queries import Units
    from synthward.engine.replay import recording
    from tests.queries.asking import count_marginals, count_rows

    dp.enable_features("contrib")
    space = dp.vector_domain(dp.atom_domain(T=int)), dp.symmetric_distance()
    units, column = Units.of_rows(4), {"x": np.zeros(4, dtype=np.int64)}
    with recording() as made:
        count_rows(mechanism(), units, max_rows_per_unit=rows, noise_multiplier=1.0)
        count_marginals(
            *(mechanism(), units, column, {"x": 3}, [("x",)]), noise_multiplier=1.0, max_rows_per_unit=rows
        )
    counted = dp.t.make_count(*space).map(rows)
    by_level = dp.t.make_count_by_categories(
        *space, categories=[0, 1, 2], null_category=False, MO=dp.L2Distance[float]
    ).map(rows)
    declared = [release.sensitivity for release in made.releases]
    assert declared == pytest.approx([counted, by_level], rel=1e-9)


ASK = {"l2_sensitivity": 3.0, "noise_multiplier": 5.0, "note": "x"}


class TestVectors:
    """`gaussian_vector`: floats on a grid."""

    @pytest.mark.parametrize("arithmetic", ["discrete", "float"])
    def test_both_ways_have_the_declared_law(self, arithmetic):
        answer = mechanism().gaussian_vector(np.full(COUNT, 7.25), **ASK, arithmetic=arithmetic)
        assert_gaussian(answer - 7.25, 15.0)

    def test_answers_lie_on_a_grid_that_does_not_depend_on_the_values(self):
        """Mironov's attack reads the last bits; here all answers are multiples of one power of two."""
        values = np.array([0.1, 1e-30, 1 / 3, 1e6 + 0.1])
        answer = mechanism().gaussian_vector(values, **ASK)
        grid = _grid(3.0, len(values))
        assert math.frexp(grid)[0] == 0.5
        assert np.array_equal(np.rint(answer / grid), answer / grid)
        loose = mechanism().gaussian_vector(values, **ASK, arithmetic="float")
        assert not np.array_equal(np.rint(loose / grid), loose / grid)

    @pytest.mark.parametrize("size", [1, 7, 1000, 100_003])
    def test_rounding_is_charged_and_costs_nothing_visible(self, monkeypatch, size):
        """The noise covers the sensitivity of the rounded vector, and is less than 1.00025 times what was asked."""
        from synthward.engine.queries import mechanism as module

        seen = []
        monkeypatch.setattr(
            module, "integer_noise", lambda n, std, **_: (seen.append(std), np.zeros(n, dtype=np.int64))[1]
        )
        values = np.random.default_rng(0).normal(0, 100, size)
        moved = values + 3.0 / math.sqrt(size) * np.random.default_rng(1).choice([-1, 1], size)
        rounded = [mechanism().gaussian_vector(v, **ASK) for v in (values, moved)]
        std = seen[0] * _grid(3.0, size)
        assert np.linalg.norm(rounded[0] - rounded[1]) <= std / 5.0
        assert (3.0 * 5.0) < std <= 1.00025 * 15.0

    def test_values_beyond_the_grid_are_cut_off_and_not_wrapped(self):
        answer = mechanism().gaussian_vector(np.array([1e300, -1e300, 0.0]), **ASK)
        limit = 2.0**61 * _grid(3.0, 3)
        assert answer[0] == pytest.approx(limit, rel=1e-9)
        assert answer[1] == pytest.approx(-limit, rel=1e-9)
        assert abs(answer[2]) < 15 * 9.5

    def test_shapes_and_empty_vectors_are_kept(self):
        assert mechanism().gaussian_vector(np.zeros((2, 3)), **ASK).shape == (2, 3)
        assert mechanism().gaussian_vector(np.zeros(0), **ASK).shape == (0,)


def test_whole_numbers_stay_whole_and_beyond_the_range_are_cut_off():
    asked = mechanism()
    most = np.iinfo(np.int64)
    values = np.array([5, most.max, most.min], dtype=np.int64)
    answer = asked.integer_vector(values, l2_sensitivity=1.0, noise_multiplier=4.0, note="")
    assert np.array_equal(answer, np.rint(answer))
    assert answer[1] == pytest.approx(2.0**61) and answer[2] == pytest.approx(-(2.0**61))


def test_no_two_queries_share_noise():
    """Of whatever kinds, under one key schedule."""
    asked = mechanism(seed=None)
    ask = {"l2_sensitivity": 1.0, "noise_multiplier": 1e6, "note": ""}
    zeros = np.zeros(500)
    whole = [asked.integer_vector(zeros.astype(np.int64), **ask) for _ in range(3)]
    answers = [
        *whole,
        asked.gaussian_vector(zeros, **ask),
        asked.gaussian_vector(zeros, **ask, arithmetic="float"),
    ]
    for i, one in enumerate(answers):
        for other in answers[:i]:
            assert_uncorrelated(one, other)
