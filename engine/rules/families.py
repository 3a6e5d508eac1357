"""The three families of per-unit gradients, and how the uses of one parameter are put together.

A use is what one captured call keeps for one parameter. All uses of a parameter are rows of the same
segments: uses of one family are concatenated unit by unit; a table that is both looked up and multiplied
(tied weights) has one cross term, outer x scatter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from synthward.engine.layout import Layout
from synthward.kernels import (
    diagonal_sq_norms,
    diagonal_weighted_sum,
    outer_sq_norms,
    outer_weighted_sum,
    scale_rows,
    scatter_sq_norms,
    scatter_weighted_sum,
)


class RowNorms:
    """Squared norms of the rows of kept tensors, each computed once per backward pass."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, rows: Tensor) -> Tensor:
        """Float32 [N] of `rows` [N, p]."""
        key = id(rows)
        if key not in self._known:
            self._known[key] = (rows, diagonal_sq_norms(rows))
        return self._known[key][1]


class CleanRows:
    """Kept tensors with the rows of units of weight zero set to zero, each made once per backward pass.

    A unit is left out because something in it is not finite, and 0 * inf is NaN in a product. Always run,
    never decided by looking at the data.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, rows: Tensor, kept: Tensor) -> Tensor:
        """`rows` [N, p], zeros where `kept` float32 [N] is 0; `kept` is otherwise 1."""
        key = id(rows)
        if key not in self._known:
            self._known[key] = (rows, scale_rows(rows, kept))
        return self._known[key][1]


@dataclass(frozen=True)
class OuterUse:
    """Gradient ``sum_n g_n a_n^T`` [p, d]: activations [N, d], output_grads [N, p]."""

    activations: Tensor
    output_grads: Tensor

    @property
    def rows(self) -> int:
        return len(self.activations)

    @property
    def longest(self) -> int:
        return max(self.activations.shape[1], self.output_grads.shape[1])

    def add_sq_norms(self, out: Tensor, layout: Layout, norms: RowNorms) -> None:
        if layout.is_single:
            out.addcmul_(norms(self.activations), norms(self.output_grads))
        else:
            a, g = layout.sort_rows(self.activations), layout.sort_rows(self.output_grads)
            outer_sq_norms(a, g, layout.offsets, out=out)

    def row_sq_norms(self, norms: RowNorms) -> Tensor:
        return norms(self.activations) * norms(self.output_grads)

    def add_weighted_sum(self, weights: Tensor, kept: Tensor, out: Tensor, clean: CleanRows) -> None:
        a, g = self.activations, self.output_grads
        # The smaller operand is scaled (and cleaned) by the kernel; the other must be finite already.
        if g.shape[1] <= a.shape[1]:
            a = clean(a, kept)
        else:
            g = clean(g, kept)
        outer_weighted_sum(a, g, weights, out=out)

    def reorder(self, index: Tensor) -> OuterUse:
        return OuterUse(self.activations.index_select(0, index), self.output_grads.index_select(0, index))

    @staticmethod
    def concatenate(uses: Sequence[OuterUse]) -> OuterUse:
        return OuterUse(torch.cat([u.activations for u in uses]), torch.cat([u.output_grads for u in uses]))


@dataclass(frozen=True)
class DiagonalUse:
    """Gradient ``sum_n r_n * f_n`` [p]: rows [N, p], factors [N, p] or None for ones."""

    grads: Tensor
    factors: Tensor | None = None

    @property
    def rows(self) -> int:
        return len(self.grads)

    @property
    def longest(self) -> int:
        return self.grads.shape[1]

    def add_sq_norms(self, out: Tensor, layout: Layout, norms: RowNorms) -> None:
        if layout.is_single and self.factors is None:
            out.add_(norms(self.grads))
            return
        factors = None if self.factors is None else layout.sort_rows(self.factors)
        diagonal_sq_norms(layout.sort_rows(self.grads), layout.offsets, factors=factors, out=out)

    def row_sq_norms(self, norms: RowNorms) -> Tensor:
        return (
            norms(self.grads) if self.factors is None else diagonal_sq_norms(self.grads, factors=self.factors)
        )

    def add_weighted_sum(self, weights: Tensor, kept: Tensor, out: Tensor, clean: CleanRows) -> None:
        factors = None if self.factors is None else clean(self.factors, kept)
        diagonal_weighted_sum(clean(self.grads, kept), weights, factors=factors, out=out.view(-1))

    def reorder(self, index: Tensor) -> DiagonalUse:
        factors = None if self.factors is None else self.factors.index_select(0, index)
        return DiagonalUse(self.grads.index_select(0, index), factors)

    @staticmethod
    def concatenate(uses: Sequence[DiagonalUse]) -> DiagonalUse:
        grads = torch.cat([u.grads for u in uses])
        if all(u.factors is None for u in uses):
            return DiagonalUse(grads)
        return DiagonalUse(
            grads, torch.cat([torch.ones_like(u.grads) if u.factors is None else u.factors for u in uses])
        )


@dataclass(frozen=True)
class ScatterUse:
    """Gradient that adds ``output_grads`` [N, p] at table rows ``ids`` [N]; a negative id is padding."""

    ids: Tensor
    output_grads: Tensor

    @property
    def rows(self) -> int:
        return len(self.ids)

    @property
    def longest(self) -> int:
        return self.output_grads.shape[1]

    def add_sq_norms(self, out: Tensor, layout: Layout, norms: RowNorms) -> None:
        ids, grads = layout.sort_rows(self.ids), layout.sort_rows(self.output_grads)
        scatter_sq_norms(ids, grads, layout.offsets, out=out)

    def row_sq_norms(self, norms: RowNorms) -> Tensor:
        return norms(self.output_grads)

    def add_weighted_sum(self, weights: Tensor, kept: Tensor, out: Tensor, clean: CleanRows) -> None:
        scatter_weighted_sum(self.ids, self.output_grads, weights, out=out)

    def reorder(self, index: Tensor) -> ScatterUse:
        return ScatterUse(self.ids.index_select(0, index), self.output_grads.index_select(0, index))

    @staticmethod
    def concatenate(uses: Sequence[ScatterUse]) -> ScatterUse:
        return ScatterUse(torch.cat([u.ids for u in uses]), torch.cat([u.output_grads for u in uses]))


Use = OuterUse | DiagonalUse | ScatterUse


def merge_uses(uses: Sequence[Use], layouts: Sequence[Layout]) -> tuple[Use, Layout]:
    """Uses of one family (and one parameter) as one use, rows unit by unit; `layouts` are the calls'."""
    if len(uses) == 1:
        return uses[0], layouts[0]
    units = torch.cat([layout.row_units for layout in layouts])
    index = torch.argsort(units, stable=True)
    family = type(uses[0])
    merged: Use = family.concatenate(uses).reorder(index)  # type: ignore[arg-type]
    if all(layout.rows_per_unit is not None for layout in layouts):
        each = sum(layout.rows_per_unit or 0 for layout in layouts)
        return merged, Layout.uniform(layouts[0].num_units, each, units.device)
    offsets = torch.zeros(layouts[0].num_units + 1, dtype=torch.int64, device=units.device)
    torch.cumsum(torch.bincount(units, minlength=layouts[0].num_units), 0, out=offsets[1:])
    return merged, Layout(layouts[0].num_units, len(units), offsets)


