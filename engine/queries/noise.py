"""Gaussians in double precision and integer Gaussians, as a pure function of key, stream and step.

A pair of normals is Box-Muller's from four cipher words: words 4p and 4p + 1 are the radius of pair p, a 64-bit
uniform, words 4p + 2 and 4p + 3 its angle, another. The largest normal is sqrt(2 * 65 * ln 2) = 9.49: beyond it the
normal law has less than 3e-21.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from synthward.kernels import chacha20_words

_HALF = np.uint64(1 << 63)


def normals(count: int, *, key: bytes, stream: int, step: int) -> NDArray[np.float64]:
    """Standard normals float64 [count], each within 2^-50 of its radius from the one that its words stand for.

    Raises:
        TypeError, ValueError: key not of 32 bytes, stream not below 2^15, step not below 2^48.
    """
    words = chacha20_words(key, stream=stream, step=step, start=0, count=4 * (-(-count // 2)))
    whole = words.astype(np.uint64).reshape(-1, 2, 2)
    radius, angle = np.moveaxis(whole[:, :, 0] | whole[:, :, 1] << np.uint64(32), 1, 0)
    # Close to 1 a uniform is told by what it lacks, which has all its bits.
    lacking = np.minimum(_uniform(~radius), 0.5)
    log = np.where(radius < _HALF, np.log(_uniform(radius)), np.log1p(-lacking))
    return (np.sqrt(-2.0 * log)[:, None] * _cos_sin(angle)).ravel()[:count]


def integer_noise(count: int, noise_std: float, *, key: bytes, stream: int, step: int) -> NDArray[np.int64]:
    """``rint(noise_std * z)`` for standard normals z, int64 [count].

    Guarantees: for an integer vector x and an ideal z, ``x + rint(noise_std * z) = rint(x + noise_std * z)``, so that
    adding this is the ideal Gaussian mechanism and a rounding after it; no bit of the answer tells how x was
    represented (Mironov 2012). What is left is the error of z itself: it moves the law of one coordinate by less
    than ``noise_std * 2^-48`` in total variation.
    """
    scaled = noise_std * normals(count, key=key, stream=stream, step=step)
    return np.asarray(np.rint(scaled), dtype=np.int64)


def _cos_sin(angle: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Cosine and sine of 2 pi (angle + 1/2) / 2^64, float64 [n, 2]; from an eighth of a turn either way, which has
    all its bits."""
    quadrant = (angle + np.uint64(1 << 61)) >> np.uint64(62)
    rest = (angle - (quadrant << np.uint64(62))).view(np.int64)
    turn = (rest.astype(np.float64) + 0.5) * (2.0 * np.pi * 2.0**-64)
    cosine, sine = np.cos(turn), np.sin(turn)
    odd = (quadrant & np.uint64(1)) == 1
    waves = np.stack([np.where(odd, sine, cosine), np.where(odd, cosine, sine)], axis=1)
    turned = np.stack([(quadrant == 1) | (quadrant == 2), quadrant >= 2], axis=1)
    return np.where(turned, -waves, waves)


def _uniform(word: NDArray[np.uint64]) -> NDArray[np.float64]:
    """(word + 1/2) / 2^64, float64."""
    return (word.astype(np.float64) + 0.5) * 2.0**-64
