"""Reads a schema file; every fault becomes one line that names the file, the column, the fault and its
cure."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from synthward.engine.errors import SchemaError
from synthward.schema.column import KEYS_OF_KIND, KINDS
from synthward.schema.model import Schema

_TOP_KEYS = ("version", "name", "unit", "label", "label_positive", "missing_values", "columns", "constraints")
_CONSTRAINT_KEYS = {"le": ("kind", "left", "right", "strict"), "implies": ("kind", "if", "then")}
_CONDITION_KEYS = ("column", "equals", "missing")


def load_schema(path: Path | str) -> Schema:
    """The schema declared in a TOML file. Raises SchemaError, one line, for anything wrong with it."""
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise SchemaError(
            f"{path}: no such schema file; `synthward schema DATA -o {path}` drafts one"
        ) from None
    except OSError as error:
        raise SchemaError(f"{path}: cannot read the schema: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SchemaError(f"{path}: the schema is not UTF-8 text: save it as UTF-8") from None
    return parse_schema(text, source=str(path))


def parse_schema(text: str, *, source: str = "schema") -> Schema:
    """As `load_schema`, from TOML text; `source` is what errors call it."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SchemaError(f"{source}: not valid TOML: {_one_line(str(error))}") from None
    return schema_from_dict(raw, source=source)


def schema_from_dict(raw: Mapping[str, Any], *, source: str = "schema") -> Schema:
    """As `load_schema`, from plain values as `Schema.to_dict` gives them."""
    _check_keys(raw, source)
    values = dict(raw)
    values.setdefault("name", Path(source).stem)
    values["columns"] = {
        name: ({"name": name} | column) if isinstance(column, dict) else column
        for name, column in values["columns"].items()
    }
    for key in ("missing_values", "constraints"):
        if isinstance(values.get(key), list):
            values[key] = tuple(values[key])
    try:
        return Schema.model_validate(values)
    except ValidationError as error:
        raise SchemaError(f"{source}: {_describe(error)}") from None


def _check_keys(raw: Mapping[str, Any], source: str) -> None:
    """Refuses keys that mean nothing, before pydantic sees them: a misspelt bound must not be ignored."""
    for key in raw:
        if key not in _TOP_KEYS:
            raise SchemaError(f"{source}: unknown key '{key}'{suggest(key, _TOP_KEYS)}")
    if "version" not in raw:
        raise SchemaError(f"{source}: version is missing: add version = 1")
    columns = raw.get("columns")
    if not isinstance(columns, Mapping) or not columns:
        raise SchemaError(f"{source}: no columns are declared: add [columns.NAME] tables")
    for name, column in columns.items():
        _check_column_keys(name, column, source)
    constraints = raw.get("constraints", [])
    if not isinstance(constraints, list | tuple):
        raise SchemaError(f"{source}: constraints is not a list: write [[constraints]]")
    for number, constraint in enumerate(constraints, start=1):
        _check_constraint_keys(constraint, f"{source}: constraint {number}")


def _check_column_keys(name: str, column: Any, source: str) -> None:
    where = f"{source}: column '{name}'"
    if not isinstance(column, Mapping):
        raise SchemaError(f"{where}: is not a table: write [columns.{name}] with a kind")
    kind = column.get("kind")
    if kind is None:
        raise SchemaError(f"{where}: kind is missing: one of {', '.join(KINDS)}")
    if kind not in KINDS:
        hint = suggest(kind, KINDS) if isinstance(kind, str) else ""
        raise SchemaError(f"{where}: unknown kind {kind!r}{hint or ': one of ' + ', '.join(KINDS)}")
    allowed = KEYS_OF_KIND[kind]
    every = frozenset[str]().union(*KEYS_OF_KIND.values())
    for key in column:
        if key in allowed:
            continue
        if key in every:
            raise SchemaError(f"{where}: '{key}' does not apply to kind '{kind}': remove it")
        raise SchemaError(f"{where}: unknown key '{key}'{suggest(key, sorted(allowed))}")


def _check_constraint_keys(constraint: Any, where: str) -> None:
    kind = constraint.get("kind") if isinstance(constraint, Mapping) else None
    if kind not in _CONSTRAINT_KEYS:
        raise SchemaError(f'{where}: kind is {kind!r}: write kind = "le" or kind = "implies"')
    for key in constraint:
        if key not in _CONSTRAINT_KEYS[kind]:
            raise SchemaError(f"{where}: unknown key '{key}'{suggest(key, _CONSTRAINT_KEYS[kind])}")
    for side in ("if", "then") if kind == "implies" else ():
        condition = constraint.get(side)
        if not isinstance(condition, Mapping):
            raise SchemaError(
                f"{where}: '{side}' is missing: write {side} = {{ column = ..., equals = ... }}"
            )
        for key in condition:
            if key not in _CONDITION_KEYS:
                raise SchemaError(f"{where}: unknown key '{key}' in '{side}'{suggest(key, _CONDITION_KEYS)}")


def suggest(word: str, known: Iterable[str]) -> str:
    """`: did you mean 'x'?`, or nothing where no known word is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f": did you mean '{close[0]}'?" if close else ""


def _describe(error: ValidationError) -> str:
    """The first fault of a pydantic error as one line."""
    fault = error.errors(include_url=False)[0]
    location = [part for part in fault["loc"] if part not in ("le", "implies")]
    message = fault["msg"].removeprefix("Value error, ")
    where = ""
    if len(location) >= 2 and location[0] == "columns":
        where = f"column '{location[1]}': "
        location = location[2:]
    elif len(location) >= 2 and location[0] == "constraints":
        where = f"constraint {int(location[1]) + 1}: "
        location = [part for part in location[2:] if not str(part).endswith("Constraint")]
    field = f"{location[0]}: " if location else ""
    got = "" if fault["type"] in ("value_error", "missing") else f" (got {_short(fault['input'])})"
    return _one_line(f"{where}{field}{message}{got}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(text: str) -> str:
    return " ".join(text.split())
