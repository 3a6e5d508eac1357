"""Parameters that `fully_shard` (FSDP2) has spread over the ranks: each owns some rows of each.

Forward and backward passes see a layer's whole parameters while it runs, which FSDP gathers and frees. The clipped sum
of a parameter is formed whole, one at a time, and reduced to its rows at once; noise, moments and update are of the
rows alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from synthward.engine.capture import CaptureState
from synthward.engine.distributed.exchange import Pending, copy_from_main, start_reduce_scatter, sum_over
from synthward.engine.distributed.ranks import Ranks
from synthward.engine.errors import ConfigError, UnsupportedOperationError
from synthward.engine.flat import Piece, Span, Spans
from synthward.kernels import leave_resizable

# Reductions under way at once: each holds one parameter's whole sum.
_IN_FLIGHT = 2


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether it is a tensor that is spread over ranks."""
    return isinstance(parameter, DTensor)


def shard(module: nn.Module, ranks: Ranks) -> None:
    """Spread a module's parameters over all ranks: `fully_shard` on each layer that has some, then on the module."""
    mesh = init_device_mesh(next(module.parameters()).device.type, (ranks.world_size,))
    layers = [layer for layer in module.modules() if layer is not module]
    for layer in layers:
        if isinstance(layer, nn.Linear | nn.Embedding | nn.modules.conv._ConvNd):
            fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)


def shard_like(value: Tensor, other: Tensor) -> Tensor:
    """`value`, whole, spread as `other` is; as it is where that is whole, too. All ranks take part."""
    if not isinstance(other, DTensor):
        return value
    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)


def whole(value: Tensor) -> Tensor:
    """All of a tensor, spread over ranks or not. All ranks take part."""
    if not isinstance(value, DTensor):
        return value
    full: Tensor = value.full_tensor()
    return full


class ShardedParameters(Spans):
    """The rows of all parameters that this rank has.

    Attributes:
        sums: the clipped sums of the step.
        pieces: what this rank updates: its rows of each parameter.
        own_size: number of coordinates that this rank owns.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
        self.ranks = ranks
        with ranks.as_one():
            super().__init__(module, optimizer)
            for span in self.spans:
                _check_placement(span, ranks)
        # FSDP spreads nothing but parameters; those that are frozen are put together of all ranks' rows.
        copy_from_main(ranks, [value for value in self.untrained() if not isinstance(value, DTensor)])
        # FSDP gathers parameters in between, and a rank without rows reduces its sums at another time than the others.
        self._reducing = ranks.apart()
        leave_resizable()
        for span in self.spans:
            span.parameter.grad = None
        self.device = _local(self.spans[0].parameter).device
        self.note_places()
        self._lengths = [_local(span.parameter).numel() for span in self.spans]
        self.own_size = sum(self._lengths)
        self.pieces = self._make_pieces()
        self.sums = self.new_sums(torch.float32)

    def check_unchanged(self, *, allow_frozen: bool) -> None:
        # A forward pass may begin after FSDP has put whole parameters in the place of their rows; what is captured
        # goes by those that it puts there, and at the release all must be what they were.
        if allow_frozen and not self._is_at_rest():
            return
        super().check_unchanged(allow_frozen=allow_frozen)

    def _is_at_rest(self) -> bool:
        return all(isinstance(parameter, DTensor) for parameter in self.module.parameters())

    def pointer(self, span: Span) -> int:
        return _local(span.parameter).data_ptr()

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` holds on any rank. All ranks take part."""
        # Not where the parameters are: a GPU would be waited for.
        return bool(sum_over(self.ranks, torch.tensor(float(flag), device=self.ranks.device)))

    def watch(self, state: CaptureState) -> None:
        watch_layers(self.module, state)

    def new_sums(self, dtype: torch.dtype) -> ShardedSums:
        """Sums of all parameters, zero."""
        shapes = [span.parameter.shape for span in self.spans]
        return ShardedSums(shapes, self._lengths, self._reducing, dtype, self.device)

    def _make_pieces(self) -> list[Piece]:
        pieces, at = [], 0
        for span in self.spans:
            rows, width = _rows(span.parameter.shape)
            first, _ = _part(rows, self.ranks)
            param = _local(span.parameter).view(-1)
            if len(param):
                pieces.append(Piece(span.group, span.start + first * width, at, param))
            at += len(param)
        return pieces

    def share(self) -> None:
        """Nothing: FSDP gathers what a layer needs."""

    def released(self) -> list[Tensor]:
        """What this rank has made of the sums that it owns, as tensors that are spread like the parameters."""
        return self.spread(self.sums.flat, copy=False)

    def spread(self, own: Tensor, *, copy: bool = True) -> list[Tensor]:
        """A buffer over this rank's coordinates as a tensor for each parameter, spread as the parameter is."""
        found: list[Tensor] = []
        for span, part in zip(self.spans, torch.split(own, self._lengths), strict=True):
            parameter = span.parameter
            assert isinstance(parameter, DTensor)
            local = part.view(_local(parameter).shape)
            found.append(
                DTensor.from_local(
                    local.clone() if copy else local,
                    parameter.device_mesh,
                    parameter.placements,
                    run_check=False,
                    shape=parameter.shape,
                    stride=parameter.stride(),
                )
            )
        return found

    def collect(self, values: Sequence[Tensor | None], own: Tensor) -> None:
        """Inverse of `spread`, into `own`; what is None is left at zero. Whole tensors are taken, too."""
        own.zero_()
        for span, value, part in zip(self.spans, values, torch.split(own, self._lengths), strict=True):
            if value is not None:
                part.copy_(self._rows_of(span, value).reshape(-1))

    def load(self, span: Span, value: Tensor) -> None:
        """Give a parameter another value, in place; `value` is whole or spread as the parameter is."""
        with torch.no_grad():
            _local(span.parameter).copy_(self._rows_of(span, value))

    def _rows_of(self, span: Span, value: Tensor) -> Tensor:
        if isinstance(value, DTensor):
            return value.to_local()
        first, last = _part(span.parameter.shape[0], self.ranks)
        return value[first:last]


