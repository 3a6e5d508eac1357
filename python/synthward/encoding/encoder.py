"""The encoder of a whole table, fitted by one Gaussian query over all histograms at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from synthward.data import Records
from synthward.encoding.columns import ContinuousCoder, TokenCoder
from synthward.encoding.layout import Layout
from synthward.engine.errors import SchemaError
from synthward.schema import Column, Schema

MAX_INTEGER_TOKENS = 128
CONTINUOUS_BINS = 64
MAX_RECORDS_COUNTED = 32
CONTEXTS = 6
# A unit's records share a weight of at most one in every histogram; up to this many count in full proportion.
RECORDS_IN_FULL = 2


class GaussianQueries(Protocol):
    """What the encoder needs of the engine's charged queries."""

    def gaussian_vector(
        self, values: np.ndarray, *, l2_sensitivity: float, noise_multiplier: float, note: str
    ) -> np.ndarray: ...


@dataclass(frozen=True)
class Encoded:
    """Encoded records: tokens int16/int32 [N, tokens], scores float32 [N, continuous], context int8 [N], offsets."""

    tokens: np.ndarray
    scores: np.ndarray
    context: np.ndarray
    unit_offsets: np.ndarray


@dataclass(frozen=True)
class TableEncoder:
    """Coders of all columns, the noisy number of units, and the noisy distribution of records per unit."""

    coders: tuple[TokenCoder | ContinuousCoder, ...]
    layout: Layout
    context_mass: np.ndarray
    units: float
    records: float

    @classmethod
    def fit(cls, records: Records, queries: GaussianQueries, noise_multiplier: float) -> TableEncoder:
        """Learn the encoding from ``records`` by one charged query.

        Each unit adds a vector of total weight at most 1 to each of H histograms, so its L2 contribution to
        their concatenation is at most sqrt(H): that is the declared sensitivity.
        """
        histograms = histograms_of(records)
        sensitivity = math.sqrt(len(histograms))
        sizes = [len(h) for h in histograms]
        noisy = queries.gaussian_vector(
            np.concatenate(histograms),
            l2_sensitivity=sensitivity,
            noise_multiplier=noise_multiplier,
            note=f"{len(histograms)} one-way histograms",
        )
        noise_std = noise_multiplier * sensitivity
        return cls._from_histograms(records.schema, np.split(noisy, np.cumsum(sizes)[:-1]), noise_std)

    @classmethod
    def _from_histograms(cls, schema: Schema, parts: list[np.ndarray], noise_std: float) -> TableEncoder:
        coders: list[TokenCoder | ContinuousCoder] = []
        presence: list[int] = []
        sizes: list[int] = []
        label: int | None = None
        parts = list(parts)
        units = max(float(parts.pop()[0]), 1.0)
        per_unit = parts.pop()
        for column, counts in zip(schema.modelled, parts, strict=True):
            if is_token_column(column):
                coder = TokenCoder.fit(
                    column.name,
                    counts,
                    noise_std,
                    ordered=column.kind in ("ordinal", "integer"),
                    missing=column.missing,
                    level_groups=column.level_groups if column.is_discrete else None,
                )
                if column.name == schema.label:
                    label = len(sizes)
                coders.append(coder)
                sizes.append(coder.size)
                continue
            if column.missing:
                flag = TokenCoder.fit(
                    column.name,
                    np.array([counts[0], counts[1:].sum()]),
                    noise_std,
                    ordered=True,
                    missing=True,
                )
                coders.append(flag)
                presence.append(len(sizes))
                sizes.append(flag.size)
            else:
                presence.append(-1)
            coders.append(ContinuousCoder.fit(column.name, counts[1:], noise_std, *_bounds(column)))
        context_mass, records_total = _context_mass(per_unit, noise_std, single=schema.unit is None)
        layout = Layout(tuple(sizes), len(presence), len(context_mass), label, tuple(presence))
        return cls(tuple(coders), layout, context_mass, units, max(records_total, units))

    @property
    def token_mass(self) -> np.ndarray:
        """Noisy shares of all tokens, concatenated over the token columns, float64 [vocabulary]."""
        masses = [c.mass for c in self.coders if isinstance(c, TokenCoder)]
        return np.concatenate(masses) if masses else np.zeros(0)

    def encode(self, records: Records, rng: np.random.Generator) -> Encoded:
        """Encode records; ``rng`` spreads integer columns inside their unit cell.

        Each column draws from a stream of its own: what a row is given, and what ``rng`` gives afterwards, do not
        depend on the number of rows.
        """
        tokens, scores = [], []
        streams = iter(rng.spawn(len(self.coders)))
        by_name = {c.name: c for c in records.schema.modelled}
        for coder in self.coders:
            column = by_name[coder.name]
            values = records.columns[coder.name]
            if isinstance(coder, ContinuousCoder):
                jitter = next(streams).uniform(-0.5, 0.5, len(values)) if column.is_integral else None
                scores.append(coder.encode(values, jitter))
            elif is_token_column(column):
                tokens.append(coder.encode(level_index(column, values)))
            else:
                tokens.append(coder.encode(np.where(np.isnan(values), -1, 0)))
        rows = records.num_rows
        per_unit = np.diff(records.unit_offsets)
        context = np.repeat(np.minimum(per_unit, self.layout.contexts) - 1, per_unit)
        return Encoded(
            np.stack(tokens, axis=1).astype(np.int64) if tokens else np.zeros((rows, 0), dtype=np.int64),
            np.stack(scores, axis=1) if scores else np.zeros((rows, 0), dtype=np.float32),
            context.astype(np.int64),
            records.unit_offsets,
        )

    def decode(
        self,
        schema: Schema,
        tokens: np.ndarray,
        scores: np.ndarray,
        uniforms: np.ndarray,
        allowed: dict[str, np.ndarray] | None = None,
    ) -> dict[str, np.ndarray]:
        """Tokens and scores back to typed columns.

        ``uniforms`` float [rows, tokens] in [0, 1) choose the levels inside tokens; ``allowed`` restricts the levels of
        named columns.
        """
        columns: dict[str, np.ndarray] = {}
        by_name = {c.name: c for c in schema.modelled}
        present: dict[str, np.ndarray] = {}
        token_at = score_at = 0
        for coder in self.coders:
            column = by_name[coder.name]
            if isinstance(coder, ContinuousCoder):
                values = coder.decode(scores[:, score_at])
                score_at += 1
                columns[coder.name] = _finish_numeric(column, values, present.get(coder.name))
                continue
            limit = None if allowed is None else allowed.get(coder.name)
            levels = coder.decode(tokens[:, token_at], uniforms[:, token_at], limit)
            token_at += 1
            if not is_token_column(column):
                present[coder.name] = levels >= 0
            elif column.is_discrete:
                columns[coder.name] = levels
            else:
                columns[coder.name] = np.where(levels < 0, np.nan, levels + public_bounds(column)[0])
        return {c.name: columns[c.name] for c in schema.modelled}

    def to_dict(self) -> dict[str, Any]:
        return {
            "coders": [c.to_dict() for c in self.coders],
            "layout": self.layout.to_dict(),
            "context_mass": self.context_mass.tolist(),
            "units": self.units,
            "records": self.records,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TableEncoder:
        kinds: dict[str, Any] = {"token": TokenCoder, "continuous": ContinuousCoder}
        return cls(
            tuple(kinds[c["type"]].from_dict(c) for c in data["coders"]),
            Layout.from_dict(data["layout"]),
            np.asarray(data["context_mass"], dtype=np.float64),
            float(data["units"]),
            float(data["records"]),
        )


def is_token_column(column: Column) -> bool:
    """True for discrete columns and for integers of few values; the rest are continuous."""
    if column.is_discrete:
        return True
    return column.kind == "integer" and bool(np.diff(public_bounds(column))[0] < MAX_INTEGER_TOKENS)


def public_bounds(column: Column) -> tuple[float, float]:
    """Declared bounds of a numeric column, which the schema guarantees to be there."""
    assert column.min is not None and column.max is not None
    return float(column.min), float(column.max)


def level_index(column: Column, values: np.ndarray) -> np.ndarray:
    """Level index of a token column (int64, -1 missing): integers count from their lower bound."""
    if column.is_discrete:
        return values.astype(np.int64)
    return np.where(np.isnan(values), -1, np.nan_to_num(values) - public_bounds(column)[0]).astype(np.int64)


def level_count(column: Column) -> int:
    """Number of levels of a token column, missing not counted."""
    return len(column.levels) if column.is_discrete else int(np.diff(public_bounds(column))[0]) + 1


def _bounds(column: Column) -> tuple[float, float]:
    margin = 0.5 if column.is_integral else 0.0
    low, high = public_bounds(column)
    return low - margin, high + margin


def histograms_of(records: Records) -> list[np.ndarray]:
    """Weighted histograms of all columns, of records per unit, and the unit count; one list entry each."""
    per_unit = np.diff(records.unit_offsets)
    share = np.minimum(1.0, RECORDS_IN_FULL / np.maximum(per_unit, 1)) / RECORDS_IN_FULL
    weight = np.repeat(share, per_unit)
    parts: list[np.ndarray] = []
    if not records.schema.modelled:
        raise SchemaError("schema: no column is left to model; remove `exclude` from at least one")
    for column in records.schema.modelled:
        values = records.columns[column.name]
        if is_token_column(column):
            index, bins = level_index(column, values) + 1, level_count(column)
        else:
            low, high = _bounds(column)
            cell = np.floor((np.nan_to_num(values, nan=low) - low) / (high - low) * CONTINUOUS_BINS)
            cell = np.clip(cell, 0, CONTINUOUS_BINS - 1).astype(np.int64)
            index, bins = np.where(np.isnan(values), 0, cell + 1), CONTINUOUS_BINS
        parts.append(np.bincount(index, weights=weight, minlength=bins + 1))
    capped = np.minimum(per_unit, MAX_RECORDS_COUNTED)
    parts.append(np.bincount(capped, minlength=MAX_RECORDS_COUNTED + 1).astype(np.float64))
    parts.append(np.array([float(records.num_units)]))
    return parts


def _context_mass(per_unit: np.ndarray, noise_std: float, *, single: bool) -> tuple[np.ndarray, float]:
    """Share of records (not units) by class of records per unit, and the noisy number of records."""
    kept = np.where(per_unit > 3.0 * noise_std, per_unit, 0.0)
    kept[0] = 0.0
    if single or kept.sum() <= 0:
        return np.ones(1), float(max(kept.sum(), 1.0))
    by_records = kept * np.arange(len(kept))
    classes = np.minimum(np.arange(len(kept)), CONTEXTS) - 1
    mass = np.bincount(np.maximum(classes, 0), weights=by_records, minlength=CONTEXTS)
    return mass / mass.sum(), float(by_records.sum())


def _finish_numeric(column: Column, values: np.ndarray, present: np.ndarray | None) -> np.ndarray:
    if column.is_integral:
        values = np.rint(values)
    elif column.decimals is not None:
        values = np.round(values, column.decimals)
    values = np.clip(values, column.min, column.max)
    return values if present is None else np.where(present, values, np.nan)
