"""A small cohort in parts, written by hand: what tests of datasets begin with."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np

from synthward.data import DatasetWriter, Layout, to_arrow
from synthward.schema.load import parse_schema

SCHEMA_TEXT = """
version = 1
name = "tiny"
[columns.n]
kind = "integer"
min = 0
max = 100000
[columns.c]
kind = "categorical"
categories = ["a", "b", "c", "never"]
missing = true
[columns.x]
kind = "continuous"
min = 0.0
max = 1.0
missing = true
[columns.day]
kind = "datetime"
min = "2020-01-01"
max = "2023-12-31"
format = "%Y-%m-%d"
[columns.at]
kind = "datetime"
min = "2020-01-01 00:00"
max = "2023-12-31 00:00"
format = "%Y-%m-%d %H:%M"
[columns.yes]
kind = "boolean"
"""
SCHEMA = parse_schema(SCHEMA_TEXT)
CHUNK = 50
LAYOUT = Layout(430, 2 * CHUNK)
FACTS = {
    **{"run_id": "run-1", "epsilon": 3.0, "delta": 1e-6, "unit": "patient", "private": True},
    "where": None,
}
SEED = 7


def columns(first: int, rows: int, seed: int = SEED) -> dict[str, np.ndarray]:
    """Rows by their global numbers and the seed. The last part has no category "a" and "b"."""
    numbers = np.arange(first, first + rows)
    return {
        "n": numbers.astype(np.float64),
        "c": np.where(numbers < 400, (numbers + seed) % 4 - 1, 2).astype(np.int32),
        "x": np.where(numbers % 7 == 0, np.nan, (numbers * seed % 11) / 11),
        "day": 18_300.0 + numbers,
        "at": 1.6e9 + 60.0 * numbers,
        "yes": (numbers % 2).astype(np.int32),
    }


def batches(part: int, seed: int = SEED, layout: Layout = LAYOUT):
    first, left = layout.first_row(part), layout.rows_of(part)
    while left:
        rows = min(CHUNK, left)
        yield to_arrow(SCHEMA, columns(first, rows, seed))
        first, left = first + rows, left - rows


def begin(path: Path, **options) -> DatasetWriter:
    asked = {"layout": LAYOUT, "request": {"rows": 430}, "facts": FACTS, "seed": SEED} | options
    return DatasetWriter.begin(path, SCHEMA, **asked)


def write(path: Path, writers: int = 1, **options) -> Path:
    """The whole of it, by some writers that share the parts out."""
    with begin(path, **options) as first:
        job = pickle.loads(pickle.dumps(first.job))
        if job.is_finished:
            return path
        others = [DatasetWriter(path, SCHEMA, job) for _ in range(writers - 1)]
        records = []
        for part in range(LAYOUT.parts):
            writer = [first, *others][part % writers]
            kept = writer.verify(part) if part in job.present else None
            records.append(kept or writer.write(part, batches(part, job.seed)))
        first.finish(records)
        for writer in others:
            writer.close()
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def staging(path: Path) -> Path:
    return path.with_name(path.name + ".parts")
