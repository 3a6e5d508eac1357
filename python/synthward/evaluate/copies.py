"""How many synthetic rows repeat a real row exactly: a copy check, not a privacy measure.

A generator without copies can still leak, and rows of a small table repeat by chance; only the privacy budget
says anything about privacy. The check finds gross failures such as a generator that returns its training
table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

_MIX = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True)
class CopyCheck:
    """Shares of rows that equal some row of another table in every modelled column.

    ``synthetic_in_train_sample`` looks up a random part of the training rows as large as the held-out table,
    so that it and ``synthetic_in_holdout`` are comparable; ``holdout_in_train`` says how often unseen real
    rows repeat a training row. The last three are None without held-out records.
    """

    synthetic_in_train: float
    synthetic_in_train_sample: float | None
    synthetic_in_holdout: float | None
    holdout_in_train: float | None


def row_words(records: Any) -> np.ndarray:
    """Modelled columns as uint64 words, equal exactly where values are equal (NaN equals NaN): [N, D]."""
    words = []
    for column in records.schema.modelled:
        values = records.columns[column.name]
        if column.is_discrete:
            words.append(values.astype(np.int64).view(np.uint64))
        else:
            # + 0.0 turns -0.0 into 0.0; every NaN becomes the same bit pattern.
            words.append(np.where(np.isnan(values), np.nan, values + 0.0).astype(np.float64).view(np.uint64))
    return np.stack(words, axis=1)


def share_repeated(rows: np.ndarray, pool: np.ndarray) -> float:
    """Share of ``rows`` [N, D] that equal some row of ``pool`` [M, D]; exact, hashes only find candidates."""
    if len(rows) == 0 or len(pool) == 0:
        return 0.0
    pool_hash = _hash_rows(pool)
    order = np.argsort(pool_hash, kind="stable")
    ordered = pool_hash[order]
    wanted = _hash_rows(rows)
    position = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    candidates = np.flatnonzero(ordered[position] == wanted)
    equal = (rows[candidates] == pool[order[position[candidates]]]).all(axis=1)
    return float(equal.sum() / len(rows))


def check_copies(train: Any, holdout: Any | None, synthetic: Any, seed: int = 0) -> CopyCheck:
    """Compare every synthetic row with every training and held-out row."""
    made, seen = row_words(synthetic), row_words(train)
    in_train = share_repeated(made, seen)
    if holdout is None or holdout.num_rows == 0:
        return CopyCheck(in_train, None, None, None)
    unseen = row_words(holdout)
    size = min(len(unseen), len(seen))
    part = np.random.default_rng(seed).choice(len(seen), size=size, replace=False)
    return CopyCheck(
        in_train,
        share_repeated(made, seen[part]),
        share_repeated(made, unseen),
        share_repeated(unseen, seen),
    )


def _hash_rows(words: np.ndarray) -> np.ndarray:
    state = np.zeros(len(words), dtype=np.uint64)
    for k in range(words.shape[1]):
        state = (state ^ words[:, k]) + _MIX
        state = (state ^ (state >> np.uint64(30))) * _MULTIPLY_1
        state = (state ^ (state >> np.uint64(27))) * _MULTIPLY_2
        state ^= state >> np.uint64(31)
    return state
