"""From squared norms to clip factors, with the rounding of the norms themselves covered."""

from __future__ import annotations

import torch
from torch import Tensor

from synthward.engine.layout import Length
from synthward.engine.spec import ClipSpec

UNIT_ROUNDOFF = 2.0**-24
# What underflow takes from a number in fp32 is less than this, also where denormals are flushed to zero.
SMALLEST_NORMAL = 2.0**-126
# Squares are added up in double and each such sum is rounded once. A unit has fewer than 2^30 of them; what is lost
# in coordinates of a formed gradient is far below the root.
LOST_SQUARES = 2.0**30 * SMALLEST_NORMAL


def product_error(chain: Length, row_sums: Tensor) -> Tensor:
    """Bound on the error of squared norms [U] taken as sums of products of two inner products.

    An inner product whose terms go through at most `chain` additions is off by at most chain u of the product of
    the norms (Higham 2002, section 3.1); over all pairs of a unit's rows these add up to the square of
    `row_sums` [U], the sum of the norms of its rows' own gradients.
    """
    return (2 * chain + 4) * UNIT_ROUNDOFF * row_sums.square()


def formed_error(chain: Length, sq_norms: Tensor, row_sums: Tensor) -> Tensor:
    """The same for squared norms [U] of gradients that were formed, as sums over the rows: the gradient is off by
    at most chain u of `row_sums` [U]."""
    off = (chain + 2) * UNIT_ROUNDOFF * row_sums
    return 2.0 * off * sq_norms.clamp_min(0.0).sqrt() + off.square()


def clip_factors(
    sample_sq_norm: Tensor,
    clip: ClipSpec,
    *,
    bound: float,
    error: Tensor | float = 0.0,
    parameters: int = 1,
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
        error: float32 [U], bound on the error of ``sample_sq_norm`` (`product_error`, `formed_error`).
        parameters: how many squared norms were added up, each rounded to fp32.
        scale: what the gradients are multiplied by before they are clipped (undoes a mean over rows).
        unit_mask: bool [U] or None; a masked unit (False) gets 0.

    Guarantees: the norm of ``factor * gradient`` is at most C for every unit, rounding and underflow of the norm
        included; a unit whose norm is NaN or infinite gets exactly 0. No branch on the data, no
        synchronisation.
    """
    upper = (sample_sq_norm + error + LOST_SQUARES) * (1.0 + (2 * parameters + 16) * UNIT_ROUNDOFF)
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
