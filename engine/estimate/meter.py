"""Counts what runs: memory in use, floating-point operations, bytes read and written."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
_CONVOLUTIONS = (_aten.convolution.default, _aten.convolution_backward.default)
_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu.default
_ATTENTION_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass
class Phase:
    """A part of the step: what was made in it, by now and at the moment when most memory was in use."""

    live: int = 0
    at_peak: int = 0


@dataclass
class Counts:
    """Operations of products, bytes that products move, bytes that all else moves."""

    flops: float = 0.0
    product_bytes: float = 0.0
    other_bytes: float = 0.0


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Active over what is to be metered. Works on tensors with and without numbers.

    Args:
        copies_convolutions: a convolution works on copies of its operands in an order of its own (oneDNN's on a
            CPU).

    Attributes:
        live: bytes in use, of what was made under the meter.
        peak: most of them at once.
        phases: by the phase they were made in.
    """

    def __init__(self, *, copies_convolutions: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._copies_convolutions = copies_convolutions
        self.live = self.peak = 0
        self.counts = Counts()
        self._known: dict[int, weakref.ref[Any]] = {}
        self._working, self._phase = Phase(), Phase()
        self.phases = {"working": self._working}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is made inside is of this phase."""
        before, self._phase = self._phase, self.phases.setdefault(name, Phase())
        try:
            yield
        finally:
            self._phase = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # What was there before the meter is no part of it, nor are views of that.
        old = [tensor.untyped_storage() for tensor in given] if made else []
        for tensor in made:
            storage = tensor.untyped_storage()
            if not any(storage is other for other in old):
                self._note(storage)
        moved = sum(tensor.nbytes for tensor in (*given, *made))
        if self._copies_convolutions and func in _CONVOLUTIONS:
            self._working.live = moved
        if self.live + self._working.live > self.peak:
            self.peak = self.live + self._working.live
            for phase in self.phases.values():
                phase.at_peak = phase.live
        self._working.live = 0
        self._count(func, args, kwargs, out, 0 if func.is_view else moved)
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._known and self._known[key]() is storage:
            return
        size, phase = storage.nbytes(), self._phase

        def freed(reference: weakref.ref[Any]) -> None:
            self.live -= size
            phase.live -= size
            if self._known.get(key) is reference:
                del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        phase.live += size

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, moved: int) -> None:
        if func in (_ATTENTION, _ATTENTION_BACKWARD):
            # Two products of all pairs of places forward; five backward.
            query, key = (args[0], args[1]) if func is _ATTENTION else (args[1], args[2])
            products = 2 if func is _ATTENTION else 5
            self.counts.flops += products * 2.0 * query.numel() * key.shape[-2]
            self.counts.product_bytes += moved
        elif (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.counts.flops += formula(*args, **kwargs, out_val=out)
            self.counts.product_bytes += moved
        else:
            self.counts.other_bytes += moved