class ShardedSums:
    """`Sums` of parameters that are spread over ranks: a sum is whole only until it is complete."""

    def __init__(
        self,
        shapes: list[torch.Size],
        lengths: list[int],
        ranks: Ranks,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shapes, self.dtype, self.device = shapes, dtype, device
        self.flat = torch.zeros(sum(lengths), dtype=dtype, device=device)
        self._parts = torch.split(self.flat, lengths)
        self._ranks = ranks
        self._whole: dict[int, Tensor] = {}
        self._pending: list[Pending] = []
        self._forget()

    def _forget(self) -> None:
        self._done: set[int] = set()
        # From the back, where the backward pass begins, and on all ranks in this order.
        self._next = len(self.shapes) - 1
        self._is_open = False

    def __getitem__(self, position: int) -> Tensor:
        rows, width = _rows(self.shapes[position])
        if position not in self._whole:
            # Rows of padding, so that all ranks have as many.
            padded = _rows_each(rows, self._ranks) * self._ranks.world_size
            self._whole[position] = torch.zeros(padded * width, dtype=self.dtype, device=self.device)
        return self._whole[position][: rows * width].view(self.shapes[position])

    def __len__(self) -> int:
        return len(self.shapes)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._parts)

    def begin_pass(self, *, is_last: bool) -> None:
        self._check_whole()
        self._forget()
        self._is_open = True

    def done(self, position: int) -> None:
        self._done.add(position)
        while self._next >= 0 and self._next in self._done:
            self._start()

    def end_pass(self) -> None:
        # Sums that no unit of this rank reached are zero here, and others wait for them.
        while self._next >= 0:
            self._start()
        for exchange in self._pending:
            exchange.wait()
        self._pending.clear()
        self._forget()

    def complete(self, agree: Callable[[], None]) -> None:
        """Each pass has been reduced at its end."""
        agree()

    def _start(self) -> None:
        if len(self._pending) >= _IN_FLIGHT:
            self._pending.pop(0).wait()
        self[self._next]
        whole, part = self._whole.pop(self._next), self._parts[self._next]
        if self._ranks.world_size == 1:
            part += whole[: len(part)]
        else:
            self._pending.append(_Reduced(self._ranks, whole, part))
        self._next -= 1

    def own(self, at: int, length: int) -> Tensor:
        return self.flat[at : at + length]

    def release(self) -> None:
        """What this rank owns is all there is."""

    def drop(self) -> None:
        self._check_whole()
        self._whole.clear()
        self.flat.zero_()
        self._forget()

    def _check_whole(self) -> None:
        if self._ranks.world_size > 1 and (
            self._pending or (self._is_open and self._next < len(self.shapes) - 1)
        ):
            raise UnsupportedOperationError(
                "a pass was given up while its sums were on their way to other ranks; end all processes and resume "
                "from the last checkpoint"
            )


