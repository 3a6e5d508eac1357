"""What a captured call keeps for a parameter: a use, of one of the families of per-unit gradients.

All uses of a parameter are rows of the same segments. A use can add up its units' squared norms without forming
their gradients, add the weighted sum of all rows to a buffer in one product, and, where nothing cheaper is exact,
form the gradients of a few units (`unit_grads`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from synthward.engine.capture import CaptureState
from synthward.engine.clipping import SMALLEST_NORMAL, UNIT_ROUNDOFF
from synthward.engine.layout import Layout, Length, longer
from synthward.engine.provenance import Part as Part
from synthward.engine.rules.row_values import Norms as Norms
from synthward.engine.rules.row_values import Weights as Weights
from synthward.kernels import (
    EXACT_TERMS,
    diagonal_weighted_sum,
    outer_norms,
    outer_sq_norms,
    outer_sum,
    outer_unit_grads,
    place_of,
    rank1_norms,
    rounding_of,
    scatter_sq_norms,
    scatter_weighted_sum,
    sum_chain,
)

# Up to so many rows a unit, inner products are taken pair by pair, in double precision.
_SMALL_GRAM = 16
# Rows that the compiled products of pairs are padded to.
_GRAM_SIDE = 32


def _is_small(layout: Layout) -> bool:
    return layout.rows_per_unit is not None and layout.rows_per_unit <= _SMALL_GRAM


def is_compiled(*tensors: Tensor) -> bool:
    """Whether the compiled kernels take these."""
    return all(place_of(t) == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in tensors)


@dataclass(frozen=True)
class Way:
    """One way to a norm: floating-point operations and bytes over what the weighted sum takes anyway, and bytes of
    memory beyond what is kept anyway (negative: it frees some)."""

    method: str
    flops: float
    bytes: float
    memory: float = 0.0


class Use(Protocol):
    """What the engine asks of a use."""

    @property
    def rows(self) -> int:
        """Rows N of the call; a multiple of the length of its first axis."""

    def chain(self, layout: Layout) -> Length:
        """Additions in a row that a term of a norm's inner products, or of a formed gradient's sums, goes
        through at most: for the bound on its rounding."""

    def released_chain(self, layout: Layout) -> Length:
        """Additions in a row that a term of a unit's released sum goes through at most."""

    @property
    def evidence(self) -> Tensor:
        """Output gradients [N, ...], for the independence probe."""

    def add_norms(self, sq_norms: Tensor, row_sums: Tensor, layout: Layout, norms: Norms) -> None:
        """Add each unit's squared norm to `sq_norms` [U], and to `row_sums` [U] the sum over its rows of the
        norms of the rows' own gradients (or an upper bound of it)."""

    def add_weighted_sum(self, weights: Weights, out: Tensor) -> None:
        """Add the weighted sum over all rows to `out`, the parameter's sum in its own shape."""

    def unit_grads(self, layout: Layout, first: int, last: int) -> Tensor:
        """Gradients of units ``first:last``, float32 [last - first, numel]."""


