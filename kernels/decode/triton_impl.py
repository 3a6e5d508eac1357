"""Triton kernels of samplers. sums [N, p], weights of blocks [p, p]; head [V, p], columns [N, k].

A row's numbers do not depend on which rows there are beside it: blocks have one shape whatever N is, no argument that
tells of N or of a row's place in memory is compiled in, and inner products of fp32 are added up in the order of their
terms, never by TF32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from synthward.kernels._select import written
from synthward.kernels._triton import FUSED, block, ceil_div, exact_dot, on

if TYPE_CHECKING:
    from synthward.kernels.decode import ResidualWeights

# Rows of a program that multiplies, and terms that it takes at a time; rows and columns of one that does not.
_ROWS, _TERMS = 64, 16
_FEW_ROWS, _COLUMNS = 4, 256
# Fewest and most tokens of a column that are held at once: with more, its logits are computed three times.
_FEWEST, _MOST = 16, 128
_NONE = tl.constexpr(1 << 62)


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit(do_not_specialize=("rows",), do_not_specialize_on_alignment=("sums_ptr", "values_ptr"))
def _first_layer_kernel(
    sums_ptr, common_ptr, values_ptr, value_weights_ptr, out_ptr, rows, p, numbers, across,
    BR: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    work = tl.program_id(0).to(tl.int64)
    n = work // across * BR + tl.arange(0, BR)
    col = (work % across * BP).to(tl.int32) + tl.arange(0, BP)
    inside = (n[:, None] < rows) & (col < p)
    x = tl.load(sums_ptr + n[:, None] * p + col, mask=inside, other=0.0).to(tl.float32)  # [BR, BP]
    x += tl.load(common_ptr + col, mask=col < p, other=0.0).to(tl.float32)
    for c in range(numbers):
        value = tl.load(values_ptr + n * numbers + c, mask=n < rows, other=0.0).to(tl.float32)
        weight = tl.load(value_weights_ptr + c * p + col, mask=col < p, other=0.0).to(tl.float32)
        x += value[:, None] * weight
    tl.store(out_ptr + n[:, None] * p + col, _silu(x), mask=inside)


@triton.jit
def _statistics(x_ptr, n, rows, p, eps, BR: tl.constexpr, BK: tl.constexpr):
    """Mean and 1 / standard deviation of rows n, fp32 [BR]."""
    sums = tl.zeros((BR, BK), tl.float32)
    for k in range(0, p, BK):
        col = k + tl.arange(0, BK)
        inside = (n[:, None] < rows) & (col < p)
        sums += tl.load(x_ptr + n[:, None] * p + col, mask=inside, other=0.0)
    mean = tl.sum(sums, axis=1) / p
    squares = tl.zeros((BR, BK), tl.float32)
    for k in range(0, p, BK):
        col = k + tl.arange(0, BK)
        inside = (n[:, None] < rows) & (col < p)
        x = tl.load(x_ptr + n[:, None] * p + col, mask=inside, other=0.0)
        centred = tl.where(inside, x - mean[:, None], 0.0)
        squares += centred * centred
    return mean, tl.math.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, axis=1) / p + eps))


@triton.jit
def _normalized(x_ptr, scale_ptr, shift_ptr, mean, rstd, n, col, rows, p):
    """Columns of the norm of rows, fp32 [BR, BK]; what is outside is 0."""
    inside = (n[:, None] < rows) & (col < p)
    x = tl.load(x_ptr + n[:, None] * p + col, mask=inside, other=0.0)
    scale = tl.load(scale_ptr + col, mask=col < p, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + col, mask=col < p, other=0.0).to(tl.float32)
    return tl.where(inside, (x - mean[:, None]) * rstd[:, None] * scale + shift, 0.0)


@triton.jit(do_not_specialize=("rows",))
def _residual_kernel(
    x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, out_ptr, rows, p, across, eps,
    BR: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    """BP columns of ``x + silu(linear(norm(x)))``."""
    work = tl.program_id(0).to(tl.int64)
    n = work // across * BR + tl.arange(0, BR)
    j = (work % across * BP).to(tl.int32) + tl.arange(0, BP)
    mean, rstd = _statistics(x_ptr, n, rows, p, eps, BR, STATISTICS)
    acc = tl.zeros((BR, BP), tl.float32)
    for k in range(0, p, BK):
        col = k + tl.arange(0, BK)
        y = _normalized(x_ptr, scale_ptr, shift_ptr, mean, rstd, n, col, rows, p)
        weight = tl.load(
            weight_ptr + j[None, :].to(tl.int64) * p + col[:, None],
            mask=(col[:, None] < p) & (j < p),
            other=0.0,
        )  # [BK, BP]
        acc = exact_dot(y, weight.to(tl.float32), acc)
    inside = (n[:, None] < rows) & (j < p)
    place = n[:, None] * p + j
    bias = tl.load(bias_ptr + j, mask=j < p, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + place, mask=inside, other=0.0)
    tl.store(out_ptr + place, x + _silu(acc + bias), mask=inside)


@triton.jit(do_not_specialize=("rows",))
def _last_norm_kernel(x_ptr, scale_ptr, shift_ptr, out_ptr, rows, p, eps, BR: tl.constexpr, BK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    mean, rstd = _statistics(x_ptr, n, rows, p, eps, BR, BK)
    for k in range(0, p, BK):
        col = k + tl.arange(0, BK)
        y = _normalized(x_ptr, scale_ptr, shift_ptr, mean, rstd, n, col, rows, p)
        tl.store(out_ptr + n[:, None] * p + col, y, mask=(n[:, None] < rows) & (col < p))


@triton.jit(do_not_specialize=("rows",), do_not_specialize_on_alignment=("x_ptr", "out_ptr"))
def _linear_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, rows, p, outputs, across,
    BR: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    work = tl.program_id(0).to(tl.int64)
    n = work // across * BR + tl.arange(0, BR)
    j = (work % across * BP).to(tl.int32) + tl.arange(0, BP)
    acc = tl.zeros((BR, BP), tl.float32)
    for k in range(0, p, BK):
        col = k + tl.arange(0, BK)
        x = tl.load(x_ptr + n[:, None] * p + col, mask=(n[:, None] < rows) & (col < p), other=0.0)
        weight = tl.load(
            weight_ptr + j[None, :].to(tl.int64) * p + col[:, None],
            mask=(col[:, None] < p) & (j < outputs),
            other=0.0,
        )  # [BK, BP]
        acc = exact_dot(x.to(tl.float32), weight.to(tl.float32), acc)
    bias = tl.load(bias_ptr + j, mask=j < outputs, other=0.0).to(tl.float32)
    tl.store(out_ptr + n[:, None] * outputs + j, acc + bias, mask=(n[:, None] < rows) & (j < outputs))


@triton.jit
def _column(columns_ptr, offsets_ptr, place, kinds, tokens):
    """First token of the column that is asked for there and the one after its last, never outside the head; both 0
    for what is no column."""
    column = tl.load(columns_ptr + place)
    is_one = (column >= 0) & (column < kinds)
    column = tl.where(is_one, column, 0)
    first = tl.minimum(tl.maximum(tl.load(offsets_ptr + column), 0), tokens)
    last = tl.minimum(tl.maximum(tl.load(offsets_ptr + column + 1), first), tokens)
    return tl.where(is_one, first, 0), tl.where(is_one, last, 0)


@triton.jit
def _logits(features_ptr, weight_ptr, bias_ptr, first, last, p, BT: tl.constexpr, BK: tl.constexpr):
    """Logits of the tokens from `first`, fp32 [BT]; minus infinity behind the last."""
    token = first + tl.arange(0, BT)
    inside = token < last
    products = tl.zeros((BT, BK), tl.float32)
    for k in range(0, p, BK):
        col = k + tl.arange(0, BK)
        x = tl.load(features_ptr + col, mask=col < p, other=0.0).to(tl.float32)
        place = token[:, None] * p + col
        weight = tl.load(weight_ptr + place, mask=inside[:, None] & (col < p), other=0.0)
        products += weight.to(tl.float32) * x[None, :]
    logits = tl.sum(products, axis=1) + tl.load(bias_ptr + token, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, logits, float("-inf"))


@triton.jit
def _shares(logits, top):
    """Exponentials, fp64; 0 where they are no number."""
    share = tl.exp(logits - top)
    return tl.where(share > 0.0, share, 0.0).to(tl.float64)


@triton.jit
def _find(share, below, target, token, drawn, last_drawn):
    """The first token, if none was before, whose cumulated share exceeds the target; the last that has a share."""
    exceeds = (below + tl.cumsum(share, axis=0) > target) & (share > 0.0)
    here = tl.min(tl.where(exceeds, token, _NONE), axis=0)
    return tl.minimum(drawn, here), tl.maximum(last_drawn, tl.max(tl.where(share > 0.0, token, 0), axis=0))


@triton.jit(
    do_not_specialize=("count",),
    do_not_specialize_on_alignment=("features_ptr", "columns_ptr", "uniforms_ptr", "tokens_ptr"),
)
def _draw_kernel(
    features_ptr, weight_ptr, bias_ptr, offsets_ptr, columns_ptr, uniforms_ptr, tokens_ptr, count, p, kinds, tokens,
    BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One token of one row, -1 if the column that is asked for is none."""
    work = tl.program_id(0).to(tl.int64)
    first, last = _column(columns_ptr, offsets_ptr, work, kinds, tokens)
    uniform = tl.load(uniforms_ptr + work).to(tl.float64)
    features_ptr += work // count * p
    token = tl.arange(0, BT).to(tl.int64)
    drawn = tl.full((), _NONE, tl.int64)
    last_drawn = tl.zeros((), tl.int64)
    below = tl.zeros((), tl.float64)
    if last - first <= BT:
        logits = _logits(features_ptr, weight_ptr, bias_ptr, first, last, p, BT, BK)
        share = _shares(logits, tl.max(logits, axis=0))
        target = uniform * tl.sum(share, axis=0)
        drawn, last_drawn = _find(share, below, target, token, drawn, last_drawn)
    else:
        tops = tl.full((BT,), float("-inf"), tl.float32)
        for at in range(first, last, BT):
            tops = tl.maximum(tops, _logits(features_ptr, weight_ptr, bias_ptr, at, last, p, BT, BK))
        top = tl.max(tops, axis=0)
        total = tl.zeros((), tl.float64)
        for at in range(first, last, BT):
            share = _shares(_logits(features_ptr, weight_ptr, bias_ptr, at, last, p, BT, BK), top)
            total += tl.sum(share, axis=0)
        target = uniform * total
        for at in range(first, last, BT):
            share = _shares(_logits(features_ptr, weight_ptr, bias_ptr, at, last, p, BT, BK), top)
            drawn, last_drawn = _find(share, below, target, at - first + token, drawn, last_drawn)
            below += tl.sum(share, axis=0)
    # A sum that rounding leaves below the target belongs to the last token that has a share.
    token_drawn = tl.where(drawn < _NONE, drawn, last_drawn)
    tl.store(tokens_ptr + work, tl.where(last > first, token_drawn, -1))


