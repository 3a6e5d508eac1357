"""One column's encoding, built from its noisy histogram; everything here is post-processing of that query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri

# A level is modelled on its own when its noisy count stands this many noise deviations above zero;
# rarer ones share a token and are told apart by the noisy histogram alone.
STANDALONE_DEVIATIONS = 6.0
# Below this many deviations a noisy count of a nominal level is more likely noise than records.
LEAF_DEVIATIONS = 2.0
SCORE_LIMIT = 4.0
# Keeps the transform of a continuous column invertible where its histogram says nothing: a share, spread over all bins.
SHARE_FLOOR = 1e-6


@dataclass(frozen=True)
class TokenCoder:
    """A discrete column: levels (index 0 is missing, then the declared levels) grouped into tokens.

    ``group`` int64 [levels + 1] maps a level to its token; ``leaf`` float64 [levels + 1] weighs the levels
    inside a token; ``mass`` float64 [tokens] is the noisy share of each token, summing to 1.
    """

    name: str
    group: np.ndarray
    leaf: np.ndarray
    mass: np.ndarray

    @property
    def size(self) -> int:
        return len(self.mass)

    @classmethod
    def fit(
        cls,
        name: str,
        counts: np.ndarray,
        noise_std: float,
        *,
        ordered: bool,
        missing: bool,
        level_groups: np.ndarray | None = None,
    ) -> TokenCoder:
        """Group the levels of one column by its noisy ``counts`` (float64 [levels + 1], index 0 missing)."""
        counts = np.asarray(counts, dtype=np.float64).copy()
        if not missing:
            counts[0] = 0.0
        threshold = STANDALONE_DEVIATIONS * noise_std
        rare = _merge_rare(counts, threshold, level_groups)
        key = _merge_adjacent(counts, threshold) if ordered else rare
        if not missing:
            # What cannot occur shares its neighbour's token with weight zero, so it is never drawn.
            key[0] = key[1]
        group = np.unique(key, return_inverse=True)[1].astype(np.int64)
        leaf = _leaf_weights(counts, group, noise_std, ordered=ordered)
        if not missing:
            leaf[0] = 0.0
        mass = np.bincount(group, weights=np.maximum(counts, 0.0))
        # An empty token keeps a little mass, so that its logit stays finite.
        mass = np.maximum(mass, max(0.1 * noise_std, 1e-9))
        return cls(name, group, leaf, mass / mass.sum())

    def encode(self, levels: np.ndarray) -> np.ndarray:
        """Level indices (int, -1 missing) to tokens."""
        return self.group[levels.astype(np.int64) + 1]

    def decode(
        self, tokens: np.ndarray, uniforms: np.ndarray, allowed: np.ndarray | None = None
    ) -> np.ndarray:
        """Tokens to level indices (int32, -1 missing), drawing the level inside a token by ``leaf``.

        ``allowed`` bool [levels + 1] restricts the levels that may be drawn.
        """
        order, starts, cumulative = self._tables(allowed)
        low = cumulative[starts[tokens]]
        high = cumulative[starts[tokens + 1]]
        position = np.searchsorted(cumulative, low + uniforms * (high - low), side="right") - 1
        position = np.clip(position, starts[tokens], starts[tokens + 1] - 1)
        return (order[position] - 1).astype(np.int32)

    def allowed_tokens(self, allowed: np.ndarray) -> np.ndarray:
        """Tokens that hold at least one allowed level with a positive weight, bool [tokens]."""
        return np.bincount(self.group, weights=self.leaf * allowed, minlength=self.size) > 0

    def _tables(self, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        weights = self.leaf if allowed is None else self.leaf * allowed
        order = np.argsort(self.group, kind="stable")
        starts = np.searchsorted(self.group[order], np.arange(self.size + 1))
        return order, starts, np.concatenate([[0.0], np.cumsum(weights[order])])

    def to_dict(self) -> dict[str, Any]:
        return {
            "type": "token",
            "name": self.name,
            "group": self.group.tolist(),
            "leaf": self.leaf.tolist(),
            "mass": self.mass.tolist(),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TokenCoder:
        return cls(
            str(data["name"]),
            np.asarray(data["group"], dtype=np.int64),
            np.asarray(data["leaf"], dtype=np.float64),
            np.asarray(data["mass"], dtype=np.float64),
        )


@dataclass(frozen=True)
class ContinuousCoder:
    """A numeric column mapped to a standard normal score by its noisy histogram (probability integral transform).

    ``edges`` float64 [bins + 1] are public (equal widths over the declared bounds); ``cdf`` float64 [bins + 1]
    is the cumulated noisy histogram, strictly increasing from 0 to 1.
    """

    name: str
    edges: np.ndarray
    cdf: np.ndarray

    @classmethod
    def fit(
        cls, name: str, counts: np.ndarray, noise_std: float, minimum: float, maximum: float
    ) -> ContinuousCoder:
        weights = np.where(counts > LEAF_DEVIATIONS * noise_std, counts, 0.0)
        if weights.sum() <= 0:
            weights = np.ones_like(weights)
        weights = weights / weights.sum() + SHARE_FLOOR / len(weights)
        cdf = np.concatenate([[0.0], np.cumsum(weights)])
        return cls(name, np.linspace(minimum, maximum, len(weights) + 1), cdf / cdf[-1])

    def encode(self, values: np.ndarray, jitter: np.ndarray | None = None) -> np.ndarray:
        """Values (float64, NaN missing) to scores (float32, 0 where missing); ``jitter`` spreads integers."""
        moved = values if jitter is None else values + jitter
        share = np.interp(np.nan_to_num(moved, nan=self.edges[0]), self.edges, self.cdf)
        limit = ndtr(-SCORE_LIMIT)
        scores = ndtri(np.clip(share, limit, 1.0 - limit))
        return np.where(np.isnan(values), 0.0, scores).astype(np.float32)

    def decode(self, scores: np.ndarray) -> np.ndarray:
        """Scores to values (float64) within the declared bounds."""
        return np.interp(ndtr(scores.astype(np.float64)), self.cdf, self.edges)

    def to_dict(self) -> dict[str, Any]:
        return {
            "type": "continuous",
            "name": self.name,
            "edges": [float(self.edges[0]), float(self.edges[-1])],
            "cdf": self.cdf.tolist(),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ContinuousCoder:
        cdf = np.asarray(data["cdf"], dtype=np.float64)
        return cls(str(data["name"]), np.linspace(data["edges"][0], data["edges"][1], len(cdf)), cdf)


def _merge_adjacent(counts: np.ndarray, threshold: float) -> np.ndarray:
    """Tokens of an ordered column: missing alone, then runs of neighbours that together pass ``threshold``."""
    key = np.zeros(len(counts), dtype=np.int64)
    current, gathered = 1, 0.0
    for index in range(1, len(counts)):
        key[index] = current
        gathered += max(counts[index], 0.0)
        if gathered >= threshold:
            current, gathered = current + 1, 0.0
    if gathered < threshold and current > 1:
        key[key == current] = current - 1
    return key


def _merge_rare(counts: np.ndarray, threshold: float, level_groups: np.ndarray | None) -> np.ndarray:
    """Tokens of a nominal column: missing alone, frequent levels alone, the rest by public group or together."""
    levels = len(counts)
    shared = np.full(levels, levels, dtype=np.int64)
    if level_groups is not None:
        shared[1:] = levels + np.asarray(level_groups, dtype=np.int64)
        threshold = 2.0 * threshold
    key = np.where(counts >= threshold, np.arange(levels), shared)
    key[0] = 0
    return key


def _leaf_weights(counts: np.ndarray, group: np.ndarray, noise_std: float, *, ordered: bool) -> np.ndarray:
    """Weight of each level inside its token; a token whose levels all drown in noise is uniform."""
    floor = 0.0 if ordered else LEAF_DEVIATIONS * noise_std
    leaf = np.where(counts > floor, counts, 0.0)
    empty = np.bincount(group, weights=leaf) <= 0
    return np.where(empty[group], 1.0, leaf)
