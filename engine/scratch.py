"""Scratch memory that is kept between steps."""

from __future__ import annotations

import torch
from torch import Tensor


class Workspace:
    """One scratch buffer, as large as the largest request: fresh memory costs more than what is done with
    it."""

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.empty(0, dtype=torch.float32, device=device)

    def __call__(self, shape: torch.Size) -> Tensor:
        size = shape.numel()
        if len(self._buffer) < size:
            self._buffer = torch.empty(size, dtype=torch.float32, device=self._buffer.device)
        return self._buffer[:size].view(shape)
