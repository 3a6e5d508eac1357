"""Tests of the watch over Triton's memory (`guarded`): kernels with one fault each are noticed, sound ones pass."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

pytest.importorskip("triton", reason="the package triton cannot be imported here")

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError

from synthward.kernels._triton import INTERPRETED
from tests.kernels.guarded import NANS, NUMBERS, watched, watching

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="memory is watched in Triton's interpreter alone")


@triton.jit
def _copy(x_ptr, out_ptr, count, STORES: tl.constexpr, BLOCK: tl.constexpr):
    """Copies `count` numbers; with STORES zeros behind them."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=(i < count), other=0.0)
    tl.store(out_ptr + i, x, mask=(i < count) | STORES)


@triton.jit
def _sum(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """Adds up what is not there, too."""
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(out_ptr, tl.sum(x, axis=0))


@triton.jit
def _neighbours(x_ptr, out_ptr, SHIFT: tl.constexpr):
    """Each program copies one number from x, and writes at its place or the next one."""
    i = tl.program_id(0)
    tl.store(out_ptr + i // SHIFT, tl.load(x_ptr + i))


@triton.jit
def _twice(x_ptr, BLOCK: tl.constexpr):
    """Reads again, in other threads, what it wrote."""
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i, i.to(tl.float32))
    tl.store(x_ptr + i, tl.load(x_ptr + (BLOCK - 1 - i)))


@triton.jit
def _count(out_ptr):
    tl.atomic_add(out_ptr, 1.0)


@triton.jit
def _gather(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i // 2, tl.load(x_ptr + i))


def copy(x: Tensor, out: Tensor, count: int, *, grid: int = 1, stores: bool = False) -> None:
    _copy[(grid,)](x, out, count, STORES=stores, BLOCK=16)


@pytest.mark.parametrize("count", [1, 5, 16, 31])
def test_a_sound_kernel_passes_and_its_result_comes_back(count):
    x = torch.randn(count)

    def run() -> list[Tensor]:
        out = torch.full((count,), torch.nan)
        copy(x, out, count, grid=triton.cdiv(count, 16))
        assert torch.equal(out, x)
        return [out]

    assert watched(run) == {"_copy"}


@pytest.mark.parametrize("is_exact", [True, False], ids=["by its address", "by the guard zones"])
@pytest.mark.parametrize("grid", [1, 2])
def test_a_store_without_a_mask_is_noticed(is_exact, grid):
    """One place behind the tensor, or a whole program too many."""
    count = 16 * grid - 1
    x, out = torch.ones(16 * grid), torch.zeros(count)
    with watching(NANS, is_exact=is_exact), pytest.raises(Exception, match=r"outside of|beside a tensor"):
        copy(x, out, count, grid=grid, stores=True)


def test_a_load_without_a_mask_is_noticed():
    x, out = torch.ones(15), torch.zeros(1)
    with watching(NANS), pytest.raises(InterpreterError, match="load outside of"):
        _sum[(1,)](x, out, 15, BLOCK=16)
    found = []
    for content in (NANS, NUMBERS):
        with watching(content, is_exact=False):
            _sum[(1,)](x, out, 15, BLOCK=16)
        found.append(out.clone())
    assert not torch.equal(*found), "what is not there is in the sum"


def test_a_load_that_another_tensor_would_hold_is_noticed():
    """Addresses are those of the launch alone; and gaps between rows of a tensor are none of its elements."""
    table, out = torch.ones(4, 20), torch.zeros(16)
    with watching(NANS), pytest.raises(InterpreterError, match="load outside of"):
        copy(table[:, :10], out, 16)
    with watching(NANS):
        copy(table, out, 16)


def test_a_grid_too_large_is_noticed():
    x, out = torch.ones(32), torch.zeros(32)
    with watching(NANS), pytest.raises(InterpreterError, match="load outside of"):
        copy(x, out, 48, grid=3)


def test_programs_that_write_at_one_place_are_noticed():
    x, out = torch.arange(4.0), torch.zeros(4)
    with watching(NANS):
        _neighbours[(4,)](x, out, SHIFT=1)
    assert torch.equal(out, x)
    with watching(NANS), pytest.raises(InterpreterError, match="another program"):
        _neighbours[(4,)](x, out, SHIFT=2)
    with watching(NANS), pytest.raises(InterpreterError, match="same launch"):
        _twice[(1,)](x, BLOCK=4)
    with watching(NANS), pytest.raises(InterpreterError, match="order of arrival"):
        _count[(4,)](out)


def test_one_store_of_two_values_at_one_place_is_noticed():
    x, out = torch.arange(4.0), torch.zeros(4)
    with watching(NANS), pytest.raises(InterpreterError, match="two values"):
        _gather[(1,)](x, out, BLOCK=4)
    with watching(NANS):
        _gather[(1,)](torch.ones(4), out, BLOCK=4)


def new_memory(count: int) -> Tensor:
    """As a launcher of synthward's asks for it."""
    made = eval("torch.empty(count)", {"torch": torch, "count": count, "__name__": "synthward"})
    assert isinstance(made, Tensor)
    return made


@pytest.mark.parametrize("written", [15, 16])
def test_memory_that_is_not_written_is_noticed(written):
    """As a result, and as a partial result whose trace in it is no NaN."""
    x, has_hole = torch.ones(16), written < 16

    def result() -> list[Tensor]:
        out = new_memory(16)
        copy(x, out, written)
        return [out]

    def partial() -> list[Tensor]:
        (scratch,), out = result(), torch.zeros(1)
        _sum[(1,)](scratch.nan_to_num(7.0), out, 16, BLOCK=16)
        return [out]

    for run in (result, partial):
        with pytest.raises(AssertionError, match="never written") if has_hole else nullcontext():
            watched(run)
