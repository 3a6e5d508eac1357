"""Noisy counts of units, and of rows of which each unit may bring a bounded number."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from synthward.engine.queries.mechanism import QueryMechanism
from synthward.engine.queries.units import Units, check_max_rows


@dataclass(frozen=True)
class Count:
    """A noisy count. ``value`` may be negative: cutting it off would bias sums of counts.

    ``noise_std`` is the standard deviation of its noise.
    """

    value: float
    noise_std: float


def count_units(
    mechanism: QueryMechanism,
    units: Units,
    *,
    noise_multiplier: float,
    where: ArrayLike | None = None,
    note: str = "count of units",
) -> Count:
    """Number of units, or of those with at least one row where ``where`` (bool [rows]) is true.

    One unit, added or removed, changes this by at most 1, whatever rows it has. One Gaussian event.

    Raises:
        DataError: ``where`` is no mask of the rows.
        BudgetExceededError: the ledger's target does not pay for it; nothing is answered.
    """
    counted = units.counted(where)
    # A unit may have no rows at all; without a mask it is still a unit.
    exact = units.num_units if where is None else len(np.unique(units.owner[counted]))
    return _ask(mechanism, exact, 1, noise_multiplier, note)


def count_rows(
    mechanism: QueryMechanism,
    units: Units,
    *,
    max_rows_per_unit: int,
    noise_multiplier: float,
    where: ArrayLike | None = None,
    note: str = "count of rows",
) -> Count:
    """Number of rows (where ``where`` is true), of which the first ``max_rows_per_unit`` of each unit count.

    One unit, added or removed, changes this by at most ``max_rows_per_unit``. One Gaussian event.

    Raises:
        ConfigError: ``max_rows_per_unit`` is not a whole number of at least 1.
        DataError: ``where`` is no mask of the rows.
        BudgetExceededError: the ledger's target does not pay for it; nothing is answered.
    """
    check_max_rows(max_rows_per_unit)
    weights = units.weights(units.counted(where), max_rows_per_unit)
    return _ask(mechanism, int(weights.rows.sum()), weights.most, noise_multiplier, note)


def _ask(
    mechanism: QueryMechanism, exact: int, sensitivity: int, noise_multiplier: float, note: str
) -> Count:
    noisy = mechanism.integer_vector(
        np.array([exact], dtype=np.int64),
        l2_sensitivity=sensitivity,
        noise_multiplier=noise_multiplier,
        note=note,
    )
    return Count(float(noisy[0]), noise_multiplier * sensitivity)
