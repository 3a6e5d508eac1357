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
# Relative to the norm of the sums; a fault of a compiler is far larger than what other rounding makes.
_CLOSE = 1e-3


def fused(graph: GraphModule, given: tuple[Tensor, ...], flat_at: int) -> Callable[..., Tensor]:
    """A function that does what `graph` does; `given` are arguments of it, the sums at place `flat_at`.

    Kernels, products and the order of additions in them stay as they are. Random numbers are those of torch itself.

    Raises:
        UnsupportedOperationError: on these arguments it gives other sums: the compiler does not know the network.
    """
    # Rounded to half precision is rounded, and nothing random is another way random: norms and sums stay those of the
    # same numbers. Equal operations are not merged: the second run of a checkpoint would go with the first.
    options: dict[str, Any] = {"emulate_precision_casts": True, "fallback_random": True}
    compiled = torch.compile(_with_outputs(graph), fullgraph=True, dynamic=False, options=options)
    first = True

    def run(*args: Tensor) -> Tensor:
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


def _compare(
    graph: Callable[..., Tensor], run: Callable[..., Tensor], given: tuple[Tensor, ...], flat_at: int
) -> None:
    """One pass of both, into memory of its own. What is random in it differs, and is left to torch's own functions."""
    found = []
    for who in (graph, run):
        flat = torch.zeros_like(given[flat_at])
        with torch.no_grad(), torch.random.fork_rng(_devices(flat)):
            torch.manual_seed(0)
            who(*given[:flat_at], flat, *given[flat_at + 1 :])
        found.append(flat)
    off, size = (found[1] - found[0]).norm(), found[0].norm()
    if not bool(off <= _CLOSE * size):
        raise UnsupportedOperationError(
            f"compile: fused by torch {torch.__version__}, the pass gives other sums ({float(off / size):.1e} of their "
            "norm); use fuse=False"
        )


def _devices(tensor: Tensor) -> list[int]:
    return [tensor.device.index or 0] if tensor.is_cuda else []
