"""Where a generator takes random numbers from: numbered rows, so that a unit is given the same whoever works on it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Randomness(Protocol):
    """Random numbers for the rows of a batch, call by call (`synthward.engine.draws.Draws`)."""

    def uniform(self, rows: int, k: int) -> Tensor:
        """Float32 [rows, k] in [0, 1)."""

    def normal(self, rows: int, k: int) -> Tensor:
        """Standard normal float32 [rows, k]."""


class TorchRandomness:
    """Random numbers in the order in which a generator of torch gives them."""

    def __init__(self, rng: torch.Generator) -> None:
        self._rng = rng

    def uniform(self, rows: int, k: int) -> Tensor:
        return torch.rand(rows, k, generator=self._rng)

    def normal(self, rows: int, k: int) -> Tensor:
        return torch.randn(rows, k, generator=self._rng)


def as_randomness(rng: Randomness | torch.Generator) -> Randomness:
    """What was given, or a generator of torch in its place."""
    return TorchRandomness(rng) if isinstance(rng, torch.Generator) else rng
