"""Where a tensor of the forward pass comes from: parameters alone, constants alone, or data.

A weight that is computed from parameters and constants only (weight norm, spectral norm, a transpose, a merge of
LoRA factors, positions put through a small network) is the same for all units, so its per-unit gradients are
taken like a parameter's, and a vector-Jacobian product carries them back. The forward pass goes on with a detached
copy of it, the leaf, so that no gradient flows past the capture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_RESHAPES = frozenset(
    {Tensor.view, Tensor.reshape, Tensor.unsqueeze, Tensor.squeeze, Tensor.flatten, torch.unsqueeze}
)
# What builds a tensor from something that may be records.
_IMPORTS = frozenset({torch.tensor, torch.as_tensor, torch.from_numpy, torch.asarray, torch.frombuffer})


@dataclass(frozen=True)
class Part:
    """Rows ``start:stop`` of the first axis of a tracked parameter, as the target of a use."""

    position: int
    start: int
    stop: int


@dataclass(frozen=True)
class Span:
    """Elements ``start:stop`` of a tracked parameter, flattened: a slice or another shape of it."""

    position: int
    start: int
    stop: int


class Derived:
    """A weight computed from tracked parameters.

    Args:
        graph: the weight with its graph.
        leaves: the parameters it is computed from, by position.
        transposed: the one parameter [p, d] that it is the transpose of, if it is no more than that.
        gathered: the one parameter whose rows it holds, and their indices (a table of positions, say).
    """

    def __init__(
        self,
        graph: Tensor,
        leaves: dict[int, Tensor],
        transposed: int | None = None,
        gathered: tuple[int, Tensor] | None = None,
    ) -> None:
        self.graph, self.leaves, self.positions = graph, leaves, frozenset(leaves)
        self.transposed, self.gathered = transposed, gathered


def flat_range(target: Part | Span, shape: torch.Size) -> tuple[int, int]:
    """First and last element (exclusive) of a part of a parameter of that shape."""
    if isinstance(target, Span):
        return target.start, target.stop
    width = shape[1:].numel()
    return target.start * width, target.stop * width


# What a use is of: a parameter (its index), some rows of one, or a weight computed from some.
Target = int | Part | Span | Derived


class Provenance:
    """What is known of the tensors of the forward pass under way."""

    def __init__(self) -> None:
        self._derived: dict[int, tuple[Tensor, Target]] = {}
        # The tensors are held, so that an id is never that of another one.
        self._graphs: dict[int, Tensor] = {}
        self._constants: dict[int, Tensor] = {}
        self._standing: set[int] = set()

    def begin(self, module: nn.Module) -> None:
        """A new forward pass: buffers and frozen parameters of the module are constants."""
        self.clear()
        self._standing = {id(buffer) for buffer in module.buffers()}
        self._standing |= {id(p) for p in module.parameters() if not p.requires_grad}

    def clear(self) -> None:
        self._derived.clear()
        self._graphs.clear()
        self._constants.clear()
        self._standing = set()

    def target(self, value: object) -> Target | None:
        """What a leaf stands for."""
        entry = self._derived.get(id(value))
        return None if entry is None else entry[1]

    def is_constant(self, tensor: Tensor) -> bool:
        return id(tensor) in self._standing or id(tensor) in self._constants

    def note_constant(self, func: Any, out: Any) -> None:
        """`out` was computed from constants alone, or from no tensor at all."""
        if func not in _IMPORTS:
            for tensor in tensors_in(out):
                self._constants[id(tensor)] = tensor

    def graphs(self, value: Any) -> Any:
        """`value` with each leaf replaced by the weight with its graph."""
        if isinstance(value, Tensor):
            return self._graphs.get(id(value), value)
        if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
            items = [self.graphs(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if isinstance(value, dict):
            return {key: self.graphs(item) for key, item in value.items()}
        return value

    def leaves(self, func: Any, args: tuple[Any, ...], out: Any, parameters: dict[int, Tensor]) -> Any:
        """`out` of ``func(*args)``, computed from `parameters` (by position), with a leaf in place of each tensor
        that carries a gradient."""
        if isinstance(out, Tensor):
            if not out.requires_grad or isinstance(out, nn.Parameter):
                return out
            leaf = out.detach()
            self._derived[id(leaf)] = (leaf, self._target(func, args, out, parameters))
            self._graphs[id(leaf)] = out
            return leaf
        if isinstance(out, list | tuple) and not isinstance(out, torch.Size):
            items = [self.leaves(func, args, item, parameters) for item in out]
            # A structure of torch's (a sort, say) becomes a plain tuple of the same order.
            return items if isinstance(out, list) else tuple(items)
        return out

    def _target(self, func: Any, args: tuple[Any, ...], out: Tensor, parameters: dict[int, Tensor]) -> Target:
        if len(parameters) > 1:
            return Derived(out, parameters)
        position, parameter = next(iter(parameters.items()))
        transposed = None
        # A view of a parameter tells by its place in memory what it is, whatever operations made it.
        if (
            out.dtype == parameter.dtype
            and out.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
            and parameter.is_contiguous()
        ):
            start = out.storage_offset() - parameter.storage_offset()
            if out.is_contiguous():
                is_whole = start == 0 and out.numel() == parameter.numel()
                return position if is_whole else Span(position, int(start), int(start) + out.numel())
            if (
                start == 0
                and parameter.dim() == 2
                and out.shape == parameter.shape[::-1]
                and out.mT.is_contiguous()
            ):
                transposed = position
        gathered = None
        if func is torch.nn.functional.embedding and len(args) > 1 and args[1] is parameter:
            gathered = (position, args[0])
        elif func in _RESHAPES and isinstance(self.target(args[0]), Derived):
            before = self.target(args[0])
            gathered = before.gathered if isinstance(before, Derived) else None
        return Derived(out, parameters, transposed, gathered)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors of nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
