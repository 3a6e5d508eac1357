"""`synthward audit`: what it writes, where figures from records may go, and when it fails."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from synthward.audit import law, whitebox
from synthward.cli import main
from synthward.engine.accounting import epsilon_of
from tests.commandline import ACCOUNTANT
from tests.tinydata import write_tiny

WHITE_BOX = ["plan of the ledger", "law of the noise", "canaries in every step", "sampled canaries"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """data.csv and a finished run of 20 steps."""
    from synthward.run import FitOptions, fit_run
    from synthward.schema import load_schema

    folder = tmp_path_factory.mktemp("audited")
    data, schema = write_tiny(folder, 120)
    options = FitOptions(accountant=ACCOUNTANT, steps=20, settings={"hidden": 16})
    fit_run(data, load_schema(schema), epsilon=3.0, delta=1e-5, out=folder / "run", options=options)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Fewer coordinates and canaries: what is tested here is what becomes of the checks."""
    real = whitebox.audit_step

    def audit_step(plan, delta, **settings):
        return real(plan, delta, canaries=1000, coordinates=100_000, **settings)

    monkeypatch.setattr("synthward.audit.runs.audit_step", audit_step)
    monkeypatch.setattr("synthward.audit.onerun._SAMPLES", 8192)


def audit(capsys, *words: object) -> tuple[int, dict, str]:
    capsys.readouterr()
    code = main(["audit", *map(str, words), "--json"])
    streams = capsys.readouterr()
    return code, json.loads(streams.out) if streams.out else {}, streams.err


def test_without_records_only_the_white_box_runs(place, capsys):
    from synthward.engine import Ledger

    code, printed, errors = audit(capsys, place / "run")
    assert code == 0 and printed["passed"] is True and "custodian" not in errors
    assert [check["name"] for check in printed["checks"]] == WHITE_BOX
    assert all(c["passed"] and c["releasable"] and c["from_records"] is False for c in printed["checks"])
    written = json.loads((place / "run" / "audit.json").read_text())
    assert written["checks"] == printed["checks"]
    with Ledger.open(place / "run" / "ledger.jsonl", readonly=True) as ledger:
        claimed = epsilon_of(ledger.events(), 1e-5, ACCOUNTANT)
    assert written["claimed_epsilon"] == pytest.approx(claimed, rel=1e-12) and written["delta"] == 1e-5
    assert written["unit"] == "patient" and written["relation"] == "add_or_remove_one"


def test_figures_from_records_are_flagged_and_stay_out_of_the_run(place, capsys, tmp_path):
    out = tmp_path / "records.json"
    code, printed, errors = audit(capsys, place / "run", "--data", place / "data.csv", "--out-records", out)
    assert code == 0 and printed["custodian_only"] is True and "custodian's eyes only" in errors
    extra = [check for check in printed["checks"] if check["name"] not in WHITE_BOX]
    assert [check["name"] for check in extra] == [
        "membership: distance to the nearest sample",
        "membership: classifier on distances",
        "one run: held-out units",
    ]
    assert all(c["from_records"] and not c["releasable"] and c["passed"] is None for c in extra)
    kept = json.loads(out.read_text())
    assert kept["checks"] == extra and kept["custodian_only"] is True
    written = json.loads((place / "run" / "audit.json").read_text())
    assert [check["name"] for check in written["checks"]] == WHITE_BOX
    assert "custodian_only" not in written


def test_canaries_among_the_records_of_a_run_of_their_own(place, capsys):
    before = {p.name: p.read_bytes() for p in (place / "run").iterdir() if p.name != "audit.json"}
    code, printed, _ = audit(
        capsys, place / "run", "--data", place / "data.csv", "--runs", 2, "--canaries", 60
    )
    assert code == 0
    found = next(check for check in printed["checks"] if check["name"] == "one run: canaries")
    assert found["guessed_units"] == 120 and found["runs"] == 2 and not found["releasable"]
    assert 0.0 <= found["lower_bound"] <= found["claimed"] <= 3.0
    after = {p.name: p.read_bytes() for p in (place / "run").iterdir() if p.name != "audit.json"}
    assert after == before, "the run itself is as it was"


