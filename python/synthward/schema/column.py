"""One declared column: its kind, and the public bounds or levels of its values."""

from __future__ import annotations

import datetime as dt
import math
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator

from synthward.codes import icd9

Kind = Literal["continuous", "integer", "categorical", "ordinal", "boolean", "datetime", "code", "text", "id"]
KINDS: tuple[str, ...] = get_args(Kind)

_COMMON = frozenset({"kind", "missing", "exclude"})
#: The keys that a column of each kind may have in the TOML file.
KEYS_OF_KIND: dict[str, frozenset[str]] = {
    "continuous": _COMMON | {"min", "max", "decimals"},
    "integer": _COMMON | {"min", "max"},
    "categorical": _COMMON | {"categories", "other"},
    "ordinal": _COMMON | {"categories", "other"},
    "boolean": _COMMON | {"categories"},
    "datetime": _COMMON | {"min", "max", "format", "resolution"},
    "code": _COMMON | {"categories", "other", "system", "level"},
    "text": _COMMON,
    "id": _COMMON,
}

_EPOCH = dt.datetime(1970, 1, 1)
# Doubles hold every integer up to here; beyond it, values would change silently.
_LARGEST_INTEGER = 2.0**53
_TIME_DIRECTIVES = ("%H", "%I", "%M", "%S", "%T", "%R", "%X", "%c", "%s")


