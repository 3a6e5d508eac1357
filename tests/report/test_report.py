"""The report stands alone, marks what it must, and releases nothing that was computed from real records."""

from __future__ import annotations

import dataclasses
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest

from synthward.engine.errors import OutputError, PrivacyError
from synthward.evaluate import evaluate_records
from synthward.report import BADGE, NOT_PRIVATE, facts_of_result, render_report, save_overview_png
from synthward.report.numbers import format_epsilon
from synthward.report.settings import settings_table
from synthward.report.statement import write_statement
from tests.invented import as_records, make_records, make_schema

SCHEMA = make_schema()
TRAIN_ROWS, HOLDOUT_ROWS, MADE_ROWS = 6318, 3274, 6422
PRIVACY = {
    "epsilon": 3.0,
    "delta": 1e-6,
    "unit": "patient",
    "private": True,
    "accountant": "pld",
    "target_epsilon": 3.0,
}
SETTINGS = {
    "generator": "diffusion",
    "steps": 1234,
    "data": "/ward/records.csv",
    "holdout_salt": "tell-nobody",
    "holdout_fraction": 0.2,
    "plan": {"max_grad_norm": 0.75, "train_rows": 6318},
    "model": {"width": 96},
    "loss_history": {"last": 0.123321},
}


class Page(HTMLParser):
    """Tags, what they load, headings and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.images_without_alt = 0
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        given = dict(attrs)
        self.loads += [v for k, v in attrs if k in ("src", "srcset", "data", "poster", "action") and v]
        if tag == "link":
            self.loads.append(given.get("href") or "")
        if tag == "img" and not given.get("alt"):
            self.images_without_alt += 1

    def handle_data(self, data):
        if self.tags and self.tags[-1] != "style":
            self.text += data


@pytest.fixture(scope="module")
def result():
    return evaluate_records(
        SCHEMA,
        make_records(SCHEMA, TRAIN_ROWS, 1),
        make_records(SCHEMA, HOLDOUT_ROWS, 2),
        make_records(SCHEMA, MADE_ROWS, 3),
        privacy=PRIVACY,
        settings=SETTINGS,
        epsilon_curve=[(0, 0.0), (600, 2.1), (1234, 3.0)],
    )


def render(result, folder: Path, **options) -> str:
    return render_report(result, folder / "report.html", **options).read_text(encoding="utf-8")


@pytest.mark.parametrize("releasable", [False, True])
def test_nothing_is_loaded_from_elsewhere(result, tmp_path, releasable):
    text = render(result, tmp_path, releasable=releasable)
    page = Page(text)
    assert page.loads and all(load.startswith("data:image/") for load in page.loads)
    assert not re.search(r"https?://|@import|url\(", text)
    assert "script" not in page.tags
    assert page.images_without_alt == 0
    assert len(text) < 3_000_000


def test_sections_of_real_records_carry_the_badge(result, tmp_path):
    text = render(result, tmp_path)
    sections = re.findall(r'<section id="([\w-]+)"( class="real")?>(.*?)</section>', text, re.DOTALL)
    marked = {name for name, real, _ in sections if real}
    assert marked == {"summary", "utility", "marginals", "pairs", "copies", "ingest"}
    assert {name for name, _, _ in sections} - marked == {"privacy", "model-card", "datasheet", "settings"}
    for _, real, body in sections:
        assert (BADGE in body.replace("&#39;", "'")) == bool(real)


def test_the_report_shows_what_it_must(result, tmp_path):
    page = Page(render(result, tmp_path))
    found = result.comparison
    for text in (
        "3", "1e-06", "patient", "add or remove one", "20.1 times", "1 in 1,000,000", "95.3 %",
        "PLD", "declared schema", "keyed hash", f"{found.pairs.mean:.3f}", f"{found.pairs_floor.mean:.3f}",
        f"{found.utility.models[0].tstr.value:.3f}", f"{found.utility.models[1].trtr.value:.3f}",
        "sex = female", "not a measure of privacy", "731", "913", "max_grad_norm", "tell-nobody",
    ):  # fmt: skip
        assert text in page.text, text


def test_a_released_report_holds_nothing_of_the_real_records(result, tmp_path):
    text = render(result, tmp_path, releasable=True)
    page = Page(text)
    assert 'class="real"' not in text and BADGE not in text.replace("&#39;", "'")
    found = result.comparison
    numbers = [n for n in found.sizes.values()] + [731, 913]
    telling = [str(n) for n in numbers] + [f"{n:,}" for n in numbers]
    telling += ["tell-nobody", "/ward/", "loss_history", "0.123", "train_rows", "held-out 0", "TSTR"]
    telling += [f"{x:.3f}" for x in (found.pairs.mean, found.pairs.maximum, found.copies.synthetic_in_train)]
    telling += [f"{m.tstr.value:.3f}" for m in found.utility.models]
    telling.remove("0.000")
    body = page.text + " ".join(re.findall(r'alt="([^"]*)"', text))
    assert [word for word in telling if word in body] == []
    assert "width" in page.text and "1234" in page.text and "0.75" in page.text
    assert text.count("shares in synthetic rows") == len(SCHEMA.modelled)


def test_a_released_report_does_not_change_when_the_real_records_do(result, tmp_path):
    """The strongest form: everything computed from real records may be replaced without a trace."""
    other = evaluate_records(
        SCHEMA,
        make_records(SCHEMA, 200, 11, link=0.0),
        None,
        make_records(SCHEMA, MADE_ROWS, 3),
        privacy=PRIVACY,
        settings=SETTINGS | {"data": "/elsewhere", "plan": {"max_grad_norm": 0.75, "train_rows": 200}},
        epsilon_curve=result.epsilon_curve,
    )
    first, second = (render(r, tmp_path, releasable=True, overwrite=True) for r in (result, other))
    assert re.sub(r"Written \S+", "", first) == re.sub(r"Written \S+", "", second)
    assert render(result, tmp_path, overwrite=True) != render(other, tmp_path, overwrite=True)


@pytest.mark.parametrize("said", [{"private": False, "seed": 77}, {"epsilon": math.inf}])
def test_a_run_that_is_not_private_says_so_and_is_not_released(result, tmp_path, said):
    loose = dataclasses.replace(result, privacy=PRIVACY | said)
    text = render(loose, tmp_path)
    assert re.search(rf'class="banner red" role="alert">{NOT_PRIVATE}', text, re.IGNORECASE)
    assert "differentially private for every" not in text
    assert "banner red" not in re.sub(r"<style>.*</style>", "", render(result, tmp_path, overwrite=True))
    with pytest.raises(PrivacyError, match="not private"):
        render_report(loose, tmp_path / "released.html", releasable=True)
    assert not (tmp_path / "released.html").exists()


def test_an_existing_file_is_kept_unless_overwriting_is_asked_for(result, tmp_path):
    out = tmp_path / "report.html"
    out.write_text("mine")
    for write in (render_report, save_overview_png):
        with pytest.raises(OutputError, match="exists"):
            write(result, out)
    assert out.read_text() == "mine"
    render_report(result, out, overwrite=True)
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(OutputError, match="does not exist"):
        render_report(result, tmp_path / "no" / "report.html")
    with pytest.raises(OutputError, match="folder"):
        render_report(result, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_failed_write_leaves_nothing_behind(result, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        render_report(result, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_names_and_levels_are_text_never_markup_or_mathematics(tmp_path):
    schema = make_schema(
        {
            "<b>cost</b> $x_{": {
                "kind": "categorical",
                "categories": ["$\\frac{", "<script>", "日本語", "& co"],
            },
            "n": {"kind": "boolean"},
        }
    )
    records = as_records(schema, {"<b>cost</b> $x_{": [0, 1, 2, 3], "n": [0, 1, 1, 0]})
    result = evaluate_records(
        schema, records, records, records, privacy=PRIVACY, settings={"<i>": "<i>"}, epsilon_curve=[]
    )
    text = render(result, tmp_path)
    page = Page(text)
    assert not {"script", "i"} & set(page.tags)
    assert "<b>cost" not in text
    assert "<b>cost</b> $x_{" in page.text


def test_small_and_odd_results_render(tmp_path):
    levels = [f"level {k}" for k in range(10_000)]
    schema = make_schema(
        {
            "many": {"kind": "categorical", "categories": levels, "missing": True},
            "flat": {"kind": "continuous", "min": 0.0, "max": 1.0, "missing": True},
        }
    )
    one = as_records(schema, {"many": [-1], "flat": [math.nan]})
    result = evaluate_records(schema, one, None, one, privacy={}, settings={}, epsilon_curve=[])
    text = render(result, tmp_path)
    assert "declares no label" not in text and "no held-out records" in text
    assert save_overview_png(result, tmp_path / "overview.png").read_bytes().startswith(b"\x89PNG")
    single = make_schema({"p": {"kind": "boolean"}})
    records = as_records(single, {"p": [0, 1]})
    result = evaluate_records(
        single, records, records, records, privacy=PRIVACY, settings={}, epsilon_curve=[(1, 3.0)]
    )
    assert "one column only" in render(result, tmp_path, overwrite=True)


def test_plots_leave_matplotlib_as_it_was(result, tmp_path):
    before = dict(matplotlib.rcParams)
    path = save_overview_png(result, tmp_path / "overview.png")
    render(result, tmp_path)
    assert dict(matplotlib.rcParams) == before
    assert 20_000 < path.stat().st_size < 1_000_000


def test_the_statement_never_understates(result):
    assert format_epsilon(2.99912) == "3"
    assert format_epsilon(3.00001) == "3.001"
    assert format_epsilon(3.0000000000000004) == "3"
    assert format_epsilon(math.inf) == "infinite"
    row = dataclasses.replace(result, privacy=PRIVACY | {"unit": None, "epsilon": 1.0, "delta": 3e-6})
    statement = write_statement(facts_of_result(row))
    text = " ".join(statement.sections[0].paragraphs)
    assert "2.72 times" in text and "1 in 333,333" in text and "73.2 %" in text
    assert "row" in statement.headline
    replaced = dataclasses.replace(
        result, privacy=PRIVACY | {"relation": "replace_one", "assumptions": ["Yes."]}
    )
    statement = write_statement(facts_of_result(replaced))
    assert "in their place" in statement.sections[0].paragraphs[0]
    assert any("replace one" in fact.value for fact in statement.sections[1].table)
    assert statement.assumptions[-1] == "Yes."
    assert not any("is treated as private" in text for text in statement.assumptions)


def test_released_settings_are_those_known_to_be_choices():
    kept = dict(settings_table(SETTINGS | {"surprise": 1}, releasable=True))
    assert kept == {
        "generator": "diffusion",
        "steps": "1234",
        "plan.max_grad_norm": "0.75",
        "model.width": "96",
        "holdout_fraction": "0.2",
    }
    everything = dict(settings_table(SETTINGS, releasable=False))
    assert everything["plan.train_rows"] == "6318"
    assert everything["holdout_salt"] == "tell-nobody"


def test_a_long_list_among_the_settings_is_cut():
    [(_, text)] = settings_table({"taps": [0.5] * 400}, releasable=False)
    assert len(text) < 200 and "400 in all" in text
