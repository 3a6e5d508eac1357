"""How the noise of one step is made from white noise of this and earlier steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from synthward.kernels import _check


@dataclass(frozen=True, eq=False)
class Correlation:
    """Noise ``w`` of an element at `step`, for white noise z of the same key, stream and element:

        ``w = sum_j taps[j] z(step - j) - sum_k weights[k] state[k]``, then
        ``state[k] = decays[k] state[k] + gains[k] w``

    Each step is taken once, in order, with a state that was zero before `first_step`.

    Args:
        taps: the first positive, so that every step has noise of its own; z of steps before `first_step` is left out.
        weights, decays, gains: K each. A weight or a decay of 0 reads nothing of its row; a row is not written where
            decay is 1 and gain 0.
        state: float32 [K, P] with contiguous rows, which may be parts of longer ones (``whole[:, start:end]``);
            needed if K > 0, and only then. Never inside another argument.
        first_step: of the noise stream.

    Raises:
        TypeError, ValueError: naming the argument.
    Reference: banded strategies: Choquette-Choo et al. 2023; buffered linear Toeplitz: McMahan, Xu and Zhang 2024.
    """

    taps: tuple[float, ...]
    weights: tuple[float, ...] = ()
    decays: tuple[float, ...] = ()
    gains: tuple[float, ...] = ()
    state: Tensor | None = None
    first_step: int = 0

    def __post_init__(self) -> None:
        for name in ("taps", "weights", "decays", "gains"):
            numbers = tuple(getattr(self, name))
            for number in numbers:
                _check.finite(number, name)
            object.__setattr__(self, name, tuple(map(float, numbers)))
        if not self.taps or self.taps[0] < _check.FLOAT32_TINY:
            raise ValueError("taps: the first must be positive, or a step would have no noise of its own")
        for name in ("decays", "gains"):
            if len(getattr(self, name)) != len(self.weights):
                raise ValueError(
                    f"{name}: got {len(getattr(self, name))}, expected {len(self.weights)} as weights"
                )
        if (self.state is None) != (not self.weights):
            raise ValueError("state: needed with weights, and only with them")
        if self.state is not None:
            _check_rows(self.state, len(self.weights))

    def part(self, start: int, end: int) -> Correlation:
        """That of the elements ``start .. end`` of the buffer, on the same memory."""
        return self if self.state is None else replace(self, state=self.state[:, start:end])

    def checked(self, step: int, others: tuple[Tensor | None, ...]) -> Correlation:
        """That of one step, without taps that reach behind the first; `others` are flat tensors of one length.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        _check.index(self.first_step, "first_step")
        if step < self.first_step:
            raise ValueError(f"step: got {step}, which is before first_step {self.first_step}")
        present = [tensor for tensor in others if tensor is not None]
        if self.state is not None and self.state.shape[1] != len(present[0]):
            raise ValueError(
                f"state: has shape {list(self.state.shape)}, expected [{len(self.weights)}, {len(present[0])}]"
            )
        for row in self.rows():
            for tensor in present:
                _check.apart(row, tensor, "state")
        return replace(self, taps=self.taps[: step - self.first_step + 1])

    def rows(self) -> tuple[Tensor, ...]:
        """Rows of the state, each contiguous."""
        return () if self.state is None else self.state.unbind(0)


def _check_rows(state: Tensor, slots: int) -> None:
    if state.dtype != torch.float32:
        raise TypeError(f"state: has dtype {state.dtype}, expected torch.float32")
    if state.ndim != 2 or len(state) != slots:
        raise ValueError(f"state: has shape {list(state.shape)}, expected [{slots}, P]")
    length = state.shape[1]
    if (length > 1 and state.stride(1) != 1) or (slots > 1 and state.stride(0) < length):
        raise ValueError(
            f"state: has strides {state.stride()}, expected contiguous rows apart from each other"
        )