@pytest.mark.parametrize(
    ("words", "mention"),
    [
        (("--runs", 1), "give --data"),
        (("--out-records", "x.json"), "give --data"),
        (("--data", "data.csv", "--runs", -1), "no negative number"),
        (("--data", "data.csv", "--canaries", 0), "a canary"),
    ],
)
def test_options_that_do_not_fit_are_one_line(place, capsys, words, mention):
    code, printed, errors = audit(capsys, place / "run", *words)
    assert code == 2 and not printed and mention in errors


def test_no_figure_from_records_is_written_into_the_run(place, capsys, tmp_path):
    inside = place / "run" / "more" / "records.json"
    code, _, errors = audit(capsys, place / "run", "--data", place / "data.csv", "--out-records", inside)
    assert code == 2 and "lies in the run folder" in errors and not inside.exists()
    there = tmp_path / "there.json"
    there.write_text("mine")
    code, _, errors = audit(capsys, place / "run", "--data", place / "data.csv", "--out-records", there)
    assert code == 2 and "exists" in errors and there.read_text() == "mine"


def test_a_broken_engine_ends_in_exit_code_3(place, capsys, monkeypatch):
    from synthward.engine.optim import FusedAdam

    update = FusedAdam.update
    monkeypatch.setattr(
        FusedAdam,
        "update",
        lambda self, noise, scale: update(self, dataclasses.replace(noise, std=noise.std / 2), scale),
    )
    code, printed, _ = audit(capsys, place / "run")
    failed = {check["name"] for check in printed["checks"] if not check["passed"]}
    assert code == 3 and printed["passed"] is False
    assert {"law of the noise", "canaries in every step"} <= failed


def test_a_run_that_did_not_do_what_its_ledger_says_fails(place, capsys, tmp_path):
    """The noise of run.json is another one than was charged."""
    copy = tmp_path / "run"
    shutil.copytree(place / "run", copy)
    info = json.loads((copy / "run.json").read_text())
    info["noise_multiplier"] *= 0.9
    (copy / "run.json").write_text(json.dumps(info))
    code, printed, _ = audit(capsys, copy)
    assert code == 3
    assert [c["name"] for c in printed["checks"] if not c["passed"]] == ["plan of the ledger"]


def test_what_a_person_sees(place, capsys):
    assert main(["audit", str(place / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("epsilon spent: ")
    assert [line.split()[0] for line in lines[1:]] == ["passed"] * 4
    assert "shown" in lines[3] and "claimed" in lines[3]
    assert law.COORDINATES == 1_000_000


def test_records_of_others_are_refused(place, capsys, tmp_path):
    """By the counts that the run paid for; what needs no records is written all the same, and says nothing of them."""
    shutil.copytree(place / "run", tmp_path / "run")
    others, _ = write_tiny(tmp_path, 4000)
    out = tmp_path / "records.json"
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.name != "audit.json"}
    code, printed, errors = audit(
        capsys, tmp_path / "run", "--data", others, "--out-records", out, "--runs", 1
    )
    assert code == 2 and not printed and not out.exists()
    (line,) = [line for line in errors.splitlines() if line.startswith("synthward: error")]
    assert f"{others}: are not the records of {tmp_path / 'run'}: " in line and "was fitted to" in line
    assert not any(letter.isdigit() for letter in line.split(f"{tmp_path / 'run'}: ")[1])
    written = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert [check["name"] for check in written["checks"]] == WHITE_BOX
    after = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.name != "audit.json"}
    assert after == before


def test_records_of_others_are_refused_where_none_were_held_out(capsys, tmp_path):
    from synthward.run import FitOptions, fit_run
    from synthward.schema import load_schema

    data, schema = write_tiny(tmp_path, 60)
    options = FitOptions(accountant=ACCOUNTANT, steps=2, holdout=0.0, settings={"hidden": 8})
    fit_run(data, load_schema(schema), epsilon=3.0, delta=1e-5, out=tmp_path / "run", options=options)
    assert audit(capsys, tmp_path / "run", "--data", data)[0] == 0
    write_tiny(tmp_path, 3000)
    code, _, errors = audit(capsys, tmp_path / "run", "--data", data)
    assert code == 2 and "are not the records of" in errors
