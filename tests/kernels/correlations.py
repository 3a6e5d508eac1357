"""Strategies of correlated noise for the tests: step by step as the kernels take them, and as dense matrices."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from synthward.kernels import Correlation, gaussian_noise

BANDS = (1.25, 0.5, 0.375, 0.125)
SUMS, DECAYS = (0.3, 0.15, 0.05), (0.95, 0.6, 0.0)
INVERSE = (1.0, -0.5, -0.25, 0.125, -0.0625)
KINDS = ("banded", "blt", "inverse")
SLOTS = {"banded": len(BANDS) - 1, "blt": len(SUMS), "inverse": 0}


def fresh_state(kind: str, length: int) -> Tensor | None:
    """Nothing reads a slot of a banded strategy before it was written."""
    if SLOTS[kind] == 0:
        return None
    return torch.full((SLOTS[kind], length), float("nan") if kind == "banded" else 0.0)


def correlation(kind: str, step: int, state: Tensor | None, first_step: int = 0) -> Correlation:
    """The recipe of one step."""
    if kind == "inverse":
        return Correlation(INVERSE, first_step=first_step)
    if kind == "blt":
        return Correlation((1.0,), SUMS, DECAYS, (1.0,) * len(SUMS), state, first_step)
    slots, since = len(BANDS) - 1, step - first_step
    ages = [(since - slot - 1) % slots + 1 for slot in range(slots)]
    return Correlation(
        (1.0 / BANDS[0],),
        tuple(BANDS[age] / BANDS[0] if age <= since else 0.0 for age in ages),
        tuple(float(slot != since % slots) for slot in range(slots)),
        tuple(float(slot == since % slots) for slot in range(slots)),
        state,
        first_step,
    )


def dense(kind: str, steps: int) -> np.ndarray:
    """The strategy matrix C, float64 [steps, steps]."""
    if kind == "inverse":
        return np.linalg.inv(_toeplitz(np.array(INVERSE), steps))
    if kind == "banded":
        return _toeplitz(np.array(BANDS), steps)
    powers = np.array([np.array(DECAYS) ** i for i in range(steps)])
    return _toeplitz(np.concatenate([[1.0], powers @ np.array(SUMS)]), steps)


def expected_noise(
    kind: str, steps: int, length: int, *, first_step: int = 0, backend: str = "auto", **place: object
) -> Tensor:
    """C^-1 z in float64, [steps, length]."""
    white = [
        gaussian_noise(length, step=first_step + t, backend=backend, **place).double() for t in range(steps)
    ]
    return torch.from_numpy(np.linalg.solve(dense(kind, steps), torch.stack(white).numpy()))


def _toeplitz(column: np.ndarray, steps: int) -> np.ndarray:
    padded = np.zeros(steps)
    padded[: len(column)] = column[:steps]
    return np.array([[padded[i - j] if i >= j else 0.0 for j in range(steps)] for i in range(steps)])