@triton.jit(
    do_not_specialize=("count",),
    do_not_specialize_on_alignment=("columns_ptr", "tokens_ptr", "sums_ptr"),
)
def _add_kernel(
    columns_ptr,
    offsets_ptr,
    tokens_ptr,
    added_ptr,
    sums_ptr,
    count,
    width,
    across,
    kinds,
    tokens,
    BP: tl.constexpr,
):
    """To some columns of a row of the sums, the rows of its tokens, one after the other."""
    work = tl.program_id(0).to(tl.int64)
    row = work // across
    col = (work % across * BP).to(tl.int32) + tl.arange(0, BP)
    place = sums_ptr + row * width + col
    total = tl.load(place, mask=col < width, other=0.0).to(tl.float32)
    for j in range(count):
        first, _last = _column(columns_ptr, offsets_ptr, row * count + j, kinds, tokens)
        token = tl.load(tokens_ptr + row * count + j)
        taken = col < tl.where(token >= 0, width, 0)
        at = (first + tl.maximum(token, 0)) * width + col
        total += tl.load(added_ptr + at, mask=taken, other=0.0).to(tl.float32)
    tl.store(place, total.to(sums_ptr.dtype.element_ty), mask=col < width)


def residual_features(
    sums: Tensor, common: Tensor, values: Tensor, value_weights: Tensor, network: ResidualWeights
) -> Tensor:
    rows, p = sums.shape
    out = torch.empty(rows, p, dtype=torch.float32, device=sums.device)
    if 0 in (rows, p):
        return out
    sums, common, values, value_weights = map(_dense, (sums, common, values, value_weights))
    weights, biases, scales, shifts = map(_dense, network.tensors())
    blocks = len(weights)
    wide, narrow = block(p, 16, _COLUMNS), block(p, 16, 64)
    with on(sums):
        # Each as aligned as memory is given, whatever N: a load's width decides in which order a row is added up.
        x, y = torch.empty_like(out), torch.empty_like(out)
        across = ceil_div(p, wide)
        _first_layer_kernel[(ceil_div(rows, _FEW_ROWS) * across,)](
            *(sums, common, values, value_weights, x, rows, p, values.shape[1], across),
            BR=_FEW_ROWS,
            BP=wide,
            **FUSED,
        )
        across = ceil_div(p, narrow)
        for layer in range(blocks):
            _residual_kernel[(ceil_div(rows, _ROWS) * across,)](
                *(
                    x,
                    weights[layer],
                    biases[layer],
                    scales[layer],
                    shifts[layer],
                    y,
                    rows,
                    p,
                    across,
                    network.eps,
                ),
                **{"BR": _ROWS, "BP": narrow, "BK": _TERMS, "STATISTICS": narrow},
                **FUSED,
            )
            x, y = y, x
        _last_norm_kernel[(ceil_div(rows, _FEW_ROWS),)](
            *(x, scales[blocks], shifts[blocks], out, rows, p, network.eps), BR=_FEW_ROWS, BK=wide, **FUSED
        )
    return out


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows, p, outputs = *x.shape, len(weight)
    out = torch.empty(rows, outputs, dtype=torch.float32, device=x.device)
    if 0 not in (rows, outputs):
        width = block(outputs, 16, 64)
        across = ceil_div(outputs, width)
        with on(x):
            _linear_kernel[(ceil_div(rows, _ROWS) * across,)](
                *(_dense(x), _dense(weight), _dense(bias), out, rows, p, outputs, across),
                **{"BR": _ROWS, "BP": width, "BK": _TERMS},
                **FUSED,
            )
    return out