@dataclass(frozen=True)
class OuterUse:
    """Gradient ``sum_n g_n a_n^T`` [p, d]: activations [N, d], output_grads [N, p].

    `is_shared`: the activations may be memory that the caller goes on using (a batch of records).
    `method`: the way to the norm where a unit has several rows; None for the usual one.
    `with_bias`: the norm is that of weight and bias together (`BiasOfOuter` is then the bias' use).
    `terms`: what the sum holds a scaled row of bfloat16 in (`synthward.kernels.outer_sum`).
    """

    activations: Tensor
    output_grads: Tensor
    is_shared: bool = True
    method: str | None = None
    with_bias: bool = False
    terms: int = EXACT_TERMS

    @property
    def rows(self) -> int:
        return len(self.activations)

    @property
    def is_half(self) -> bool:
        """Whether the sum may round what it adds up."""
        return self.activations.dtype == self.output_grads.dtype == torch.bfloat16

    @property
    def is_formed(self) -> bool:
        return self.method == "tile"

    def chain(self, layout: Layout) -> Length:
        a, g = self.activations, self.output_grads
        is_compiled_here = is_compiled(a, g)
        if layout.is_single or (_is_small(layout) and place_of(a) == "cpu"):
            return 1
        if self.is_formed and not _is_small(layout):
            return self._sum_chain(layout)
        width = max(a.shape[1] + int(self.with_bias), g.shape[1])
        chain = sum_chain(self._truncations * width, compiled=is_compiled_here)
        # Elsewhere pairs of inner products are multiplied, and some of them added up, in fp32, too.
        return chain if is_compiled_here else chain + 4

    def released_chain(self, layout: Layout) -> Length:
        chain, rounding = self._sum_chain(layout), rounding_of(self.terms) if self.is_half else 0.0
        if rounding == 0.0:
            return chain
        # Each row is off by its rounding, as if by so many additions; and what is added up is longer by as much.
        return chain + chain // 64 + math.ceil(rounding / UNIT_ROUNDOFF) + 2

    def _sum_chain(self, layout: Layout) -> Length:
        a, g = self.activations, self.output_grads
        return sum_chain(self._truncations * layout.lengths, compiled=is_compiled(a, g))

    @property
    def _truncations(self) -> int:
        """Roundings that an addition counts as: tensor cores, which multiply operands of half precision, cut off what
        does not fit (Fasi et al. 2021), which is up to twice as much."""
        return 2 if self.activations.element_size() == 2 else 1

    @property
    def evidence(self) -> Tensor:
        return self.output_grads

    def add_norms(self, sq_norms: Tensor, row_sums: Tensor, layout: Layout, norms: Norms) -> None:
        a, g = self.activations, self.output_grads
        if layout.is_single:
            norms.note_squares(g, rank1_norms(a, g, sq_norms, row_sums))
            return
        offsets, a, g = layout.offsets, layout.sort_rows(a), layout.sort_rows(g)
        assert offsets is not None
        if _is_small(layout):
            outer_sq_norms(a, g, offsets, out=sq_norms)
            lengths = norms.rows(self.activations) * norms.rows(self.output_grads)
            row_sums += layout.sum_rows(lengths)
        else:
            method: Literal["gram", "tile"] = "tile" if self.method == "tile" else "gram"
            outer_norms(a, g, offsets, sq_norms, row_sums, method=method, with_bias=self.with_bias)

    def add_weighted_sum(self, weights: Weights, out: Tensor) -> None:
        a, g = self.activations, self.output_grads
        total = out.new_zeros(g.shape[1]) if id(g) in weights.row_totals else None
        outer_sum(
            *(a, g, weights.rows),
            out=out.view(g.shape[1], a.shape[1]),
            bias=total,
            terms=self.terms,
            run=weights.run,
        )
        if total is not None:
            weights.row_totals[id(g)] = total

    def unit_grads(self, layout: Layout, first: int, last: int) -> Tensor:
        a, g = (
            layout.unit_rows(self.activations, first, last).float(),
            layout.unit_rows(self.output_grads, first, last).float(),
        )
        return torch.bmm(g.mT, a).flatten(1)

    def ways(self, layout: Layout) -> list[Way]:
        """What each way to the norm costs. Materialised gradients spare the weighted sum its product."""
        rows, d = self.activations.shape
        p = self.output_grads.shape[1]
        read = float(self.activations.nbytes + self.output_grads.nbytes)
        if layout.is_single:
            return [Way("rank-1", 2.0 * rows * (d + p), read)]
        units = max(layout.num_units, 1)
        formed = 4.0 * units * p * d
        padded = -(-rows // (units * _GRAM_SIDE)) * _GRAM_SIDE
        ways = [Way("gram", float(rows) * padded * (d + p), read)]
        if not _is_small(layout):
            ways.append(Way("tile", 2.0 * rows * p * d, read))
        return [*ways, Way("materialise", 0.0, 2.0 * formed, formed - 4.0 * rows * p)]

    def by(self, method: str) -> OuterUse:
        return replace(self, method=method, with_bias=self.with_bias and method == "gram")

    def summed(self, half_sums: str, layout: Layout) -> OuterUse:
        """This use, added up as `PerfSpec.half_sums` says; before its norm is taken, which covers the rounding."""
        if not self.is_half or half_sums == "exact":
            return self
        if half_sums == "auto" and place_of(self.activations) != "cuda":
            return self
        return replace(self, terms=1 if half_sums == "rounded" or layout.is_single else 2)

    def can_take_bias(self, layout: Layout) -> bool:
        """Whether products of pairs of rows, which the norm would come from, tell the bias' norm on their way."""
        return (
            not layout.is_single
            and not _is_small(layout)
            and is_compiled(self.activations, self.output_grads)
        )

    def materialise(self, layout: Layout) -> DiagonalUse:
        """The units' gradients as rows."""
        a, g = layout.sort_rows(self.activations), layout.sort_rows(self.output_grads)
        return DiagonalUse(outer_unit_grads(a, g, layout.offsets_on(a.device))[0])

    def reorder(self, index: Tensor) -> OuterUse:
        return OuterUse(self.activations.index_select(0, index), self.output_grads.index_select(0, index))

    @staticmethod
    def concatenate(uses: Sequence[OuterUse]) -> OuterUse:
        return OuterUse(torch.cat([u.activations for u in uses]), torch.cat([u.output_grads for u in uses]))


@dataclass(frozen=True)
class BlockOuterUse:
    """An outer product for each block of a parameter [G, p, d]: activations [G, N, d], output_grads [G, N, p]."""

    activations: Tensor
    output_grads: Tensor

    @property
    def rows(self) -> int:
        return self.activations.shape[1]

    def chain(self, layout: Layout) -> Length:
        return longer(*(block.chain(layout) for block in self._blocks())) + len(self.activations)

    def released_chain(self, layout: Layout) -> Length:
        return longer(*(block.released_chain(layout) for block in self._blocks()))

    @property
    def evidence(self) -> Tensor:
        return self.output_grads.transpose(0, 1)

    def _blocks(self) -> list[OuterUse]:
        return [OuterUse(a, g) for a, g in zip(self.activations, self.output_grads, strict=True)]

    def add_norms(self, sq_norms: Tensor, row_sums: Tensor, layout: Layout, norms: Norms) -> None:
        for block in self._blocks():
            block.add_norms(sq_norms, row_sums, layout, norms)

    def add_weighted_sum(self, weights: Weights, out: Tensor) -> None:
        blocks = self._blocks()
        parts = out.view(len(blocks), self.output_grads.shape[2], self.activations.shape[2])
        for block, part in zip(blocks, parts, strict=True):
            block.add_weighted_sum(weights, part)

    def unit_grads(self, layout: Layout, first: int, last: int) -> Tensor:
        return torch.cat([block.unit_grads(layout, first, last) for block in self._blocks()], dim=1)


@dataclass(frozen=True)
class DiagonalUse:
    """Gradient ``sum_n r_n`` [p] of rows [N, p]: output gradients (a bias), or these times a factor (a scale).

    Its rows are added up unit by unit before anything else, so that norm and released sum are of the same tensor:
    what cancels inside a unit is gone before it is measured. unit_rows [U, p].
    """

    unit_rows: Tensor

    @property
    def rows(self) -> int:
        return len(self.unit_rows)

    def chain(self, layout: Layout) -> Length:
        return 1

    def released_chain(self, layout: Layout) -> Length:
        return 1

    @property
    def evidence(self) -> Tensor:
        return self.unit_rows

    def add_norms(self, sq_norms: Tensor, row_sums: Tensor, layout: Layout, norms: Norms) -> None:
        squares = norms.squares(self.unit_rows)
        sq_norms += squares
        row_sums += squares.sqrt()

    def add_weighted_sum(self, weights: Weights, out: Tensor) -> None:
        total = weights.row_totals.pop(id(self.unit_rows), None)
        if total is None:
            diagonal_weighted_sum(self.unit_rows, weights.rows, out=out.view(-1))
        else:
            out.view(-1).add_(total)

    def unit_grads(self, layout: Layout, first: int, last: int) -> Tensor:
        return self.unit_rows[first:last].float()

    @staticmethod
    def add(uses: Sequence[DiagonalUse]) -> DiagonalUse:
        """Several uses of one parameter as one."""
        total = uses[0].unit_rows.float()
        for use in uses[1:]:
            total = total + use.unit_rows.float()
        return DiagonalUse(total)


@dataclass(frozen=True)
class BiasOfOuter:
    """Bias of a product whose norm is taken with the product's: output_grads [N, p], those of its `OuterUse`."""

    output_grads: Tensor

    @property
    def rows(self) -> int:
        return len(self.output_grads)

    def chain(self, layout: Layout) -> Length:
        return 1

    def released_chain(self, layout: Layout) -> Length:
        return layout.lengths

    @property
    def evidence(self) -> Tensor:
        return self.output_grads

    def add_norms(self, sq_norms: Tensor, row_sums: Tensor, layout: Layout, norms: Norms) -> None:
        pass

    def add_weighted_sum(self, weights: Weights, out: Tensor) -> None:
        total = weights.row_totals.pop(id(self.output_grads), None)
        if total is None:
            diagonal_weighted_sum(self.output_grads, weights.rows, out=out.view(-1))
        else:
            out.view(-1).add_(total)

    def unit_grads(self, layout: Layout, first: int, last: int) -> Tensor:
        return layout.unit_rows(self.output_grads, first, last).float().sum(1)


@dataclass(frozen=True)
class DiagonalRows:
    """A diagonal use whose rows [N, p] wait for the layout of their call.

    `is_bias_of_outer`: they are the output gradients of the product kept just before, whose bias this is.
    """

    grads: Tensor
    is_bias_of_outer: bool = False

    @property
    def rows(self) -> int:
        return len(self.grads)

    @property
    def evidence(self) -> Tensor:
        return self.grads


@dataclass(frozen=True)
class ScatterUse:
    """Gradient that adds ``output_grads`` [N, p] at table rows ``ids`` [N]; a negative id is padding.

    num_rows: rows of the table.
    """

    ids: Tensor
    output_grads: Tensor
    num_rows: int = 0

    @property
    def rows(self) -> int:
        return len(self.ids)

    def chain(self, layout: Layout) -> Length:
        return 1

    def released_chain(self, layout: Layout) -> Length:
        return layout.lengths

    @property
    def evidence(self) -> Tensor:
        return self.output_grads

    def add_norms(self, sq_norms: Tensor, row_sums: Tensor, layout: Layout, norms: Norms) -> None:
        ids, grads = layout.sort_rows(self.ids), layout.sort_rows(self.output_grads)
        scatter_sq_norms(ids, grads, layout.offsets, out=sq_norms)
        row_sums += layout.sum_rows(norms.rows(self.output_grads))

    def add_weighted_sum(self, weights: Weights, out: Tensor) -> None:
        scatter_weighted_sum(
            self.ids, self.output_grads, weights.rows, out=out.view(-1, self.output_grads.shape[1])
        )

    def unit_grads(self, layout: Layout, first: int, last: int) -> Tensor:
        grads = layout.unit_rows(self.output_grads, first, last).float()
        # Padding goes to an extra row of the table that is cut off.
        ids = layout.unit_rows(self.ids, first, last, fill=-1)
        ids = torch.where(ids < 0, self.num_rows, ids)
        units, width = len(grads), grads.shape[2]
        table = grads.new_zeros(units, self.num_rows + 1, width)
        table.scatter_add_(1, ids.unsqueeze(2).expand_as(grads), grads)
        return table[:, :-1].reshape(units, -1)

    def reorder(self, index: Tensor) -> ScatterUse:
        return ScatterUse(
            self.ids.index_select(0, index), self.output_grads.index_select(0, index), self.num_rows
        )

    @staticmethod
    def concatenate(uses: Sequence[ScatterUse]) -> ScatterUse:
        ids, grads = torch.cat([u.ids for u in uses]), torch.cat([u.output_grads for u in uses])
        return ScatterUse(ids, grads, uses[0].num_rows)


def diagonal_use(
    state: CaptureState, rows: Tensor, leading: int, forward: int, row_factors: Tensor | None = None
) -> DiagonalUse | DiagonalRows:
    """Rows [N, p] (times factors [N]) of a captured call, added up per unit if the units are known."""
    layout = state.call_layout(len(rows), leading, forward)
    if layout is not None:
        return DiagonalUse(layout.sum_rows(rows, row_factors))
    return DiagonalRows(rows if row_factors is None else rows * row_factors.unsqueeze(1))


def merge_uses(uses: Sequence[Use], layouts: Sequence[Layout]) -> tuple[Use, Layout]:
    """Uses of one parameter, all of one type (outer, diagonal or scatter), as one use with rows unit by unit;
    `layouts` are the calls'."""
    if len(uses) == 1:
        return uses[0], layouts[0]
    if isinstance(uses[0], DiagonalUse):
        # What is released is the weighted sum of the parts; a clipped sum of sums is the same to rounding.
        return DiagonalUse.add([u for u in uses if isinstance(u, DiagonalUse)]), layouts[0]
    units = torch.cat([layout.row_units for layout in layouts])
    index = torch.argsort(units, stable=True)
    merged: Use = type(uses[0]).concatenate(uses).reorder(index)  # type: ignore[attr-defined]
    if all(layout.rows_per_unit is not None for layout in layouts):
        each = sum(layout.rows_per_unit or 0 for layout in layouts)
        return merged, Layout.uniform(layouts[0].num_units, each, units.device)
    # Each unit has the rows that it has in all of them.
    offsets = torch.stack([layout.row_offsets for layout in layouts]).sum(0)
    return merged, Layout(layouts[0].num_units, len(units), offsets)


def add_cross_term(
    outer: OuterUse, outer_layout: Layout, scatter: ScatterUse, scatter_layout: Layout, out: Tensor
) -> None:
    """Add ``2 <G_outer, G_scatter>`` of each unit to `out` [U], for a table [p, d] that is also looked up.

    ``<G_outer, G_scatter> = sum_{n, m} g_n[id_m] (a_n . e_m)`` over the unit's rows n of the product and m of the
    look-up: the one term that a sum of two norms lacks.
    """
    units = outer_layout.num_units
    # Of the wide one only what is picked is converted.
    g = outer_layout.unit_rows(outer.output_grads, 0, units)
    a = outer_layout.unit_rows(outer.activations, 0, units).float()
    e = scatter_layout.unit_rows(scatter.output_grads, 0, units).float()
    ids = scatter_layout.unit_rows(scatter.ids, 0, units, fill=-1)
    picked = torch.gather(g, 2, ids.clamp_min(0).unsqueeze(1).expand(-1, g.shape[1], -1)).float()
    picked = torch.where((ids >= 0).unsqueeze(1), picked, torch.zeros_like(picked))
    # What underflow may take from an inner product counts as if it were there.
    lost = picked.abs() * (a.shape[2] * SMALLEST_NORMAL)
    out.add_((picked * torch.bmm(a, e.transpose(1, 2)) + lost).sum((1, 2)), alpha=2.0)
