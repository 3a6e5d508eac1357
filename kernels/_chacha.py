"""ChaCha20 as a stream of words addressed by position, and how Gaussians are laid over it.

Layout, mirrored in ``csrc/core/chacha.inl`` and ``gaussian.inl``: the key has 32 bytes; state words 12-13 are
the 64-bit block counter, words 14-15 the 64-bit nonce ``stream << 48 | step`` with ``stream < 2^15``; the top
bit marks extension blocks.

Element e of a Gaussian stream lies in group ``e // 256`` at place ``r = e % 256``: in block
``16 * group + r % 16``, lane ``r // 16``. Lane j < 8 is the cosine of radius word j and angle word 8 + j,
lane 8 + j the sine. A radius word w stands for the uniform ``w / 2^32``, as the nearest float32; one below
2^16 is refined by word j of the extension block, v, to ``(w + (v + 1/2) / 2^32) / 2^32``.

Integer noise (``csrc/core/discrete.inl``) has words of 64 bits and blocks of its own, those with the top bit of the
counter set; whole streams of float32 noise end below it. Element e lies in group ``e // 128`` at place
``r = e % 128``: in block ``2^63 + 16 * group + r % 16``, lane ``r // 16``. Lane j < 4 is the cosine and lane 4 + j the
sine of the pair whose radius is words j (low half) and 4 + j (high half) and whose angle is words 8 + j and 12 + j. A
radius word w stands for the uniform ``(w + 1/2) / 2^64``, an angle word a for ``2 pi a / 2^64``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from synthward import _C
from synthward.kernels import _check

_CONSTANTS = np.frombuffer(b"expand 32-byte k", dtype="<u4")
RARE = 1 << 16
EXTENSION_BIT = 1 << 63  # of the nonce
DISCRETE_BIT = 1 << 63  # of the counter


def chacha20_words(key: bytes, *, stream: int, step: int, start: int, count: int) -> NDArray[np.uint32]:
    """Raw cipher words ``start .. start + count`` of a stream, uint32 [count]; word w lies in block w // 16.

    Raises:
        ValueError: key not of 32 bytes, stream not below 2^15, step not below 2^48, or a negative position.
    """
    _check.place(key, stream, step, start, count)
    return _C.chacha20_words(key, stream, step, start, count)


def reference_blocks(key: bytes, nonce: int, counters: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """Plain NumPy ChaCha20 blocks, uint32 [len(counters), 16] (RFC 8439, section 2.3)."""
    state = np.empty((16, len(counters)), dtype=np.uint32)
    state[:4] = _CONSTANTS[:, None]
    state[4:12] = np.frombuffer(key, dtype="<u4")[:, None]
    state[12] = (counters & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    state[13] = (counters >> np.uint64(32)).astype(np.uint32)
    state[14], state[15] = nonce & 0xFFFFFFFF, nonce >> 32
    x = state.copy()
    for _ in range(10):
        for a, b, c, d in ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)):
            _quarter(x, a, b, c, d)
        for a, b, c, d in ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)):
            _quarter(x, a, b, c, d)
    return (x + state).T.copy()


def reference_gaussians(key: bytes, *, stream: int, step: int, start: int, count: int) -> NDArray[np.float32]:
    """Plain NumPy form of the Gaussian stream, float32 [count]; transcendental functions in float64."""
    nonce = stream << 48 | step
    element = np.arange(start, start + count, dtype=np.int64)
    group, place = element // 256, element % 256
    block, lane = group * 16 + place % 16, place // 16
    counters, inverse = np.unique(block, return_inverse=True)
    words = reference_blocks(key, nonce, counters.astype(np.uint64))
    extra = reference_blocks(key, nonce | EXTENSION_BIT, counters.astype(np.uint64))
    pair = lane % 8
    radius = words[inverse, pair].astype(np.uint64)
    coarse = radius.astype(np.float32).astype(np.float64) * 2.0**-32
    whole = (radius << np.uint64(32)) | extra[inverse, pair].astype(np.uint64)
    uniform = np.where(radius < RARE, (whole.astype(np.float64) + 0.5) * 2.0**-64, coarse)
    angle = words[inverse, 8 + pair].astype(np.float64) * (2.0 * np.pi / 2.0**32)
    wave = np.where(lane < 8, np.cos(angle), np.sin(angle))
    return (np.sqrt(-2.0 * np.log(uniform)) * wave).astype(np.float32)


def reference_wide_gaussians(
    key: bytes, *, stream: int, step: int, start: int, count: int
) -> NDArray[np.float64]:
    """Plain NumPy form of the normals that integer noise is rounded from, float64 [count]."""
    element = np.arange(start, start + count, dtype=np.int64)
    group, place = element // 128, element % 128
    counters, inverse = np.unique(group * 16 + place % 16, return_inverse=True)
    words = reference_blocks(key, stream << 48 | step, counters.astype(np.uint64) | np.uint64(DISCRETE_BIT))
    lane = place // 16
    low, pair = words.astype(np.uint64)[inverse], lane % 4
    at = np.arange(count)
    radius = low[at, pair] | low[at, 4 + pair] << np.uint64(32)
    angle = low[at, 8 + pair] | low[at, 12 + pair] << np.uint64(32)
    cosines, sines = wide_normals(radius, angle)
    return np.where(lane < 4, cosines, sines)


def wide_normals(
    radius: NDArray[np.uint64], angle: NDArray[np.uint64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both normals of each pair of words. The upper half of the uniforms is taken by its distance from one."""
    below_one = ((~radius).astype(np.float64) + 0.5) * 2.0**-64
    uniform = (radius.astype(np.float64) + 0.5) * 2.0**-64
    upper = radius >> np.uint64(63) != 0
    logarithm = np.where(upper, np.log1p(-np.where(upper, below_one, 0.5)), np.log(uniform))
    quadrant = (angle + np.uint64(1 << 61)) >> np.uint64(62)
    rest = (angle - (quadrant << np.uint64(62))).view(np.int64).astype(np.float64) * (2.0 * np.pi / 2.0**64)
    turns = (quadrant & np.uint64(3)).astype(np.int64)
    c, s = np.cos(rest), np.sin(rest)
    length = np.sqrt(-2.0 * logarithm)
    return length * np.choose(turns, (c, -s, -c, s)), length * np.choose(turns, (s, c, -s, -c))


def _quarter(x: NDArray[np.uint32], a: int, b: int, c: int, d: int) -> None:
    for target, source, mixed, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        x[target] += x[source]
        x[mixed] ^= x[target]
        x[mixed] = (x[mixed] << np.uint32(turn)) | (x[mixed] >> np.uint32(32 - turn))