def draw_tokens(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    offsets: Tensor,
    columns: Tensor,
    uniforms: Tensor,
    added: Tensor | None,
    sums: Tensor | None,
) -> Tensor:
    """As `synthward.kernels.draw_tokens`. On a device nobody looks at offsets and columns before; what they name
    outside of the head is not read, and the token of what is no column is -1."""
    rows, count = columns.shape
    tokens = torch.empty(rows, count, dtype=torch.int64, device=columns.device)
    kinds, vocabulary = len(offsets) - 1, len(weight)
    if 0 in (rows, count):
        return tokens
    if 0 in (kinds, vocabulary):
        return tokens.fill_(-1)
    features, weight, bias, offsets, columns, uniforms = map(
        _dense, (features, weight, bias, offsets, columns, uniforms)
    )
    with on(features):
        # Most columns have no more than twice as many tokens as they have on average.
        held = block(ceil_div(2 * vocabulary, kinds), _FEWEST, _MOST)
        p = features.shape[1]
        _draw_kernel[(rows * count,)](
            *(features, weight, bias, offsets, columns, uniforms, tokens, count, p, kinds, vocabulary),
            **{"BT": held, "BK": block(p, 16, max(1024 // held, 16))},
            num_warps=1 if held <= 32 else 2,
            **FUSED,
        )
        if added is not None and sums is not None and sums.shape[1]:
            width = sums.shape[1]
            wide = block(width, 16, _COLUMNS)
            across = ceil_div(width, wide)
            _add_kernel[(rows * across,)](
                *(columns, offsets, tokens, _dense(added), sums, count, width, across, kinds, vocabulary),
                BP=wide,
                num_warps=2,
                **FUSED,
            )
    written(sums)
    return tokens


def _dense(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous()