def add_cross_term(
    outer: OuterUse, outer_layout: Layout, scatter: ScatterUse, scatter_layout: Layout, out: Tensor
) -> None:
    """Add ``2 <G_outer, G_scatter>`` of each unit to `out` [U], for a table [p, d] that is also looked up.

    ``<G_outer, G_scatter> = sum_{n, m} g_n[id_m] (a_n . e_m)`` over the unit's rows n of the product and m
    of the look-up: the one term that a sum of two norms lacks.
    """
    g, a = _padded(outer.output_grads, outer_layout), _padded(outer.activations, outer_layout)
    e, ids = _padded(scatter.output_grads, scatter_layout), _padded(scatter.ids, scatter_layout, fill=-1)
    picked = torch.gather(g, 2, ids.clamp_min(0).unsqueeze(1).expand(-1, g.shape[1], -1))
    picked = torch.where((ids >= 0).unsqueeze(1), picked, torch.zeros_like(picked))
    out.add_((picked * torch.bmm(a, e.transpose(1, 2))).sum((1, 2)), alpha=2.0)


def _padded(rows: Tensor, layout: Layout, fill: int = 0) -> Tensor:
    """Rows [N, ...] as [U, K, ...], K the most rows of a unit, the rest filled."""
    if layout.rows_per_unit is not None:
        return rows.view(layout.num_units, layout.rows_per_unit, *rows.shape[1:])
    assert layout.offsets is not None
    counts = layout.offsets.diff()
    most = int(counts.max()) if len(counts) else 0
    rows = layout.sort_rows(rows)
    units = torch.repeat_interleave(torch.arange(layout.num_units, device=rows.device), counts)
    place = torch.arange(len(rows), device=rows.device) - layout.offsets[units]
    padded = rows.new_full((layout.num_units, most, *rows.shape[1:]), fill)
    padded[units, place] = rows
    return padded
