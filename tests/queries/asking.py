"""Helpers: tables of units, mechanisms without a file, and all queries by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from synthward.engine import KeySchedule, QueryMechanism
from synthward.engine.queries import (
    Units,
    count_marginals,
    count_rows,
    count_units,
    discover_categories,
    find_bounds,
    find_quantiles,
)

EDGES = np.array([-10.0, -1.0, 0.0, 0.5, 3.0, 7.0, 100.0])
SPECIAL = (0.0, -0.0, np.inf, -np.inf, np.nan, 1e308, -1e308, 5e-324, 2.0**40, -(2.0**-20), 1.0)


class ListLedger:
    """Keeps what is charged."""

    def __init__(self) -> None:
        self.charged: list[tuple[Any, str]] = []

    def append_event(self, event, *, note):
        self.charged.append((event, note))

    @property
    def events(self):
        return [event for event, _ in self.charged]


def mechanism(seed: int | None = 5, ledger=None) -> QueryMechanism:
    """With keys from a seed, or from the operating system for None."""
    keys = KeySchedule.from_os() if seed is None else KeySchedule.reproducible(seed)
    return QueryMechanism(ListLedger() if ledger is None else ledger, keys)


@dataclass(frozen=True)
class Rows:
    """A table: the unit of each row, and its columns."""

    ids: np.ndarray
    small: np.ndarray
    big: np.ndarray
    number: np.ndarray
    where: np.ndarray

    def without(self, unit: int) -> Rows:
        kept = self.ids != unit
        return Rows(*(getattr(self, name)[kept] for name in self.__dataclass_fields__))


def rows(ids, small, big, number, where) -> Rows:
    return Rows(
        np.array(ids, dtype=np.int64),
        np.array(small, dtype=np.int64),
        np.array(big, dtype=np.int64),
        np.array(number, dtype=np.float64),
        np.array(where, dtype=bool),
    )


NUMBERS = st.one_of(st.sampled_from(SPECIAL), st.floats(-20, 120))
ROW = st.tuples(st.integers(0, 5), st.integers(-2, 4), st.integers(0, 40), NUMBERS, st.booleans())
TABLES = st.lists(ROW, max_size=40).map(
    lambda found: rows(*(zip(*found, strict=True) if found else [[]] * 5))
)

Query = Callable[[QueryMechanism, Rows, float], Any]
LEVELS = {"small": 3, "big": 40}
PAIRS = [("small",), ("big",), ("small", "big")]


def _marginals(most: int | None) -> Query:
    def ask(asked, table, noise):
        columns = {"small": table.small, "big": table.big}
        return count_marginals(
            asked,
            Units.from_ids(table.ids),
            columns,
            LEVELS,
            PAIRS,
            noise_multiplier=noise,
            max_rows_per_unit=most,
        )

    return ask


def _discovery(most: int) -> Query:
    def ask(asked, table, noise):
        return discover_categories(
            asked,
            Units.from_ids(table.ids),
            table.big,
            noise_multiplier=noise,
            delta=0.2,
            max_categories_per_unit=most,
            where=table.where,
        )

    return ask


QUERIES: dict[str, Query] = {
    "units": lambda m, t, s: count_units(m, Units.from_ids(t.ids), noise_multiplier=s),
    "units where": lambda m, t, s: count_units(m, Units.from_ids(t.ids), noise_multiplier=s, where=t.where),
    "rows": lambda m, t, s: count_rows(m, Units.from_ids(t.ids), noise_multiplier=s, max_rows_per_unit=3),
    "rows where": lambda m, t, s: count_rows(
        m, Units.from_ids(t.ids), noise_multiplier=s, max_rows_per_unit=2, where=t.where
    ),
    "marginals": _marginals(None),
    "marginals, rows capped": _marginals(2),
    "bounds": lambda m, t, s: find_bounds(
        m, Units.from_ids(t.ids), t.number, noise_multiplier=s, where=t.where
    ),
    "quantiles": lambda m, t, s: find_quantiles(
        m, Units.from_ids(t.ids), t.number, [0.0, 0.3, 1.0], edges=EDGES, noise_multiplier=s
    ),
    "categories": _discovery(1),
    "categories, several": _discovery(3),
}
