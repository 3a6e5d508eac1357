"""Triton form of the noise: the same cipher words, and the same bits where nothing is fused. Layout: ``_chacha.py``.

A program makes the 256 * GROUPS elements of whole groups from 16 * GROUPS blocks: word j of all of them is one
vector, so that a lane's normals are one vector too and nothing is transposed.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from synthward.kernels._chacha import EXTENSION_BIT, RARE
from synthward.kernels._select import written
from synthward.kernels._triton import UNFUSED, ceil_div, on
from synthward.kernels.noise.correlation import Correlation

GROUPS = 4
_RARE = tl.constexpr(RARE)
_EXTENSION = tl.constexpr(EXTENSION_BIT >> 32)
# The words of the key and the rest of the place change from call to call: never a reason to compile again.
PLACE = (
    *("k0", "k1", "k2", "k3", "k4", "k5", "k6", "k7", "n0", "n1", "start", "count"),
    *("taps", "slots", "stride"),
)


@triton.jit
def _quarter(a, b, c, d):
    a += b
    d ^= a
    d = (d << 16) | (d >> 16)
    c += d
    b ^= c
    b = (b << 12) | (b >> 20)
    a += b
    d ^= a
    d = (d << 8) | (d >> 24)
    c += d
    b ^= c
    b = (b << 7) | (b >> 25)
    return a, b, c, d


@triton.jit
def _word(value, like):
    """A 32-bit word, passed as a signed integer, for every block."""
    return tl.zeros_like(like) + value.to(tl.uint32, bitcast=True)


@triton.jit
def chacha(counter, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, EXTEND: tl.constexpr):
    """Words 0 .. 15 of the blocks `counter` int64 [B], each uint32 [B] (RFC 8439, section 2.3)."""
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    c0, c1 = zero + 0x61707865, zero + 0x3320646E
    c2, c3 = zero + 0x79622D32, zero + 0x6B206574
    w4, w5, w6, w7 = _word(k0, low), _word(k1, low), _word(k2, low), _word(k3, low)
    w8, w9, w10, w11 = _word(k4, low), _word(k5, low), _word(k6, low), _word(k7, low)
    w14, w15 = _word(n0, low), _word(n1, low)
    if EXTEND:
        w15 = w15 | _EXTENSION
    x0, x1, x2, x3 = c0, c1, c2, c3
    x4, x5, x6, x7 = w4, w5, w6, w7
    x8, x9, x10, x11 = w8, w9, w10, w11
    x12, x13, x14, x15 = low, high, w14, w15
    for _ in range(10):
        x0, x4, x8, x12 = _quarter(x0, x4, x8, x12)
        x1, x5, x9, x13 = _quarter(x1, x5, x9, x13)
        x2, x6, x10, x14 = _quarter(x2, x6, x10, x14)
        x3, x7, x11, x15 = _quarter(x3, x7, x11, x15)
        x0, x5, x10, x15 = _quarter(x0, x5, x10, x15)
        x1, x6, x11, x12 = _quarter(x1, x6, x11, x12)
        x2, x7, x8, x13 = _quarter(x2, x7, x8, x13)
        x3, x4, x9, x14 = _quarter(x3, x4, x9, x14)
    return (
        x0 + c0, x1 + c1, x2 + c2, x3 + c3, x4 + w4, x5 + w5, x6 + w6, x7 + w7,
        x8 + w8, x9 + w9, x10 + w10, x11 + w11, x12 + low, x13 + high, x14 + w14, x15 + w15,
    )  # fmt: skip


@triton.jit
def _logarithm(x):
    """Natural logarithm of positive normal x, as in csrc/core/gaussian.inl."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    m = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    e = exponent.to(tl.float32)
    s = tl.math.div_rn(m - 1.0, m + 1.0)
    z = s * s
    series = 0.22222222 * z + 0.28571429
    series = series * z + 0.4
    series = series * z + 0.66666667
    series = series * z + 2.0
    return e * 1.42860677e-6 + (s * series + e * 0.693145751953125)


