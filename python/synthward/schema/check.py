"""Checks that reach across columns: unit, label, missing values and constraints, contradictions among them
included."""

from __future__ import annotations

import math
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING

from synthward.schema.column import Column

if TYPE_CHECKING:
    from synthward.schema.model import Condition, ImpliesConstraint, LeConstraint, Schema

# The value that a condition asks for: a level index or a number; None stands for missing.
Value = float | None


def check_schema(schema: Schema) -> None:
    """Raises ValueError (one line) for the first fault found."""
    if not schema.modelled:
        raise ValueError("no column is left to model: all are ids or excluded")
    _check_unit(schema)
    _check_label(schema)
    for column in schema.modelled:
        for level in (column.categories or ()) if column.is_discrete else ():
            if level in schema.missing_values:
                raise ValueError(
                    f"column '{column.name}': {level!r} is a category and in missing_values: choose one"
                )
    _check_constraints(schema)


def _check_unit(schema: Schema) -> None:
    if schema.unit is None:
        return
    column = schema.columns.get(schema.unit)
    if column is None:
        raise ValueError(f"unit '{schema.unit}' is not a declared column{_hint(schema.unit, schema)}")
    if column.kind != "id":
        raise ValueError(
            f"unit '{schema.unit}' has kind '{column.kind}': the unit column must have kind = \"id\""
        )
    if column.exclude:
        raise ValueError(f"unit '{schema.unit}' is excluded: remove exclude = true")
    if column.missing:
        raise ValueError(f"unit '{schema.unit}' may not be missing: remove missing = true")


def _check_label(schema: Schema) -> None:
    if schema.label is None:
        if schema.label_positive is not None:
            raise ValueError("label_positive is given without label: name the label column")
        return
    column = schema.columns.get(schema.label)
    if column is None:
        raise ValueError(f"label '{schema.label}' is not a declared column{_hint(schema.label, schema)}")
    if not column.is_modelled or not column.is_discrete:
        raise ValueError(
            f"label '{schema.label}' must be a modelled categorical, ordinal, boolean or code column"
        )
    if schema.label_positive is not None and schema.label_positive not in column.level_index:
        raise ValueError(f"label_positive {schema.label_positive!r} is not a category of '{schema.label}'")


def _hint(name: str, schema: Schema) -> str:
    from synthward.schema.load import suggest

    return suggest(name, schema.columns)


def _check_constraints(schema: Schema) -> None:
    for number, constraint in enumerate(schema.constraints, start=1):
        try:
            if constraint.kind == "le":
                _check_le(schema, constraint)
            else:
                condition_value(schema, constraint.when)
                condition_value(schema, constraint.then)
        except ValueError as error:
            raise ValueError(f"constraint {number} ({constraint.name}): {error}") from None
    _check_contradictions(schema)


def _modelled(schema: Schema, name: str) -> Column:
    column = schema.columns.get(name)
    if column is None:
        raise ValueError(f"'{name}' is not a declared column{_hint(name, schema)}")
    if not column.is_modelled:
        raise ValueError(f"'{name}' is an id or excluded, so it is not in the cohort")
    return column


def _check_le(schema: Schema, constraint: LeConstraint) -> None:
    left, right = _modelled(schema, constraint.left), _modelled(schema, constraint.right)
    if left.name == right.name:
        raise ValueError("compares a column with itself")
    numbers = all(column.kind in ("continuous", "integer") for column in (left, right))
    times = left.kind == right.kind == "datetime" and left.resolution == right.resolution
    ordered = left.kind == right.kind == "ordinal" and left.levels == right.levels
    if not (numbers or times or ordered):
        raise ValueError(
            f"cannot compare kinds '{left.kind}' and '{right.kind}': both must be numbers, "
            "datetimes of one resolution, or ordinals with the same categories"
        )
    if bounds_of(left)[0] + le_gap(left, right, constraint.strict) > bounds_of(right)[1]:
        raise ValueError("can never hold within the declared bounds")


def condition_value(schema: Schema, condition: Condition) -> Value:
    """The level index or number that a condition names, None for missing. Raises ValueError where it cannot
    be."""
    column = _modelled(schema, condition.column)
    if condition.missing:
        if not column.missing:
            raise ValueError(f"'{column.name}' may not be missing: declare missing = true")
        return None
    value = condition.equals
    if column.is_discrete:
        text = str(value).lower() if isinstance(value, bool) else str(value)
        if text not in column.level_index:
            raise ValueError(f"{text!r} is not a category of '{column.name}'")
        return float(column.level_index[text])
    if column.kind == "datetime":
        raise ValueError(
            f"'{column.name}' is a datetime: conditions on datetimes can only ask for missing = true"
        )
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a number, which '{column.name}' needs")
    low, high = bounds_of(column)
    if not low <= value <= high:
        raise ValueError(f"{value!r} is outside the bounds of '{column.name}'")
    if (column.is_integral and value != math.floor(value)) or (
        column.decimals is not None and round(value, column.decimals) != value
    ):
        raise ValueError(f"{value!r} has more decimals than '{column.name}' holds")
    return float(value)


