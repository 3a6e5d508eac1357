"""The law of both kinds of noise: moments, every lane, the far tail, and independence of neighbours and of places."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from synthward.kernels import gaussian_noise, rounded_gaussian
from synthward.kernels._chacha import EXTENSION_BIT, reference_blocks
from tests.privacy.stats import FALSE_ALARM

Noise = Callable[..., NDArray[np.float64]]
KEY = bytes(range(32))
FINE = 2.0**40


def of_floats(
    count: int, *, key: bytes = KEY, stream: int = 3, step: int = 7, start: int = 0
) -> NDArray[np.float64]:
    return gaussian_noise(count, key=key, stream=stream, step=step, start=start).double().numpy()


def of_integers(
    count: int, *, key: bytes = KEY, stream: int = 3, step: int = 7, start: int = 0
) -> NDArray[np.float64]:
    """Integers of the finest grid, whose steps no test here can see."""
    drawn = rounded_gaussian(count, key=key, stream=stream, step=step, start=start, scale=FINE)
    return drawn.double().numpy() / FINE


# Each with the elements of a group, half of which are cosines.
KINDS = pytest.mark.parametrize(("noise", "group"), [(of_floats, 256), (of_integers, 128)])


def pairs(noise: Noise, group: int, count: int) -> Iterator[NDArray[np.float64]]:
    """Cosines and sines of the same radii, [2, n], from `count` elements a million at a time."""
    for start in range(0, count, 1 << 20):
        z = noise(min(1 << 20, count - start), start=start)
        yield z.reshape(-1, 2, group // 2).transpose(1, 0, 2).reshape(2, -1)


@KINDS
def test_moments(noise, group):
    """Means of the powers 1 to 6, within the spread that they have themselves; odd ones show a tail on one side."""
    count = 1 << 22
    z = noise(count)
    even = {power: float(math.prod(range(power - 1, 0, -2))) for power in range(2, 13, 2)}
    for power in range(1, 7):
        expected = even.get(power, 0.0)
        spread = math.sqrt((even[2 * power] - expected**2) / count)
        # Means of high powers have heavy tails themselves.
        assert abs((z**power).mean() - expected) < (6.11 if power < 4 else 8.0) * spread, power


@KINDS
def test_every_lane_is_normal(noise, group):
    """Kolmogorov-Smirnov on each lane of a group: one bad word of sixteen would drown in the whole."""
    lanes = noise(1 << 21).reshape(-1, group // 16, 16).transpose(1, 0, 2).reshape(group // 16, -1)
    assert min(stats.kstest(lane, "norm").pvalue for lane in lanes) > FALSE_ALARM
    spread = np.abs((lanes**2).mean(axis=1) - 1.0) / math.sqrt(2.0 / lanes.shape[1])
    assert spread.max() < 6.8


@KINDS
def test_radius_and_angle_are_exponential_uniform_and_independent(noise, group):
    """Polar coordinates of each pair, which is where a fault of the angle does not show in one normal alone."""
    both = np.concatenate(list(pairs(noise, group, 1 << 21)), axis=1)
    half_square, turn = (both**2).sum(axis=0) / 2.0, np.arctan2(both[1], both[0]) / (2.0 * np.pi) % 1.0
    assert stats.kstest(half_square, "expon").pvalue > FALSE_ALARM
    assert stats.kstest(turn, "uniform").pvalue > FALSE_ALARM
    eighths, sizes = (turn * 8).astype(int), np.searchsorted(np.log(8 / np.arange(7, 0, -1)), half_square)
    table = np.bincount(eighths * 8 + sizes, minlength=64)
    assert stats.chisquare(table).pvalue > FALSE_ALARM


@KINDS
def test_the_far_tail_is_exact(noise, group):
    """Radii beyond 4.71, which one word of 2^16 gives: as many as there should be, and shaped as they should be.

    There the float32 noise has its radius from 64 bits; a tail of 32 bits alone would still pass here, see below.
    """
    beyond, count = [], 0
    for both in pairs(noise, group, 1 << 26):
        square = (both**2).sum(axis=0)
        count += len(square)
        beyond.append(np.exp(-0.5 * square[square > 32.0 * math.log(2.0)]) * 2.0**16)
    uniform = np.concatenate(beyond)
    assert stats.binomtest(len(uniform), count, 2.0**-16).pvalue > FALSE_ALARM
    assert len(uniform) > 300 and stats.kstest(uniform, "uniform").pvalue > FALSE_ALARM


# Blocks of (KEY, stream 3, step 7) among the first 2^33 in which a radius word is 0, and which word.
ZEROS = [(1760580388, 3), (1948969008, 5), (3547867562, 6), (6129960671, 6)]


@pytest.mark.parametrize(("block", "word"), ZEROS)
def test_normals_beyond_the_end_of_32_bits_are_reached(backend, block, word):
    """Radii of a word that is 0: from 6.66 on the extension's 32 bits alone say which. Here one of a pair is as far."""
    words = reference_blocks(KEY, 3 << 48 | 7, np.array([block], np.uint64))[0]
    extension = reference_blocks(KEY, EXTENSION_BIT | 3 << 48 | 7, np.array([block], np.uint64))[0]
    assert words[word] == 0
    radius = math.sqrt(-2.0 * math.log((float(extension[word]) + 0.5) * 2.0**-64))
    angle = 2.0 * math.pi * float(words[8 + word]) / 2.0**32
    start = block // 16 * 256 + word * 16 + block % 16
    place = {"key": KEY, "stream": 3, "step": 7, "backend": backend}
    found = [float(gaussian_noise(1, start=start + lane, **place)) for lane in (0, 128)]
    assert found == pytest.approx([radius * math.cos(angle), radius * math.sin(angle)], abs=4e-6)
    assert max(map(abs, found)) > 6.71


@KINDS
def test_neighbours_are_independent(noise, group):
    """Correlation of the noise, and of its squares, at every lag up to two thousand: blocks, groups and all between."""
    count, lags = 1 << 20, 2000
    gate = stats.norm.isf(FALSE_ALARM / 2 / lags)
    z = noise(count)
    for series in (z, (z**2 - 1.0) / math.sqrt(2.0)):
        spectrum = np.fft.rfft(series, 2 * count)
        lagged = np.fft.irfft(np.abs(spectrum) ** 2)[1 : lags + 1] / np.sqrt(count - np.arange(1, lags + 1))
        assert np.abs(lagged).max() < gate


@KINDS
def test_places_are_independent(noise, group):
    """Streams, steps and keys, next to each other and one bit apart, the sums and the squares; and the other kind."""
    count = 1 << 15
    rows = [noise(count, stream=stream) for stream in (0, 1, 2, 3, 4, 2**14, 2**15 - 1)]
    rows += [noise(count, step=step) for step in (0, 1, 2, 3, 8, 2**16, 2**32, 2**47, 2**48 - 1)]
    for bit in (0, 1, 7, 31, 32, 128, 255):
        rows.append(noise(count, key=(int.from_bytes(KEY, "little") ^ 1 << bit).to_bytes(32, "little")))
    rows.append(noise(count, start=count))
    other = of_integers if noise is of_floats else of_floats
    rows += [other(count), other(count, stream=1)]
    z = np.stack(rows)
    cases = len(rows) * (len(rows) - 1) // 2
    gate = stats.norm.isf(FALSE_ALARM / 2 / cases) / math.sqrt(count)
    for values in (z, z**2, np.sign(z)):
        correlation = np.corrcoef(values)
        assert np.abs(correlation - np.eye(len(rows))).max() < gate
