"""Exact norms where no family's formula holds: uses of several kinds, overlapping parts, computed weights.

The gradients of a few units at a time are formed, added up over all uses, and measured. Slower, never wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor

from synthward.engine.capture import positions_of
from synthward.engine.layout import Layout, Length, longer
from synthward.engine.provenance import Derived, Part, Span, Target, flat_range
from synthward.engine.rules.uses import Norms, Use, Weights
from synthward.engine.sums import Sums


def add_mixed_norms(
    items: list[tuple[Target, Use, Layout]],
    shapes: list[torch.Size],
    units: int,
    sq_norms: Tensor,
    row_sums: Tensor,
    norms: Norms,
    chunk_bytes: int,
) -> Length:
    """Add the squared norms [U] of parameters that are reached by several kinds of uses or by computed weights.

    `shapes` are those of all parameters, by position. The bound on what may cancel (`row_sums`) is that of the
    uses themselves, before they are carried back to the parameters. Gradients are formed `chunk_bytes` at a time.
    Returns how many additions a term goes through at most (`clipping.product_error`).
    """
    for _, use, layout in items:
        use.add_norms(torch.zeros_like(sq_norms), row_sums, layout, norms)
    positions = sorted({p for target, _, _ in items for p in positions_of(target)})
    widest = sum(shapes[p].numel() for p in positions) + max(_numel(t, shapes) for t, _, _ in items)
    chunk = max(1, chunk_bytes // (4 * max(1, widest)))
    for first in range(0, units, chunk):
        last = min(units, first + chunk)
        totals = {p: sq_norms.new_zeros(last - first, *shapes[p]) for p in positions}
        for target, use, layout in items:
            _add_unit_grads(target, use.unit_grads(layout, first, last), shapes, totals)
        for total in totals.values():
            sq_norms[first:last] += total.view(last - first, -1).double().square().sum(1).float()
    # A product with the slopes of a computed weight sums over an axis of the parameter; parts just lie in it.
    axes = [n for t, _, _ in items if isinstance(t, Derived) for p in t.positions for n in shapes[p]]
    return longer(*(layout.lengths for _, _, layout in items)) + len(items) + max(axes, default=0)


def _numel(target: Target, shapes: list[torch.Size]) -> int:
    if isinstance(target, Derived):
        return target.graph.numel()
    return max(shapes[p].numel() for p in positions_of(target))


def _add_unit_grads(
    target: Target, grads: Tensor, shapes: list[torch.Size], totals: dict[int, Tensor]
) -> None:
    """Carry gradients [u, numel] with respect to a target to the parameters behind it."""
    if isinstance(target, Derived):
        carried = _carry_back(target, grads.view(-1, *target.graph.shape), is_batched=True)
        for position, found in carried.items():
            totals[position] += found
    elif isinstance(target, Part | Span):
        start, stop = flat_range(target, shapes[target.position])
        totals[target.position].view(len(grads), -1)[:, start:stop] += grads
    else:
        totals[target] += grads.view(totals[target].shape)


def _carry_back(target: Derived, grads: Tensor, *, is_batched: bool) -> dict[int, Tensor]:
    """Vector-Jacobian products of the computed weight with one gradient, or with several (first axis)."""
    positions = sorted(target.positions)
    grads = grads.to(target.graph.dtype)
    with torch.enable_grad():
        found = torch.autograd.grad(
            target.graph,
            [target.leaves[p] for p in positions],
            grads,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=is_batched,
        )
    return {p: grad for p, grad in zip(positions, found, strict=True) if grad is not None}


def add_derived_sum(target: Derived, use: Use, weights: Weights, sums: Sums) -> None:
    """Add the weighted sum of a use of a computed weight to the sums of the parameters behind it."""
    total = torch.zeros(target.graph.shape, dtype=torch.float32, device=target.graph.device)
    use.add_weighted_sum(weights, total)
    for position, grad in _carry_back(target, total, is_batched=False).items():
        sums[position].add_(grad)
