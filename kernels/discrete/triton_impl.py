"""Triton form of integer noise: products and sums of doubles as in csrc/core/discrete.inl, so the same integers.

A program makes the 128 * GROUPS elements of whole groups from 16 * GROUPS blocks, lane by lane, as the float32 noise.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl
from torch import Tensor

from synthward.kernels._chacha import DISCRETE_BIT
from synthward.kernels._select import written
from synthward.kernels._triton import UNFUSED, ceil_div, on
from synthward.kernels.noise.triton_impl import PLACE, chacha, place

GROUPS = 4
_DISCRETE = tl.constexpr(DISCRETE_BIT - (1 << 64))  # as int64
# Doubles, each as two words: an argument that is a number would come as a float.
_HALVES = (*PLACE, "scale0", "scale1")


@triton.jit
def _double(low, high):
    """The double whose halves are these signed words."""
    low = low.to(tl.uint32, bitcast=True).to(tl.uint64)
    high = high.to(tl.uint32, bitcast=True).to(tl.uint64)
    return ((high << 32) | low).to(tl.float64, bitcast=True)


@triton.jit
def _signed(x):
    """Nearest double of int64."""
    high = (x >> 32).to(tl.int32).to(tl.float64)
    return high * 4294967296.0 + (x & 0xFFFFFFFF).to(tl.uint32).to(tl.float64)


@triton.jit
def _nearest(x):
    """Nearest whole number int64, ties to even, of x in [-2^62, 2^62]."""
    high = (x * 2.3283064365386963e-10 + 6755399441055744.0) - 6755399441055744.0  # 2^-32, 1.5 * 2^52
    low = ((x - high * 4294967296.0) + 6755399441055744.0) - 6755399441055744.0
    return (high.to(tl.int64) << 32) + low.to(tl.int64)


@triton.jit
def _radius(low, high):
    """sqrt(-2 log((word + 1/2) / 2^64)) of the radius word with these halves, uint32."""
    whole = high.to(tl.float64) * 4294967296.0 + (low.to(tl.float64) + 0.5)
    bits = whole.to(tl.int64, bitcast=True)
    exponent = (bits - 0x3FE6A09E667F3BCD) >> 52
    m = (bits - (exponent << 52)).to(tl.float64, bitcast=True)
    e = exponent.to(tl.int32).to(tl.float64) - 64.0
    ones = 0xFFFFFFFF  # (`~` of unsigned words is more than the interpreter of Triton 3.6 bears)
    complement = (high ^ ones).to(tl.float64) * 4294967296.0 + ((low ^ ones).to(tl.float64) + 0.5)
    f = tl.where(exponent == 64, complement * -5.421010862427522e-20, m - 1.0)  # 2^-64
    d = f + 2.0
    inverse = (0.11686288691412428 * d - 0.7224441022646164) * d + 1.4777559081899114
    inverse = inverse * (2.0 - d * inverse)
    inverse = inverse * (2.0 - d * inverse)
    inverse = inverse + inverse * (1.0 - d * inverse)
    s = f * inverse
    z = s * s
    series = 0.14795630272803398 * z + 0.15314084190435848
    series = series * z + 0.18183562942512763
    series = series * z + 0.22222198601152546
    series = series * z + 0.28571428742102045
    series = series * z + 0.3999999999941602
    series = series * z + 0.6666666666666734
    logarithm = e * 0.6931471803691238 + (2.0 * s + (s * z * series + e * 1.9082149292705877e-10))
    half = -logarithm
    square = half + half
    root = (0x5FE6EB50C7B537A9 - (square.to(tl.int64, bitcast=True) >> 1)).to(tl.float64, bitcast=True)
    for _ in tl.static_range(4):
        root = root * (1.5 - half * root * root)
    return square * root


@triton.jit
def _cos_sin(low, high):
    """Cosine and sine of 2 pi angle / 2^64."""
    angle = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    quadrant = (angle + 0x2000000000000000) >> 62
    x = _signed((angle - (quadrant << 62)).to(tl.int64, bitcast=True)) * 3.4061215800865545e-19  # 2 pi / 2^64
    z = x * x
    s = 1.589621392917107e-10 * z - 2.5050747491134792e-08
    s = s * z + 2.7557313619705785e-06
    s = s * z - 0.00019841269829584866
    s = s * z + 0.008333333333322113
    s = s * z - 0.1666666666666663
    s = s * z * x + x
    c = -1.1358525242667456e-11 * z + 2.0875700629209864e-09
    c = c * z - 2.755731417777029e-07
    c = c * z + 2.480158728884656e-05
    c = c * z - 0.001388888888887305
    c = c * z + 0.041666666666666595
    c = c * z * z - 0.5 * z + 1.0
    odd = (quadrant & 1) != 0
    cosine = tl.where(odd, s, c)
    sine = tl.where(odd, c, s)
    cosine = tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine)
    sine = tl.where((quadrant & 2) != 0, -sine, sine)
    return cosine, sine


@triton.jit
def _pair(r0, r1, a0, a1, scale):
    radius = _radius(r0, r1)
    cosine, sine = _cos_sin(a0, a1)
    return _nearest(radius * cosine * scale), _nearest(radius * sine * scale)


@triton.jit
def _rounded(first, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, scale, GROUPS: tl.constexpr):
    """Lanes 0 .. 7, each int64 [16 * GROUPS], of the groups from `first`."""
    counter = (first * 16 + tl.arange(0, 16 * GROUPS)) | _DISCRETE
    w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15 = chacha(
        counter, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, False
    )
    c0, s0 = _pair(w0, w4, w8, w12, scale)
    c1, s1 = _pair(w1, w5, w9, w13, scale)
    c2, s2 = _pair(w2, w6, w10, w14, scale)
    c3, s3 = _pair(w3, w7, w11, w15, scale)
    return c0, c1, c2, c3, s0, s1, s2, s3


@triton.jit
def _elements(first, start, LANE: tl.constexpr, GROUPS: tl.constexpr):
    """Indices, counted from `start`, of a lane's elements: int64 [16 * GROUPS]."""
    b = tl.arange(0, 16 * GROUPS)
    return (first * 128 - start.to(tl.int64)) + (b // 16 * 128 + LANE * 16 + b % 16)


@triton.jit(do_not_specialize=_HALVES)
def _rounded_kernel(
    integers_ptr, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, start, count, scale0, scale1, GROUPS: tl.constexpr
):  # fmt: skip
    first = start.to(tl.int64) // 128 + tl.program_id(0).to(tl.int64) * GROUPS
    k = _rounded(first, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, _double(scale0, scale1), GROUPS)
    for lane in tl.static_range(8):
        i = _elements(first, start, lane, GROUPS)
        tl.store(integers_ptr + i, k[lane], mask=(i >= 0) & (i < count))


@triton.jit
def _release(release_ptr, out_ptr, i, inside, noise, grid, per_grid):
    x = tl.load(release_ptr + i, mask=inside, other=0.0) * per_grid
    x = tl.where(x == x, x, 0.0)
    x = tl.where(x > 4611686018427387904.0, 4611686018427387904.0, x)  # 2^62
    x = tl.where(x < -4611686018427387904.0, -4611686018427387904.0, x)
    value = _signed(_nearest(x) + noise) * grid
    tl.store(out_ptr + i, value.to(tl.float32), mask=inside)
    tl.store(release_ptr + i, tl.zeros_like(x), mask=inside)


@triton.jit(do_not_specialize=(*_HALVES, "grid0", "grid1", "per_grid0", "per_grid1"))
def _release_kernel(
    release_ptr, out_ptr, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, start, count, scale0, scale1, grid0, grid1,
    per_grid0, per_grid1, GROUPS: tl.constexpr,
):  # fmt: skip
    first = start.to(tl.int64) // 128 + tl.program_id(0).to(tl.int64) * GROUPS
    k = _rounded(first, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, _double(scale0, scale1), GROUPS)
    for lane in tl.static_range(8):
        i = _elements(first, start, lane, GROUPS)
        inside = (i >= 0) & (i < count)
        _release(
            release_ptr, out_ptr, i, inside, k[lane], _double(grid0, grid1), _double(per_grid0, per_grid1)
        )


def _halves(value: float) -> tuple[int, int]:
    low, high = struct.unpack("<2i", struct.pack("<d", value))
    return low, high


def _grid(start: int, count: int) -> tuple[int]:
    """Programs that cover the groups of elements ``start .. start + count``."""
    return (ceil_div(-(-(start + count) // 128) - start // 128, GROUPS),)


def rounded_gaussian(out: Tensor, key: bytes, stream: int, step: int, start: int, scale: float) -> None:
    if len(out) == 0:
        return
    with on(out):
        _rounded_kernel[_grid(start, len(out))](
            *(out, *place(key, stream, step), start, len(out), *_halves(scale)),
            GROUPS=GROUPS,
            num_warps=2,
            **UNFUSED,
        )


def discrete_release_(
    sums: Tensor, out: Tensor, key: bytes, stream: int, step: int, start: int, grid: float, noise_std: float
) -> None:
    if len(sums) == 0:
        return
    halves = (*_halves(noise_std / grid), *_halves(grid), *_halves(1.0 / grid))
    with on(sums):
        _release_kernel[_grid(start, len(sums))](
            *(sums, out, *place(key, stream, step), start, len(sums), *halves),
            GROUPS=GROUPS,
            num_warps=2,
            **UNFUSED,
        )
    written(sums, out)
