"""A report for release does not change when the real records do: HTML, JSON and what the command prints.

The command is run on one run folder with records D and with neighbours of D (and with quite other records); every
output has to be equal byte for byte, but for the time. The custodian's report has to differ, or the test sees nothing.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
from pathlib import Path

import matplotlib.figure
import pytest

from synthward.cli import main
from synthward.engine.errors import PrivacyError
from synthward.evaluate import evaluate_records
from synthward.evaluate.result import CUSTODIAN_ONLY, RELEASABLE_ROWS
from synthward.report import BADGE, read_facts, render_report, save_overview_png
from synthward.report.documents import PrivacyDocuments
from tests.invented import make_records, make_schema
from tests.report.runs import make_run
from tests.tinydata import COLUMNS, table, write_csv

MADE_COLUMNS = tuple(name for name in COLUMNS if name != "patient")
WITHHELD = {"name": "guesses of members", "lower_bound": 0.71, "passed": True, "from_records": True}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A run folder with an audit, a cohort, and three sets of records: D, D without one patient, others."""
    folder = tmp_path_factory.mktemp("desk")
    run = make_run(folder / "run")
    (run / "audit.json").write_text(json.dumps({"delta": 1e-6, "claimed_epsilon": 3.0, "checks": [WITHHELD]}))
    write_csv(run / "cohort.csv", table(RELEASABLE_ROWS + 17, RELEASABLE_ROWS + 17, seed=5), MADE_COLUMNS)
    rows = table(211, 331)
    write_csv(folder / "d.csv", rows)
    write_csv(folder / "neighbour.csv", [row for row in rows if row["patient"] != "p00007"])
    write_csv(folder / "others.csv", table(97, 101, seed=9))
    return folder


