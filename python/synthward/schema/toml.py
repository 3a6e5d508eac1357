"""Writes a schema as TOML (the standard library reads TOML but does not write it)."""

from __future__ import annotations

import datetime as dt
import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from synthward.schema.column import Column
    from synthward.schema.model import Schema

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_EPOCH = dt.datetime(1970, 1, 1)
_LIST_WIDTH = 100


def schema_to_dict(schema: Schema) -> dict[str, Any]:
    """Plain values (str, int, float, bool, date, list, dict) with defaults left out."""
    head: dict[str, Any] = {"version": schema.version, "name": schema.name}
    for key in ("unit", "label", "label_positive"):
        if (value := getattr(schema, key)) is not None:
            head[key] = value
    head["missing_values"] = list(schema.missing_values)
    head["columns"] = {name: _column_to_dict(column) for name, column in schema.columns.items()}
    head["constraints"] = [
        constraint.model_dump(by_alias=True, exclude_defaults=True) for constraint in schema.constraints
    ]
    return head


def _column_to_dict(column: Column) -> dict[str, Any]:
    values = column.model_dump(exclude_defaults=True, exclude={"name"})
    for key in ("min", "max"):
        if key not in values:
            continue
        if column.kind == "integer":
            values[key] = int(values[key])
        elif column.kind == "datetime":
            values[key] = _moment(column, values[key])
    if "categories" in values:
        values["categories"] = list(values["categories"])
    return values


def _moment(column: Column, value: float) -> dt.date | dt.datetime:
    if column.resolution == "day":
        return (_EPOCH + dt.timedelta(days=value)).date()
    return _EPOCH + dt.timedelta(seconds=value)


def dump_toml(values: dict[str, Any]) -> str:
    """TOML text of `schema_to_dict`'s result."""
    lines = [
        f"{key} = {toml_value(value)}"
        for key, value in values.items()
        if key not in ("columns", "constraints") and value is not None
    ]
    for name, column in values["columns"].items():
        lines += ["", f"[columns.{toml_key(name)}]"]
        lines += [f"{key} = {toml_value(value)}" for key, value in column.items()]
    for constraint in values.get("constraints", ()):
        lines += ["", "[[constraints]]"]
        lines += [f"{key} = {toml_value(value)}" for key, value in constraint.items()]
    return "\n".join(lines) + "\n"


def toml_key(name: str) -> str:
    """A key, quoted where TOML needs it."""
    return name if _BARE_KEY.fullmatch(name) else toml_value(name)


def toml_value(value: Any) -> str:
    """One TOML value; long lists are broken over lines."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON strings are TOML basic strings, but for the delete character.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, dt.date):
        return value.isoformat()
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{toml_key(key)} = {toml_value(item)}" for key, item in value.items()) + " }"
    items = [toml_value(item) for item in value]
    flat = "[" + ", ".join(items) + "]"
    return flat if len(flat) <= _LIST_WIDTH else "[\n" + "".join(f"    {item},\n" for item in items) + "]"
