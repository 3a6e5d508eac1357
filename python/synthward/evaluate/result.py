"""What an evaluation found, as plain data that a report renders and JSON stores."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from synthward.evaluate.copies import CopyCheck
from synthward.evaluate.marginals import PairTV
from synthward.evaluate.utility import Utility

CUSTODIAN_ONLY = "custodian's eyes only: computed from real records, not paid for from the privacy budget"
"""What every place that shows figures computed from real records says of them."""

RELEASABLE_ROWS = 5000
"""Figures of the synthetic table that may be released use exactly this many of its rows, drawn at random. So
they do not tell how many rows it has, often as many as there were training rows: a private number."""


@dataclass(frozen=True)
class Marginal:
    """Shares of one column's codes in each table; ``labels`` names the codes, the last one is missing."""

    column: str
    kind: str
    labels: tuple[str, ...]
    train: np.ndarray
    holdout: np.ndarray | None
    synthetic: np.ndarray


@dataclass(frozen=True)
class Panel:
    """Joint shares [codes of left, codes of right] of two columns in the training and the synthetic table."""

    left: str
    right: str
    why: str
    left_labels: tuple[str, ...]
    right_labels: tuple[str, ...]
    train: np.ndarray
    synthetic: np.ndarray
    tv: float


@dataclass(frozen=True)
class PublicMarginal:
    """Shares of one column's codes in ``RELEASABLE_ROWS`` of the synthetic rows; uses no real record."""

    column: str
    kind: str
    labels: tuple[str, ...]
    synthetic: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """Everything that was computed from real records. None of it is paid for from the privacy budget.

    ``pairs_floor`` is the total variation of held-out against training rows, what a fresh real sample of
    ``sizes["holdout_rows"]`` rows shows; ``pairs_matched`` is that of as many synthetic rows.
    """

    sizes: dict[str, int]
    marginals: tuple[Marginal, ...]
    one_way: dict[str, float]
    one_way_floor: dict[str, float] | None
    pairs: PairTV
    pairs_floor: PairTV | None
    pairs_matched: PairTV | None
    panels: tuple[Panel, ...]
    utility: Utility | None
    copies: CopyCheck
    ingest: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class EvaluationResult:
    """Outcome of ``evaluate_records``.

    Attributes:
        schema_name: name in the schema.
        columns: names of the modelled columns.
        privacy: what the run's ledger and plan say; the keys are listed at ``evaluate_records``.
        settings: the run's settings, for display.
        epsilon_curve: (step, epsilon spent so far).
        public_marginals: synthetic-only figures that the privacy budget covers; empty when the synthetic
            table has fewer than ``RELEASABLE_ROWS`` rows.
        comparison: everything computed from real records.
        skipped: part of the evaluation -> why it was left out.
        numeric_bins: bins per numeric column.
        seed: seed of the evaluation's own sampling (bootstrap, subsamples); no secret.
    """

    schema_name: str
    columns: tuple[str, ...]
    privacy: dict[str, Any]
    settings: dict[str, Any]
    epsilon_curve: tuple[tuple[int, float], ...]
    public_marginals: tuple[PublicMarginal, ...]
    comparison: Comparison
    skipped: dict[str, str] = field(default_factory=dict)
    numeric_bins: int = 20
    seed: int = 0

    @property
    def is_private(self) -> bool:
        """True only for a run that says so and whose epsilon is finite; no entry counts as not private."""
        return self.privacy.get("private") is True and math.isfinite(self.epsilon)

    @property
    def epsilon(self) -> float:
        """Epsilon spent; infinite when it was not given."""
        value = self.privacy.get("epsilon")
        return float("inf") if value is None else float(value)

    @property
    def delta(self) -> float:
        """Delta; NaN when it was not given."""
        value = self.privacy.get("delta")
        return float("nan") if value is None else float(value)

    def summary(self) -> dict[str, Any]:
        """The headline figures in one flat dictionary (custodian's eyes only: computed from real records)."""
        found = self.comparison
        line: dict[str, Any] = {
            "one_way_tv_mean": float(np.mean(list(found.one_way.values()))),
            "two_way_tv_mean": found.pairs.mean,
            "two_way_tv_median": found.pairs.median,
            "two_way_tv_max": found.pairs.maximum,
            "two_way_tv_mean_matched": found.pairs_matched.mean if found.pairs_matched else None,
            "two_way_tv_mean_floor": found.pairs_floor.mean if found.pairs_floor else None,
            "synthetic_rows_in_train": found.copies.synthetic_in_train,
            "synthetic_rows_in_holdout": found.copies.synthetic_in_holdout,
        }
        for model in found.utility.models if found.utility else ():
            name = model.model.replace(" ", "_")
            line |= {f"tstr_auroc_{name}": model.tstr.value, f"trtr_auroc_{name}": model.trtr.value}
        return line

    def to_json(self, *, indent: int | None = None) -> str:
        """The whole result as JSON (custodian's eyes only). NaN becomes null, infinity the text ``"inf"``."""
        document = {"notice": CUSTODIAN_ONLY, "summary": self.summary()} | {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self)
        }
        return json.dumps(plain(document), indent=indent, allow_nan=False)


def plain(value: Any) -> Any:
    """Dataclasses, arrays and non-finite floats as what JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
