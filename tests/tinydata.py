"""A tiny table of invented patients with one column of each kind, and the ways to spoil it.

`table()` is a list of rows (dicts of strings, as a CSV reader gives them); the schema declares exactly these
columns. Everything is a pure function of the arguments, so that a test can name the cell it spoils.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

COLUMNS = (
    "patient",
    "age",
    "weight",
    "sex",
    "stage",
    "smoker",
    "pregnant",
    "visited",
    "first",
    "last",
    "outcome",
)
STAGES = ("I", "II", "III", "IV")

SCHEMA = """
version = 1
name = "tiny"
unit = "patient"
label = "outcome"
label_positive = "died"
missing_values = ["", "?"]

[columns.patient]
kind = "id"

[columns.age]
kind = "integer"
min = 0
max = 100

[columns.weight]
kind = "continuous"
min = 30.0
max = 180.0
decimals = 1
missing = true

[columns.sex]
kind = "categorical"
categories = ["F", "M"]

[columns.stage]
kind = "ordinal"
categories = ["I", "II", "III", "IV"]
missing = true

[columns.smoker]
kind = "boolean"

[columns.pregnant]
kind = "boolean"

[columns.visited]
kind = "datetime"
min = "2020-01-01"
max = "2023-12-31"
format = "%Y-%m-%d"

[columns.first]
kind = "integer"
min = 0
max = 60

[columns.last]
kind = "integer"
min = 0
max = 60

[columns.outcome]
kind = "categorical"
categories = ["alive", "died"]

[[constraints]]
kind = "le"
left = "first"
right = "last"

[[constraints]]
kind = "implies"
if = { column = "sex", equals = "M" }
then = { column = "pregnant", equals = "false" }
"""


def table(patients: int = 120, rows: int | None = None, seed: int = 0) -> list[dict[str, str]]:
    """`rows` visits (default: 1.5 a patient) of `patients` patients, about a fifth of the weights missing."""
    generator = np.random.default_rng(seed)
    rows = rows if rows is not None else patients + patients // 2
    owners = np.concatenate([np.arange(patients), generator.integers(0, patients, rows - patients)])
    return [_visit(generator, int(owner)) for owner in owners]


def _visit(generator: np.random.Generator, owner: int) -> dict[str, str]:
    """One row: age drives weight, stage and outcome, so that there is something to learn."""
    age = int(generator.integers(18, 95))
    sex = "FM"[int(generator.integers(2))]
    stage = STAGES[min(3, int(age / 30 + generator.integers(2)))]
    first = int(generator.integers(0, 40))
    died = generator.random() < (0.6 if stage in ("III", "IV") else 0.1)
    date = np.datetime64("2020-01-01") + int(generator.integers(1460))
    return {
        "patient": f"p{owner:05d}",
        "age": str(age),
        "weight": "" if generator.random() < 0.2 else f"{60 + age * 0.2 + generator.normal(0, 8):.1f}",
        "sex": sex,
        "stage": "" if generator.random() < 0.05 else stage,
        "smoker": "true" if generator.random() < 0.3 else "false",
        "pregnant": "true" if sex == "F" and age < 45 and generator.random() < 0.2 else "false",
        "visited": str(date),
        "first": str(first),
        "last": str(first + int(generator.integers(0, 20))),
        "outcome": "died" if died else "alive",
    }


def write_csv(path: Path, rows: list[dict[str, str]], columns: tuple[str, ...] = COLUMNS) -> Path:
    """Writes the rows with a header; cells of columns that are not listed are left out."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_tiny(
    folder: Path, patients: int = 120, rows: int | None = None, seed: int = 0
) -> tuple[Path, Path]:
    """data.csv and schema.toml in `folder`."""
    schema = folder / "schema.toml"
    schema.write_text(SCHEMA)
    return write_csv(folder / "data.csv", table(patients, rows)), schema


def only_columns(schema_text: str, keep: tuple[str, ...]) -> str:
    """The schema without its constraints and without the columns that are not in `keep`."""
    head, *blocks = schema_text.split("\n[columns.")
    blocks = [b.split("\n[[")[0] for b in blocks if b.split("]")[0] in keep]
    return head + "".join("\n[columns." + b for b in blocks)
