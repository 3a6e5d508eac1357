"""From squared norms to clip factors, with the rounding of the norms themselves covered."""

from __future__ import annotations

import torch
from torch import Tensor

from synthward.engine.spec import ClipSpec

UNIT_ROUNDOFF = 2.0**-24


def rounding_slack(longest: int, uses: int) -> float:
    """Bound gamma on the relative rounding error of a unit's squared norm.

    A sum of n products in fp32, added in any order, is off by at most n u of the sum of magnitudes (Higham
    2002, section 3.1). Two inner sums of at most `longest` terms are multiplied (activations, output
    gradients), `uses` such terms are added, and a few single roundings follow, those of the clipped
    contribution itself included.
    """
    return (2 * longest + uses + 16) * UNIT_ROUNDOFF


def clip_factors(
    sample_sq_norm: Tensor,
    clip: ClipSpec,
    *,
    bound: float,
    slack: float,
    row_bound: Tensor,
    scale: float = 1.0,
    unit_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Factor per unit, the upper bound of its norm that the factor rests on, and whether it counts.

    The factor is ``scale * min(1, C / norm)``, or ``scale * C / (norm + gamma)`` for automatic clipping (Bu et al.
    2023, section 2). All three are [U]: float32, float32, bool.

    Args:
        sample_sq_norm: float32 [U], squared norms of the units' gradients before ``scale``.
        clip: the rule.
        bound: C of this clipping group.
        slack: `rounding_slack` of the norms.
        row_bound: float32 [U]: sum over parameters of the squared sum of the norms of a unit's
            rows. Where rows of one unit cancel, the rounding error of the squared norm is relative to this,
            not to the norm.
        scale: what the gradients are multiplied by before they are clipped (undoes a mean over rows).
        unit_mask: bool [U] or None; a masked unit (False) gets 0.

    Guarantees: the norm of ``factor * gradient`` is at most C for every unit, rounding of the norm included; a
        unit whose norm is NaN or infinite gets exactly 0. No branch on the data, no synchronisation.
    """
    upper = sample_sq_norm * (1.0 + slack)
    upper = upper.add(row_bound, alpha=slack)
    norm = upper.clamp_min(0.0).sqrt().mul_(scale * (1.0 + 8 * UNIT_ROUNDOFF))
    if clip.clipping == "automatic":
        factor = (bound * scale) / (norm + clip.gamma)
    else:
        factor = (bound / norm).clamp_max_(1.0).mul_(scale)
    counts = torch.isfinite(norm) & torch.isfinite(sample_sq_norm)
    if unit_mask is not None:
        counts = counts & unit_mask
    # NaN compares false everywhere, so the choice is by mask and not by multiplication.
    return torch.where(counts, factor, torch.zeros_like(factor)), norm, counts
