"""Settings that make no sense, and outputs that are in the way."""

from __future__ import annotations

import pytest

from tests.commandline import fit_arguments


@pytest.mark.parametrize("epsilon", [0, -1, "nan", "-inf", "three", ""])
def test_epsilon_that_is_no_budget(desk, epsilon):
    desk.fit_refused(mentions=("epsilon",), epsilon=epsilon)


@pytest.mark.parametrize("delta", [0, 1, 2, -1e-5, "nan", "small"])
def test_delta_that_is_no_probability_of_failure(desk, delta):
    desk.fit_refused(mentions=("delta",), delta=delta)


def test_a_generator_that_does_not_exist(desk):
    line = desk.fit_refused(generator="wizard", mentions=("wizard",))
    assert "diffusion" in line and "gan" in line, "the message lists what there is"


@pytest.mark.parametrize("steps", [0, -5, "many"])
def test_steps_that_cannot_be_run(desk, steps):
    desk.fit_refused("--steps", steps)


def test_an_option_that_does_not_exist(desk):
    desk.fit_refused("--frobnicate", 3, mentions=("frobnicate",))


@pytest.mark.parametrize("missing", ["--schema", "--epsilon", "--delta", "--out"])
def test_an_option_left_out(desk, missing):
    """Never a default where the user must decide; `--epsilon` and `--delta` above all."""
    arguments = fit_arguments(desk.data, desk.schema, desk.out)
    position = arguments.index(missing)
    desk.refused(*arguments[:position], *arguments[position + 2 :], mentions=(missing.strip("-"),))


def test_an_unknown_command(desk):
    desk.refused("conjure", desk.data)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_fit_into_a_place_that_exists(desk, kind):
    """What stands there is left as it is."""
    if kind == "file":
        desk.out.write_text("mine")
    else:
        desk.out.mkdir()
        (desk.out / "thesis.txt").write_text("mine")
    desk.fit_refused(mentions=("run",))


def test_resume_of_nothing(desk):
    desk.fit_refused("--resume", mentions=("run",))


def test_resume_of_a_folder_that_is_no_run(desk):
    desk.out.mkdir()
    (desk.out / "thesis.txt").write_text("mine")
    desk.fit_refused("--resume", mentions=("run",))


# sample


@pytest.mark.parametrize("rows", [0, -3, "all", 1.5])
def test_sample_of_no_sensible_number_of_rows(desk, finished_run, rows):
    desk.refused("sample", finished_run, "--rows", rows, "--out", desk.folder / "c.csv")


@pytest.mark.parametrize(
    "where",
    [
        "",
        "outcome",
        "outcome=",
        "outcome='undead'",
        "nosuch='x'",
        "age='x'",
        "__import__('os')",
        "outcome=='died' or 1",
    ],
)
def test_sample_where_nothing_can_be(desk, finished_run, where):
    desk.refused("sample", finished_run, "--rows", 5, "--out", desk.folder / "c.csv", "--where", where)


def test_sample_from_what_is_no_run(desk):
    desk.refused(
        "sample", desk.folder / "nowhere", "--rows", 5, "--out", desk.folder / "c.csv", mentions=("nowhere",)
    )
    desk.refused("sample", desk.folder, "--rows", 5, "--out", desk.folder / "c.csv")


def test_sample_onto_a_file_that_exists(desk, finished_run):
    """Only `--overwrite` replaces it, and the message says so."""
    cohort = desk.folder / "cohort.csv"
    cohort.write_text("mine")
    desk.refused("sample", finished_run, "--rows", 5, "--out", cohort, mentions=("cohort.csv", "--overwrite"))
    outcome = desk.call("sample", finished_run, "--rows", 5, "--out", cohort, "--overwrite")
    assert outcome.code == 0, outcome.stderr
    assert len(cohort.read_text().splitlines()) == 6


def test_sample_into_a_kind_of_file_that_is_not_written(desk, finished_run):
    desk.refused("sample", finished_run, "--rows", 5, "--out", desk.folder / "c.xlsx", mentions=("c.xlsx",))


def test_sample_into_a_folder_that_does_not_exist(desk, finished_run):
    desk.refused("sample", finished_run, "--rows", 5, "--out", desk.folder / "no" / "c.csv", mentions=("no",))


# evaluate, account, simulate, schema


def test_evaluate_of_what_is_not_there(desk, finished_run):
    report = desk.folder / "report.html"
    desk.refused(
        "evaluate", desk.folder / "nowhere", "--real", desk.data, "--out", report, mentions=("nowhere",)
    )
    desk.refused(
        "evaluate", finished_run, "--real", desk.folder / "gone.csv", "--out", report, mentions=("gone.csv",)
    )


def test_evaluate_onto_a_report_that_exists(desk, finished_run):
    report = desk.folder / "report.html"
    report.write_text("mine")
    desk.refused("evaluate", finished_run, "--real", desk.data, "--out", report, mentions=("report.html",))


ACCOUNT = {"--noise-multiplier": 1.0, "--sample-rate": 0.01, "--steps": 100, "--delta": 1e-5}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--noise-multiplier", -1),
        ("--noise-multiplier", "nan"),
        ("--sample-rate", 0),
        ("--sample-rate", 1.5),
        ("--steps", -1),
        ("--steps", 2.5),
        ("--delta", 0),
        ("--delta", 1),
        ("--target-epsilon", 0),
        ("--target-epsilon", -2),
    ],
)
def test_account_of_what_is_no_mechanism(desk, option, value):
    settings = ACCOUNT | {option: value}
    if option == "--target-epsilon":
        del settings["--noise-multiplier"]
    flags = [part for pair in settings.items() for part in pair]
    desk.refused("account", *flags, mentions=(option.strip("-").split("-")[-1],))


def test_account_with_nothing_to_solve_for(desk):
    desk.refused("account", "--noise-multiplier", 1, "--sample-rate", 0.01, "--steps", 10)
    desk.refused("account", "--noise-multiplier", 1, "--delta", 1e-5)


@pytest.mark.parametrize("patients", [0, -1, "lots"])
def test_simulate_nobody(desk, patients):
    desk.refused("simulate", "--patients", patients, "--out", desk.folder / "sim.csv")


def test_simulate_onto_a_file_that_exists(desk):
    there = desk.folder / "sim.parquet"
    there.write_text("mine")
    desk.refused("simulate", "--patients", 10, "--out", there, mentions=("sim.parquet",))


def test_draft_a_schema_of_nothing(desk):
    draft = desk.folder / "draft.toml"
    desk.refused("schema", desk.folder / "gone.csv", "-o", draft, mentions=("gone.csv",))
    (desk.folder / "empty.csv").write_bytes(b"")
    desk.refused("schema", desk.folder / "empty.csv", "-o", draft, mentions=("empty.csv",))


def test_draft_a_schema_over_one_that_exists(desk):
    desk.refused("schema", desk.data, "-o", desk.schema, mentions=("schema.toml",))
