"""Membership inference on samples: can somebody who holds a record tell from a cohort whether it was trained on?

Computed from real records, so that every figure here is for their custodian's eyes only. Never a gate: an attack that
finds nothing shows nothing, and one that finds something is bounded by epsilon already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synthward.data import IngestReport, Records
from synthward.evaluate.auroc import Interval, RankedScores, interval
from synthward.evaluate.features import FeatureEncoder
from synthward.schema import Schema

Floats = NDArray[np.float64]
#: Of the attack that is reported beside the area under the curve.
FALSE_POSITIVES = 0.01
#: Units of either side, and rows of the cohort, that are compared at most.
MOST_UNITS, MOST_SAMPLES = 4000, 20_000
# Nearest, second nearest, ... sample whose distances the classifier sees.
NEIGHBOURS = (1, 2, 5, 10, 20)
_BLOCK = 1024
_DRAWS = 300


@dataclass(frozen=True)
class Attack:
    """One attack on units that were trained on and as many kinds of others.

    Attributes:
        auroc: area under its ROC curve, 0.5 for chance. tpr: share of the trained units that it finds while
            `FALSE_POSITIVES` of the others are taken for trained; both with 95 % bootstrap intervals.
    """

    name: str
    auroc: Interval
    tpr: Interval
    train_units: int
    other_units: int


class Distances:
    """Distances from records to the rows of a cohort: numbers in its standard deviations, levels equal or not.

    Args:
        cohort: synthetic records; scales come from them alone.
    """

    def __init__(self, schema: Schema, cohort: Records) -> None:
        rows = np.arange(min(cohort.num_rows, MOST_SAMPLES))
        self._features = FeatureEncoder(schema, cohort, rows, exclude="")
        self._cohort = self._dense(cohort, rows)
        self._squares = np.einsum("ij,ij->i", self._cohort, self._cohort)

    def nearest(self, records: Records, rows: NDArray[np.int64]) -> Floats:
        """Distances of rows to their 1st, 2nd, 5th, ... nearest synthetic row, float64 [rows, `NEIGHBOURS`]."""
        order = np.minimum(np.array(NEIGHBOURS), len(self._cohort)) - 1
        found = np.empty((len(rows), len(order)))
        for start in range(0, len(rows), _BLOCK):
            block = self._dense(records, rows[start : start + _BLOCK])
            squares = self._squares - 2.0 * (block @ self._cohort.T)
            squares += np.einsum("ij,ij->i", block, block)[:, None]
            squares.partition(np.unique(order), axis=1)
            found[start : start + len(block)] = np.sqrt(np.maximum(squares[:, order], 0.0))
        return found

    def _dense(self, records: Records, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._features.one_hot(records, rows).toarray().astype(np.float32)


def unit_distances(distances: Distances, records: Records, units: NDArray[np.int64]) -> Floats:
    """Of each unit the least distances over its rows, float64 [units, `NEIGHBOURS`]."""
    starts, stops = records.unit_offsets[units], records.unit_offsets[units + 1]
    rows = np.concatenate([np.arange(a, b) for a, b in zip(starts, stops, strict=True)]).astype(np.int64)
    found = distances.nearest(records, rows)
    return np.minimum.reduceat(found, np.r_[0, np.cumsum(stops - starts)[:-1]], axis=0)


def membership_attacks(
    train: Records, others: Records, cohort: Records, rng: np.random.Generator
) -> list[Attack]:
    """A distance attack and a classifier on distances, trained units against units that were held out.

    Args:
        train: what the run was trained on. others: units of the same kind that it never saw. cohort: its samples.
    """
    distances = Distances(train.schema, cohort)
    sides = [_some_units(records, rng) for records in (train, others)]
    features = np.concatenate(
        [
            unit_distances(distances, records, units)
            for records, units in zip((train, others), sides, strict=True)
        ]
    )
    member = np.r_[np.ones(len(sides[0]), dtype=bool), np.zeros(len(sides[1]), dtype=bool)]
    scores = {
        "distance to the nearest sample": -features[:, 0],
        "classifier on distances": _classify(features, member, rng),
    }
    return [measure_attack(name, values, member, rng) for name, values in scores.items()]


def measure_attack(name: str, scores: Floats, member: NDArray[np.bool_], rng: np.random.Generator) -> Attack:
    """The figures of an attack whose scores are larger for members; the bootstrap draws units of either side."""
    inside, outside = scores[member], scores[~member]
    drawn = np.empty((2, _DRAWS))
    for draw in range(_DRAWS):
        one, two = rng.choice(inside, len(inside)), rng.choice(outside, len(outside))
        drawn[:, draw] = _auroc(one, two), _tpr(one, two)
    return Attack(
        name,
        interval(_auroc(inside, outside), drawn[0]),
        interval(_tpr(inside, outside), drawn[1]),
        len(inside),
        len(outside),
    )


def _auroc(inside: Floats, outside: Floats) -> float:
    positive = np.r_[np.ones(len(inside), dtype=bool), np.zeros(len(outside), dtype=bool)]
    return RankedScores(np.r_[inside, outside], positive).auroc()


def _tpr(inside: Floats, outside: Floats) -> float:
    """Share of `inside` above the score that `FALSE_POSITIVES` of `outside` exceed."""
    return float((inside > np.quantile(outside, 1.0 - FALSE_POSITIVES, method="higher")).mean())


def _classify(features: Floats, member: NDArray[np.bool_], rng: np.random.Generator) -> Floats:
    """Out-of-fold probability of membership, from boosted trees on logarithms of distances and their ratios."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    logs = np.log(features + 1e-6)
    inputs = np.concatenate([logs, logs[:, :1] - logs[:, 1:]], axis=1)
    seed = int(rng.integers(2**31))
    model = HistGradientBoostingClassifier(max_iter=60, learning_rate=0.05, max_depth=3, random_state=seed)
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    found: Any = cross_val_predict(model, inputs, member, cv=folds, method="predict_proba")
    return np.asarray(found[:, 1], dtype=np.float64)


def _some_units(records: Records, rng: np.random.Generator) -> NDArray[np.int64]:
    count = min(records.num_units, MOST_UNITS)
    return np.sort(rng.choice(records.num_units, count, replace=False)).astype(np.int64)


def as_records(schema: Schema, columns: dict[str, np.ndarray], keys: np.ndarray | None = None) -> Records:
    """Columns as records of one row a unit."""
    rows = len(next(iter(columns.values())))
    keys = np.arange(rows, dtype=np.uint64) if keys is None else keys
    return Records(schema, columns, np.arange(rows + 1, dtype=np.int64), keys, IngestReport(rows=rows))
