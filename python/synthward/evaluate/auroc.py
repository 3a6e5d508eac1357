"""Area under the ROC curve with a bootstrap over privacy units."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 percent bootstrap interval."""

    value: float
    low: float
    high: float


class RankedScores:
    """Scores of one classifier, sorted once so that every re-weighting costs one pass.

    Args:
        scores: float64 [N], larger means more likely positive.
        positive: bool [N].
    """

    def __init__(self, scores: np.ndarray, positive: np.ndarray) -> None:
        self._order = np.argsort(scores, kind="stable")
        ordered = scores[self._order]
        self._positive = positive[self._order].astype(np.float64)
        changes = ordered[1:] != ordered[:-1]
        self._group_starts = np.flatnonzero(np.r_[True, changes]) if ordered.size else np.zeros(0, int)

    def auroc(self, weights: np.ndarray | None = None) -> float:
        """Weighted AUROC, ties counted one half; NaN when a class has no weight; ``weights``: [N] or None."""
        if self._order.size == 0:
            return float("nan")
        ordered = np.ones(self._order.size) if weights is None else weights[self._order].astype(np.float64)
        positive = np.add.reduceat(ordered * self._positive, self._group_starts)
        negative = np.add.reduceat(ordered * (1.0 - self._positive), self._group_starts)
        total = positive.sum() * negative.sum()
        if total <= 0:
            return float("nan")
        below = np.cumsum(negative) - negative
        return float((positive * (below + 0.5 * negative)).sum() / total)


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """AUROC of ``scores`` for ``positive`` (bool), ties counted one half; NaN when a class is absent."""
    return RankedScores(scores, positive).auroc()


def bootstrap_auroc(
    scores: list[np.ndarray],
    positive: np.ndarray,
    row_unit: np.ndarray,
    *,
    draws: int = 300,
    seed: int = 0,
) -> list[tuple[float, np.ndarray]]:
    """AUROC of several classifiers on the same rows, with a bootstrap that draws whole units.

    The same units are drawn for every classifier, so differences of the draws are paired.

    Args:
        scores: one float array [N] per classifier.
        positive: bool [N].
        row_unit: int64 [N] unit of each row.
        draws: bootstrap samples.

    Returns:
        per classifier the AUROC and its bootstrap draws [draws]; draws in which a class is absent are left
        out of all classifiers.
    """
    ranked = [RankedScores(s, positive) for s in scores]
    units, index = np.unique(row_unit, return_inverse=True)
    generator = np.random.default_rng(seed)
    share = np.full(len(units), 1.0 / len(units))
    values = np.empty((len(ranked), draws))
    for d in range(draws):
        weights = generator.multinomial(len(units), share)[index]
        values[:, d] = [r.auroc(weights) for r in ranked]
    values = values[:, np.isfinite(values).all(axis=0)]
    return [(r.auroc(), v) for r, v in zip(ranked, values, strict=True)]


def interval(value: float, draws: np.ndarray) -> Interval:
    """The 2.5 and 97.5 percentiles of bootstrap draws around a figure; NaN bounds without draws."""
    if draws.size == 0:
        return Interval(value, float("nan"), float("nan"))
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(value, float(low), float(high))
