"""Parameters of a module as views of one flat fp32 buffer, so that noise and update are one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from synthward.engine.distributed.exchange import copy_from_main
from synthward.engine.distributed.ranks import Ranks
from synthward.engine.errors import ConfigError, PrivacyError
from synthward.engine.sums import Buckets, FlatSums, gatherer, new_sums

if TYPE_CHECKING:
    from synthward.engine.capture import CaptureState
    from synthward.engine.distributed.sharded import ShardedParameters

# Each parameter starts at a multiple of 64 bytes; what lies between is never read.
_ALIGN = 16


Parameters: TypeAlias = "FlatParameters | ShardedParameters"


@dataclass(frozen=True)
class Span:
    """One parameter, and where it lies among all coordinates."""

    name: str
    parameter: nn.Parameter
    group: int
    start: int

    def view(self, flat: Tensor) -> Tensor:
        """This parameter's part of a buffer over all coordinates, in its own shape."""
        return flat[self.start : self.start + self.parameter.numel()].view(self.parameter.shape)


@dataclass(frozen=True)
class Piece:
    """A stretch of coordinates that this process noises and updates.

    Attributes:
        group: index of the optimizer's group.
        start: index of its first coordinate among all, which is its index in the noise stream.
        at: index of its first coordinate among those that this process owns.
        param: float32 [n], the parameters themselves.
    """

    group: int
    start: int
    at: int
    param: Tensor

    def of(self, own: Tensor) -> Tensor:
        """Its part of a buffer over the coordinates that this process owns."""
        return own[self.at : self.at + len(self.param)]


class Spans:
    """The trainable parameters of a module, one after the other, optimizer group by optimizer group.

    Attributes:
        size: number of coordinates, the gaps of alignment included: the same for every number of ranks.
        group_ranges: first and last (exclusive) coordinate of each optimizer group.

    Guarantees: each trainable parameter lies in exactly one span and in exactly one optimizer group; the index of a
    coordinate is its index in the noise stream.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.module = module
        names = {id(p): name for name, p in module.named_parameters()}
        trainable = {id(p) for p in module.parameters() if p.requires_grad}
        self.spans: list[Span] = []
        self.group_ranges: list[tuple[int, int]] = []
        end = 0
        for index, group in enumerate(optimizer.param_groups):
            begin = end
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    continue
                if id(parameter) not in trainable:
                    raise ConfigError(
                        f"the optimizer holds a parameter of shape {list(parameter.shape)} that is not in "
                        "the module; build it from module.parameters()"
                    )
                _check_kind(names[id(parameter)], parameter)
                self.spans.append(Span(names[id(parameter)], parameter, index, end))
                end += -(-parameter.numel() // _ALIGN) * _ALIGN
            self.group_ranges.append((begin, end))
        missing = trainable - {id(s.parameter) for s in self.spans}
        if missing:
            listed = ", ".join(names[i] for i in names if i in missing)
            raise ConfigError(
                f"the optimizer does not hold these trainable parameters of the module: {listed}"
            )
        if not self.spans:
            raise ConfigError("the module has no trainable parameter")
        self.size = end
        self.positions = {id(s.parameter): i for i, s in enumerate(self.spans)}
        self.device = self.spans[0].parameter.device
        if any(s.parameter.device != self.device for s in self.spans):
            raise ConfigError("the module's parameters lie on several devices; move them to one")

    def __iter__(self) -> Iterator[Span]:
        return iter(self.spans)

    def untrained(self) -> list[Tensor]:
        """The memory of frozen parameters and of buffers. Ranks that began with other values of them would each add up
        gradients of another network."""
        frozen = [p for p in self.module.parameters() if id(p) not in self.positions]
        return [_bytes_of(value.detach()) for value in (*frozen, *self.module.buffers())]

    def check_unchanged(self, *, allow_frozen: bool) -> None:
        """`PrivacyError` when the module's trainable parameters are not those that were wrapped."""
        for name, parameter in self.module.named_parameters():
            if id(parameter) not in self.positions:
                if parameter.requires_grad:
                    raise PrivacyError(
                        f"parameter {name!r} became trainable after the module was made private; it has "
                        "neither clipping nor noise. Build the whole module (and unfreeze) first, then "
                        "make it private"
                    )
            elif not (parameter.requires_grad or allow_frozen):
                raise PrivacyError(
                    f"parameter {name!r} was frozen after the module was made private; freeze first, then "
                    "make it private"
                )

    def check_in_place(self) -> None:
        """`PrivacyError` when a parameter's memory was replaced, or a gradient reached it past the engine."""
        for span, pointer in zip(self.spans, self._pointers, strict=True):
            if span.parameter.grad is not None:
                raise PrivacyError(
                    f"parameter {span.name!r} received a gradient past the engine (a loss on the weights, "
                    "a forward pass outside the capture, or a gradient set by hand): it is not clipped. "
                    "Call zero_grad() to drop it"
                )
            if self.pointer(span) != pointer:
                raise PrivacyError(
                    f"parameter {span.name!r} was moved or replaced (module.to, .data = ...) after the "
                    "module was made private; move first, then make it private"
                )

    def note_places(self) -> None:
        """Remember where the parameters are."""
        self._pointers = [self.pointer(span) for span in self.spans]

    def pointer(self, span: Span) -> int:
        """Where a parameter lies in memory."""
        return span.parameter.data_ptr()

    def watch(self, state: CaptureState) -> None:
        """Tell a capture what stands for a parameter in the forward pass, where it is not the parameter itself."""


