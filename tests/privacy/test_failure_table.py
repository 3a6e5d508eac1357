"""The table of known failures in docs/privacy.md names tests that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEADING = "## Known failures, and the test that catches each"


def table() -> list[list[str]]:
    """Cells of each row of the table."""
    page = (ROOT / "docs" / "privacy.md").read_text()
    section = page.split(HEADING, 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_failure_has_a_test_that_exists():
    rows = table()
    assert len(rows) >= 40
    assert len({row[0] for row in rows}) == len(rows)
    for failure, _, tests in rows:
        named = re.findall(r"`(tests/[a-z0-9_/]+\.py)::(test_[a-z0-9_]+)`", tests)
        assert named, f"{failure}: no test"
        for file, name in named:
            assert (ROOT / file).is_file(), f"{failure}: {file} is not there"
            assert name in functions(ROOT / file), f"{failure}: {file} has no {name}"
