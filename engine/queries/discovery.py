"""Categories that are not declared: found by a noisy count and a threshold that hides what one unit alone has."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from synthward.engine.accounting.events import check_delta
from synthward.engine.queries.mechanism import QueryMechanism, check_some_noise
from synthward.engine.queries.units import Units, check_max_rows


@dataclass(frozen=True)
class Categories:
    """The categories that were found, in their order, with the noisy number of units that have each.

    A category is found where that number is at least ``threshold``; ``noise_std`` is its noise. ``delta`` is what was
    charged for the threshold, beside the Gaussian mechanism.
    """

    counts: dict[int, float] | dict[str, float]
    threshold: int
    noise_std: float
    delta: float


def discover_categories(
    mechanism: QueryMechanism,
    units: Units,
    values: ArrayLike,
    *,
    noise_multiplier: float,
    delta: float,
    max_categories_per_unit: int = 1,
    where: ArrayLike | None = None,
    note: str = "categories of a column",
) -> Categories:
    """Categories of a column, whole numbers or text, that enough units have.

    Args:
        values: whole numbers or text [rows]; rows where ``where`` is false are left out (missing values).
        delta: probability, at the most, that anything is released that only one unit has.
        max_categories_per_unit: m; a unit counts in the first m categories of its rows.

    Why it is private (Rogers 2023; Swanberg et al. 2023). Let D have one unit more than D', and let A be the
    categories that this unit alone has, m at the most. The unit adds 1 to at most m counts: on all other categories
    the answer for D is that of a Gaussian mechanism of sensitivity sqrt(m), read through a threshold. Each category
    of A has the exact count 1 and is released when 1 + rint(s z) >= t, s being the noise and z a normal: with
    probability p = Q((t - 3/2) / s). That any category of A is released has probability 1 - (1 - p)^|A|, at most
    ``delta`` by the choice of t, and is independent of the rest. So the pair of answers is a function of a Gaussian
    mechanism and of an independent (0, delta) mechanism that tells D with probability delta and else nothing: as
    which it is charged.

    Raises:
        ConfigError: no noise, a delta outside of 0 and 1, or a limit of categories below 1.
        DataError: values that are neither whole numbers nor text, or not one for each row.
        BudgetExceededError: the ledger's target does not pay for it; nothing is answered.
    """
    check_delta(delta)
    check_some_noise(noise_multiplier)
    check_max_rows(max_categories_per_unit, "max_categories_per_unit")
    column = units.column(values, "values", "iuU")
    held = _units_by_category(units, column, units.counted(where), max_categories_per_unit)
    sensitivity = math.sqrt(max_categories_per_unit)
    noise_std = noise_multiplier * sensitivity
    threshold = least_threshold(noise_std, delta, max_categories_per_unit)
    found = mechanism.counts_above(
        held,
        threshold=threshold,
        delta=delta,
        l2_sensitivity=sensitivity,
        noise_multiplier=noise_multiplier,
        note=note,
    )
    if column.dtype.kind == "U":
        return Categories(found, threshold, noise_std, delta)
    numbers = {int(name): count for name, count in found.items()}
    return Categories(dict(sorted(numbers.items())), threshold, noise_std, delta)


def least_threshold(noise_std: float, delta: float, max_categories: int) -> int:
    """Least whole t at which up to ``max_categories`` counts of 1 stay below t with probability 1 - ``delta``."""
    each = NormalDist().inv_cdf(delta / max_categories)
    threshold = max(math.floor(1.5 - noise_std * each) - 2, 1)
    while release_probability(threshold, noise_std, max_categories) > delta:
        threshold += 1
    return threshold


def release_probability(threshold: int, noise_std: float, categories: int) -> float:
    """Probability that any of so many categories is released that one unit alone has."""
    each = math.erfc((threshold - 1.5) / (noise_std * math.sqrt(2.0))) / 2.0
    return 1.0 if each == 1.0 else -math.expm1(categories * math.log1p(-each))


def _units_by_category(
    units: Units, column: NDArray[Any], counted: NDArray[np.bool_], most: int
) -> dict[str, int]:
    """Units that have each category, of the first ``most`` categories of each unit in the order of its rows."""
    names, code = np.unique(column[counted], return_inverse=True)
    owner = units.owner[counted]
    pairs, first = np.unique(owner * max(len(names), 1) + code, return_index=True)
    # In the order of a unit's own rows, which other units do not change.
    first = np.sort(first)
    place, _ = Units(owner[first], units.num_units).places(np.ones(len(pairs), dtype=np.bool_))
    counts = np.bincount(code[first][place < most], minlength=len(names))
    return {str(name): int(count) for name, count in zip(names, counts, strict=True) if count}
