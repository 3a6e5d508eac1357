"""Triton kernels of the backward passes of normalisations.

Of layer norm x and g are [N, p], a mean and an rstd for each row, rows in units by offsets [U + 1]; of group norm
[N, C, L], a mean and an rstd for each group of channels. With c = x - mean and h = g * weight, over a row or a group:

    input gradient   r h + slope c + shift,  slope = -r^3 mean(h c),  shift = -r mean(h) (0 for RMS norm)

What has these means added up in one block of the program keeps x and g on the chip between the sums and the input
gradient; of what is wider a kernel before gives slope and shift, and x and g are read twice. Sums are of products in
fp64, which reading takes longer than; the input gradient is fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from synthward.kernels import _select
from synthward.kernels._triton import FUSED, block, ceil_div, on, segment, slots

# Most elements of a row or group that one program keeps; columns and elements of one beyond that; elements of a row
# that one program goes through.
_WHOLE, _COLUMNS, _TILE, _SPAN = 4096, 1024, 1024, 8192
# Rows of a unit that one program adds up: fewer where there are few, or there would be few programs.
_LEAST_ROWS, _MOST_ROWS, _PROGRAMS = 16, 64, 1024


@triton.jit
def _coefficients(sum_h, sum_hc, r, width, CENTRED: tl.constexpr):
    """(slope, shift) of the input gradient, fp32."""
    wide = r.to(tl.float64)
    slope = (-wide * wide * wide * sum_hc / width).to(tl.float32)
    shift = (-wide * sum_h / width).to(tl.float32)
    return slope, tl.where(CENTRED, shift, 0.0)


@triton.jit
def _store(out_ptr, place, value, mask):
    tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _row_factors(h, c, r, coefficients_ptr, row, live, rows, p, CENTRED: tl.constexpr):
    """Slope and shift of rows, fp32 [BR]: of the whole rows h and c [BR, BP], or from before."""
    if coefficients_ptr is None:
        exact = h.to(tl.float64)
        slope, shift = _coefficients(
            tl.sum(exact, axis=1), tl.sum(exact * c.to(tl.float64), axis=1), r, p, CENTRED
        )
    else:
        slope = tl.load(coefficients_ptr + row, mask=live, other=0.0)
        shift = tl.load(coefficients_ptr + rows + row, mask=live, other=0.0)
    return slope, shift


@triton.jit
def _keep(terms, sums_ptr, partials_ptr, unit, begin, first, last, col, p, STEP: tl.constexpr):
    """The sum of some rows of a unit [BR, BP]: to its place if these are all, else to the partial results."""
    total = tl.sum(terms, axis=0)
    whole = tl.where((last - first <= STEP) & (begin == first), p, 0)
    tl.store(sums_ptr + unit * p + col, total.to(tl.float32), mask=col < whole)
    # A unit of more rows than STEP has at least as many halves of STEP as it has slots.
    part = first // (STEP // 2) + (begin - first) // STEP
    partial = tl.where((last - first > STEP) & (begin < last), p, 0)
    tl.store(partials_ptr + part * p + col, total, mask=col < partial)


@triton.jit
def _layer_norm_kernel(
    x_ptr, g_ptr, mean_ptr, rstd_ptr, weight_ptr, coefficients_ptr, offsets_ptr, slots_ptr, order_ptr,
    dx_ptr, scale_ptr, bias_ptr, scale_partials_ptr, bias_partials_ptr, rows, units, p, across,
    STEP: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """BP columns of STEP rows of a unit, or without offsets of rows that are units."""
    work = tl.program_id(0).to(tl.int64)
    slot = work // across
    col = (work % across * BP).to(tl.int32) + tl.arange(0, BP)
    if offsets_ptr is None:
        begin = slot * STEP
        end = tl.minimum(begin + STEP, rows)
    else:
        unit = tl.minimum(tl.maximum(tl.load(slots_ptr + slot), 0).to(tl.int64), units - 1)
        first, last = segment(offsets_ptr, unit, rows)
        begin = tl.maximum(first + (slot - first // STEP - unit) * STEP, first)
        end = tl.minimum(begin + STEP, last)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + col, mask=col < p, other=0.0)
    scale = tl.zeros((BR, BP), tl.float64)
    bias = tl.zeros((BR, BP), tl.float64)
    for at in range(begin, end, BR):
        n = at + tl.arange(0, BR)  # [BR]
        live = n < end
        row = n
        if order_ptr is not None:
            row = tl.load(order_ptr + n, mask=live, other=0)
            row = tl.minimum(tl.maximum(row, 0), rows - 1)
        inside = live[:, None] & (col < p)
        place = row[:, None] * p + col
        c = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)  # [BR, BP]
        g = tl.load(g_ptr + place, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(rstd_ptr + row, mask=live, other=0.0)  # [BR]
        if mean_ptr is not None:
            c -= tl.load(mean_ptr + row, mask=live, other=0.0)[:, None]
        if dx_ptr is not None:
            h = g
            if weight_ptr is not None:
                h = g * weight
            slope, shift = _row_factors(h, c, r, coefficients_ptr, row, live, rows, p, mean_ptr is not None)
            _store(dx_ptr, place, r[:, None] * h + (slope[:, None] * c + shift[:, None]), inside)
        if scale_ptr is not None:
            product = g.to(tl.float64) * (c.to(tl.float64) * r.to(tl.float64)[:, None])
            if offsets_ptr is None:
                tl.store(scale_ptr + n[:, None] * p + col, product.to(tl.float32), mask=inside)
            else:
                scale += product
        if bias_ptr is not None:
            if offsets_ptr is None:
                tl.store(bias_ptr + n[:, None] * p + col, g, mask=inside)
            else:
                bias += g.to(tl.float64)
    if offsets_ptr is not None:
        if scale_ptr is not None:
            _keep(scale, scale_ptr, scale_partials_ptr, unit, begin, first, last, col, p, STEP)
        if bias_ptr is not None:
            _keep(bias, bias_ptr, bias_partials_ptr, unit, begin, first, last, col, p, STEP)


@triton.jit
def _add_parts(partials_ptr, out_ptr, unit, base, parts, col, p, BK: tl.constexpr, BP: tl.constexpr):
    total = tl.zeros((BP,), tl.float64)
    for at in range(0, parts, BK):
        part = at + tl.arange(0, BK)
        place = (base + part)[:, None] * p + col
        total += tl.sum(
            tl.load(partials_ptr + place, mask=(part[:, None] < parts) & (col < p), other=0.0), axis=0
        )
    tl.store(out_ptr + unit * p + col, total.to(tl.float32), mask=col < tl.where(parts > 0, p, 0))


@triton.jit
def _layer_norm_units_kernel(
    offsets_ptr, scale_ptr, bias_ptr, scale_partials_ptr, bias_partials_ptr, rows, p, across,
    STEP: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Sums of the units that had several programs, in the order of their rows."""
    work = tl.program_id(0).to(tl.int64)
    unit = work // across
    first, last = segment(offsets_ptr, unit, rows)
    col = (work % across * BP).to(tl.int32) + tl.arange(0, BP)
    base = first // (STEP // 2)
    parts = tl.where(last - first > STEP, (last - first + STEP - 1) // STEP, 0)
    if scale_ptr is not None:
        _add_parts(scale_partials_ptr, scale_ptr, unit, base, parts, col, p, BK, BP)
    if bias_ptr is not None:
        _add_parts(bias_partials_ptr, bias_ptr, unit, base, parts, col, p, BK, BP)


@triton.jit
def _group_norm_kernel(
    x_ptr, g_ptr, mean_ptr, rstd_ptr, weight_ptr, dx_ptr, scale_ptr, bias_ptr, groups, channels, length,
    BC: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """A group of `channels` channels of one record, whole."""
    group = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BC)
    j = tl.arange(0, BL)
    inside = (channel[:, None] < channels) & (j < length)
    place = (group * channels + channel)[:, None] * length + j
    mean = tl.load(mean_ptr + group).to(tl.float32)
    r = tl.load(rstd_ptr + group).to(tl.float32)
    c = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32) - mean  # [BC, BL]
    g = tl.load(g_ptr + place, mask=inside, other=0.0).to(tl.float32)
    exact = g.to(tl.float64)
    sum_g = tl.sum(exact, axis=1)  # [BC]
    sum_gc = tl.sum(exact * c.to(tl.float64), axis=1)
    tl.store(
        scale_ptr + group * channels + channel, (sum_gc * r.to(tl.float64)).to(tl.float32), channel < channels
    )
    tl.store(bias_ptr + group * channels + channel, sum_g.to(tl.float32), channel < channels)
    if dx_ptr is not None:
        h = g
        if weight_ptr is not None:
            at = group % groups * channels + channel
            weight = tl.load(weight_ptr + at, mask=channel < channels, other=0.0)
            sum_g *= weight.to(tl.float64)
            sum_gc *= weight.to(tl.float64)
            h = g * weight[:, None]
        slope, shift = _coefficients(
            tl.sum(sum_g, axis=0), tl.sum(sum_gc, axis=0), r, channels * length, True
        )
        _store(dx_ptr, place, r * h + (slope * c + shift), inside)


