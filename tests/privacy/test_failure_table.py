"""The tables of known failures in docs/privacy.md name tests that are there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEADING = "## Known failures, and the test that catches each"
HEADER = ["failure", "here", "test"]
NAME = re.compile(r"`(tests/[a-z0-9_/]+\.py)::(test_[a-z0-9_]+)`")


def rows_of(page: str) -> list[list[str]]:
    """Cells of each row of the tables under the heading."""
    section = page.split(HEADING, 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row != HEADER]


@cache
def functions(file: str) -> frozenset[str]:
    path = ROOT / file
    if not path.is_file():
        return frozenset()
    return frozenset(x.name for x in ast.parse(path.read_text()).body if isinstance(x, ast.FunctionDef))


def faults(page: str) -> list[str]:
    """What is wrong with the rows, in words."""
    found, seen = [], set()
    for row in rows_of(page):
        if len(row) != 3 or not all(row):
            found.append(f"{row[0]}: not three cells")
            continue
        named = NAME.findall(row[2])
        if row[0] in seen:
            found.append(f"{row[0]}: twice")
        if not named or NAME.sub("", row[2]).replace("<br>", ""):
            found.append(f"{row[0]}: no test, or something else beside it")
        found += [f"{row[0]}: no {file}::{name}" for file, name in named if name not in functions(file)]
        seen.add(row[0])
    return found


PAGE = (ROOT / "docs" / "privacy.md").read_text()


def test_every_failure_has_a_test_that_exists():
    assert faults(PAGE) == []
    assert len(rows_of(PAGE)) >= 90


@pytest.mark.parametrize(
    ("last", "mention"),
    [
        ("`tests/privacy/test_noise.py::test_of_nothing`", "no tests/privacy/test_noise.py::test_of_nothing"),
        ("`tests/privacy/test_nothing.py::test_a`", "no tests/privacy/test_nothing.py::test_a"),
        ("some day", "no test"),
        ("", "not three cells"),
    ],
)
def test_a_row_without_its_test_is_noticed(last, mention):
    [found] = faults(
        f"{HEADING}\n\n| failure | here | test |\n|---|---|---|\n| f | h | {last} |\n\n## Next\n"
    )
    assert mention in found