class _Reduced(Pending):
    """A sum on its way to the ranks that own its rows."""

    def __init__(self, ranks: Ranks, whole: Tensor, part: Tensor) -> None:
        rows = whole.new_empty(len(whole) // ranks.world_size)
        self._inner, self._rows, self._part = start_reduce_scatter(ranks, whole, rows), rows, part

    def wait(self) -> None:
        self._inner.wait()
        self._part += self._rows[: len(self._part)]


def watch_layers(module: nn.Module, state: CaptureState) -> None:
    """Tell the capture which whole parameter stands for which of its rows, and keep it out of FSDP's own hooks: out of
    no others, which may mix units and write statistics as a forward pass may.

    Raises:
        UnsupportedOperationError: FSDP's hooks are not where they are looked for.
    """
    known = weakref.ref(state)
    names = {name: i for i, name in enumerate(state.names)}
    for prefix, layer in module.named_modules():
        places = {
            key: names[f"{prefix}.{key}" if prefix else key]
            for key, p in layer._parameters.items()
            if p is not None and (f"{prefix}.{key}" if prefix else key) in names
        }
        note = _Note(known, places)
        if not _is_unit(layer):
            layer.register_forward_pre_hook(note, prepend=True)
            continue
        hooks: list[dict[int, Any]] = [layer._forward_pre_hooks, layer._forward_hooks]
        for found, then in zip(hooks, (note, None), strict=True):
            own = [number for number, hook in found.items() if _is_of_fsdp(hook)]
            if len(own) != 1:
                raise UnsupportedOperationError(
                    f"module {prefix or '(the whole)'!r}: fully_shard has put its hooks somewhere else (one call on "
                    "several modules, or a version of torch that is not known); call it on each module"
                )
            found[own[0]] = _Paused(known, found[own[0]], then)


class _Paused:
    """A hook of FSDP, which the capture does not look at; then what may see the parameters that it has put in place."""

    def __init__(self, state: weakref.ref[CaptureState], hook: Any, then: _Note | None) -> None:
        self._state, self._hook, self._then = state, hook, then

    def __call__(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = self._state()
        before = state is not None and state.is_paused
        try:
            if state is not None:
                state.is_paused = True
            found = self._hook(layer, *args, **kwargs)
        finally:
            if state is not None:
                state.is_paused = before
        if self._then is not None:
            self._then(layer, args)
        return found


class _Note:
    def __init__(self, state: weakref.ref[CaptureState], places: dict[str, int]) -> None:
        self._state, self._places = state, places

    def __call__(self, layer: nn.Module, _: Any) -> None:
        state = self._state()
        if state is not None:
            for key, position in self._places.items():
                parameter = layer._parameters[key]
                assert parameter is not None
                state.stand_in(position, parameter)


def _is_of_fsdp(hook: Any) -> bool:
    owner = getattr(hook, "__self__", None)
    return isinstance(hook, _Paused) or type(owner).__module__.startswith("torch.distributed.fsdp")


def _is_unit(layer: nn.Module) -> bool:
    return isinstance(layer, FSDPModule)


def _rows(shape: torch.Size) -> tuple[int, int]:
    return shape[0], shape[1:].numel()


def _rows_each(rows: int, ranks: Ranks) -> int:
    """Rows that a rank has, but for the last ones; as torch.chunk divides them."""
    return -(-rows // ranks.world_size)


def _part(rows: int, ranks: Ranks) -> tuple[int, int]:
    """First and last (exclusive) row of this rank."""
    each = _rows_each(rows, ranks)
    return min(ranks.rank * each, rows), min((ranks.rank + 1) * each, rows)


def _local(parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    # Of the parameter itself, not of a copy: to_local of what needs no gradient is a view.
    local: Tensor = parameter.detach().to_local()  # type: ignore[attr-defined]
    return local


def _check_placement(span: Span, ranks: Ranks) -> None:
    parameter = span.parameter
    if not isinstance(parameter, DTensor):
        raise ConfigError(
            f"parameter {span.name!r} is whole and others are sharded; call fully_shard on the whole module"
        )
    mesh = parameter.device_mesh
    local = _local(parameter)
    rows, width = _rows(parameter.shape) if parameter.dim() else (0, 0)
    first, last = _part(rows, ranks)
    if (
        mesh.ndim != 1
        or mesh.mesh.tolist() != ranks.members
        or tuple(parameter.placements) != (Shard(0),)
        or local.numel() != (last - first) * width
        or not local.is_contiguous()
    ):
        raise UnsupportedOperationError(
            f"parameter {span.name!r} is placed as {tuple(parameter.placements)} on a mesh of "
            f"{tuple(mesh.shape)}, processes {mesh.mesh.tolist()}; only fully_shard over all ranks of the run, "
            f"{ranks.members} in this order, by the first axis, is supported"
        )
