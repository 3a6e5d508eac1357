"""Integer noise: its normals against mpmath, its law, and that a release is the rounded sum plus noise alone."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from synthward import _C
from synthward.kernels import available_isas, discrete_release_, force_isa, rounded_gaussian
from synthward.kernels._chacha import DISCRETE_BIT, reference_blocks, reference_wide_gaussians, wide_normals
from tests.kernels.cases import generator
from tests.privacy.stats import FALSE_ALARM, assert_gaussian, assert_uncorrelated

KEY = bytes(range(32))
PLACE = {"key": KEY, "stream": 3, "step": 7}
GOOD = 2.0**-50  # of the value
# sqrt(1/2) 2^64: where the logarithm changes its argument.
BORDER = 13043817825332782212
RADII = [
    *(0, 1, 2, 3, 2**32 - 1, 2**32, 2**53 - 1, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 2**32, 2**64 - 2**11),
    *(2**64 - 2**10 - 1, 2**64 - 2**10, 2**64 - 3, 2**64 - 2, 2**64 - 1, *range(BORDER - 3000, BORDER + 3000, 500)),
]  # fmt: skip
ANGLES = [(eighth << 61) + near & (2**64 - 1) for eighth in range(8) for near in (-(2**20), -1, 0, 1, 3)]


def words() -> tuple[np.ndarray, np.ndarray]:
    """Pairs of a radius and an angle word: each extreme one with each, words of every size, and random ones."""
    random = np.random.default_rng(5)
    pairs = np.array([(r, a) for r in RADII for a in ANGLES], np.uint64)
    drawn = random.integers(0, 2**64, (4000, 2), dtype=np.uint64)
    sizes = (np.arange(1000) % 64).astype(np.uint64)
    drawn[:1000, 0] >>= sizes
    drawn[1000:2000, 0] = ~(drawn[1000:2000, 0] >> sizes)
    drawn[2000:3000, 1] >>= sizes
    both = np.concatenate([pairs, drawn])
    both = np.concatenate([both, drawn[: -len(both) % 8]])
    return both[:, 0].copy(), both[:, 1].copy()


def exact_normals(radius: np.ndarray, angle: np.ndarray) -> list[tuple[mpmath.mpf, mpmath.mpf]]:
    found = []
    for r, a in zip(radius.tolist(), angle.tolist(), strict=True):
        length = mpmath.sqrt(-2 * mpmath.log(mpmath.mpf(2 * r + 1) / 2**65))
        # cospi and sinpi are exact where the angle is a quarter of the circle.
        turn = mpmath.mpf(a) / 2**63
        found.append((length * mpmath.cospi(turn), length * mpmath.sinpi(turn)))
    return found


def test_normals_are_exact_to_fifty_bits():
    """Relative error of each, whatever the words: in the far tail, near zero and at the edges of the quadrants."""
    radius, angle = words()
    with mpmath.workprec(200):
        exact = exact_normals(radius, angle)
        reference = wide_normals(radius, angle)
        for name in available_isas():
            force_isa(name)
            compiled = _C.wide_normals(radius, angle)
            force_isa(None)
            for found in (compiled, reference):
                for values, which in zip(found, (0, 1), strict=True):
                    pairs = zip(values.tolist(), exact, strict=True)
                    assert all(abs(v - e[which]) <= GOOD * abs(e[which]) for v, e in pairs)


def test_normals_are_the_same_bits_on_every_instruction_set():
    radius, angle = words()
    found = []
    for name in available_isas():
        force_isa(name)
        found.append(np.concatenate(_C.wide_normals(radius, angle)).view(np.int64))
    force_isa(None)
    assert all(np.array_equal(found[0], other) for other in found)


def test_the_farthest_normals():
    """The smallest radius words reach 9.49 standard deviations, the largest 2^-32: nothing is infinite or lost."""
    cosines, _ = _C.wide_normals(np.array([0, 2**64 - 1] * 4, np.uint64), np.zeros(8, np.uint64))
    assert cosines[:2] == pytest.approx([np.sqrt(130 * np.log(2)), 2.0**-32], rel=1e-15)


def expected(elements: np.ndarray, scale: float) -> np.ndarray:
    """Integers of the layout that kernels/_chacha.py documents."""
    block, lane = elements // 128 * 16 + elements % 16, elements % 128 // 16
    made = reference_blocks(KEY, 3 << 48 | 7, block.astype(np.uint64) + np.uint64(DISCRETE_BIT))
    word = made.astype(object)
    rows, j = np.arange(len(elements)), lane % 4
    radius = (word[rows, j] + word[rows, 4 + j] * 2**32).astype(np.uint64)
    angle = (word[rows, 8 + j] + word[rows, 12 + j] * 2**32).astype(np.uint64)
    normals = wide_normals(radius, angle)
    return np.rint(scale * np.where(lane < 4, *normals)).astype(np.int64)


@pytest.mark.parametrize("start", [0, 100, 128 * 2**33 + 3])
def test_integers_follow_the_documented_layout(backend, start):
    found = rounded_gaussian(3000, start=start, scale=1000.0, **PLACE, backend=backend)
    assert found.dtype == torch.int64
    assert np.array_equal(found.numpy(), expected(np.arange(start, start + 3000), 1000.0))


@pytest.mark.parametrize(("scale", "few"), [(3.0, 0.0), (2.0**20, 1e-4), (2.0**30, 1e-4), (2.0**40, 0.02)])
def test_the_reference_differs_at_a_border_at_most(isa, scale, few):
    """By one, where the last bits of two logarithms or cosines decide the rounding."""
    compiled = rounded_gaussian(50_000, scale=scale, **PLACE)
    difference = (compiled - rounded_gaussian(50_000, scale=scale, **PLACE, backend="reference")).abs()
    assert int(difference.max()) <= 1 and float((difference > 0).double().mean()) <= few


def test_integers_do_not_depend_on_split_instruction_set_or_threads(restore_threads):
    count, start, found = 200_003, 77, []
    for name in available_isas():
        force_isa(name)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(rounded_gaussian(count, start=start, scale=2.0**40, **PLACE))
            sums, out = torch.zeros(count, dtype=torch.float64), torch.empty(count)
            discrete_release_(sums, out, start=start, grid=2.0**-7, noise_std=2.0**33, **PLACE)
            assert torch.equal(out, (found[0].double() * 2.0**-7).float())
        cuts = [0, 1, 127, 128, 4097, 100_000, count]
        pieces = [rounded_gaussian(b - a, start=start + a, scale=2.0**40, **PLACE) for a, b in pairwise(cuts)]
        found.append(torch.cat(pieces))
    force_isa(None)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_the_integers_of_a_stream_never_change(isa):
    """Pinned: a run that is repeated from its recorded seed gets the same noise."""
    noise = rounded_gaussian(100_000, scale=2.0**40, **PLACE).numpy().astype("<i8").tobytes()
    assert hashlib.sha256(noise).hexdigest() == (
        "e8a851596206ac20a7894a5eeb7c2ca7538fbef6dc3d932d7c000b9455d20308"
    )


@pytest.mark.parametrize("scale", [0.4, 3.0])
def test_law_of_small_integers(isa, scale):
    """Chi-square against the exact probabilities of a rounded Gaussian, tails together."""
    count, most = 1 << 21, int(4 * scale) + 1
    k = rounded_gaussian(count, scale=scale, **PLACE).numpy()
    cells = np.clip(k, -most, most)
    edges = (np.arange(-most, most) + 0.5) / scale
    probability = np.diff(np.concatenate([[0.0], stats.norm.cdf(edges), [1.0]]))
    counted = np.bincount(cells + most, minlength=2 * most + 1)
    assert counted.min() > 5
    assert stats.chisquare(counted, count * probability).pvalue > FALSE_ALARM


def test_law_of_large_integers(isa):
    count = 1 << 20
    k = rounded_gaussian(count, scale=2.0**30, **PLACE).double().numpy()
    assert_gaussian(k, 2.0**30)
    assert_gaussian(rounded_gaussian(count, start=count, scale=2.0**40, **PLACE).double().numpy(), 2.0**40)
    # Cosine and sine of one radius lie 64 apart.
    pairs = k.reshape(-1, 2, 64)
    assert_uncorrelated(pairs[:, 0].ravel(), pairs[:, 1].ravel())
    assert_uncorrelated((pairs[:, 0] ** 2).ravel(), (pairs[:, 1] ** 2).ravel())


def test_low_digits_of_large_integers_are_uniform(isa):
    """At 2^30 the last three digits of the noise hide those of the sum."""
    k = rounded_gaussian(1 << 20, scale=2.0**30, **PLACE).numpy()
    assert stats.chisquare(np.bincount(k % 1000, minlength=1000)).pvalue > FALSE_ALARM


def release(sums: Tensor, grid: float, noise_std: float, backend: str, start: int = 5) -> Tensor:
    """What is released of a copy of the sums, which must be left at zero."""
    taken, out = sums.clone(), torch.full((len(sums),), float("nan"))
    found = discrete_release_(
        taken, out, start=start, grid=grid, noise_std=noise_std, **PLACE, backend=backend
    )
    assert found is out and not taken.any()
    return out


@pytest.mark.parametrize("count", [0, 1, 2, 15, 127, 129, 1000])
@pytest.mark.parametrize(("grid", "scale"), [(1.0, 3.0), (2.0**-20, 2.0**20), (2.0**9, 0.0)])
def test_a_release_is_the_rounded_sum_and_the_noise(backend, count, grid, scale):
    sums = torch.randn(count, dtype=torch.float64, generator=generator()) * (3000.0 * grid)
    noise = rounded_gaussian(count, start=5, scale=scale, **PLACE, backend=backend)
    whole = torch.from_numpy(np.rint(sums.numpy() / grid).astype(np.int64))
    assert torch.equal(release(sums, grid, scale * grid, backend), ((whole + noise).double() * grid).float())


def test_what_the_noise_adds_does_not_depend_on_the_sum(backend):
    """Post-processing of the rounded sum: integer in, integer out, and the same difference whatever was put in."""
    # Small enough for float32 to hold every result.
    noise = release(torch.zeros(500, dtype=torch.float64), 1.0, 1000.0, backend)
    for seed in range(4):
        whole = torch.randint(-(2**22), 2**22, (500,), generator=generator(seed)).double()
        assert torch.equal(release(whole, 1.0, 1000.0, backend).double() - whole, noise.double())
        # Nor on what was rounded away.
        near = whole + (torch.rand(500, dtype=torch.float64, generator=generator(seed)) - 0.5) * 0.999
        assert torch.equal(release(near, 1.0, 1000.0, backend).double() - whole, noise.double())


def test_halves_are_rounded_to_even(backend):
    big = 2.0**40
    sums = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, big + 0.5, big + 1.5, -big - 0.5, 0.49999999999999994])
    sums = torch.cat([sums.double(), torch.tensor([2.0**31 + 0.5, 2.0**31 - 0.5, 2.0**32 - 0.5]).double()])
    sums[5:8] = torch.tensor([big + 0.5, big + 1.5, -big - 0.5], dtype=torch.float64)
    sums[8] = 0.49999999999999994
    assert torch.equal(release(sums, 1.0, 0.0, backend), sums.round().float())


def test_large_sums_are_exact_up_to_the_cut(backend):
    """A sum beyond 2^62 steps is cut off there, an infinite one too; NaN counts as 0. Noise is added to all."""
    most = 2.0**62
    given = [
        most - 512,
        -most + 512,
        most,
        -most,
        2 * most,
        -1e300,
        np.inf,
        -np.inf,
        np.nan,
        2.0**52 + 1.0,
        -0.0,
    ]
    meant = [most - 512, -most + 512, most, -most, most, -most, most, -most, 0.0, 2.0**52 + 1.0, 0.0]
    sums = torch.tensor(given, dtype=torch.float64)
    for grid in (2.0**-100, 1.0, 2.0**60):
        # A sum that overflows on the way to steps of the grid is too large as well.
        noise = rounded_gaussian(len(sums), start=5, scale=2.0**40, **PLACE, backend=backend)
        whole = torch.tensor(meant, dtype=torch.float64).to(torch.int64)
        found = release(sums * grid, grid, 2.0**40 * grid, backend)
        assert torch.equal(found, ((whole + noise).double() * grid).float())
        assert found.isfinite().all()


def test_cutting_off_brings_no_two_sums_further_apart(isa):
    """So that a bound on how far one unit moves the sums stays one."""
    sums = torch.tensor([1.0, 1.5, 2.0, 3.0, np.inf], dtype=torch.float64) * 2.0**61
    ends = release(sums, 1.0, 0.0, "cpp").double()
    moved, before = ends.diff(), sums.diff()
    assert ((moved >= 0) & (moved <= before)).all() and moved[0] == before[0] and moved[-1] == 0


def test_the_words_are_those_of_no_other_noise():
    """At the same key, stream, step and element the blocks differ from those of float32 noise."""
    integers = reference_wide_gaussians(KEY, stream=3, step=7, start=0, count=4096)
    from synthward.kernels import gaussian_noise

    assert_uncorrelated(integers, gaussian_noise(4096, **PLACE).double().numpy())
