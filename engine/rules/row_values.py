"""Numbers of rows: their norms, and their weights in the released sum."""

from __future__ import annotations

import torch
from torch import Tensor

from synthward.engine.clipping import SMALLEST_NORMAL
from synthward.kernels import diagonal_sq_norms, place_of


def measured_type(output_grads: Tensor) -> torch.dtype:
    """The type in which the operands of a product are measured and summed: on a GPU, which multiplies numbers of half
    precision without error and many times as fast, that of its output gradients; on a CPU fp32."""
    is_half = output_grads.is_floating_point() and output_grads.element_size() == 2
    return output_grads.dtype if is_half and place_of(output_grads) == "cuda" else torch.float32


class Norms:
    """Norms of rows, each taken once per kept tensor and backward pass."""

    def __init__(self) -> None:
        self._squares: dict[int, tuple[Tensor, Tensor]] = {}

    def squares(self, rows: Tensor) -> Tensor:
        """Squared L2 norm of each row of `rows` [N, p], float32 [N]."""
        if id(rows) not in self._squares:
            self.note_squares(rows, diagonal_sq_norms(rows))
        return self._squares[id(rows)][1]

    def note_squares(self, rows: Tensor, squares: Tensor) -> None:
        """They came with something else."""
        self._squares[id(rows)] = (rows, squares)

    def rows(self, rows: Tensor) -> Tensor:
        """L2 norm of each row of `rows` [N, p], float32 [N]; not below it where the square underflows."""
        return self.squares(rows).add(SMALLEST_NORMAL).sqrt()


class Weights:
    """Weight of each row in the released sum, float32 [N]. A row of weight zero is not there: the units whose norm
    is not finite have it, and 0 * inf would be NaN in a product, so it goes by choice and not by multiplication.

    `run`: rows of a unit, next to each other and so of one weight, if all units have as many.
    """

    def __init__(self, rows: Tensor, run: int | None = None) -> None:
        self.rows, self.run = rows, run
        # Sums of rows that a product gives on its way, by the rows' tensor: wanted (None), then found.
        self.row_totals: dict[int, Tensor | None] = {}