class Column(BaseModel):
    """A column as declared. Frozen; built by `load_schema`, which turns every fault into one clear line.

    Values of a discrete column are held as level indices (int32, -1 for missing), those of a numeric column
    or a datetime as float64 (NaN for missing; a datetime counts days or seconds since 1970-01-01, by
    `resolution`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    kind: Kind
    min: float | None = None
    max: float | None = None
    categories: tuple[str, ...] | None = None
    other: str | None = None
    missing: bool = False
    decimals: int | None = None
    format: str | None = None
    resolution: Literal["day", "second"] | None = None
    system: Literal["icd9"] | None = None
    level: Literal["category", "chapter"] | None = None
    exclude: bool = False

    @model_validator(mode="before")
    @classmethod
    def _from_toml(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            raise ValueError("is not a table: write [columns.NAME] with a kind")
        raw = dict(raw)
        if isinstance(raw.get("categories"), list | tuple):
            raw["categories"] = tuple(_category_text(value) for value in raw["categories"])
        if raw.get("kind") == "datetime":
            _read_datetime_bounds(raw)
        return raw

    @model_validator(mode="after")
    def _check(self) -> Column:
        if self.exclude:
            return self
        if self.kind == "text":
            raise ValueError(
                "kind 'text' is not modelled by the table generators: add exclude = true, "
                "or declare it as categorical with its categories"
            )
        if self.kind in ("continuous", "integer", "datetime"):
            self._check_bounds()
        elif self.is_discrete:
            self._check_levels()
        return self

    def _check_bounds(self) -> None:
        if self.min is None or self.max is None:
            raise ValueError(f"kind '{self.kind}' needs public bounds: give min and max")
        if not (math.isfinite(self.min) and math.isfinite(self.max)):
            raise ValueError("min and max must be finite numbers")
        if self.min >= self.max:
            raise ValueError(f"min {self.min:g} is not below max {self.max:g}: give bounds with min < max")
        if self.decimals is not None and not 0 <= self.decimals <= 12:
            raise ValueError(f"decimals = {self.decimals} is outside 0..12")
        for bound in (self.min, self.max):
            if self.is_integral and (bound != math.floor(bound) or abs(bound) > _LARGEST_INTEGER):
                raise ValueError(f"bound {bound!r} is not a whole number of at most 2**53 in size")
            if self.decimals is not None and round(bound, self.decimals) != bound:
                raise ValueError(f"bound {bound!r} has more than {self.decimals} decimals: round it")

    def _check_levels(self) -> None:
        if self.kind == "code" and self.system is not None:
            if self.categories is not None:
                raise ValueError("give either system or categories, not both")
            if self.level is None:
                raise ValueError(f'system = "{self.system}" needs level = "category" or "chapter"')
            return
        if self.level is not None:
            raise ValueError('level needs system = "icd9"')
        if self.categories is None:
            if self.kind == "boolean":
                return
            needs = "a system or categories" if self.kind == "code" else "its categories"
            raise ValueError(f"kind '{self.kind}' needs {needs}: list the public values")
        if self.kind == "boolean" and len(self.categories) != 2:
            raise ValueError("a boolean has two categories, the false one first")
        if not self.categories:
            raise ValueError("categories is empty: list the public values")
        seen: set[str] = set()
        for value in self.categories:
            if value in seen:
                raise ValueError(f"category {value!r} is listed twice: remove one")
            seen.add(value)
        for value in (*self.categories, *(() if self.other is None else (self.other,))):
            if value == "":
                raise ValueError("an empty cell means missing and cannot be a category: remove it")
            if value != value.strip():
                raise ValueError(f"category {value!r} begins or ends with a blank: remove the blank")

    @property
    def is_discrete(self) -> bool:
        """Whether values are levels (categorical, ordinal, boolean, code) rather than numbers."""
        return self.kind in ("categorical", "ordinal", "boolean", "code")

    @property
    def is_numeric(self) -> bool:
        """Whether values are float64 numbers: continuous, integer or datetime."""
        return self.kind in ("continuous", "integer", "datetime")

    @property
    def is_integral(self) -> bool:
        """Whether a numeric column holds whole numbers only (integer, datetime in days or seconds)."""
        return self.kind in ("integer", "datetime")

    @property
    def is_modelled(self) -> bool:
        """Whether generators model the column and the cohort holds it."""
        return self.kind != "id" and not self.exclude

    @property
    def step(self) -> float:
        """Distance of neighbouring values of a numeric column; 0 where any real number may be held."""
        if self.is_integral:
            return 1.0
        return 0.0 if self.decimals is None else 10.0**-self.decimals

    @cached_property
    def levels(self) -> tuple[str, ...]:
        """The values of a discrete column in order; `other`, where declared, is one of them. Else ()."""
        if not self.is_discrete or self.exclude:
            return ()
        if self.categories is not None:
            base = self.categories
        elif self.kind == "boolean":
            base = ("false", "true")
        elif self.level == "chapter":
            base = tuple(code_range for code_range, _ in icd9.CHAPTERS)
        else:
            base = icd9.categories()
        return base if self.other is None or self.other in base else (*base, self.other)

    @cached_property
    def level_index(self) -> dict[str, int]:
        """Position of each level in `levels`."""
        return {level: index for index, level in enumerate(self.levels)}

    @cached_property
    def level_groups(self) -> np.ndarray | None:
        """int64 [levels]: public group of each level (ICD-9 chapter; `other` is a group of its own), or
        None."""
        if self.system != "icd9" or self.level != "category" or self.exclude:
            return None
        groups = [icd9.chapter_of(value) for value in icd9.categories()]
        if len(self.levels) > len(groups):
            groups.append(len(icd9.CHAPTERS))
        return np.array(groups, dtype=np.int64)


def _category_text(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value


def _read_datetime_bounds(raw: dict[str, Any]) -> None:
    """Replaces date and time bounds by floats in place, and settles the resolution."""
    bounds = {key: _as_moment(key, raw[key]) for key in ("min", "max") if raw.get(key) is not None}
    if raw.get("resolution") is None:
        text = raw.get("format")
        timed = isinstance(text, str) and any(directive in text for directive in _TIME_DIRECTIVES)
        raw["resolution"] = "second" if timed or any(has_time for _, has_time in bounds.values()) else "day"
    seconds = 86400.0 if raw["resolution"] == "day" else 1.0
    for key, (moment, _) in bounds.items():
        value = (moment - _EPOCH).total_seconds() / seconds
        raw[key] = math.floor(value) * 1.0 if raw["resolution"] == "day" else value


def _as_moment(key: str, value: Any) -> tuple[dt.datetime, bool]:
    """The moment that a bound names (UTC, without zone), and whether it has a time of day."""
    if isinstance(value, str):
        try:
            value = dt.datetime.fromisoformat(value) if len(value) > 10 else dt.date.fromisoformat(value)
        except ValueError:
            raise ValueError(f"{key} = {value!r} is not a date such as 2024-01-31") from None
    if isinstance(value, dt.datetime):
        if value.tzinfo is not None:
            value = value.astimezone(dt.UTC).replace(tzinfo=None)
        return value, True
    if isinstance(value, dt.date):
        return dt.datetime(value.year, value.month, value.day), False
    raise ValueError(f"{key} = {value!r} is not a date such as 2024-01-31")