def bounds_of(column: Column) -> tuple[float, float]:
    """Smallest and largest value: declared bounds, or level indices."""
    if column.is_discrete:
        return 0.0, len(column.levels) - 1.0
    assert column.min is not None and column.max is not None
    return column.min, column.max


def grid_of(column: Column) -> float:
    """`Column.step`, with level indices as whole numbers."""
    return 1.0 if column.is_discrete else column.step


def le_gap(left: Column, right: Column, strict: bool) -> float:
    """The least difference right - left that a comparison asks for."""
    if not strict:
        return 0.0
    # The coarser grid's step can be met exactly by both; without any grid, a gap too small to matter but not
    # zero.
    step = max(grid_of(left), grid_of(right))
    low, high = bounds_of(right)
    return step if step > 0 else max((high - low) * 1e-9, 4 * math.ulp(max(abs(low), abs(high))))


def _check_contradictions(schema: Schema) -> None:
    """Refuses constraints that pull one row two ways.

    Each rule has a single condition, so what a row must hold is the union of what its conditions imply one by
    one: looking at every pair of conditions finds every conflict between implied values, `le` chains between
    two of them included.
    """
    fault = _le_conflict(schema, {})
    if fault is not None:
        raise ValueError(f"the constraints contradict each other: {fault}")
    rules = [constraint for constraint in schema.constraints if constraint.kind == "implies"]
    for first, second in combinations_with_replacement(rules, 2):
        start: dict[str, Value] = {}
        if not _assign(start, first.when, condition_value(schema, first.when)):
            continue
        if not _assign(start, second.when, condition_value(schema, second.when)):
            continue
        fault = _propagate(schema, rules, start)
        if fault is not None:
            conditions = dict.fromkeys((str(first.when), str(second.when)))
            raise ValueError(
                f"the constraints contradict each other where {' and '.join(conditions)}: {fault}"
            )


def _assign(known: dict[str, Value], condition: Condition, value: Value) -> bool:
    """Notes a value; False where the column already has another."""
    if condition.column in known:
        return known[condition.column] == value
    known[condition.column] = value
    return True


def _propagate(schema: Schema, rules: list[ImpliesConstraint], known: dict[str, Value]) -> str | None:
    """Follows the rules from what is known; the fault met, or None."""
    changed = True
    while changed:
        changed = False
        for rule in rules:
            if rule.when.column not in known or known[rule.when.column] != condition_value(schema, rule.when):
                continue
            before = len(known)
            if not _assign(known, rule.then, condition_value(schema, rule.then)):
                return f"'{rule.then.column}' would need two values"
            changed |= len(known) > before
    return _le_conflict(schema, known)


def _le_conflict(schema: Schema, known: dict[str, Value]) -> str | None:
    """Whether the `le` chains leave some column no value, given the known ones; missing values break a
    chain."""
    comparisons = [
        constraint
        for constraint in schema.constraints
        if constraint.kind == "le"
        and not any(known.get(name, 0.0) is None for name in (constraint.left, constraint.right))
    ]
    low: dict[str, float] = {}
    high: dict[str, float] = {}
    for constraint in comparisons:
        for name in (constraint.left, constraint.right):
            value = known.get(name)
            bounds = bounds_of(schema.columns[name])
            low[name], high[name] = bounds if value is None else (value, value)
    changed = True
    for _ in range(len(low) + 1):
        changed = False
        for constraint in comparisons:
            left, right = constraint.left, constraint.right
            gap = le_gap(schema.columns[left], schema.columns[right], constraint.strict)
            changed |= low[right] < low[left] + gap or high[left] > high[right] - gap
            low[right] = max(low[right], low[left] + gap)
            high[left] = min(high[left], high[right] - gap)
    if changed:
        # Bounds that still move after as many rounds as there are columns move for ever: a cycle of strict
        # orders.
        return "the strict comparisons form a circle"
    for name in low:
        if low[name] > high[name]:
            return f"'{name}' has no value left between its bounds and its comparisons"
    return None
