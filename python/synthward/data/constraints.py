"""Bounds, rounding and declared constraints: counted on records, enforced on sampled rows.

How a row is repaired. First every number is clipped to its bounds and rounded to what its column holds (whole
numbers, declared decimals). Then the constraints are applied in the order declared, again and again until
nothing changes:

- `implies`: where the condition holds, the other column is set to the implied value.
- `le`: where the left value is too large, it gives way to the right one (is lowered to it, or just under it
  when strict). If that does not settle, because another constraint fixes a left value, the right values give
  way instead. A side that its bounds keep from giving way makes the other side move.

A missing value satisfies every comparison.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from synthward.engine.errors import DataError
from synthward.schema import Column, Condition, ImpliesConstraint, LeConstraint, Schema
from synthward.schema.check import bounds_of, condition_value, grid_of, le_gap


def check_constraints(schema: Schema, columns: dict[str, np.ndarray]) -> dict[str, int]:
    """Number of rows that break each declared constraint, by its name."""
    return {
        constraint.name: int(np.count_nonzero(_broken(schema, constraint, columns)))
        for constraint in schema.constraints
    }


def enforce_constraints(schema: Schema, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Brings every row within bounds, rounding and constraints; `columns` is changed and returned.

    Arrays are as `Records` holds them. Level indices are not changed but by constraints. Raises DataError
    where the constraints cannot be met together in some row (a contradiction that only some combinations of
    values show).
    """
    for column in schema.modelled:
        values = columns[column.name]
        columns[column.name] = (
            np.array(values, dtype=np.int32) if column.is_discrete else conform(column, values)
        )
    if not schema.constraints:
        return columns
    # A phase is long enough for a change to run down a chain of all constraints. Letting the left sides give
    # way brings every value below what fixed values ask; then raising right sides cannot pass it again. Later
    # phases are for rules that fire on repaired values.
    phase = len(schema.constraints) + 1
    for round_number in range(4 * phase + 1):
        changed = False
        gives_way: Literal["left", "right"] = "right" if round_number // phase % 2 else "left"
        for constraint in schema.constraints:
            broken = _broken(schema, constraint, columns)
            if not broken.any():
                continue
            changed = True
            if isinstance(constraint, LeConstraint):
                _repair_le(schema, constraint, columns, broken, gives_way)
            else:
                _set(schema, constraint.then, columns, broken)
        if not changed:
            return columns
    names = [name for name, count in check_constraints(schema, columns).items() if count]
    if names:
        raise DataError(
            f"schema {schema.name}: constraints cannot be met together in some row: {'; '.join(names)}"
        )
    return columns


def conform(column: Column, values: np.ndarray) -> np.ndarray:
    """float64 [n], new: clipped to the bounds, then rounded to what a numeric column holds. NaN stays NaN."""
    out = np.array(values, dtype=np.float64)
    np.clip(out, column.min, column.max, out=out)
    if column.is_integral:
        np.rint(out, out=out)
    elif column.decimals is not None:
        np.round(out, column.decimals, out=out)
    return out


def _broken(
    schema: Schema, constraint: LeConstraint | ImpliesConstraint, columns: dict[str, np.ndarray]
) -> np.ndarray:
    """bool [n]: rows that break the constraint."""
    if isinstance(constraint, ImpliesConstraint):
        return _holds(schema, constraint.when, columns) & ~_holds(schema, constraint.then, columns)
    left, right = columns[constraint.left], columns[constraint.right]
    with np.errstate(invalid="ignore"):
        broken = left >= right if constraint.strict else left > right
    if schema.columns[constraint.left].is_discrete:
        broken &= (left >= 0) & (right >= 0)
    return broken


def _holds(schema: Schema, condition: Condition, columns: dict[str, np.ndarray]) -> np.ndarray:
    values = columns[condition.column]
    value = condition_value(schema, condition)
    if value is None:
        return values < 0 if schema.columns[condition.column].is_discrete else np.isnan(values)
    return values == value


def _set(schema: Schema, condition: Condition, columns: dict[str, np.ndarray], rows: np.ndarray) -> None:
    value = condition_value(schema, condition)
    if value is None:
        value = -1.0 if schema.columns[condition.column].is_discrete else np.nan
    columns[condition.column][rows] = value


def _repair_le(
    schema: Schema,
    constraint: LeConstraint,
    columns: dict[str, np.ndarray],
    rows: np.ndarray,
    gives_way: Literal["left", "right"],
) -> None:
    left, right = schema.columns[constraint.left], schema.columns[constraint.right]
    gap = le_gap(left, right, constraint.strict)
    left_values = columns[left.name][rows].astype(np.float64)
    right_values = columns[right.name][rows].astype(np.float64)
    # The side that gives way moves as far as its bounds let it; the other one moves only for what is left to
    # do.
    if gives_way == "left":
        left_values = np.minimum(
            left_values, _on_grid(left, right_values - gap, up=False, strict=constraint.strict)
        )
        right_values = np.maximum(
            right_values, _on_grid(right, left_values + gap, up=True, strict=constraint.strict)
        )
    else:
        right_values = np.maximum(
            right_values, _on_grid(right, left_values + gap, up=True, strict=constraint.strict)
        )
        left_values = np.minimum(
            left_values, _on_grid(left, right_values - gap, up=False, strict=constraint.strict)
        )
    columns[left.name][rows] = left_values
    columns[right.name][rows] = right_values


def _on_grid(column: Column, values: np.ndarray, *, up: bool, strict: bool) -> np.ndarray:
    """The nearest values that the column can hold, at or above (up) or at or below, within its bounds."""
    low, high = bounds_of(column)
    grid = grid_of(column)
    if grid == 1.0 and (column.is_discrete or column.is_integral):
        values = np.ceil(values) if up else np.floor(values)
    elif grid > 0:
        assert column.decimals is not None
        rounded = np.round(values, column.decimals)
        # A strict gap is a whole step, so a rounding error of the sum or difference need not cost another
        # one.
        slack = grid * 1e-6 if strict else 0.0
        behind = rounded < values - slack if up else rounded > values + slack
        values = np.where(behind, np.round(rounded + (grid if up else -grid), column.decimals), rounded)
    return np.clip(values, low, high)
