"""Where a generator takes random numbers from: numbered rows, so that a unit is given the same whoever works on it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from synthward.engine.device import CPU, copy_to


class Randomness(Protocol):
    """Random numbers for the rows of a batch, call by call, on the generator's device
    (`synthward.engine.draws.Draws`)."""

    def uniform(self, rows: int, k: int) -> Tensor:
        """Float32 [rows, k] in [0, 1)."""

    def normal(self, rows: int, k: int) -> Tensor:
        """Standard normal float32 [rows, k]."""


class TorchRandomness:
    """Random numbers in the order in which a generator of torch for the CPU gives them, put on a device."""

    def __init__(self, rng: torch.Generator, device: torch.device = CPU) -> None:
        self._rng, self._device = rng, device

    def uniform(self, rows: int, k: int) -> Tensor:
        return copy_to(torch.rand(rows, k, generator=self._rng), self._device)

    def normal(self, rows: int, k: int) -> Tensor:
        return copy_to(torch.randn(rows, k, generator=self._rng), self._device)

    def integers(self, rows: int, end: int) -> Tensor:
        """Int64 [rows] in 0 .. end - 1."""
        return copy_to(torch.randint(end, (rows,), generator=self._rng), self._device)


def as_randomness(rng: Randomness | torch.Generator, device: torch.device) -> Randomness:
    """What was given (its numbers are on the device), or a generator of torch in its place."""
    return TorchRandomness(rng, device) if isinstance(rng, torch.Generator) else rng
