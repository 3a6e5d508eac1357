"""Noisy tables of one and of two columns of coded values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from synthward.engine.errors import ConfigError
from synthward.engine.queries.mechanism import QueryMechanism
from synthward.engine.queries.units import Units, Weights, check_max_rows

MAX_CELLS = 1 << 26


@dataclass(frozen=True)
class Marginals:
    """Noisy tables by the names of their columns: float64 [levels] or [levels, levels of the second].

    ``noise_std`` is the standard deviation of the noise of each cell.
    """

    tables: dict[tuple[str, ...], NDArray[np.float64]]
    noise_std: float


def count_marginals(
    mechanism: QueryMechanism,
    units: Units,
    columns: Mapping[str, ArrayLike],
    levels: Mapping[str, int],
    attributes: Sequence[tuple[str, ...]],
    *,
    noise_multiplier: float,
    max_rows_per_unit: int | None = None,
    note: str = "",
) -> Marginals:
    """Counts of the levels of single columns, and of pairs of levels of two columns, in one Gaussian event.

    Args:
        columns: codes by name of the column, whole numbers [rows].
        levels: number of levels by name; public. A row with a code outside of 0 .. levels - 1 (missing: -1) is not
            counted in the tables of that column.
        attributes: names of one or two columns for each table.
        max_rows_per_unit: None: the rows of a unit that a table counts share a weight of 1. Otherwise the
            first so many of them count 1 each.
        note: for the ledger; says which tables these are by default.

    Sensitivity. Let W be 1, or ``max_rows_per_unit``, and k the number of tables. To the cells of each table a unit
    adds numbers of at least 0 that sum to at most W (`Units.weights`) and do not depend on other units. Their L2
    norm is at most their sum, so at most W, and is W where all its rows fall in one cell. The tables lie one after
    the other in the vector that is released, so the squares of their norms add up: the vector moves by at most
    sqrt(k W^2) = W sqrt(k) when the unit is added or removed, however its rows are spread.

    Raises:
        ConfigError: an attribute without levels or codes, a table of more than two columns, too many cells.
        DataError: codes that are no whole numbers, or not one for each row.
        BudgetExceededError: the ledger's target does not pay for it; nothing is answered.
    """
    check_max_rows(max_rows_per_unit)
    names = [_checked(names, levels, columns) for names in attributes]
    if not names or len(set(names)) != len(names):
        raise ConfigError("attributes: give at least one table, and none twice")
    shapes = [tuple(int(levels[name]) for name in table) for table in names]
    if sum(math.prod(shape) for shape in shapes) > MAX_CELLS:
        raise ConfigError(f"attributes: these tables have more than {MAX_CELLS} cells; ask for fewer")
    used = sorted({name for table in names for name in table})
    codes = {name: units.column(columns[name], f"column {name!r}", "iub") for name in used}
    parts: list[NDArray[np.int64]] = []
    for table, shape in zip(names, shapes, strict=True):
        cells, weights = _cells([codes[name] for name in table], shape, units, max_rows_per_unit)
        parts.append(histogram(cells, weights, math.prod(shape)))
    # The weights of both kinds are the same in all tables.
    sensitivity = weights.most * math.sqrt(len(names))
    noisy = mechanism.integer_vector(
        np.concatenate(parts),
        l2_sensitivity=sensitivity,
        noise_multiplier=noise_multiplier,
        note=note or "marginals: " + ", ".join(" x ".join(table) for table in names),
    )
    split = np.split(noisy / weights.parts, np.cumsum([len(part) for part in parts])[:-1])
    tables = {table: cells.reshape(shape) for table, shape, cells in zip(names, shapes, split, strict=True)}
    return Marginals(tables, noise_multiplier * sensitivity / weights.parts)


def histogram(cells: NDArray[np.int64], weights: Weights, size: int) -> NDArray[np.int64]:
    """Sum of the weights of the rows of each cell, int64 [size]; exact: sums stay below 2^53."""
    weighty = weights.rows > 0
    return np.bincount(cells[weighty], weights=weights.rows[weighty], minlength=size).astype(np.int64)


def _cells(
    codes: list[NDArray[Any]], shape: tuple[int, ...], units: Units, max_rows: int | None
) -> tuple[NDArray[np.int64], Weights]:
    """Cell of each row in the flattened table, and the weights of the rows whose codes are all levels."""
    counted = np.ones(units.num_rows, dtype=np.bool_)
    cells = np.zeros(units.num_rows, dtype=np.int64)
    for column, size in zip(codes, shape, strict=True):
        # Compared before they are converted: an unsigned code beyond int64 would become a negative one.
        inside = (column >= 0) & (column < size)
        counted &= inside
        cells = cells * size + np.where(inside, column, 0).astype(np.int64)
    return cells, units.weights(counted, max_rows)


def _checked(
    names: tuple[str, ...], levels: Mapping[str, int], columns: Mapping[str, ArrayLike]
) -> tuple[str, ...]:
    if isinstance(names, str) or len(names) not in (1, 2) or len(set(names)) != len(names):
        raise ConfigError(f"attributes: got {names!r}; give one name, or two different ones, in a tuple")
    for name in names:
        if name not in columns or name not in levels:
            raise ConfigError(f"attributes: {name!r} is not among the columns and their levels")
        size = levels[name]
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(f"levels of {name!r}: got {size!r}; give a whole number of at least 1")
    return tuple(names)
