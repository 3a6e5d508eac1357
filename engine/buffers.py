"""Flat buffers: all trained parameters, their clipped sum and their moments, each one contiguous fp32 tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from synthward.engine.errors import ConfigError


class FlatBuffers:
    """Parameters moved into one fp32 buffer (each stays a view, so its module and optimizer still hold it)."""

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        for name, parameter in named:
            if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
                raise ConfigError(
                    f"parameter {name!r}: is {parameter.dtype} on {parameter.device.type}; the engine trains "
                    "torch.float32 on cpu so far"
                )
        self.named = list(named)
        self.slices: dict[int, slice] = {}
        at = 0
        for _, parameter in self.named:
            self.slices[id(parameter)] = slice(at, at + parameter.numel())
            at += parameter.numel()
        self.parameters = torch.empty(at)
        self.summed = torch.zeros(at)
        with torch.no_grad():
            for _, parameter in self.named:
                view = self.parameters[self.slices[id(parameter)]]
                view.copy_(parameter.detach().reshape(-1))
                parameter.data = view.view(parameter.shape)
        self.sums = self.views(self.summed)

    def views(self, flat: Tensor) -> dict[int, Tensor]:
        """Views of a flat buffer in the shapes of the parameters, by parameter id."""
        return {id(p): flat[self.slices[id(p)]].view(p.shape) for _, p in self.named}

    def is_intact(self) -> str | None:
        """Name of a parameter that was moved out of the buffer (by ``.to()`` or an assignment), or None."""
        for name, parameter in self.named:
            expected = self.parameters[self.slices[id(parameter)]]
            if parameter.data_ptr() != expected.data_ptr() and parameter.numel():
                return name
        return None
