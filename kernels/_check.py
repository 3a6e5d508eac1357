"""Shared checks of arguments at the Python entry: TypeError and ValueError that name the argument."""

from __future__ import annotations

import math
import operator

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

STREAM_BITS = 15  # the sixteenth marks extension blocks, see _chacha.py
STEP_BITS = 48
# As Python's numbers: a comparison with NumPy's would round the other side to float32.
FLOAT32_MAX, FLOAT32_TINY = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)


def matrix(tensor: Tensor, name: str) -> None:
    if tensor.ndim != 2:
        raise ValueError(f"{name}: has shape {list(tensor.shape)}, expected two dimensions")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: has dtype {tensor.dtype}, expected floating point")


def row_ids(tensor: Tensor, rows: int) -> None:
    if tensor.dtype != torch.int64:
        raise TypeError(f"ids: has dtype {tensor.dtype}, expected torch.int64")
    if tensor.ndim != 1 or len(tensor) != rows:
        raise ValueError(f"ids: has shape {list(tensor.shape)}, expected [{rows}]")


def same_rows(tensor: Tensor, rows: int, name: str) -> None:
    if len(tensor) != rows:
        raise ValueError(f"{name}: has {len(tensor)} rows, expected {rows}")


def shape(tensor: Tensor, expected: tuple[int, ...], name: str) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name}: has shape {list(tensor.shape)}, expected {list(expected)}")


def flat_float(tensor: Tensor, name: str, length: int | None = None) -> None:
    if tensor.dtype != torch.float32:
        raise TypeError(f"{name}: has dtype {tensor.dtype}, expected torch.float32")
    if tensor.ndim != 1 or (length is not None and len(tensor) != length):
        expected = "P" if length is None else length
        raise ValueError(f"{name}: has shape {list(tensor.shape)}, expected [{expected}]")


def flat_sum(tensor: Tensor, name: str, length: int) -> None:
    """An accumulator: float32, or float64 for sums that are exact but for their own rounding."""
    if tensor.dtype != torch.float64:
        flat_float(tensor, name, length)
    elif tensor.ndim != 1 or len(tensor) != length:
        raise ValueError(f"{name}: has shape {list(tensor.shape)}, expected [{length}]")


def flat_double(tensor: Tensor, name: str) -> None:
    if tensor.dtype != torch.float64:
        raise TypeError(f"{name}: has dtype {tensor.dtype}, expected torch.float64")
    if tensor.ndim != 1:
        raise ValueError(f"{name}: has shape {list(tensor.shape)}, expected [P]")


def apart(tensor: Tensor, written: Tensor, name: str) -> None:
    """No byte of one flat tensor may lie within the other."""
    (first, end), (other, other_end) = _extent(tensor), _extent(written)
    if first < other_end and other < end and tensor.device == written.device:
        raise ValueError(f"{name}: overlaps another argument")


def _extent(flat: Tensor) -> tuple[int, int]:
    first = flat.data_ptr()
    size = flat.element_size()
    return first, first + (((len(flat) - 1) * flat.stride(0) + 1) * size if len(flat) else 0)


def unit_count(offsets: Tensor | None, rows: int) -> int:
    """Number of units; checks that the offsets run from 0 to the number of rows without decreasing.

    Offsets on a device are not looked at, which would wait for it: the kernels there keep within the rows.
    """
    if offsets is None:
        return rows
    if offsets.dtype != torch.int64:
        raise TypeError(f"offsets: has dtype {offsets.dtype}, expected torch.int64")
    if offsets.ndim != 1 or len(offsets) < 1:
        raise ValueError(f"offsets: has shape {list(offsets.shape)}, expected [U + 1]")
    if offsets.device.type != "cpu" or isinstance(offsets, FakeTensor):
        return len(offsets) - 1
    ends = offsets.numpy(force=True)
    if ends[0] != 0 or ends[-1] != rows or (ends[1:] < ends[:-1]).any():
        raise ValueError("offsets: must run from 0 to the number of rows and never decrease")
    return len(offsets) - 1


def unit_output(out: Tensor | None, units: int, like: Tensor) -> Tensor:
    """The accumulator float32 [U], zeros if the caller gave none."""
    if out is None:
        return torch.zeros(units, dtype=torch.float32, device=like.device)
    flat_float(out, "out", units)
    return out


def finite(value: float, name: str, low: float = -math.inf) -> None:
    """A number that is at least `low` and finite as a float32."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number") from None
    if not low <= number <= FLOAT32_MAX or number < -FLOAT32_MAX:
        at_least = "" if low == -math.inf else f" of at least {low:g}"
        raise ValueError(f"{name}: got {value}, expected a finite number{at_least}")


def noise_std(value: float) -> None:
    finite(value, "noise_std", 0.0)
    if 0 < value < FLOAT32_TINY:
        raise ValueError(f"noise_std: got {value}, which float32 cannot hold; use 0 for no noise")


def index(value: int, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: got {type(value).__name__}, expected an integer") from None


def place(key: bytes, stream: int, step: int, start: int, count: int) -> None:
    """Coordinates of elements ``start .. start + count`` of a noise stream."""
    if not isinstance(key, bytes):
        raise TypeError(f"key: got {type(key).__name__}, expected bytes")
    if len(key) != 32:
        raise ValueError(f"key: has {len(key)} bytes, expected 32")
    for name, value, limit in (
        ("stream", stream, 1 << STREAM_BITS),
        ("step", step, 1 << STEP_BITS),
        ("count", count, 1 << 63),
        ("start", start, (1 << 63) - max(count, 0)),
    ):
        if not 0 <= index(value, name) < limit:
            raise ValueError(f"{name}: got {value}, expected 0 <= {name} < {limit}")