class FlatParameters(Spans):
    """All parameters in one flat buffer, whole on every rank.

    Each rank noises and updates the coordinates that it owns (`pieces`) and has the others from their owners.

    Attributes:
        data: float32 [length], all parameters; what lies behind `size` is padding.
        sums: the clipped sums of the step.
        pieces: what this rank updates.
        own_size: number of coordinates that this rank owns.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks | None = None
    ) -> None:
        super().__init__(module, optimizer)
        self.ranks = ranks or Ranks.alone()
        self._buckets = Buckets(self.size, self.ranks, _ALIGN)
        self.data = torch.zeros(self._buckets.length, dtype=torch.float32, device=self.device)
        for span in self.spans:
            view = span.view(self.data)
            with torch.no_grad():
                view.copy_(span.parameter)
            span.parameter.data = view
            span.parameter.grad = None
        copy_from_main(self.ranks, [self.data, *self.untrained()])
        self._gatherer = gatherer(self._buckets, self.device)
        self.note_places()
        self._lengths = [stop - start for start, stop in self._buckets.owned]
        self.own_size = sum(self._lengths)
        self.pieces = self._make_pieces()
        self.sums = self.new_sums(torch.float32)

    @property
    def summed_grad(self) -> Tensor:
        """The sums of all parameters, flat."""
        return self.sums.flat

    def new_sums(self, dtype: torch.dtype) -> FlatSums:
        """Sums of all parameters, zero."""
        ranges = [(s.start, s.start + s.parameter.numel(), s.parameter.shape) for s in self.spans]
        return new_sums(ranges, self._buckets, dtype, self.device)

    def _make_pieces(self) -> list[Piece]:
        pieces, at = [], 0
        for start, stop in self._buckets.owned:
            for group, (begin, end) in enumerate(self.group_ranges):
                low, high = max(start, begin), min(stop, end)
                if low < high:
                    pieces.append(Piece(group, low, at + low - start, self.data[low:high]))
            at += stop - start
        return pieces

    def share(self) -> None:
        """Copy the parameters that each rank has updated to all others."""
        self._gatherer.gather(self.data)

    def spread(self, own: Tensor) -> list[Tensor]:
        """A buffer over this rank's coordinates as a tensor for each parameter, whole (copies). All ranks take part."""
        flat = torch.zeros(self._buckets.length, dtype=own.dtype, device=own.device)
        for (start, stop), part in zip(self._buckets.owned, torch.split(own, self._lengths), strict=True):
            flat[start:stop] = part
        self._buckets.gather(flat)
        return [span.view(flat).clone() for span in self.spans]

    def collect(self, values: Sequence[Tensor | None], own: Tensor) -> None:
        """Inverse of `spread`, into `own`; what is None is left at zero."""
        flat = torch.zeros(self._buckets.length, dtype=own.dtype, device=own.device)
        for span, value in zip(self.spans, values, strict=True):
            if value is not None:
                span.view(flat).copy_(value)
        for (start, stop), part in zip(self._buckets.owned, torch.split(own, self._lengths), strict=True):
            part.copy_(flat[start:stop])

    def released(self) -> list[Tensor]:
        """What each rank has made of the sums that it owns, as a tensor for each parameter. All ranks take part."""
        self.sums.gather()
        return list(self.sums)

    def load(self, span: Span, value: Tensor) -> None:
        """Give a parameter another value, in place."""
        with torch.no_grad():
            span.parameter.copy_(value)


def wrap_parameters(module: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> Parameters:
    """The trainable parameters of a module, as this process has them."""
    from synthward.engine.distributed import sharded

    if any(sharded.is_sharded(parameter) for parameter in module.parameters()):
        return sharded.ShardedParameters(module, optimizer, ranks)
    return FlatParameters(module, optimizer, ranks)


def _bytes_of(value: Tensor) -> Tensor:
    """The memory of a tensor, as an exchange takes it whatever its type."""
    return value.view(-1).view(torch.uint8) if type(value) is Tensor and value.is_contiguous() else value


def _check_kind(name: str, parameter: nn.Parameter) -> None:
    if parameter.dtype != torch.float32:
        raise ConfigError(
            f"parameter {name!r} is {parameter.dtype}; trainable parameters must be torch.float32"
        )
    if parameter.is_sparse:
        raise ConfigError(f"parameter {name!r} is sparse; only dense parameters are supported")