@triton.jit
def _cos_sin(angle):
    """Cosine and sine of 2 pi angle / 2^32, as in csrc/core/gaussian.inl."""
    quadrant = (angle + 0x20000000) >> 30
    rest = (angle - (quadrant << 30)).to(tl.int32, bitcast=True)
    x = rest.to(tl.float32) * 1.4629180792671596e-9
    z = x * x
    s = -1.9515295891e-4 * z + 8.3321608736e-3
    s = s * z - 1.6666654611e-1
    s = s * z * x + x
    c = 2.443315711809948e-5 * z - 1.388731625493765e-3
    c = c * z + 4.166664568298827e-2
    c = c * z * z - 0.5 * z + 1.0
    odd = (quadrant & 1) != 0
    cosine = tl.where(odd, s, c)
    sine = tl.where(odd, c, s)
    cosine = tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine)
    sine = tl.where((quadrant & 2) != 0, -sine, sine)
    return cosine, sine


@triton.jit
def _uniform(word):
    return word.to(tl.float32) * 2.3283064365386963e-10  # 2^-32


@triton.jit
def _refined(uniform, word, extra):
    """The uniform of a rare radius word, with 32 bits more."""
    whole = ((word.to(tl.uint64) << 32) | extra.to(tl.uint64)).to(tl.float64) + 0.5
    return tl.where(word < _RARE, (whole * 5.421010862427522e-20).to(tl.float32), uniform)  # 2^-64


@triton.jit
def _pair(uniform, angle):
    # The largest words round to a uniform of exactly 1, and so to a radius of 0.
    radius = tl.sqrt_rn(-2.0 * _logarithm(uniform))
    cosine, sine = _cos_sin(angle)
    return radius * cosine, radius * sine


@triton.jit
def normals(first, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, GROUPS: tl.constexpr):
    """Lanes 0 .. 15, each float32 [16 * GROUPS], of the groups from `first`; see `elements`."""
    counter = first * 16 + tl.arange(0, 16 * GROUPS)
    w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15 = chacha(
        counter, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, False
    )
    u0, u1, u2, u3 = _uniform(w0), _uniform(w1), _uniform(w2), _uniform(w3)
    u4, u5, u6, u7 = _uniform(w4), _uniform(w5), _uniform(w6), _uniform(w7)
    smallest = tl.minimum(tl.minimum(tl.minimum(u0, u1), tl.minimum(u2, u3)), tl.minimum(u4, u5))
    smallest = tl.min(tl.minimum(smallest, tl.minimum(u6, u7)), axis=0)
    if smallest < 1.52587890625e-05:  # RARE / 2^32
        e0, e1, e2, e3, e4, e5, e6, e7, _e8, _e9, _e10, _e11, _e12, _e13, _e14, _e15 = chacha(
            counter, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, True
        )
        u0, u1, u2, u3 = (
            _refined(u0, w0, e0),
            _refined(u1, w1, e1),
            _refined(u2, w2, e2),
            _refined(u3, w3, e3),
        )
        u4, u5, u6, u7 = (
            _refined(u4, w4, e4),
            _refined(u5, w5, e5),
            _refined(u6, w6, e6),
            _refined(u7, w7, e7),
        )
    c0, s0 = _pair(u0, w8)
    c1, s1 = _pair(u1, w9)
    c2, s2 = _pair(u2, w10)
    c3, s3 = _pair(u3, w11)
    c4, s4 = _pair(u4, w12)
    c5, s5 = _pair(u5, w13)
    c6, s6 = _pair(u6, w14)
    c7, s7 = _pair(u7, w15)
    return c0, c1, c2, c3, c4, c5, c6, c7, s0, s1, s2, s3, s4, s5, s6, s7


