"""Noise that is correlated over steps: what a kernel needs of it at one step, and its plain form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from synthward.kernels.noise import reference


@dataclass(frozen=True)
class Correlation:
    """Noise of an element at a step of the stream::

        w = sum_j taps[j] z(step - j) - sum_k weights[k] state[k]
        state[k] = decays[k] state[k] + gains[k] w

    with z the stream's own Gaussians: those of past steps are made again and not kept.

    Args:
        taps: at least one; no more than steps since ``first_step``, that of the step itself among them, are used.
        weights, decays, gains: K numbers each.
        state: float32 [K, P], contiguous; column ``start + i`` is of the element that is written at i. It is not
            written where decay is 1 and gain 0. None if K is 0.
        first_step: the first step of this noise; what would come before it is zero.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    taps: tuple[float, ...]
    weights: tuple[float, ...] = ()
    decays: tuple[float, ...] = ()
    gains: tuple[float, ...] = ()
    state: Tensor | None = None
    first_step: int = 0

    def __post_init__(self) -> None:
        for name in ("taps", "weights", "decays", "gains"):
            values = getattr(self, name)
            if not all(math.isfinite(value) for value in values):
                raise ValueError(f"{name}: expected finite numbers")
            if name in ("decays", "gains") and len(values) != len(self.weights):
                raise ValueError(f"{name}: has {len(values)} entries, expected {len(self.weights)} as weights has")
        if not self.taps:
            raise ValueError("taps: expected at least one")
        if self.first_step < 0:
            raise ValueError(f"first_step: got {self.first_step}, expected at least 0")
        if (self.state is None) != (not self.weights):
            raise ValueError("state: goes with weights, and only with them")
        if self.state is not None:
            if self.state.dtype != torch.float32 or self.state.ndim != 2 or not self.state.is_contiguous():
                raise TypeError("state: expected contiguous float32 [K, P]")
            if len(self.state) != len(self.weights):
                raise ValueError(f"state: has {len(self.state)} rows, expected {len(self.weights)}")

    def check(self, step: int, start: int, count: int) -> None:
        """`ValueError` unless it fits elements ``start .. start + count`` at a step."""
        if step < self.first_step:
            raise ValueError(f"first_step: is {self.first_step}, later than step {step}")
        if self.state is not None and self.state.shape[1] < start + count:
            raise ValueError(
                f"state: has {self.state.shape[1]} columns, expected one for each of {start + count} elements"
            )

    def used_taps(self, step: int) -> tuple[float, ...]:
        """The taps of steps that were."""
        return self.taps[: step - self.first_step + 1]

    def coefficients(self, step: int) -> list[list[float]]:
        """What the compiled kernels take."""
        return [list(part) for part in (self.used_taps(step), self.weights, self.decays, self.gains)]


def correlated_noise(
    count: int, key: bytes, stream: int, step: int, start: int, correlation: Correlation | None
) -> Tensor:
    """Plain form: the noise float32 [count] in CPU memory, the state moved on."""
    if correlation is None:
        return reference.gaussian_noise(count, key, stream, step, start)
    total = torch.zeros(count)
    for back, tap in enumerate(correlation.used_taps(step)):
        total += tap * reference.gaussian_noise(count, key, stream, step - back, start)
    if correlation.state is None:
        return total
    state = correlation.state[:, start : start + count]
    for weight, kept in zip(correlation.weights, state, strict=True):
        total -= (weight * kept).cpu()
    for decay, gain, kept in zip(correlation.decays, correlation.gains, state, strict=True):
        kept.mul_(decay).add_(total.to(kept.device), alpha=gain)
    return total
