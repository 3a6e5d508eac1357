"""The example of docs/queries.md runs, and what the page says of it is so."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "queries.md"


def test_the_example_runs_and_is_right(tmp_path, monkeypatch, capsys):
    from synthward.engine import KeySchedule

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # The same noise each time: what is tested here is the page.
    monkeypatch.setattr(KeySchedule, "from_os", lambda: KeySchedule.reproducible(1))
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    names: dict = {}
    exec(compile(example, str(PAGE), "exec"), names)
    names["ledger"].close()
    printed = capsys.readouterr().out
    assert abs(names["patients"].value - 5000) < 9.5 * 20
    assert names["bounds"].upper == 128.0 and names["bounds"].lower >= 16.0
    assert names["quartiles"].values[1] == pytest.approx(80.0, abs=3.0)
    assert list(names["wards"].counts) == ["medicine", "surgery"], "a few patients' ward is not found"
    assert "deaths by ward" in printed
    assert 0.0 < names["ledger"].header["target_epsilon"] <= 1.0


def test_the_page_names_every_query():
    from synthward.engine import queries

    asked = [n for n in vars(queries) if n.split("_")[0] in ("count", "find", "discover") and "_" in n]
    assert len(asked) == 6
    assert all(f"`{name}`" in PAGE.read_text() for name in asked)