@triton.jit
def _row_sums_kernel(
    x_ptr, g_ptr, mean_ptr, weight_ptr, partials_ptr, rows, width, across, channels,
    SPAN: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Sums of h and of h * c over SPAN columns of some rows of x and g [rows, width]: partials [2, rows, across].

    `channels` rows share a mean; a weight, if there is one, is of a column.
    """
    tl.static_assert(SPAN % BK == 0)
    work = tl.program_id(0).to(tl.int64)
    n = work // across * BR + tl.arange(0, BR)  # [BR]
    begin = work % across * SPAN
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + n // channels, mask=n < rows, other=0.0).to(tl.float32)
    sum_h = tl.zeros((BR,), tl.float64)
    sum_hc = tl.zeros((BR,), tl.float64)
    for at in range(begin, tl.minimum(begin + SPAN, width), BK):
        col = at + tl.arange(0, BK)
        inside = (n[:, None] < rows) & (col < width)
        place = n[:, None] * width + col
        c = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)  # [BR, BK]
        h = tl.load(g_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if mean_ptr is not None:
            c -= mean[:, None]
        if weight_ptr is not None:
            h *= tl.load(weight_ptr + col, mask=col < width, other=0.0)
        exact = h.to(tl.float64)
        sum_h += tl.sum(exact, axis=1)
        sum_hc += tl.sum(exact * c.to(tl.float64), axis=1)
    place = n * across + work % across
    tl.store(partials_ptr + place, sum_h, mask=n < rows)
    tl.store(partials_ptr + rows * across + place, sum_hc, mask=n < rows)


@triton.jit
def _row_coefficients_kernel(
    partials_ptr, rstd_ptr, weight_ptr, coefficients_ptr, scale_ptr, bias_ptr,
    count, groups, channels, across, width, plane, CENTRED: tl.constexpr, BC: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    """What the sums of rows [2, plane] give: slope and shift of each group of `channels` rows, [2, count], and of
    each row scale and bias. A weight, if there is one, is of a row: `groups` groups have theirs, then again."""
    group = tl.program_id(0).to(tl.int64)
    r = tl.load(rstd_ptr + group).to(tl.float32)
    sum_h = tl.zeros((BC,), tl.float64)
    sum_hc = tl.zeros((BC,), tl.float64)
    for at in range(0, channels, BC):
        channel = at + tl.arange(0, BC)
        row = group * channels + channel
        sum_g = tl.zeros((BC,), tl.float64)
        sum_gc = tl.zeros((BC,), tl.float64)
        for piece in range(0, across, BA):
            k = piece + tl.arange(0, BA)
            inside = (channel[:, None] < channels) & (k < across)
            place = row[:, None] * across + k
            sum_g += tl.sum(tl.load(partials_ptr + place, mask=inside, other=0.0), axis=1)
            sum_gc += tl.sum(tl.load(partials_ptr + plane + place, mask=inside, other=0.0), axis=1)
        if scale_ptr is not None:
            tl.store(scale_ptr + row, (sum_gc * r.to(tl.float64)).to(tl.float32), mask=channel < channels)
            tl.store(bias_ptr + row, sum_g.to(tl.float32), mask=channel < channels)
        if weight_ptr is not None:
            at_weight = weight_ptr + group % groups * channels + channel
            weight = tl.load(at_weight, mask=channel < channels, other=0.0).to(tl.float64)
            sum_g *= weight
            sum_gc *= weight
        sum_h += sum_g
        sum_hc += sum_gc
    if coefficients_ptr is not None:
        slope, shift = _coefficients(tl.sum(sum_h, axis=0), tl.sum(sum_hc, axis=0), r, width, CENTRED)
        tl.store(coefficients_ptr + group, slope)
        tl.store(coefficients_ptr + count + group, shift)


@triton.jit
def _group_norm_grad_kernel(
    x_ptr, g_ptr, mean_ptr, rstd_ptr, weight_ptr, coefficients_ptr, dx_ptr, rows, width, across, count, groups,
    channels, SPAN: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Input gradient of SPAN elements of some channels; x and g [rows, width], a row for each record's channel."""
    tl.static_assert(SPAN % BK == 0)
    work = tl.program_id(0).to(tl.int64)
    n = work // across * BR + tl.arange(0, BR)  # [BR]
    begin = work % across * SPAN
    live = n < rows
    group = n // channels
    mean = tl.load(mean_ptr + group, mask=live, other=0.0).to(tl.float32)
    r = tl.load(rstd_ptr + group, mask=live, other=0.0).to(tl.float32)
    slope = tl.load(coefficients_ptr + group, mask=live, other=0.0)
    shift = tl.load(coefficients_ptr + count + group, mask=live, other=0.0)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + n % (groups * channels), mask=live, other=0.0)
    for at in range(begin, tl.minimum(begin + SPAN, width), BK):
        col = at + tl.arange(0, BK)
        inside = live[:, None] & (col < width)
        place = n[:, None] * width + col
        c = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32) - mean[:, None]  # [BR, BK]
        h = tl.load(g_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            h *= weight[:, None]
        _store(dx_ptr, place, r[:, None] * h + (slope[:, None] * c + shift[:, None]), inside)


def layer_norm_backward(
    x: Tensor,
    output_grads: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    offsets: Tensor | None,
    order: Tensor | None,
    units: int,
    written: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """As `synthward.kernels.layer_norm_backward`, of at least one element."""
    if units == 0:
        raise ValueError(f"offsets: there is no unit for {len(x)} rows")
    x, g, rstd = _dense(x), _dense(output_grads), _dense(rstd)
    mean, weight, offsets, order = map(_maybe_dense, (mean, weight, offsets, order))
    dx, scale, bias = written
    rows, p = x.shape
    width = block(p, 16, _WHOLE) if p <= _WHOLE else _COLUMNS
    across, step = ceil_div(p, width), _step(rows)
    together = max(1, min(step, _TILE // width))
    with on(x):
        coefficients, table, scale_parts, bias_parts = None, None, None, None
        if dx is not None and across > 1:
            sums = _row_sums(x, g, mean, weight, 1)
            coefficients = _row_coefficients(sums, rstd, None, p, mean is not None)
        if offsets is not None:
            table = slots(offsets, rows, step)
            scale_parts, bias_parts = _parts(scale, rows, step), _parts(bias, rows, step)
        programs = ceil_div(rows, step) if table is None else len(table)
        _layer_norm_kernel[(programs * across,)](
            *(x, g, mean, rstd, weight, coefficients, offsets, table, order),
            *(dx, scale, bias, scale_parts, bias_parts, rows, units, p, across),
            **{"STEP": step, "BR": together, "BP": width},
            **_launch(together * width),
        )
        if offsets is not None and rows > step:
            narrow = block(p, 16, 64)
            across = ceil_div(p, narrow)
            _layer_norm_units_kernel[(units * across,)](
                *(offsets, scale, bias, scale_parts, bias_parts, rows, p, across),
                **{"STEP": step, "BK": 16, "BP": narrow},
                **FUSED,
            )
    _select.written(*written)


def group_norm_backward(
    x: Tensor,
    output_grads: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    dx: Tensor | None,
    scale: Tensor,
    bias: Tensor,
) -> None:
    """As `synthward.kernels.group_norm_backward`, of at least one element."""
    x, g, mean, rstd, weight = *map(_dense, (x, output_grads, mean, rstd)), _maybe_dense(weight)
    (rows, channels, length), groups = x.shape, mean.shape[1]
    together = channels // groups
    high, wide = 1 << (together - 1).bit_length(), 1 << (length - 1).bit_length()
    with on(x):
        if high * wide <= _WHOLE:
            _group_norm_kernel[(rows * groups,)](
                *(x, g, mean, rstd, weight, dx, scale, bias, groups, together, length),
                **{"BC": high, "BL": wide},
                **_launch(high * wide),
            )
        else:
            sums = _row_sums(x.view(rows * channels, length), g, mean, None, together)
            coefficients = _row_coefficients(sums, rstd, weight, together * length, True, scale, bias)
            if dx is not None:
                across, shape = _spans(length)
                _group_norm_grad_kernel[(ceil_div(rows * channels, shape["BR"]) * across,)](
                    *(x, g, mean, rstd, weight, coefficients, dx),
                    *(rows * channels, length, across, rows * groups, groups, together),
                    **shape,
                    **FUSED,
                )
    _select.written(dx, scale, bias)


def _row_sums(x: Tensor, g: Tensor, mean: Tensor | None, weight: Tensor | None, channels: int) -> Tensor:
    """Sums of the pieces of rows, float64 [2, rows, pieces]: x [rows, width], a mean for `channels` rows."""
    rows, width = x.shape
    across, shape = _spans(width)
    partials = torch.empty(2, rows, across, dtype=torch.float64, device=x.device)
    _row_sums_kernel[(ceil_div(rows, shape["BR"]) * across,)](
        *(x, g, mean, weight, partials, rows, width, across, channels), **shape, **FUSED
    )
    return partials


def _row_coefficients(
    sums: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    numel: int,
    is_centred: bool,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Slope and shift of each rstd's rows, float32 [2, number of rstd], from their pieces' sums; scale and bias."""
    _, rows, across = sums.shape
    count, groups = rstd.numel(), rstd.shape[-1] if rstd.ndim == 2 else 1
    coefficients = torch.empty(2, count, dtype=torch.float32, device=sums.device)
    _row_coefficients_kernel[(count,)](
        *(sums, rstd, weight, coefficients, scale, bias),
        *(count, groups, rows // count, across, numel, rows * across),
        **{"CENTRED": is_centred, "BC": block(rows // count, 1, 64), "BA": block(across, 1, 16)},
        **FUSED,
    )
    return coefficients


def _dense(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous()


def _maybe_dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _dense(tensor)


def _step(rows: int) -> int:
    return block(ceil_div(rows, _PROGRAMS), _LEAST_ROWS, _MOST_ROWS)


def _parts(sums: Tensor | None, rows: int, step: int) -> Tensor | None:
    """Room for partial results of `sums` [U, p], float64: a row for half of `step` rows."""
    if sums is None:
        return None
    return torch.empty(rows // (step // 2), sums.shape[1], dtype=torch.float64, device=sums.device)


def _spans(width: int) -> tuple[int, dict[str, int]]:
    """Programs that a row is shared out to, and the shape of one."""
    columns = block(width, 16, _COLUMNS)
    return ceil_div(width, _SPAN), {"SPAN": _SPAN, "BR": _COLUMNS // columns, "BK": columns}


def _launch(elements: int) -> dict[str, Any]:
    """For programs of so many elements at a time."""
    return {"num_warps": max(1, min(16, elements // 256)), **FUSED}
