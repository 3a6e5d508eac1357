"""Which implementation runs: an explicit choice never falls back, and `auto` says why by its rule."""

from __future__ import annotations

import functools
import importlib.util
import logging
from contextvars import ContextVar
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from synthward import _C

Backend = Literal["auto", "reference", "cpp", "triton"]
Choice = Literal["reference", "cpp", "triton", "shapes"]

_DTYPES_TRITON = (torch.float32, torch.bfloat16, torch.float16, torch.int64)
_log = logging.getLogger("synthward.kernels")

# The kind of device that tensors without numbers stand for, where a step is planned and not run; None for their own.
planned_device: ContextVar[str | None] = ContextVar("planned_device", default=None)


def choose(
    backend: Backend,
    *inputs: Tensor | None,
    written: tuple[Tensor | None, ...] = (),
    triton: bool = True,
    further: tuple[torch.dtype, ...] = (),
) -> Choice:
    """Which implementation runs: what was asked for, or under `auto` the compiled one that takes these tensors.

    Args:
        backend: "cpp" is C++ on contiguous fp32/int64 tensors in CPU memory, "triton" fp32, bf16, fp16 and int64 on a
            CUDA device, or in CPU memory if Triton was imported under TRITON_INTERPRET=1. "auto" never interprets.
        inputs: tensors that are read; the Triton kernels copy what is not contiguous.
        written: tensors that are written, contiguous.
        triton: whether the operation has a Triton kernel.
        further: dtypes that the operation's compiled kernels take beside those.

    Returns:
        "shapes" where a tensor has a shape and no numbers (torch's FakeTensor): outputs are made, nothing is computed.

    Raises:
        ValueError: the backend is unknown, or was asked for and cannot take the tensors.
    """
    tensors = (*inputs, *written)
    if backend == "reference":
        return "reference"
    if any(t is not None and is_shape(t) for t in tensors):
        if get_proxy_mode() is not None:
            # It would be missing from the graph, and nobody would know. Noise above all: a replay would repeat it.
            raise NotImplementedError("this operation can not be part of a traced step")
        return "shapes"
    if backend == "triton":
        _demand_triton(inputs, written, triton, further)
        return "triton"
    if backend not in ("auto", "cpp"):
        raise ValueError(f"backend: got {backend!r}, expected 'auto', 'reference', 'cpp' or 'triton'")
    if _forced and backend == "auto" and triton and _fits_triton(inputs, written, "cpu", further):
        return "triton"
    if all(t is None or _fits(t, further) for t in tensors):
        return "cpp"
    if backend == "cpp":
        raise ValueError("backend 'cpp' needs contiguous fp32 (ids: int64) tensors in CPU memory")
    on_device = any(t is not None and t.is_cuda for t in tensors)
    if triton and on_device and _fits_triton(inputs, written, "cuda", further) and _triton_found():
        return "triton"
    return "reference"


def is_shape(tensor: Tensor) -> bool:
    """Whether the tensor has a shape and a type, but no numbers: a plan of a step, not a step."""
    return isinstance(tensor, FakeTensor)


def place_of(tensor: Tensor) -> str:
    """Kind of the device that the tensor lies on or, in the plan of a step, stands for."""
    is_planned = is_shape(tensor) and get_proxy_mode() is None
    return (planned_device.get() if is_planned else None) or tensor.device.type


def uses_triton(*inputs: Tensor | None) -> bool:
    """Whether `auto` runs the Triton kernel of an operation that has one, or would on tensors with numbers."""
    if any(t is not None and is_shape(t) for t in inputs):
        return _fits_triton(inputs, (), "cuda", ()) and _triton_found()
    return choose("auto", *inputs) == "triton"


def use_cpp(backend: Backend, *tensors: Tensor | None) -> bool:
    """Whether the C++ kernel runs: asked for, or `auto` with contiguous fp32/int64 tensors in CPU memory.

    For operations without a Triton kernel.
    """
    return choose(backend, *tensors, triton=False) == "cpp"


def _fits(tensor: Tensor, further: tuple[torch.dtype, ...]) -> bool:
    typed = tensor.dtype in (torch.float32, torch.int64, *further)
    return tensor.device.type == "cpu" and typed and tensor.is_contiguous() and not tensor.is_neg()


def _fits_triton(
    inputs: tuple[Tensor | None, ...],
    written: tuple[Tensor | None, ...],
    device: str,
    further: tuple[torch.dtype, ...],
) -> bool:
    present = [t for t in (*inputs, *written) if t is not None]
    return (
        all(
            t.dtype in (*_DTYPES_TRITON, *further) and place_of(t) == device and not t.is_neg()
            for t in present
        )
        and len({t.device for t in present}) <= 1
        and all(t.is_contiguous() for t in written if t is not None)
    )


def _demand_triton(
    inputs: tuple[Tensor | None, ...],
    written: tuple[Tensor | None, ...],
    exists: bool,
    further: tuple[torch.dtype, ...],
) -> None:
    if not exists:
        raise ValueError("backend 'triton': this operation has no Triton kernel; use 'auto' or 'reference'")
    if importlib.util.find_spec("triton") is None:
        raise ValueError("backend 'triton': the package triton is not installed")
    from synthward.kernels._triton import INTERPRETED

    if not _fits_triton(inputs, written, "cpu" if INTERPRETED else "cuda", further):
        place = "in CPU memory, as TRITON_INTERPRET is set" if INTERPRETED else "on one CUDA device"
        raise ValueError(
            f"backend 'triton' needs fp32, bf16 or fp16 (ids: int64) tensors {place}, contiguous where written"
        )


@functools.cache
def _triton_found() -> bool:
    """Whether kernels can be compiled for a device; if not, a line in the log says what runs instead."""
    if importlib.util.find_spec("triton") is None:
        _log.warning("triton is not installed: kernels on CUDA tensors run as plain torch, slower")
        return False
    from synthward.kernels._triton import INTERPRETED

    if INTERPRETED:
        _log.warning("TRITON_INTERPRET is set: kernels on CUDA tensors run as plain torch, slower")
    return not INTERPRETED


def view(tensor: Tensor) -> NDArray[Any]:
    """The tensor's own memory as an array."""
    if _resizable:
        return np.from_dlpack(tensor.detach())
    return tensor.detach().numpy()


def leave_resizable() -> None:
    """From now on memory that kernels have read may still be freed by whoever manages it (FSDP frees and restores the
    storage of whole parameters). `Tensor.numpy` would end that for good; this costs a microsecond more a tensor.

    Raises:
        RuntimeError: this version of NumPy can not write to memory that it has in this way.
    """
    global _resizable
    if not np.from_dlpack(torch.zeros(1)).flags.writeable:
        raise RuntimeError("sharded parameters on a CPU need NumPy 2.1 or later")
    _resizable = True


_resizable = False


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


_forced = False


def force_triton(is_forced: bool) -> None:
    """Test hook: `auto` interprets the Triton kernels on tensors in CPU memory, where Triton is in its interpreter."""
    global _forced
    _forced = is_forced


def force_isa(name: str | None) -> None:
    """Test hook: use one instruction set for everything, or the best again with None.

    Raises:
        ValueError: the processor or the build does not have it.
    """
    if not _C.force_isa(name or ""):
        raise ValueError(f"isa: got {name!r}; available: {', '.join(_C.available_isas())}")
