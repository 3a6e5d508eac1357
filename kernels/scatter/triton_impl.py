"""Triton kernels of the scatter family. ids [N], output_grads g [N, p], offsets [U + 1]; every sum in fp64.

Rows are sorted by key (table row, or unit and table row), which brings those that add up together: a run. A program
adds up the runs in SPAN sorted rows. A run that goes on in the next span leaves a fragment in each, and the program of
the span that it begins in adds these up afterwards, in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from synthward.kernels._select import written
from synthward.kernels._triton import FUSED, add_totals, block, ceil_div, on

# Sorted rows that one program adds up one after the other.
SPAN = 32
# Keys of norms: unit in the high half, table row in the low one.
_BITS = 32
_PADDING = (1 << _BITS) - 1
_BEYOND = _PADDING - 1
_MASK = tl.constexpr(_PADDING)
_TOO_LARGE = tl.constexpr(_BEYOND)


@triton.jit
def _is_row(key, SQUARE: tl.constexpr):
    """Whether the key names a row of the table; otherwise it is padding."""
    return (key & _MASK) != _MASK if SQUARE else key >= 0


@triton.jit
def _finish(out_ptr, key, at, col, plane, total, rows, p, table, really, SQUARE: tl.constexpr):
    """If `really`: the sum of a run is complete; `at` is one of its sorted rows."""
    if SQUARE:
        whole = tl.sum(total * total, axis=0)
        # Table rows that the key has no room for may have met others: such a unit gets no norm at all.
        whole = tl.where((key & _MASK) == _TOO_LARGE, float("nan"), whole)
        tl.store(out_ptr + plane * rows + at, whole, mask=really)
    else:
        taken = really & (key >= 0) & (key < table)
        inside = col < tl.where(taken, p, 0)
        place = tl.where(taken, key, 0) * p + col
        before = tl.load(out_ptr + place, mask=inside, other=0.0).to(tl.float64)
        tl.store(out_ptr + place, (before + total).to(tl.float32), mask=inside)


@triton.jit
def _runs_kernel(
    keys_ptr, order_ptr, g_ptr, weights_ptr, out_ptr, fragments_ptr, rows, p, across, table,
    SPAN: tl.constexpr, BP: tl.constexpr, SQUARE: tl.constexpr,
):  # fmt: skip
    work = tl.program_id(0).to(tl.int64)
    plane = work % across
    span = work // across
    col = plane * BP + tl.arange(0, BP)
    top = span * SPAN
    end = tl.minimum(top + SPAN, rows)
    fragments = fragments_ptr + span * 2 * across * BP + col  # [BP]
    behind = across * BP
    total = tl.zeros((BP,), tl.float64)
    begin = top
    key = tl.load(keys_ptr + top)
    goes_on = (top > 0) & (tl.load(keys_ptr + tl.maximum(top - 1, 0)) == key)  # from the span before
    for at in range(top, end):
        now = tl.load(keys_ptr + at)
        if now != key:
            tl.store(fragments, total, mask=col < tl.where(goes_on, behind, 0))
            _finish(out_ptr, key, begin, col, plane, total, rows, p, table, goes_on == 0, SQUARE)
            total = tl.zeros((BP,), tl.float64)
            goes_on = now == key
            begin = at
            key = now
        row = tl.load(order_ptr + at)
        live = _is_row(now, SQUARE)
        if weights_ptr is None:
            g = tl.load(g_ptr + row * p + col, mask=col < tl.where(live, p, 0), other=0.0).to(tl.float64)
            total += g
        else:
            w = tl.load(weights_ptr + row)
            # A row of weight zero is not read: what it holds may not be finite.
            live = live & (w != 0.0)
            g = tl.load(g_ptr + row * p + col, mask=col < tl.where(live, p, 0), other=0.0).to(tl.float64)
            total += g * w.to(tl.float64)
    more = (end < rows) & (tl.load(keys_ptr + tl.minimum(end, rows - 1)) == key)  # in the next span
    tl.store(fragments, total, mask=col < tl.where(goes_on, behind, 0))
    tl.store(fragments + behind, total, mask=col < tl.where(more & (goes_on == 0), behind, 0))
    _finish(out_ptr, key, begin, col, plane, total, rows, p, table, (goes_on | more) == 0, SQUARE)


@triton.jit
def _seams_kernel(
    keys_ptr, out_ptr, fragments_ptr, rows, p, across, table,
    SPAN: tl.constexpr, BP: tl.constexpr, SQUARE: tl.constexpr,
):  # fmt: skip
    """The run that goes on in this span, if it ends here: its fragments, from the span in which it begins."""
    work = tl.program_id(0).to(tl.int64)
    plane = work % across
    span = work // across
    col = plane * BP + tl.arange(0, BP)
    end = (span + 1) * SPAN
    if end < rows:
        key = tl.load(keys_ptr + end - 1)
        more = tl.load(keys_ptr + end) == key
        begins_here = (span == 0) | (tl.load(keys_ptr + tl.maximum(span * SPAN - 1, 0)) != key)
        if more & begins_here:
            total = tl.load(fragments_ptr + (span * 2 + 1) * across * BP + col)
            following = span + 1
            while more:
                total += tl.load(fragments_ptr + following * 2 * across * BP + col)
                following += 1
                top = following * SPAN
                more = (top < rows) & (tl.load(keys_ptr + tl.minimum(top, rows - 1)) == key)
            _finish(out_ptr, key, end - 1, col, plane, total, rows, p, table, following > span, SQUARE)


def scatter_sq_norms(
    ids: Tensor, output_grads: Tensor, offsets: Tensor | None, out: Tensor, *, span: int = SPAN
) -> None:
    rows, p = output_grads.shape
    if 0 in (rows, p, len(out)):
        return
    with on(ids):
        place = torch.arange(rows, device=ids.device)
        unit = place if offsets is None else torch.searchsorted(offsets[1:], place, right=True)
        keys = (unit << _BITS) | torch.where(ids < 0, _PADDING, ids.clamp(max=_BEYOND))
        # Unit first: the rows of a unit stay between its offsets.
        keys, order = (keys, place) if offsets is None else torch.sort(keys, stable=True)
        planes = ceil_div(p, _width(p))
        partials = torch.zeros(planes, rows, dtype=torch.float64, device=ids.device)
        _add_runs(keys, order, output_grads, None, partials, 0, span)
        add_totals(out, partials, offsets=offsets, rows=rows, planes=planes)
    written(out)


def scatter_weighted_sum(
    ids: Tensor, output_grads: Tensor, row_weights: Tensor, out: Tensor, *, span: int = SPAN
) -> None:
    """An id beyond the table stops the program; on a device, where waiting would cost more, at a later call."""
    rows, p = output_grads.shape
    if rows == 0:
        return
    if not ids.is_cuda and bool((ids >= len(out)).any()):
        raise ValueError("ids: name a row beyond the table")
    if p == 0:
        return
    with on(ids):
        if ids.is_cuda:
            torch._assert_async((ids < len(out)).all(), "ids: name a row beyond the table")
        keys, order = torch.sort(ids, stable=True)
        _add_runs(keys, order, output_grads, row_weights.contiguous(), out, len(out), span)
    written(out)


def _width(p: int) -> int:
    """Columns of one program."""
    return block(p, 16, 256)


def _add_runs(
    keys: Tensor, order: Tensor, grads: Tensor, weights: Tensor | None, out: Tensor, table: int, span: int
) -> None:
    """Without weights squares of runs into `out` [planes, N], with them sums into its rows [V, p]."""
    grads = grads.detach().contiguous()
    rows, p = grads.shape
    width = _width(p)
    across, spans = ceil_div(p, width), ceil_div(rows, span)
    fragments = torch.empty(spans, 2, across, width, dtype=torch.float64, device=keys.device)
    shape = {"SPAN": span, "BP": width, "SQUARE": weights is None}
    _runs_kernel[(spans * across,)](
        *(keys, order, grads, weights, out, fragments, rows, p, across, table), **shape, **FUSED
    )
    _seams_kernel[(spans * across,)](keys, out, fragments, rows, p, across, table, **shape, **FUSED)
