"""Which implementation runs: an explicit choice never falls back, and `auto` says why by its rule."""

from __future__ import annotations

from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor

from synthward import _C

Backend = Literal["auto", "reference", "cpp"]


def use_cpp(backend: Backend, *tensors: Tensor | None) -> bool:
    """Whether the C++ kernel runs: asked for, or `auto` with contiguous fp32/int64 tensors in CPU memory."""
    if backend == "reference":
        return False
    if backend not in ("auto", "cpp"):
        raise ValueError(f"backend: got {backend!r}, expected 'auto', 'reference' or 'cpp'")
    fits = all(t is None or _fits(t) for t in tensors)
    if backend == "cpp" and not fits:
        raise ValueError("backend 'cpp' needs contiguous fp32 (ids: int64) tensors in CPU memory")
    return fits


def _fits(tensor: Tensor) -> bool:
    typed = tensor.dtype in (torch.float32, torch.int64)
    return tensor.device.type == "cpu" and typed and tensor.is_contiguous() and not tensor.is_neg()


def view(tensor: Tensor) -> NDArray[Any]:
    """The tensor's own memory as an array."""
    return tensor.detach().numpy()


def maybe_view(tensor: Tensor | None) -> NDArray[Any] | None:
    return None if tensor is None else view(tensor)


def written(*tensors: Tensor | None) -> None:
    """Tell autograd that memory was written behind its back, so that a stale saved tensor is an error."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def threads() -> int:
    """Torch's own setting; one in loader workers."""
    return torch.get_num_threads()


def cpu_isa() -> str:
    """Name of the instruction set in use: "baseline", "avx2" or "avx512"."""
    return _C.cpu_isa()


def available_isas() -> list[str]:
    """Instruction sets that this build has and this processor runs."""
    return _C.available_isas()


def force_isa(name: str | None) -> None:
    """Test hook: use one instruction set for everything, or the best again with None.

    Raises:
        ValueError: the processor or the build does not have it.
    """
    if not _C.force_isa(name or ""):
        raise ValueError(f"isa: got {name!r}; available: {', '.join(_C.available_isas())}")
