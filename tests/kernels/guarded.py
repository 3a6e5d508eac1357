"""Launches of Triton kernels on memory that is watched, in Triton's interpreter.

Each tensor of a launch is copied into an allocation of its own, between guard zones, and copied back. Of every load
and store the address of each active lane is looked up: it must be an element of one of the launch's tensors. Apart
from that the guard zones hold what shows in the result if it is read, and must be the same afterwards.

Programs of a grid run in no order on a device, so none may read or write what another one writes, or the result were
luck; nor may a program read again what it wrote, which other threads of it need not see yet.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

# Elements of a guard zone beside as many as the largest tensor of the launch has.
ZONE = 256
NOBODY, SEVERAL = -1, -2
SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class OutOfBoundsError(AssertionError):
    """A lane is active whose address is no element of any tensor of the launch."""


class RaceError(AssertionError):
    """What is read or written depends on the order of programs or threads."""


@dataclass(frozen=True)
class Content:
    """What guard zones hold, and new memory."""

    of_floats: float
    of_integers: int  # beyond every tensor's size, or 0

    def fill(self, tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return tensor.fill_(self.of_floats)
        return tensor.fill_(min(self.of_integers, torch.iinfo(tensor.dtype).max))


NANS, NUMBERS = Content(float("nan"), 2**62), Content(1.0, 0)


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, so that NaN equals NaN."""
    return tensor.detach().contiguous().view(SIGNED[tensor.element_size()])


