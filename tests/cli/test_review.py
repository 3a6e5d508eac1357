"""What a first user and an officer would stumble over: options left out in silence, figures rounded down, strays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from synthward.commands.common import budget_line, epsilon_up
from synthward.engine.errors import ConfigError
from tests.cli.test_attest import call, finished, place, verify
from tests.commandline import assert_one_line_error

__all__ = ["call", "finished", "place"]


@pytest.mark.parametrize(
    ("epsilon", "shown"),
    [
        (1.23441, "1.235"),
        (12.3401, "12.341"),
        (3.0000000000000004, "3"),
        (0.0001, "0.001"),
        (1e5 + 0.4, "100000.4"),
    ],
)
def test_a_shown_epsilon_is_never_below_the_one_that_was_spent(epsilon, shown):
    assert epsilon_up(epsilon) == shown
    assert f"epsilon spent: {shown} at" in budget_line(epsilon, 1e-6, "patient", private=True)


def test_an_infinite_epsilon_is_shown_as_such():
    assert epsilon_up(float("inf")) == "inf"


@pytest.mark.parametrize("command", ["fit", "tune"])
@pytest.mark.parametrize("noise", [(), ("--noise", "independent"), ("--noise", "blt")])
def test_bands_are_refused_for_noise_that_has_none(call, place, command, noise):
    words = [command, place / "data.csv", "--schema", place / "schema.toml", "--epsilon", 1, "--delta", 1e-6]
    outcome = call(*words, "--out", place / "other", "--bands", 4, *noise)
    assert_one_line_error(outcome, "--bands", "--noise")
    assert not (place / "other").exists()


@pytest.mark.parametrize("units", [0, -5])
def test_a_bound_on_units_that_is_none_is_named(call, place, units):
    words = ["fit", place / "data.csv", "--schema", place / "schema.toml", "--epsilon", 1, "--delta", 1e-6]
    outcome = call(*words, "--out", place / "other", "--max-units", units)
    assert_one_line_error(outcome, "max units", str(units))
    assert not (place / "other").exists()


@pytest.mark.parametrize("options", [(), ("--max-units", 900), ("--max-units", 900, "--resume")])
def test_a_calibration_that_takes_seconds_is_told(call, place, monkeypatch, options):
    def refuse(*_, **__):
        raise ConfigError("that is all")

    monkeypatch.setattr("synthward.run.fit_run", refuse)
    words = ["fit", place / "data.csv", "--schema", place / "schema.toml", "--epsilon", 1, "--delta", 1e-6]
    outcome = call(*words, "--out", place / "run", *options)
    assert_one_line_error(outcome, "that is all")
    assert ("choosing the noise" in outcome.stderr) == (options == ("--max-units", 900))


def test_a_rate_is_given_with_its_period(call, place):
    """With groups that take turns, a rate says little without their number."""
    words = ["fit", place / "data.csv", "--schema", place / "schema.toml", "--epsilon", 1, "--delta", 1e-6]
    words += ["--out", place / "banded", "--steps", 4, "--accountant", "rdp", "--sample-rate", 0.1, "--json"]
    outcome = call(*words, "--noise", "banded")
    assert outcome.code == 0, outcome.stderr
    found = json.loads(outcome.stdout)
    assert (found["period"], found["sample_rate"]) == (4, 0.4), "8 bands by default, but no more than steps"


def test_bands_that_were_asked_for_are_not_lessened(call, place):
    words = ["fit", place / "data.csv", "--schema", place / "schema.toml", "--epsilon", 1, "--delta", 1e-6]
    outcome = call(*words, "--out", place / "other", "--steps", 4, "--noise", "banded", "--bands", 8)
    assert_one_line_error(outcome, "bands", "8")


def test_half_a_key_pair_is_not_left_behind(call, place):
    (place / "new.pub.pem").write_text("another's")
    assert_one_line_error(call("sign", "--new-key", place / "new.pem"), "new.pub.pem", "exists")
    assert not (place / "new.pem").exists() and (place / "new.pub.pem").read_text() == "another's"


def test_a_cohort_is_not_signed_without_its_run(call, place):
    outcome = call("sign", "--new-key", place / "new.pem", "--cohort", place / "cohort.csv")
    assert_one_line_error(outcome, "--cohort", "RUN")
    assert not (place / "new.pem").exists()


def test_what_nobody_vouches_for_is_named(call, place):
    (place / "run" / "more.csv").write_text("a\n1\n")
    outcome = verify(call, place)
    assert outcome.code == 0 and "not signed: more.csv" in outcome.stdout
    assert json.loads(verify(call, place, "--json").stdout)["not_signed"] == ["log.jsonl", "more.csv"]


def test_a_false_copy_of_a_cohort_beside_the_good_one_is_found(call, place):
    """The good one in the folder does not vouch for the other that lies where it was signed."""
    shutil.copy(place / "cohort.csv", place / "run" / "cohort.csv")
    assert verify(call, place).code == 0
    (place / "cohort.csv").write_text("false\n")
    assert_one_line_error(verify(call, place), str(Path("cohort.csv")), "SHA-256")


def test_an_audit_is_signed_with_the_run(call, place):
    """The statement shows what it says, so that it can not be changed, taken away or put in another's place."""
    audit = place / "run" / "audit.json"
    audit.write_text('{"delta": 1e-5, "checks": []}')
    assert "not signed: audit.json" in verify(call, place).stdout
    assert call("sign", place / "run", "--key", place / "key.pem", "--cohort", place / "cohort.csv").code == 0
    assert "unchanged: audit.json" in verify(call, place).stdout
    shutil.copy(audit, place / "audit.json")
    audit.write_text(
        '{"delta": 1e-5, "checks": [{"name": "made up", "passed": true, "from_records": false}]}'
    )
    assert_one_line_error(verify(call, place), "audit.json", "SHA-256")
    audit.unlink()
    assert_one_line_error(verify(call, place), "audit.json", "missing")


def test_an_error_before_the_first_record_stands_alone(call, place):
    (place / "strange.csv").write_text("a,b\n1,2\n")
    words = ["fit", place / "strange.csv", "--schema", place / "schema.toml", "--epsilon", 1, "--delta", 1e-6]
    outcome = call(*words, "--out", place / "other", "--steps", 4, "--accountant", "rdp")
    assert_one_line_error(outcome, "strange.csv")
    assert outcome.stderr.count("\n") == 1, outcome.stderr
