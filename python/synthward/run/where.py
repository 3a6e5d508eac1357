"""Conditions on sampled rows: ``readmitted='<30' and age>=65``, parsed against the schema."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from synthward.encoding.encoder import is_token_column, level_count, public_bounds
from synthward.engine.errors import ConfigError
from synthward.schema import Column, Schema

_TERM = re.compile(
    r"""\s*(?P<column>"[^"]+"|[\w.-]+)\s*(?P<op><=|>=|!=|==|=|<|>|\bin\b|\bis\b)\s*"""
    r"""(?P<value>\([^)]*\)|'[^']*'|"[^"]*"|[^\s'"()]+)\s*(?:\band\b|&|$)""",
    re.IGNORECASE,
)
_HINT = "write for example --where \"sex='F' and age>=65\""


@dataclass(frozen=True)
class Term:
    """One comparison: rows must satisfy ``column op value``; a missing value satisfies only ``is missing``."""

    column: Column
    op: str
    values: tuple[str, ...]

    def levels(self) -> np.ndarray | None:
        """Allowed levels of a token column, bool [levels + 1] (index 0 is missing); None for other columns."""
        if not is_token_column(self.column):
            return None
        count = level_count(self.column)
        index = np.arange(count)
        held = self._compare(index if self.column.is_discrete else index + public_bounds(self.column)[0])
        return np.concatenate([[self.op == "is"], held])

    def holds(self, values: np.ndarray) -> np.ndarray:
        """Which rows satisfy the term, bool [rows]; ``values`` as records hold them."""
        absent = values < 0 if self.column.is_discrete else np.isnan(values)
        return absent if self.op == "is" else self._compare(values) & ~absent

    def _compare(self, values: np.ndarray) -> np.ndarray:
        if self.op == "is":
            return np.zeros(len(values), dtype=bool)
        wanted = np.array([_number(self.column, v) for v in self.values])
        if self.op in ("=", "==", "in"):
            return np.isin(values, wanted)
        if self.op == "!=":
            return ~np.isin(values, wanted)
        compare = {"<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal}[self.op]
        return compare(values, wanted[0])


@dataclass(frozen=True)
class Where:
    """A conjunction of terms."""

    terms: tuple[Term, ...]

    def allowed_levels(self) -> dict[str, np.ndarray]:
        """Allowed levels per token column, the terms on one column combined."""
        allowed: dict[str, np.ndarray] = {}
        for term in self.terms:
            levels = term.levels()
            if levels is not None:
                name = term.column.name
                allowed[name] = levels & allowed[name] if name in allowed else levels
        return allowed

    def holds(self, columns: dict[str, np.ndarray]) -> np.ndarray:
        """Which rows satisfy every term."""
        held = [term.holds(columns[term.column.name]) for term in self.terms]
        return np.logical_and.reduce(held)


def parse_where(text: str, schema: Schema) -> Where:
    """Parse a condition; `ConfigError` names what is wrong with it."""
    terms, at = [], 0
    while at < len(text):
        match = _TERM.match(text, at)
        if match is None:
            raise ConfigError(f"--where: can not read {text[at:].strip()!r}; {_HINT}")
        terms.append(_term(match, schema))
        at = match.end()
    if not terms:
        raise ConfigError(f"--where: is empty; {_HINT}")
    where = Where(tuple(terms))
    for name, levels in where.allowed_levels().items():
        if not levels.any():
            raise ConfigError(f"--where: no declared value of column {name!r} satisfies it")
    return where


def _term(match: re.Match[str], schema: Schema) -> Term:
    name, op = match["column"].strip('"'), match["op"].lower()
    columns = {c.name: c for c in schema.modelled}
    if name not in columns:
        raise ConfigError(f"--where: column {name!r} is not a modelled column of the schema")
    column, raw = columns[name], match["value"]
    if op == "is":
        if raw.lower() not in ("missing", "null"):
            raise ConfigError(f"--where: after 'is' only 'missing' is understood, got {raw!r}")
        if not column.missing:
            raise ConfigError(f"--where: column {name!r} is declared without missing values")
        return Term(column, "is", ())
    listed = raw.strip("()").split(",") if raw.startswith("(") else [raw]
    values = tuple(v.strip().strip("'\"") for v in listed)
    if len(values) > 1 and op != "in":
        raise ConfigError(f"--where: a list of values needs 'in', got {op!r} for column {name!r}")
    if op in ("<", "<=", ">", ">=") and column.kind in ("categorical", "boolean", "code"):
        raise ConfigError(f"--where: column {name!r} is {column.kind} and has no order; use = or !=")
    for value in values:
        _number(column, value)
    return Term(column, op, values)


def _number(column: Column, value: str) -> float:
    """A written value as records hold it: the level's index, or the number."""
    if column.is_discrete:
        levels = list(column.levels)
        if value not in levels:
            shown = ", ".join(levels[:8]) + (", ..." if len(levels) > 8 else "")
            raise ConfigError(f"--where: {value!r} is not a value of column {column.name!r}; it has {shown}")
        return float(levels.index(value))
    if column.kind == "datetime":
        unit: Any = "s" if column.resolution == "second" else "D"
        try:
            return float(np.datetime64(value, unit).astype(np.int64))
        except ValueError:
            raise ConfigError(f"--where: {value!r} is not a date for column {column.name!r}") from None
    try:
        return float(value)
    except ValueError:
        raise ConfigError(f"--where: {value!r} is not a number for column {column.name!r}") from None