class _Zone:
    """A tensor's copy between guard zones."""

    def __init__(self, tensor: Tensor, zone: int, content: Content) -> None:
        self.tensor = tensor.detach()
        zone = -(-zone // 64) * 64  # as aligned as the tensor's own memory is
        whole = content.fill(torch.zeros(zone + _span(tensor) + zone, dtype=tensor.dtype))
        of_tensor = torch.zeros(len(whole), dtype=torch.bool)
        place = (tensor.shape, tensor.stride(), zone)
        self.copy = whole.as_strided(*place)
        self.copy.copy_(self.tensor)
        of_tensor.as_strided(*place).fill_(True)
        self.whole, self.of_tensor = whole, of_tensor.numpy()
        self.before = bits(whole).clone()
        self.begin, self.size = whole.data_ptr(), whole.element_size()
        self.end = self.begin + len(whole) * self.size
        self.writer, self.reader = np.full((2, len(whole)), NOBODY)

    def close(self) -> None:
        """Copy back; the zones, and gaps between rows of the tensor, hold what they held."""
        changed = (bits(self.whole) != self.before).numpy() & ~self.of_tensor
        if changed.any():
            raise OutOfBoundsError(f"{changed.sum()} elements beside a tensor were written")
        self.tensor.copy_(self.copy)


def _span(tensor: Tensor) -> int:
    """Elements from a tensor's first to its last one in memory."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


@dataclass
class Watch:
    """What happens to launches while it is active (`watching`).

    Attributes:
        content: of guard zones and of memory that was never written.
        is_exact: look up addresses; else only the guard zones are there.
        is_reversed: the last program of a grid first.
        is_ordered: programs and threads may depend on each other's order: what is asked for makes no sense anyway.
        launched: names of the kernels that were launched.
    """

    content: Content
    is_exact: bool = True
    is_reversed: bool = False
    is_ordered: bool = False
    launched: set[str] = field(default_factory=set)
    _zones: list[_Zone] = field(default_factory=list)

    def launch(
        self, run: Callable[..., Any], kernel: Any, args: tuple[Any, ...], named: dict[str, Any]
    ) -> Any:
        assert not self._zones, "a launch within a launch"
        self.launched.add(kernel.fn.__name__)
        made: dict[tuple[Any, ...], _Zone] = {}
        zone = ZONE + max((_span(t) for t in (*args, *named.values()) if isinstance(t, Tensor)), default=0)

        def guard(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            place = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
            key = place if value.numel() else (id(value),)
            if key not in made:
                made[key] = _Zone(value, zone, self.content)
            return made[key].copy

        args, named = tuple(map(guard, args)), {name: guard(value) for name, value in named.items()}
        self._zones = list(made.values())
        _demand_apart([zone.tensor for zone in self._zones])
        try:
            done = run(kernel, *args, **named)
        finally:
            zones, self._zones = self._zones, []
        for each in zones:
            each.close()
        return done

    def access(self, pointers: Any, mask: Any, value: Any, program: int, *, stores: bool) -> None:
        """Look up the addresses of the active lanes of a load or a store of `value`."""
        shape = np.broadcast_shapes(pointers.data.shape, mask.data.shape)
        active = np.broadcast_to(mask.data, shape).astype(bool)
        addresses = np.broadcast_to(pointers.data, shape)[active].astype(np.int64)
        for zone in self._zones:
            here = (addresses >= zone.begin) & (addresses < zone.end)
            if not here.any():
                continue
            place = (addresses[here] - zone.begin) // zone.size
            if not zone.of_tensor[place].all() or ((addresses[here] - zone.begin) % zone.size).any():
                break
            if self.is_ordered:
                pass
            elif stores:
                values = np.broadcast_to(value.data, shape)[active][here]
                _note_store(zone, place, values, program)
            else:
                _note_load(zone, place, program)
            if here.all():
                return
            addresses, active = addresses[~here], _without(active, here)
        if len(addresses):
            raise OutOfBoundsError(f"{'store' if stores else 'load'} outside of the tensors of the launch")


def _demand_apart(tensors: list[Tensor]) -> None:
    """Copies of tensors that share memory would not show what is written through one of them in the other."""
    ends = [(t.data_ptr(), t.data_ptr() + _span(t) * t.element_size()) for t in tensors if t.numel()]
    for (_, end), (begin, _) in pairwise(sorted(ends)):
        assert end <= begin, "two tensors of a launch overlap"


def _without(active: Any, here: Any) -> Any:
    """The mask `active` less those of its lanes that are `here`."""
    rest = active.copy()
    rest[active] = ~here
    return rest


def _note_load(zone: _Zone, place: Any, program: int) -> None:
    if (zone.writer[place] != NOBODY).any():
        raise RaceError("load of what the same launch writes")
    reader = zone.reader[place]
    zone.reader[place] = np.where((reader == NOBODY) | (reader == program), program, SEVERAL)


def _note_store(zone: _Zone, place: Any, values: Any, program: int) -> None:
    for others in (zone.writer[place], zone.reader[place]):
        if ((others != NOBODY) & (others != program)).any():
            raise RaceError("store to what another program reads or writes")
    if len(np.unique(place)) < len(place):
        order = np.argsort(place, kind="stable")
        again = np.diff(place[order]) == 0
        as_bytes = np.ascontiguousarray(values[order]).view(np.uint8).reshape(len(place), -1)
        if (as_bytes[1:] != as_bytes[:-1])[again].any():
            raise RaceError("one store puts two values at one place")
    zone.writer[place] = program


@contextmanager
def watching(
    content: Content, *, is_exact: bool = True, is_reversed: bool = False, is_ordered: bool = False
) -> Iterator[Watch]:
    """Watch all launches until it ends; new memory that synthward asks for holds `content`."""
    watch = Watch(content, is_exact, is_reversed, is_ordered)
    builder = interpreter.InterpreterBuilder
    run, set_place = interpreter.InterpretedFunction.run, builder.set_grid_idx

    def launch(kernel: Any, *args: Any, **named: Any) -> Any:
        return watch.launch(run, kernel, args, named)

    def turned(self: Any, x: int, y: int, z: int) -> None:
        set_place(self, self.grid_dim[0] - 1 - x if is_reversed else x, y, z)

    def refused(*_args: Any, **_named: Any) -> None:
        raise RaceError("atomic operations add up in the order of arrival")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "run", launch)
        patch.setattr(builder, "set_grid_idx", turned)
        for name in ("create_atomic_rmw", "create_atomic_cas"):
            patch.setattr(builder, name, refused)
        if is_exact:
            patch.setattr(builder, "create_masked_load", _loads(watch, builder.create_masked_load))
            patch.setattr(builder, "create_masked_store", _stores(watch, builder.create_masked_store))
        for place, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            patch.setattr(place, name, _filled(getattr(place, name), content))
        yield watch


def _loads(watch: Watch, load: Callable[..., Any]) -> Callable[..., Any]:
    def checked(self: Any, pointers: Any, mask: Any, *others: Any, **named: Any) -> Any:
        watch.access(pointers, mask, None, _program(self), stores=False)
        return load(self, pointers, mask, *others, **named)

    return checked


def _stores(watch: Watch, store: Callable[..., Any]) -> Callable[..., Any]:
    def checked(self: Any, pointers: Any, value: Any, mask: Any, *others: Any, **named: Any) -> Any:
        watch.access(pointers, mask, value, _program(self), stores=True)
        return store(self, pointers, value, mask, *others, **named)

    return checked


def _program(builder: Any) -> int:
    (x, y, z), (_, wide, deep) = builder.grid_idx, builder.grid_dim
    return (x * wide + y) * deep + z


def _filled(allocate: Callable[..., Tensor], content: Content) -> Callable[..., Tensor]:
    """`allocate` whose memory holds `content` when synthward asks for it."""

    def fill(*args: Any, **named: Any) -> Tensor:
        made = allocate(*args, **named)
        is_ours = sys._getframe(1).f_globals.get("__name__", "").startswith("synthward")
        return content.fill(made) if is_ours and made.device.type == "cpu" else made

    return fill


def watched(run: Callable[..., list[Tensor]], arguments: Sequence[Any] = ()) -> set[str]:
    """Run it with other contents of guard zones and new memory, and with programs in reverse: the same bits, and none
    of the contents among them. Names of the kernels that were launched."""
    with watching(NANS) as watch:
        found = run(*arguments)
    with watching(NUMBERS, is_exact=False, is_reversed=True):
        again = run(*arguments)
    assert not any(t.is_floating_point() and bool(t.isnan().any()) for t in found), (
        "something was never written"
    )
    assert all(map(torch.equal, map(bits, found), map(bits, again))), "what was never written was read"
    return watch.launched
