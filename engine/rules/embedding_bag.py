"""Bags of embeddings: the scatter family, with one output gradient for all ids of a bag.

A bag is a row of the batch. Its ids may be of any number, since only output gradients are kept row by row; the rows of
the scatter family are formed from them for a norm or a sum, and forgotten.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from synthward.engine.capture import CaptureState, Kept
from synthward.engine.layout import Layout, Length
from synthward.engine.rules.bare import as_data
from synthward.engine.rules.uses import Norms, Use, Weights
from synthward.kernels import scatter_sq_norms, scatter_weighted_sum

_OPERATION = "embedding_bag"


@dataclass(frozen=True)
class BagUse:
    """Gradient that adds ``weights_i g_b`` at table row ``ids_i`` for each id i of bag b.

    ids [M], int64, negative for padding; bags [M], the row of each id, never decreasing; weights [M] or None (ones);
    output_grads [B, p]; num_rows: rows of the table. Memory: B p + 3 M numbers are kept, and M p are formed for a
    norm or a sum.
    """

    ids: Tensor
    bags: Tensor
    weights: Tensor | None
    output_grads: Tensor
    num_rows: int

    @property
    def rows(self) -> int:
        return len(self.output_grads)

    def chain(self, layout: Layout) -> Length:
        return 1

    def released_chain(self, layout: Layout) -> Length:
        units = layout.row_units.index_select(0, self.bags)
        return torch.zeros(layout.num_units, dtype=torch.int64, device=units.device).index_add_(
            0, units, torch.ones_like(units)
        )

    @property
    def evidence(self) -> Tensor:
        return self.output_grads

    def _id_grads(self) -> Tensor:
        """Gradient of each id's own row, float32 [M, p]."""
        grads = self.output_grads.float().index_select(0, self.bags)
        if self.weights is not None:
            grads *= self.weights.unsqueeze(1)
        # By choice and not by a factor: padding must not bring in what is not finite.
        return torch.where((self.ids < 0).unsqueeze(1), torch.zeros_like(grads), grads)

    def add_norms(self, sq_norms: Tensor, row_sums: Tensor, layout: Layout, norms: Norms) -> None:
        ids, grads = self.ids, self._id_grads()
        units = layout.row_units.index_select(0, self.bags)
        row_sums.index_add_(0, units, grads.double().norm(dim=1).float())
        if layout.order is not None:
            units, index = torch.sort(units, stable=True)
            ids, grads = ids.index_select(0, index), grads.index_select(0, index)
        starts = torch.arange(layout.num_units + 1, device=units.device)
        scatter_sq_norms(ids, grads, torch.searchsorted(units, starts), out=sq_norms)

    def add_weighted_sum(self, weights: Weights, out: Tensor) -> None:
        grads = self._id_grads()
        row_weights = weights.rows.index_select(0, self.bags)
        scatter_weighted_sum(self.ids, grads, row_weights, out=out.view(-1, grads.shape[1]))

    def unit_grads(self, layout: Layout, first: int, last: int) -> Tensor:
        units = layout.row_units.index_select(0, self.bags)
        chosen = (units >= first) & (units < last) & (self.ids >= 0)
        grads = self._id_grads()[chosen]
        place = (units[chosen] - first) * self.num_rows + self.ids[chosen]
        table = grads.new_zeros((last - first) * self.num_rows, grads.shape[1])
        return table.index_add_(0, place, grads).view(last - first, self.num_rows * grads.shape[1])


