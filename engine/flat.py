"""Parameters of a module as views of one flat fp32 buffer, so that noise and update are one pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from synthward.engine.errors import ConfigError, PrivacyError

# Each parameter starts at a multiple of 64 bytes; what lies between is never read.
_ALIGN = 16


@dataclass(frozen=True)
class Span:
    """Where one parameter lies in the flat buffers."""

    name: str
    parameter: nn.Parameter
    group: int
    start: int

    def view(self, flat: Tensor) -> Tensor:
        """This parameter's part of a flat buffer, in its own shape."""
        return flat[self.start : self.start + self.parameter.numel()].view(self.parameter.shape)


class FlatParameters:
    """The trainable parameters of a module, one after the other, optimizer group by optimizer group.

    Guarantees: each trainable parameter lies in exactly one span and in exactly one optimizer group; the
    index of a coordinate in the flat buffer is its index in the noise stream.
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
        self.positions = {id(s.parameter): i for i, s in enumerate(self.spans)}
        device = self.spans[0].parameter.device
        if any(s.parameter.device != device for s in self.spans):
            raise ConfigError("the module's parameters lie on several devices; move them to one")
        self.data = torch.zeros(end, dtype=torch.float32, device=device)
        self.summed_grad = torch.zeros_like(self.data)
        for span in self.spans:
            view = span.view(self.data)
            with torch.no_grad():
                view.copy_(span.parameter)
            span.parameter.data = view
            span.parameter.grad = None
        self._pointers = [span.parameter.data_ptr() for span in self.spans]
        self.sums = [span.view(self.summed_grad) for span in self.spans]

    def __iter__(self) -> Iterator[Span]:
        return iter(self.spans)

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
            if span.parameter.data_ptr() != pointer:
                raise PrivacyError(
                    f"parameter {span.name!r} was moved or replaced (module.to, .data = ...) after the "
                    "module was made private; move first, then make it private"
                )


def _check_kind(name: str, parameter: nn.Parameter) -> None:
    if parameter.dtype != torch.float32:
        raise ConfigError(
            f"parameter {name!r} is {parameter.dtype}; trainable parameters must be torch.float32"
        )
    if parameter.is_sparse:
        raise ConfigError(f"parameter {name!r} is sparse; only dense parameters are supported")
