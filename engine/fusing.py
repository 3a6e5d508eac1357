"""What lies between the kernels of a recorded pass, fused by torch's compiler."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from synthward.engine.errors import UnsupportedOperationError
from synthward.kernels import ops

_aten = torch.ops.aten
_EMPTY = {_aten.empty.memory_format, _aten.empty_like.default, _aten.new_empty.default}
_ZEROS = {_aten.zeros.default, _aten.zeros_like.default, _aten.new_zeros.default}
# Relative to the norm of the sums, and to each unit's own; a fault of a compiler is far larger than what other rounding
# makes.
_CLOSE, _CLOSE_NORM = 1e-3, 1e-2

Run = Callable[..., tuple[Tensor, Tensor]]


def fused(graph: GraphModule, given: tuple[Tensor, ...], flat_at: int) -> Run:
    """A function that does what `graph` does (`TracedPass.graph`); `given` are arguments of it, the sums at place
    `flat_at`, the mask behind them.

    Kernels, products and the order of additions in them stay as they are. Random numbers are those of torch itself.

    Raises:
        UnsupportedOperationError: on these arguments it gives other sums or norms: the compiler does not know the
            network. Or all gradients are zero, so that nothing shows.
    """
    # Rounded to half precision is rounded, and nothing random is another way random: norms and sums stay those of the
    # same numbers. Equal operations are not merged: the second run of a checkpoint would go with the first.
    options: dict[str, Any] = {"emulate_precision_casts": True, "fallback_random": True}
    compiled = torch.compile(_with_outputs(graph), fullgraph=True, dynamic=False, options=options)
    first = True

    def run(*args: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal first
        if not first:
            return compiled(*args)  # type: ignore[no-any-return]
        first = False
        with torch._functorch.config.patch(cse=False):
            return compiled(*args)  # type: ignore[no-any-return]

    _compare(graph, run, given, flat_at)
    return run


def _with_outputs(graph: GraphModule) -> GraphModule:
    """The graph with memory that operations write into as just that, not as a constant that a compiler sees through."""
    changed = copy.deepcopy(graph)
    for node in list(changed.graph.nodes):
        if node.op != "call_function" or node.target not in _EMPTY | _ZEROS:
            continue
        value: Tensor = node.meta["val"]
        arguments = (list(value.shape), value.dtype, value.device, node.target in _ZEROS)
        with changed.graph.inserting_before(node):
            new: Node = changed.graph.call_function(ops.new_output._opoverload, arguments)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        changed.graph.erase_node(node)
    changed.recompile()
    return changed


def _compare(graph: Run, run: Run, given: tuple[Tensor, ...], flat_at: int) -> None:
    """One pass of both, into memory of its own. What is random in it differs, and is left to torch's own functions."""
    sums, norms = [], []
    for who in (graph, run):
        # A pass may write into what it is given.
        args = [_copy(tensor) for tensor in given]
        args[flat_at].zero_()
        # In a batch of padding nothing would show.
        args[flat_at + 1].fill_(True)
        with torch.no_grad(), torch.random.fork_rng(_devices(args[flat_at])):
            torch.manual_seed(0)
            norms.append(who(*args)[1])
        sums.append(args[flat_at])
    off, size = (sums[1] - sums[0]).norm(), sums[0].norm()
    if not bool(size > 0.0):
        raise UnsupportedOperationError(
            "compile: all gradients of the batch are zero, so that what was fused can not be compared; use fuse=False"
        )
    # Of units that are not clipped, sums would not show that norms are other ones.
    is_close = (norms[1] - norms[0]).abs() <= _CLOSE_NORM * norms[0]
    if not bool(off <= _CLOSE * size) or not bool((is_close | ~norms[0].isfinite()).all()):
        raise UnsupportedOperationError(
            f"compile: fused by torch {torch.__version__}, the pass gives other sums or norms (sums by "
            f"{float(off / size):.1e} of their norm); use fuse=False"
        )


def _copy(tensor: Tensor) -> Tensor:
    """Of the same strides, for which else the compiler would compile anew; what overlaps itself can not be written."""
    copied = tensor.clone()
    return copied if copied.stride() == tensor.stride() else tensor


def _devices(tensor: Tensor) -> list[int]:
    return [tensor.device.index or 0] if tensor.is_cuda else []