@dataclass(frozen=True)
class MaxBagUse:
    """Gradient that adds ``g_bc`` at row ``ids_bc`` and column c of a table: of each bag's largest entries.

    ids [B, p], int64, negative where a bag is empty; output_grads [B, p]; num_rows: rows of the table.
    """

    ids: Tensor
    output_grads: Tensor
    num_rows: int

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
        grads = self.output_grads.float()
        row_sums += layout.sum_rows(norms.rows(self.output_grads))
        if layout.is_single:
            sq_norms += (
                torch.where(self.ids < 0, torch.zeros_like(grads), grads).double().square().sum(1).float()
            )
            return
        units = layout.num_units
        # Columns never meet: each is a segment of its own, of as many rows as the unit has bags.
        ids = layout.unit_rows(self.ids, 0, units, fill=-1).mT
        rows = layout.unit_rows(grads, 0, units).mT
        segments, each = units * ids.shape[1], ids.shape[2]
        offsets = torch.arange(segments + 1, device=ids.device) * each
        squares = scatter_sq_norms(ids.flatten(), rows.reshape(-1, 1), offsets)
        sq_norms += squares.view(units, -1).double().sum(1).float()

    def add_weighted_sum(self, weights: Weights, out: Tensor) -> None:
        width = self.ids.shape[1]
        columns = torch.arange(width, device=self.ids.device)
        entries = torch.where(self.ids < 0, self.ids, self.ids * width + columns).flatten()
        row_weights = weights.rows.repeat_interleave(width)
        scatter_weighted_sum(entries, self.output_grads.reshape(-1, 1), row_weights, out=out.view(-1, 1))

    def unit_grads(self, layout: Layout, first: int, last: int) -> Tensor:
        grads = layout.unit_rows(self.output_grads, first, last).float()
        # Padding goes to an extra row of the table that is cut off.
        ids = layout.unit_rows(self.ids, first, last, fill=-1)
        ids = torch.where(ids < 0, self.num_rows, ids)
        table = grads.new_zeros(last - first, self.num_rows + 1, grads.shape[2])
        return table.scatter_add_(1, ids, grads)[:, :-1].reshape(last - first, -1)


