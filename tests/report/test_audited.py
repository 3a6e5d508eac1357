"""What an audit left in the run folder: shown as it is, and withheld where it used real records."""

from __future__ import annotations

import json

import pytest

from synthward.report import read_facts, write_documents
from synthward.report.statement import write_statement
from tests.report.runs import make_run

STEP = {
    "name": "canaries in a step",
    "lower_bound": 2.4567,
    "claimed": 3.0,
    "passed": True,
    "from_records": False,
}
BROKEN = {
    "name": "law of the noise",
    "lower_bound": None,
    "passed": False,
    "from_records": False,
    "deviation": 0.25,
}
GUESSES = {"name": "membership inference", "lower_bound": 0.8125, "passed": None, "from_records": True}
UNMARKED = {"name": "one run of unknown kind", "lower_bound": 0.7321, "passed": True}


def audited(folder, data):
    run = make_run(folder)
    (run / "audit.json").write_text(data if isinstance(data, str) else json.dumps(data))
    return read_facts(run)


def audit_section(facts):
    return next(part for part in write_statement(facts).sections if part.id == "audit")


def test_bounds_stand_with_delta_and_claim(tmp_path):
    facts = audited(tmp_path / "run", {"claimed_epsilon": 3.0, "delta": 1e-5, "checks": [STEP, BROKEN]})
    part = audit_section(facts)
    assert "delta 1e-05" in part.paragraphs[0] and "epsilon 3" in " ".join(part.paragraphs)
    found = {fact.name: fact.value for fact in part.table}
    assert found["canaries in a step"] == "passed; epsilon is at least 2.456; claimed: 3"
    assert found["law of the noise"].startswith("FAILED")
    assert facts.audit is not None and facts.audit.checks[1].details == {"deviation": 0.25}


def test_checks_of_real_records_are_in_no_document(tmp_path):
    checks = [STEP, GUESSES, UNMARKED]
    facts = audited(tmp_path / "run", {"claimed_epsilon": 3.0, "delta": 1e-5, "checks": checks})
    assert [check.name for check in facts.custodian_checks] == [GUESSES["name"], UNMARKED["name"]]
    text = write_documents(facts).model_dump_json()
    for check in (GUESSES, UNMARKED):
        assert check["name"] not in text and str(check["lower_bound"]) not in text
    assert "left out (2)" in " ".join(audit_section(facts).paragraphs)
    assert STEP["name"] in text


@pytest.mark.parametrize(
    "data",
    [
        "",
        "{",
        "[]",
        "null",
        '{"checks": 3}',
        '{"delta": 2, "checks": []}',
        '{"claimed_epsilon": 3, "checks": [{}]}',
    ],
)
def test_an_audit_that_can_not_be_read_or_gives_no_delta_claims_nothing(tmp_path, data):
    part = audit_section(audited(tmp_path / "run", data))
    assert "No audit of this run is recorded" in part.paragraphs[0] and not part.table


def test_odd_entries_are_left_out(tmp_path):
    odd = [
        3,
        None,
        {"from_records": False},
        {"name": "x", "from_records": False, "lower_bound": "high", "passed": "yes"},
    ]
    facts = audited(tmp_path / "run", {"delta": 1e-5, "claimed_epsilon": "three", "checks": odd})
    assert [fact.name for fact in audit_section(facts).table] == ["unnamed", "x"]
    assert facts.audit is not None and facts.audit.claimed_epsilon is None
    assert facts.audit.checks[1].lower_bound is None and facts.audit.checks[1].passed is None


def test_an_audit_of_another_run_is_not_shown_as_this_one_s(tmp_path):
    data = {"claimed_epsilon": 3.0, "delta": 1e-5, "checks": [STEP, GUESSES]}
    own = audited(tmp_path / "run", data)
    assert audited(tmp_path / "own", data | {"run_id": own.run_id}).audit is not None
    facts = audited(tmp_path / "other", data | {"run_id": "0" * 16})
    assert facts.audit is None and facts.custodian_checks == ()
    assert STEP["name"] not in write_documents(facts).model_dump_json()