@triton.jit
def elements(first, start, LANE: tl.constexpr, GROUPS: tl.constexpr):
    """Indices, counted from `start`, of a lane's elements: int64 [16 * GROUPS]."""
    b = tl.arange(0, 16 * GROUPS)
    return (first * 256 - start.to(tl.int64)) + (b // 16 * 256 + LANE * 16 + b % 16)


@triton.jit
def _earlier(n0, n1, j):
    """The nonce of the step that lies j before; the step is at least j, so that the stream stays the same."""
    nonce = ((n1.to(tl.int64) << 32) | (n0.to(tl.int64) & 0xFFFFFFFF)) - j
    return nonce.to(tl.int32), (nonce >> 32).to(tl.int32)


@triton.jit
def step_normals(
    first, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, numbers_ptr, taps, GROUPS: tl.constexpr
):  # fmt: skip
    """As `normals`; with numbers, the sum over taps of this step and earlier ones, as in csrc/core/correlated.inl."""
    w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15 = normals(
        first, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, GROUPS
    )
    if numbers_ptr is not None:
        tap = tl.load(numbers_ptr)
        w0, w1, w2, w3, w4, w5, w6, w7 = (
            tap * w0, tap * w1, tap * w2, tap * w3, tap * w4, tap * w5, tap * w6, tap * w7
        )  # fmt: skip
        w8, w9, w10, w11, w12, w13, w14, w15 = (
            tap * w8, tap * w9, tap * w10, tap * w11, tap * w12, tap * w13, tap * w14, tap * w15
        )  # fmt: skip
        for j in range(1, taps):
            low, high = _earlier(n0, n1, j)
            z = normals(first, k0, k1, k2, k3, k4, k5, k6, k7, low, high, GROUPS)
            tap = tl.load(numbers_ptr + j)
            w0, w1, w2, w3 = w0 + tap * z[0], w1 + tap * z[1], w2 + tap * z[2], w3 + tap * z[3]
            w4, w5, w6, w7 = w4 + tap * z[4], w5 + tap * z[5], w6 + tap * z[6], w7 + tap * z[7]
            w8, w9, w10, w11 = w8 + tap * z[8], w9 + tap * z[9], w10 + tap * z[10], w11 + tap * z[11]
            w12, w13, w14, w15 = w12 + tap * z[12], w13 + tap * z[13], w14 + tap * z[14], w15 + tap * z[15]
    return w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15


@triton.jit
def pass_state(w, numbers_ptr, taps, state_ptr, slots, stride, i, inside):
    """One lane's noise less the weighted state, which moves on; numbers are taps, weights, decays and gains."""
    if state_ptr is not None:
        weights_ptr = numbers_ptr + taps
        for k in range(slots):
            weight = tl.load(weights_ptr + k)
            at = state_ptr + k * stride.to(tl.int64) + i
            if weight != 0.0:
                w = w - weight * tl.load(at, mask=inside, other=0.0)
        for k in range(slots):
            decay = tl.load(weights_ptr + slots + k)
            gain = tl.load(weights_ptr + 2 * slots + k)
            at = state_ptr + k * stride.to(tl.int64) + i
            # Unless decay is 1 and gain 0; the interpreter cannot join two conditions.
            if tl.abs(decay - 1.0) + tl.abs(gain) != 0.0:
                fresh = gain * w
                if decay != 0.0:
                    fresh = decay * tl.load(at, mask=inside, other=0.0) + fresh
                tl.store(at, fresh, mask=inside)
    return w


@triton.jit
def _add(
    tensor_ptr, first, start, count, z, noise_std, numbers_ptr, taps, state_ptr, slots, stride,
    LANE: tl.constexpr, GROUPS: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    i = elements(first, start, LANE, GROUPS)
    inside = (i >= 0) & (i < count)
    if FILL:
        tl.store(tensor_ptr + i, z, mask=inside)
    else:
        w = pass_state(z, numbers_ptr, taps, state_ptr, slots, stride, i, inside)
        before = tl.load(tensor_ptr + i, mask=inside, other=0.0)
        tl.store(tensor_ptr + i, before + noise_std * w, mask=inside)


@triton.jit(do_not_specialize=PLACE)
def _noise_kernel(
    tensor_ptr, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, start, count, noise_std, numbers_ptr, taps, state_ptr, slots,
    stride, GROUPS: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    first = start.to(tl.int64) // 256 + tl.program_id(0).to(tl.int64) * GROUPS
    z = step_normals(first, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, numbers_ptr, taps, GROUPS)
    for lane in tl.static_range(16):
        _add(
            tensor_ptr, first, start, count, z[lane], noise_std, numbers_ptr, taps, state_ptr, slots, stride, lane,
            GROUPS, FILL,
        )  # fmt: skip


@triton.jit(do_not_specialize=PLACE)
def _words_kernel(
    out_ptr, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, start, count, BLOCKS: tl.constexpr
):  # fmt: skip
    """Raw words of whole blocks from block `start`, for tests: int32 [count, 16]."""
    b = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    words = chacha(start.to(tl.int64) + b, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, False)
    for w in tl.static_range(16):
        tl.store(out_ptr + b * 16 + w, words[w].to(tl.int32, bitcast=True), mask=b < count)


@triton.jit(do_not_specialize=PLACE)
def _uniform_kernel(
    out_ptr, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, start, count, BLOCKS: tl.constexpr
):  # fmt: skip
    """Upper 24 bits of words `start`, start + 1, ... as numbers in [0, 1)."""
    first = start.to(tl.int64) // 16 + tl.program_id(0).to(tl.int64) * BLOCKS
    block = first + tl.arange(0, BLOCKS)
    words = chacha(block, k0, k1, k2, k3, k4, k5, k6, k7, n0, n1, False)
    for w in tl.static_range(16):
        i = block * 16 + w - start
        uniform = (words[w] >> 8).to(tl.float32) * 5.960464477539063e-08  # 2^-24
        tl.store(out_ptr + i, uniform, mask=(i >= 0) & (i < count))


def place(key: bytes, stream: int, step: int) -> tuple[int, ...]:
    """Ten signed 32-bit words: the key and the nonce."""
    whole = key + (stream << 48 | step).to_bytes(8, "little")
    return tuple(int.from_bytes(whole[i : i + 4], "little", signed=True) for i in range(0, 40, 4))


def grid(start: int, count: int) -> tuple[int]:
    """Programs that cover the groups of elements ``start .. start + count``."""
    return (ceil_div(-(-(start + count) // 256) - start // 256, GROUPS),)


@functools.lru_cache(maxsize=1024)
def _numbers(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    # Kept, since a copy to the device would wait for it: a schedule has few different steps.
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def correlated(
    correlation: Correlation | None, device: torch.device
) -> tuple[Tensor | None, int, Tensor | None, int, int]:
    """Arguments ``numbers_ptr, taps, state_ptr, slots, stride`` of the kernels."""
    if correlation is None:
        return None, 0, None, 0, 0
    c = correlation
    numbers = _numbers((*c.taps, *c.weights, *c.decays, *c.gains), device)
    stride = 0 if c.state is None else c.state.stride(0)
    return numbers, len(c.taps), c.state, len(c.weights), stride


def gaussian_noise(out: Tensor, key: bytes, stream: int, step: int, start: int) -> None:
    _run(out, key, stream, step, start, 1.0, None, fill=True)


def uniform_noise(out: Tensor, key: bytes, stream: int, step: int, start: int) -> None:
    count = len(out)
    if count == 0:
        return
    blocks = ceil_div(start + count, 16) - start // 16
    with on(out):
        _uniform_kernel[(ceil_div(blocks, 64),)](
            out, *place(key, stream, step), start, count, BLOCKS=64, num_warps=2, **UNFUSED
        )
    written(out)


def add_gaussian_noise_(
    tensor: Tensor,
    key: bytes,
    stream: int,
    step: int,
    start: int,
    noise_std: float,
    correlation: Correlation | None = None,
) -> None:
    _run(tensor, key, stream, step, start, noise_std, correlation, fill=False)


def chacha20_blocks(
    key: bytes, stream: int, step: int, start: int, count: int, device: Any = "cpu"
) -> Tensor:
    """Words of the blocks ``start .. start + count`` as signed int32 [count, 16]."""
    out = torch.empty(count, 16, dtype=torch.int32, device=device)
    with on(out):
        _words_kernel[(ceil_div(count, 64),)](
            out, *place(key, stream, step), start, count, BLOCKS=64, **UNFUSED
        )
    return out


def _run(
    tensor: Tensor,
    key: bytes,
    stream: int,
    step: int,
    start: int,
    noise_std: float,
    correlation: Correlation | None,
    *,
    fill: bool,
) -> None:
    if len(tensor) == 0:
        return
    with on(tensor):
        _noise_kernel[grid(start, len(tensor))](
            *(tensor, *place(key, stream, step), start, len(tensor), noise_std),
            *correlated(correlation, tensor.device),
            GROUPS=GROUPS,
            FILL=fill,
            num_warps=2,
            **UNFUSED,
        )
    written(tensor, None if correlation is None else correlation.state)
