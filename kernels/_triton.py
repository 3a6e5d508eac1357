"""What the Triton kernels share. Only `triton_impl` modules import this file: Triton is optional.

Every kernel writes partial results to places that shapes alone decide, and a second kernel adds them up in a fixed
order: no atomics, so the same input gives the same bits. Nothing here waits for the device.

A unit is cut into slots of STEP rows. Unit u owns the slots from ``offsets[u] // STEP + u`` to the next unit's first:
at least as many as it needs, so that neither their places nor their number depends on a sum over other units.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor

# Whether kernels run in Triton's interpreter, on tensors in CPU memory. Fixed when they are decorated.
INTERPRETED = bool(triton.knobs.runtime.interpret)

# Said at every launch, since Triton's default changes: whether a product and a sum may become one instruction.
FUSED, UNFUSED = {"enable_fp_fusion": True}, {"enable_fp_fusion": False}


def ceil_div(amount: int, size: int) -> int:
    return -(-amount // size)


def block(length: int, low: int, high: int) -> int:
    """Power of two that covers `length`, within limits."""
    return max(low, min(high, 1 << max(length - 1, 0).bit_length()))


def on(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device; make it the tensor's."""
    return torch.cuda.device_of(tensor)


def processors(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's device; a small number in the interpreter."""
    return _processors(tensor.device.index or 0) if tensor.is_cuda else 3


@functools.cache
def _processors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def exact_dot(x, y, acc):
    """``acc + x @ y`` in fp32 with products as exact as the operands allow: never TF32."""
    if _INTERPRETED:
        # The interpreter multiplies bf16 as if their bits were integers.
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, acc, input_precision="ieee")


@triton.jit
def to_bf16(x):
    """The nearest bf16, ties to even."""
    if _INTERPRETED:
        # The interpreter cuts digits off; so they are made zeros before.
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(tl.abs(x) < float("inf"), nearest.to(tl.float32, bitcast=True), x)
    return x.to(tl.bfloat16)


@triton.jit
def segment(offsets_ptr, unit, rows):
    """First row of a unit and the row after its last, int64, never outside the matrix whatever offsets hold."""
    first = tl.minimum(tl.maximum(tl.load(offsets_ptr + unit), 0), rows).to(tl.int64)
    last = tl.minimum(tl.maximum(tl.load(offsets_ptr + unit + 1), first), rows).to(tl.int64)
    return first, last


@triton.jit
def _slots_kernel(offsets_ptr, slots_ptr, rows, STEP: tl.constexpr, BLOCK: tl.constexpr):
    unit = tl.program_id(0).to(tl.int64)
    first, last = segment(offsets_ptr, unit, rows)
    base = first // STEP + unit
    end = last // STEP + unit + 1
    for at in range(base, end, BLOCK):
        slot = at + tl.arange(0, BLOCK)
        tl.store(slots_ptr + slot, unit.to(tl.int32), mask=slot < end)


@triton.jit
def slot_rows(slots_ptr, offsets_ptr, slot, rows, units, STEP: tl.constexpr):
    """First row of a slot, not before its unit's, and the unit's bounds; a spare slot begins at or behind its end."""
    unit = tl.load(slots_ptr + slot).to(tl.int64)
    unit = tl.minimum(tl.maximum(unit, 0), units - 1)
    first, last = segment(offsets_ptr, unit, rows)
    # Of a slot that no unit wrote, where offsets decrease, the sum may be negative.
    return tl.maximum(first + (slot - first // STEP - unit) * STEP, first), first, last


@triton.jit
def _totals_kernel(
    partials_ptr, offsets_ptr, out_ptr, rows, width, planes, plane, STEP: tl.constexpr, BLOCK: tl.constexpr
):
    unit = tl.program_id(0).to(tl.int64)
    if offsets_ptr is None:
        base = unit * width
        end = base + width
    else:
        first, last = segment(offsets_ptr, unit, rows)
        if STEP == 0:
            base = first
            end = last
        else:
            base = first // STEP + unit
            end = last // STEP + unit + 1
    total = tl.zeros((BLOCK,), tl.float64)
    for _layer in range(planes):
        for at in range(base, end, BLOCK):
            place = at + tl.arange(0, BLOCK)
            total += tl.load(partials_ptr + place, mask=place < end, other=0.0)
        partials_ptr += plane
    # Rounding may leave a small negative number where rows cancel; a comparison keeps NaN.
    whole = tl.sum(total, axis=0)
    whole = tl.where(whole < 0.0, 0.0, whole)
    tl.store(out_ptr + unit, (tl.load(out_ptr + unit) + whole).to(tl.float32))


def slots(offsets: Tensor, rows: int, step: int) -> Tensor:
    """Unit of each slot, int32 [rows // step + U]."""
    units = len(offsets) - 1
    out = torch.empty(rows // step + units, dtype=torch.int32, device=offsets.device)
    _slots_kernel[(units,)](offsets, out, rows, STEP=step, BLOCK=64, **FUSED)
    return out


def add_totals(
    out: Tensor,
    partials: Tensor,
    *,
    offsets: Tensor | None = None,
    rows: int = 0,
    step: int = 0,
    planes: int = 1,
) -> None:
    """Add to ``out`` float32 [U] each unit's sum of float64 partial results.

    partials [planes, M]; a unit owns M / U of them; or with `offsets` those of its rows, or with `step` of its slots.
    """
    units, plane = len(out), partials.numel() // max(planes, 1)
    width = plane // units if offsets is None else 0
    _totals_kernel[(units,)](
        *(partials, offsets, out, rows, width, planes, plane),
        STEP=step,
        BLOCK=block(plane // units + 1, 32, 1024),
        **FUSED,
    )
