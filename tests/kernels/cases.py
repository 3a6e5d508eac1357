"""Units of rows for the tests of kernels, and the gradients of one unit in plain float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from synthward.kernels import force_isa

# Rows per unit; None means that every row is a unit, given without offsets.
LAYOUTS: dict[str, list[int] | None] = {
    "rows": None,
    "single": [1] * 7,
    "pairs": [2] * 5,
    "uniform": [8] * 3,
    "ragged": [3, 0, 1, 5, 17, 0, 2, 4],
    "empty units": [0, 0],
    "no units": [],
    "long": [1, 64, 65, 130],
}
WIDTHS = [(1, 1), (3, 2), (16, 8), (17, 31), (40, 131), (67, 15), (0, 4)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def offsets_of(lengths: list[int] | None) -> Tensor | None:
    if lengths is None:
        return None
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)


def segments(lengths: list[int] | None, rows: int) -> list[slice]:
    """Rows of each unit."""
    ends = [0, *np.cumsum([1] * rows if lengths is None else lengths).tolist()]
    return [slice(a, b) for a, b in pairwise(ends)]


def row_count(lengths: list[int] | None) -> int:
    return 11 if lengths is None else sum(lengths)


def matrix(rows: int, columns: int, seed: int) -> Tensor:
    """Normal entries whose scale differs from row to row, so that no unit hides behind another."""
    scale = torch.logspace(-2, 2, max(rows, 1))[:rows].flip(0)
    return torch.randn(rows, columns, generator=generator(seed)) * scale.unsqueeze(1)


@contextmanager
def executing(name: str) -> Iterator[str]:
    """The `backend` argument for "reference" or an instruction set, which is forced meanwhile."""
    if name == "reference":
        yield "reference"
        return
    force_isa(name)
    try:
        yield "cpp"
    finally:
        force_isa(None)


def whole(rows: int, columns: int, seed: int, most: int = 3) -> Tensor:
    """Whole numbers from -most to most, as float32."""
    return torch.randint(-most, most + 1, (rows, columns), generator=generator(seed)).float()


def outer_gradient(activations: Tensor, output_grads: Tensor, rows: slice) -> np.ndarray:
    total = np.zeros((output_grads.shape[1], activations.shape[1]))
    for a, g in zip(activations[rows].double().numpy(), output_grads[rows].double().numpy(), strict=True):
        total += np.outer(g, a)
    return total


def diagonal_gradient(grads: Tensor, factors: Tensor | None, rows: slice) -> np.ndarray:
    total = np.zeros(grads.shape[1])
    for n in range(rows.start, rows.stop):
        row = grads[n].double().numpy()
        total += row if factors is None else row * factors[n].double().numpy()
    return total


def scatter_gradient(ids: Tensor, grads: Tensor, rows: slice, table_rows: int) -> np.ndarray:
    total = np.zeros((table_rows, grads.shape[1]))
    for n in range(rows.start, rows.stop):
        if ids[n] >= 0:
            total[int(ids[n])] += grads[n].double().numpy()
    return total


def sq_norms(gradients: list[np.ndarray]) -> Tensor:
    return torch.tensor([float((g * g).sum()) for g in gradients], dtype=torch.float64)


def assert_close(actual: Tensor, expected: Tensor, rounding: float = 2.0**-22) -> None:
    """Equal up to a few roundings to float32, entry by entry."""
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rounding, atol=1e-30)