@dataclass(frozen=True)
class _Bags:
    """How torch is to be called, and which bag each id is in: offsets [B], or None where ids are [B, n]."""

    mode: str
    offsets: Tensor | None
    include_last_offset: bool
    padding_idx: int | None

    def run(self, ids: Tensor, table: Tensor, weights: Tensor | None) -> Tensor:
        return F.embedding_bag(
            ids,
            table,
            self.offsets,
            mode=self.mode,
            per_sample_weights=weights,
            include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
        )

    def largest(self, ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """The output of mode "max" [B, p], and the table row that each of its entries is of."""
        offsets, include_last = self.offsets, self.include_last_offset
        if offsets is None:
            # In this form torch takes flat ids alone.
            offsets, include_last = torch.arange(len(ids), device=ids.device).to(ids) * ids.shape[1], False
        out, _, _, rows = torch.embedding_bag(
            table, ids.reshape(-1), offsets, False, 2, False, None, include_last, self.padding_idx
        )
        return out, rows

    def of(self, ids: Tensor) -> Tensor:
        """Bag of each id, int64 [M]."""
        if self.offsets is None:
            return torch.arange(len(ids), device=ids.device).repeat_interleave(ids.shape[1])
        starts = self.offsets[:-1] if self.include_last_offset else self.offsets
        place = torch.arange(len(ids), device=ids.device, dtype=starts.dtype)
        return torch.searchsorted(starts, place, right=True) - 1


class _EmbeddingBag(torch.autograd.Function):
    """``F.embedding_bag`` whose backward keeps ids and output gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        table: Tensor,
        weights: Tensor | None,
        bags: _Bags,
        anchor: Tensor,
        state: CaptureState,
        call: Any,
    ) -> Tensor:
        ctx.bags, ctx.state, ctx.call = bags, state, call
        out, rows = bags.largest(ids, table) if bags.mode == "max" else (bags.run(ids, table, weights), None)
        ctx.save_for_backward(ids, table, weights, rows)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.state.refuse_double(_OPERATION)
        ids, table, weights, largest = ctx.saved_tensors
        weight_at, leading, forward = ctx.call
        mode, padding, bags = ctx.bags.mode, ctx.bags.padding_idx, ctx.bags.of(ids)
        ids = ids.reshape(-1).long()
        if padding is not None:
            ids = torch.where(ids == padding % len(table), -1, ids)
        grads = grad.float().contiguous()
        counts = torch.zeros(leading, device=grads.device).index_add_(0, bags, (ids >= 0).float())
        factors = None if weights is None else weights.detach().reshape(-1).float()
        if mode == "mean":
            factors = counts.reciprocal().index_select(0, bags)
        use: Use = BagUse(ids, bags, factors, grads, len(table))
        if mode == "max":
            use = MaxBagUse(torch.where(counts.unsqueeze(1) > 0, largest.long(), -1), grads, len(table))
        ctx.state.keep(Kept(_OPERATION, leading, forward, [(weight_at, use)]))
        grad_weights = None
        if weights is not None and ctx.needs_input_grad[2]:
            slopes = (table[ids.clamp_min(0)] * grad.index_select(0, bags)).sum(1)
            grad_weights = torch.where(ids < 0, torch.zeros_like(slopes), slopes).view(weights.shape)
        return None, None, grad_weights, None, ctx.state.anchor_grad, None, None


def _check(
    state: CaptureState, input: Tensor, weight: Tensor, offsets: Tensor | None, include_last: bool
) -> int:
    """Number of bags; refuses what names none of them for sure."""
    state.refuse_tracked(input, _OPERATION)
    if input.is_nested or input.dim() not in (1, 2) or input.is_floating_point():
        state.refuse(weight, _OPERATION, "its ids must be integers [bags, n], or [n] with offsets")
    if (input.dim() == 1) != (offsets is not None):
        state.refuse(weight, _OPERATION, "ids [n] need offsets, and ids [bags, n] have none")
    if offsets is None:
        return len(input)
    ends = offsets if include_last else torch.cat([offsets, offsets.new_full((1,), len(input))])
    is_whole = ends.dim() == 1 and len(ends) > 0 and int(ends[0]) == 0 and int(ends[-1]) == len(input)
    if not is_whole or bool((ends.diff() < 0).any()):
        state.refuse(
            weight,
            _OPERATION,
            "its offsets must begin with 0, never decrease, and leave no id out at the end",
        )
    return len(ends) - 1


def embedding_bag(
    state: CaptureState,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Handler of ``torch.nn.functional.embedding_bag``; ids [bags, n], or [n] with offsets. The bags are the rows."""
    bags = _Bags(mode, offsets, include_last_offset, padding_idx)
    weight_at = state.target(weight)
    if state.target(per_sample_weights) is not None:
        assert per_sample_weights is not None
        if input.dim() == 1:
            state.refuse(
                per_sample_weights, _OPERATION, "learned weights of bags need ids [bags, n], not offsets"
            )
        per_sample_weights = as_data(state, per_sample_weights, len(input), _OPERATION)
    if weight_at is None:
        options = (max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights)
        return F.embedding_bag(input, weight, offsets, *options, include_last_offset, padding_idx)
    if max_norm is not None:
        state.refuse(
            weight, _OPERATION, "max_norm rewrites the table from the records, without noise; leave it out"
        )
    if scale_grad_by_freq:
        state.refuse(weight, _OPERATION, "scale_grad_by_freq couples units through the batch; leave it out")
    if sparse:
        state.refuse(weight, _OPERATION, "sparse=True; noise is dense, use sparse=False")
    count = _check(state, input, weight, offsets, include_last_offset)
    if per_sample_weights is not None and mode != "sum":
        state.refuse(weight, _OPERATION, f"per_sample_weights go with mode='sum', not {mode!r}")
    call = state.call(_OPERATION, (weight_at,), count)
    apply: Callable[..., Tensor] = _EmbeddingBag.apply
    return apply(input, weight, per_sample_weights, bags, state.anchor, state, call)


HANDLERS: dict[Any, Callable[..., Any]] = {F.embedding_bag: embedding_bag}