def evaluate(desk: Path, records: str, *options: str) -> dict[str, str]:
    """Every output of one `synthward evaluate`, times taken out."""
    out, documents = desk / "report.html", desk / "report.privacy.json"
    arguments = ["evaluate", desk / "run", "--real", desk / records, "--out", out, "--json", "--overwrite"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main([str(a) for a in (*arguments, "--synthetic", desk / "run" / "cohort.csv", *options)]) == 0
    assert sorted(p.name for p in desk.glob("report*")) == [out.name, documents.name]
    PrivacyDocuments.model_validate_json(documents.read_text(encoding="utf-8"))
    return {
        "html": re.sub(r"Written \S+ by", "Written by", out.read_text(encoding="utf-8")),
        "json": undated(documents),
        "printed": re.sub(r'"seconds": [0-9.]+', '"seconds": 0', printed.getvalue()),
    }


def undated(documents: Path) -> str:
    return re.sub(r'"written": *"[^"]*"', "", documents.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def released(desk):
    return {name: evaluate(desk, name, "--releasable") for name in ("d.csv", "neighbour.csv", "others.csv")}


@pytest.fixture(scope="module")
def kept(desk):
    return {name: evaluate(desk, name) for name in ("d.csv", "neighbour.csv")}


def test_what_is_released_is_the_same_for_neighbours_and_for_all_others(released):
    first = released["d.csv"]
    assert released["neighbour.csv"] == first and released["others.csv"] == first
    shown = first["html"].count("shares in synthetic rows")
    assert shown == len(MADE_COLUMNS), "there is something to compare"
    assert BADGE not in first["html"].replace("&#39;", "'") and WITHHELD["name"] not in first["html"]
    assert "custodian_only" not in first["printed"] and "summary" not in first["printed"]


def sections(page: str) -> dict[str, tuple[bool, str]]:
    """Sections of a page by id: whether it is marked as the custodian's, and its body."""
    found = re.findall(r'<section id="([\w-]+)"( class="real")?>(.*?)</section>', page, re.DOTALL)
    return {name: (bool(real), body.replace("&#39;", "'")) for name, real, body in found}


def test_the_custodians_report_differs_and_says_whose_it_is(kept):
    first, other = kept["d.csv"], kept["neighbour.csv"]
    assert first["html"] != other["html"] and first["printed"] != other["printed"]
    assert first["json"] == other["json"], "the documents never come from the records"
    assert json.loads(first["printed"])["custodian_only"] is True
    of_first, of_other = sections(first["html"]), sections(other["html"])
    for name, (real, body) in of_first.items():
        assert (BADGE in body) == real
        assert real or of_other[name][1] == body, f"{name} tells of the records without saying so"
    assert WITHHELD["name"] in of_first["audit"][1]


def test_pictures_in_a_released_report_hold_synthetic_shares_only(released):
    html = released["d.csv"]["html"]
    pictures = re.findall(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", html)
    drawn = [base64.b64decode(picture).decode() for picture in pictures]
    assert len(drawn) == len(MADE_COLUMNS) + 1, "one for each column, and epsilon over the steps"
    assert "image/png" not in html
    for text in drawn:
        assert ">train<" not in text and "held-out" not in text


def test_statement_command_gives_what_the_report_releases(desk, released, capsys):
    out = desk / "alone.json"
    assert main(["statement", str(desk / "run"), "--out", str(out), "--overwrite"]) == 0
    assert undated(out) == released["d.csv"]["json"]
    capsys.readouterr()
    assert main(["statement", str(desk / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_text(encoding="utf-8"))
    page = desk / "alone.html"
    assert main(["statement", str(desk / "run"), "--out", str(page), "--overwrite"]) == 0
    assert WITHHELD["name"] not in page.read_text(encoding="utf-8")
    assert main(["statement", str(desk / "run")]) == 0
    assert "PRIVACY PARAMETERS" in capsys.readouterr().out


def test_statement_command_refuses_in_one_line(desk, capsys, tmp_path):
    for arguments in (
        ("--out", tmp_path / "s.txt"),
        ("--out", tmp_path),
        ("--out", tmp_path / "no" / "s.html"),
    ):
        assert main(["statement", str(desk / "run"), *map(str, arguments)]) == 2
    assert main(["statement", str(tmp_path)]) == 2
    (tmp_path / "mine.json").write_text("mine")
    assert main(["statement", str(desk / "run"), "--out", str(tmp_path / "mine.json")]) == 2
    assert (tmp_path / "mine.json").read_text() == "mine"
    assert capsys.readouterr().err.count("synthward: error:") == 5


def test_documents_beside_a_report_are_not_replaced_unasked(desk, capsys, tmp_path):
    (tmp_path / "r.privacy.json").write_text("mine")
    arguments = ["evaluate", desk / "run", "--real", desk / "d.csv", "--out", tmp_path / "r.html"]
    assert main([str(a) for a in arguments]) == 2
    assert "r.privacy.json" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["r.privacy.json"]


@pytest.fixture(scope="module")
def result():
    schema = make_schema()
    privacy = {"epsilon": 3.0, "delta": 1e-6, "unit": "patient", "private": True}
    records = [make_records(schema, 400, seed) for seed in (1, 2, 3)]
    return evaluate_records(schema, *records, privacy=privacy, settings={}, epsilon_curve=[])


def test_a_seeded_run_is_not_released_whatever_its_caller_says(result, tmp_path):
    facts = read_facts(make_run(tmp_path / "run", private=False))
    assert result.is_private
    with pytest.raises(PrivacyError, match="not private"):
        render_report(result, tmp_path / "r.html", facts=facts, releasable=True)
    text = render_report(result, tmp_path / "r.html", facts=facts).read_text(encoding="utf-8")
    assert "not private" in text and "differentially private for every" not in text


def test_pictures_and_json_of_an_evaluation_say_whose_they_are(result, tmp_path, monkeypatch):
    assert json.loads(result.to_json())["notice"] == CUSTODIAN_ONLY
    drawn: list[str] = []
    saved = matplotlib.figure.Figure.savefig

    def keep(figure, *args, **kwargs):
        drawn.extend(text.get_text() for text in figure.findobj(matplotlib.text.Text))
        return saved(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    save_overview_png(result, tmp_path / "overview.png")
    assert CUSTODIAN_ONLY in drawn
