"""The schema of a table: columns, privacy unit, label and constraints."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from synthward.schema.column import Column

_FROZEN = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)


class Condition(BaseModel):
    """One side of an `implies` constraint: a column that equals a value, or is missing."""

    model_config = _FROZEN

    column: str
    equals: str | bool | int | float | None = None
    missing: bool = False

    @model_validator(mode="after")
    def _one_of_two(self) -> Condition:
        if (self.equals is None) == (not self.missing):
            raise ValueError(f"condition on '{self.column}': give either equals = VALUE or missing = true")
        return self

    def __str__(self) -> str:
        return f"{self.column} missing" if self.missing else f"{self.column} = {self.equals!r}"


class LeConstraint(BaseModel):
    """`left <= right` (or `<` when strict) in every row where both are present."""

    model_config = _FROZEN

    kind: Literal["le"]
    left: str
    right: str
    strict: bool = False

    @property
    def name(self) -> str:
        """How reports and errors call it."""
        return f"{self.left} {'<' if self.strict else '<='} {self.right}"


class ImpliesConstraint(BaseModel):
    """In every row where `when` holds, `then` holds. In TOML, `when` is written `if`."""

    model_config = _FROZEN

    kind: Literal["implies"]
    when: Condition = Field(alias="if")
    then: Condition

    @property
    def name(self) -> str:
        """How reports and errors call it."""
        return f"{self.when} -> {self.then}"


Constraint = Annotated[LeConstraint | ImpliesConstraint, Field(discriminator="kind")]


class Schema(BaseModel):
    """The declared schema: everything that may be known about the records without paying for it.

    Frozen. `columns` keeps the order of the file, which is the order of the columns of a cohort.
    """

    model_config = _FROZEN

    version: Literal[1]
    name: str
    unit: str | None = None
    label: str | None = None
    label_positive: str | None = None
    missing_values: tuple[str, ...] = ("",)
    columns: dict[str, Column]
    constraints: tuple[Constraint, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Schema:
        from synthward.schema.check import check_schema

        check_schema(self)
        return self

    @cached_property
    def modelled(self) -> list[Column]:
        """The columns that generators model and a cohort holds: neither ids nor excluded ones, in order."""
        return [column for column in self.columns.values() if column.is_modelled]

    def with_unit(self, unit: str | None) -> Schema:
        """The same schema with another privacy unit. Raises SchemaError where the column cannot be one."""
        from synthward.schema.load import schema_from_dict

        return schema_from_dict(self.to_dict() | {"unit": unit}, source=self.name)

    def cohort(self) -> Schema:
        """The schema of a synthetic cohort: the modelled columns alone, every row its own unit."""
        values = self.to_dict() | {"unit": None}
        names = {column.name for column in self.modelled}
        values["columns"] = {name: value for name, value in values["columns"].items() if name in names}
        from synthward.schema.load import schema_from_dict

        return schema_from_dict(values, source=self.name)

    def to_dict(self) -> dict[str, Any]:
        """The schema as plain TOML values, in canonical order; `schema_from_dict` reads it back."""
        from synthward.schema.toml import schema_to_dict

        return schema_to_dict(self)

    def to_toml(self) -> str:
        """The schema as a TOML file that `load_schema` reads back to an equal schema."""
        from synthward.schema.toml import dump_toml

        return dump_toml(self.to_dict())

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the canonical form: equal for equal schemas, whatever the file's layout."""
        text = json.dumps(self.to_dict(), ensure_ascii=False, default=str, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()
