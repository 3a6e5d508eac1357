"""Where a tensor of the forward pass comes from: parameters alone, constants alone, or data.

A weight that is computed from parameters and constants only (weight norm, spectral norm, a transpose, a merge of
LoRA factors, positions put through a small network) is the same for all units, so its per-unit gradients are
taken like a parameter's, and a vector-Jacobian product carries them back. The forward pass goes on with a detached
copy of it, the leaf, so that no gradient flows past the capture.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_RESHAPES = frozenset(
    {Tensor.view, Tensor.reshape, Tensor.unsqueeze, Tensor.squeeze, Tensor.flatten, torch.unsqueeze}
)
# What builds a tensor from something that may be records.
_IMPORTS = frozenset({torch.tensor, torch.as_tensor, torch.from_numpy, torch.asarray, torch.frombuffer})
# What gives a tensor's numbers away, to be told from constants no more.
_READS = frozenset({Tensor.item, Tensor.tolist, Tensor.__float__})
# Functions that give axes another order.
_ORDERS = "transpose permute t swapaxes swapdims movedim moveaxis adjoint einsum tensordot"
_TURNS = frozenset(
    getattr(place, name) for place in (torch, Tensor) for name in _ORDERS.split() if hasattr(place, name)
) | {getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH")}
# Functions whose output has the rows of the first argument, whatever the shapes.
_BY_FIRST = frozenset(
    {
        *(torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__),
        *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.embedding, F.layer_norm, F.group_norm, F.rms_norm),
    }
)


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
        has_own_rows: its first axis certainly is one of the parameters', not one of constants or of an expansion.
    """

    def __init__(
        self,
        graph: Tensor,
        leaves: dict[int, Tensor],
        transposed: int | None = None,
        gathered: tuple[int, Tensor] | None = None,
        *,
        has_own_rows: bool = False,
    ) -> None:
        self.graph, self.leaves, self.positions = graph, leaves, frozenset(leaves)
        self.transposed, self.gathered, self.has_own_rows = transposed, gathered, has_own_rows


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
        # With the version that each had when it was known to be constant: a later write is seen there.
        self._constants: dict[int, tuple[Tensor, int]] = {}
        self._module: nn.Module | None = None
        self._last: weakref.ref[nn.Module] | None = None
        self._layers: list[nn.Module] = []
        # What the module keeps, by storage; gathered when it is first asked for.
        self._kept: dict[int, list[tuple[str, Tensor]]] | None = None
        # Whether what the module keeps is looked at when the forward pass ends; an error has been raised if not.
        self.is_watching = True
        # Whether numbers of data have been read, which Python may hand to any operation.
        self.has_read = False

    def begin(self, module: nn.Module) -> None:
        """A new forward pass: buffers and frozen parameters of the module are constants."""
        self.clear()
        self._module, self._layers = module, list(module.modules())
        self._last, self.is_watching = weakref.ref(module), True
        for layer in self._layers:
            for tensor in (*layer._parameters.values(), *layer._buffers.values()):
                if tensor is not None:
                    self._note(tensor)

    @contextmanager
    def again(self) -> Iterator[None]:
        """A part of the last forward pass is run again, most likely after its end."""
        module = None if self._last is None else self._last()
        if self._module is not None or module is None:
            yield
            return
        self.begin(module)
        try:
            yield
        finally:
            self.clear()

    def clear(self) -> None:
        self._derived.clear()
        self._graphs.clear()
        self._constants.clear()
        self._module, self._layers, self._kept, self.has_read = None, [], None, False

    def target(self, value: object) -> Target | None:
        """What a leaf stands for."""
        entry = self._derived.get(id(value))
        return None if entry is None else entry[1]

    def is_constant(self, tensor: Tensor) -> bool:
        entry = self._constants.get(id(tensor))
        if entry is None or entry[1] != tensor._version:
            return False
        # What an autograd function of the user's made of constants and parameters requires a gradient; where none is
        # recorded, a view of a parameter says that it does.
        return not tensor.requires_grad or not torch.is_grad_enabled()

    def note_constant(self, func: Any, out: Any, given: list[Tensor]) -> None:
        """`out` was computed from `given`, which is constant, or from no tensor at all; what was written into is
        constant still."""
        places = {_storage(tensor) for tensor in given if self.is_stale(tensor)}
        if places:
            for tensor, _ in list(self._constants.values()):
                if self.is_stale(tensor) and _storage(tensor) in places:
                    self._note(tensor)
        if func not in _IMPORTS:
            for tensor in tensors_in(out):
                self._note(tensor)

    def _note(self, tensor: Tensor) -> None:
        # Tensors of inference mode have no version, so a write into them would not be seen.
        if not tensor.is_inference():
            self._constants[id(tensor)] = (tensor, tensor._version)

    def note_parameter(self, tensor: Tensor) -> None:
        """It stands in the module in the place of a parameter."""
        if self._module is not None:
            self._note(tensor)

    def note_read(self, func: Any, args: tuple[Any, ...]) -> None:
        """``func(*args)`` has run on data."""
        if func in _READS and args[0].is_floating_point():
            self.has_read = True

    def is_stale(self, tensor: Tensor) -> bool:
        """Whether it was constant (or a parameter) and has been written into since."""
        entry = self._constants.get(id(tensor))
        return entry is not None and entry[1] != tensor._version

    def forget(self, tensor: Tensor) -> None:
        """Data is written into it: it is constant no more, nor is what shares its memory."""
        if id(tensor) in self._constants:
            place = _storage(tensor)
            for other, _ in list(self._constants.values()):
                if other is tensor or _storage(other) == place:
                    del self._constants[id(other)]

    def holder(self, tensor: Tensor) -> str | None:
        """Which parameter or buffer of the module `tensor` shares memory with, for messages; else None."""
        if self._module is None:
            return None
        if self._kept is None:
            self._kept = {}
            for kind, named in (
                ("parameter", self._module.named_parameters()),
                ("buffer", self._module.named_buffers()),
            ):
                for name, kept in named:
                    self._kept.setdefault(_storage(kept), []).append((f"{kind} {name!r}", kept))
            self._kept.pop(0, None)
        found = self._kept.get(_storage(tensor))
        if found is None:
            return None
        # All trainable parameters are parts of one piece of memory.
        place = tensor.data_ptr()
        inside = (name for name, kept in found if 0 <= place - kept.data_ptr() < max(kept.nbytes, 1))
        return next(inside, found[0][0])

    def written(self) -> str | None:
        """A parameter or buffer of the module that something other than constants was put into, else None."""
        for layer in self._layers if self.is_watching else []:
            for kind, found in (("parameter", layer._parameters), ("buffer", layer._buffers)):
                for key, tensor in found.items():
                    if tensor is None or id(tensor) in self._derived:
                        continue
                    if id(tensor) not in self._constants or self.is_stale(tensor):
                        prefix = next(n for n, m in self._module.named_modules() if m is layer)  # type: ignore[union-attr]
                        return f"{kind} {f'{prefix}.{key}' if prefix else key!r}"
        return None

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

    def leaves(
        self,
        func: Any,
        args: tuple[Any, ...],
        out: Any,
        parameters: dict[int, Tensor],
        tracked: list[Tensor],
    ) -> Any:
        """`out` of ``func(*args)``, computed from `parameters` (by position) through the arguments `tracked`, with a
        leaf in place of each tensor that carries a gradient."""
        if isinstance(out, Tensor):
            if not out.requires_grad or isinstance(out, nn.Parameter):
                return out
            leaf = out.detach()
            self._derived[id(leaf)] = (leaf, self._target(func, args, out, parameters, tracked))
            self._graphs[id(leaf)] = out
            return leaf
        if isinstance(out, list | tuple) and not isinstance(out, torch.Size):
            items = [self.leaves(func, args, item, parameters, tracked) for item in out]
            # A structure of torch's (a sort, say) becomes a plain tuple of the same order.
            return items if isinstance(out, list) else tuple(items)
        return out

    def _target(
        self,
        func: Any,
        args: tuple[Any, ...],
        out: Tensor,
        parameters: dict[int, Tensor],
        tracked: list[Tensor],
    ) -> Target:
        has_own_rows = self._has_own_rows(func, args, out, tracked)
        if len(parameters) > 1:
            return Derived(out, parameters, has_own_rows=has_own_rows)
        position, parameter = next(iter(parameters.items()))
        transposed = None
        # A view of a parameter tells by its place in memory what it is, whatever operations made it.
        if (
            out.dtype == parameter.dtype
            and out.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
            and parameter.is_contiguous()
            and not out.is_neg()
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
        return Derived(out, parameters, transposed, gathered, has_own_rows=has_own_rows)

    def _has_own_rows(self, func: Any, args: tuple[Any, ...], out: Tensor, tracked: list[Tensor]) -> bool:
        """Whether the first axis of `out` certainly is one of the parameters': then row i is of their row i."""
        if out.dim() == 0 or len(out) == 1 or func in _TURNS:
            return False
        for tensor in tracked:
            if func in _BY_FIRST and tensor is not args[0]:
                continue
            if tensor.dim() == out.dim() and len(tensor) == len(out):
                target = self.target(tensor)
                if not isinstance(target, Derived) or target.has_own_rows:
                    return True
        return False


def _storage(tensor: Tensor) -> int:
    """Which memory it is a view of, whatever its size; 0 for one without (a sparse one, say)."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except RuntimeError:
        return 0


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
