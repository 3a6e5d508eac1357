"""`sign`, `verify`, `ledger` and `budget`: what a data-protection officer is given, and sees when it is false."""

from __future__ import annotations

import base64
import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

from synthward.cli import main
from tests.commandline import Outcome, assert_one_line_error
from tests.tinydata import SCHEMA, table, write_csv

DELTA = 1e-5
PAYLOAD = "application/vnd.in-toto+json"


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`synthward ...` in this process."""

    def invoke(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        streams = capsys.readouterr()
        return Outcome(code, streams.out, streams.err)

    return invoke


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of ten steps under a budget, its cohort and a key, made once."""
    folder = tmp_path_factory.mktemp("signed")
    (folder / "schema.toml").write_text(SCHEMA)
    data = write_csv(folder / "data.csv", table(60))
    budget = folder / "budget.jsonl"
    create = ["budget", "create", budget, "--epsilon", 30, "--delta", DELTA, "--unit", "patient"]
    small = ["--steps", 10, "--accountant", "rdp", "--set", "hidden=8", "--set", "blocks=1"]
    fit = ["fit", data, "--schema", folder / "schema.toml", "--epsilon", 3, "--delta", DELTA]
    cohort = ["sample", folder / "run", "--rows", 20, "--out", folder / "cohort.csv"]
    for words in (create, [*fit, "--out", folder / "run", "--budget", budget, *small], cohort):
        assert main([str(w) for w in words]) == 0
    assert main(["sign", "--new-key", str(folder / "key.pem")]) == 0
    signed = ["sign", folder / "run", "--key", folder / "key.pem", "--cohort", folder / "cohort.csv"]
    assert main([str(w) for w in signed]) == 0
    return folder


@pytest.fixture
def place(finished, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def verify(call, place, *more):
    return call("verify", place / "run", "--key", place / "key.pub.pem", *more)


def envelope(place):
    return json.loads((place / "run" / "attestation.dsse.json").read_text())


def test_a_signed_run_verifies(call, place):
    outcome = verify(call, place, "--json")
    assert outcome.code == 0, outcome.stderr
    result = json.loads(outcome.stdout)
    spent = json.loads(call("ledger", place / "run", "--json").stdout)
    assert result["signed"] is True and result["private"] is True
    assert result["epsilon"] == spent["epsilon"] and result["ledger"]["head"] == spent["head"]
    assert {"model.safetensors", "ledger.jsonl", "cohort.csv", "schema.toml", "encoder.json"} <= set(
        result["files"]
    )
    text = verify(call, place).stdout
    assert "signature: good" in text and spent["head"] in text and "epsilon spent" in text


def test_the_signature_is_over_the_encoding_of_the_specification(place):
    """Built here anew from the words of DSSE's protocol.md, and checked by the library alone."""
    found = envelope(place)
    payload = base64.standard_b64decode(found["payload"])
    assert found["payloadType"] == PAYLOAD
    signed = f"DSSEv1 {len(PAYLOAD)} {PAYLOAD} {len(payload)} ".encode() + payload
    key = serialization.load_pem_public_key((place / "key.pub.pem").read_bytes())
    [entry] = found["signatures"]
    key.verify(base64.standard_b64decode(entry["sig"]), signed)
    with pytest.raises(InvalidSignature):
        key.verify(base64.standard_b64decode(entry["sig"]), payload)
    statement = json.loads(payload)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert set(statement) == {"_type", "subject", "predicateType", "predicate"}
    assert all(len(subject["digest"]["sha256"]) == 64 for subject in statement["subject"])


def test_the_encoding_of_the_specification_s_own_example():
    from synthward.run.attest import pre_authentication_encoding

    encoded = pre_authentication_encoding("http://example.com/HelloWorld", b"hello world")
    assert encoded == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert pre_authentication_encoding("\u00e9", b"") == b"DSSEv1 2 \xc3\xa9 0 ", "lengths are in bytes"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "encoder.json", "schema.toml", "run.json", "ledger.jsonl", "../cohort.csv"]
)
def test_a_changed_file_is_one_line_with_its_name(call, place, name):
    file = place / "run" / name
    content = bytearray(file.read_bytes())
    at = content.index(b'"unit"') + 1 if name == "run.json" else len(content) // 2
    content[at] ^= 1
    file.write_bytes(bytes(content))
    assert_one_line_error(verify(call, place), Path(name).name)


@pytest.mark.parametrize("name", ["model.safetensors", "ledger.jsonl", "attestation.dsse.json"])
def test_a_missing_file_is_one_line_with_its_name(call, place, name):
    (place / "run" / name).unlink()
    assert_one_line_error(verify(call, place), name)


def test_a_cohort_elsewhere_has_to_be_shown(call, place, tmp_path):
    moved = (place / "cohort.csv").rename(tmp_path / "cohort.csv")
    assert_one_line_error(verify(call, place), "cohort.csv", "--cohort")
    assert verify(call, place, "--cohort", moved).code == 0
    other = shutil.copy(moved, tmp_path / "other.csv")
    assert_one_line_error(verify(call, place, "--cohort", moved, "--cohort", other), "other.csv")


def test_another_s_key_does_not_verify(call, place):
    assert call("sign", "--new-key", place / "other.pem").code == 0
    assert_one_line_error(call("verify", place / "run", "--key", place / "other.pub.pem"), "no signature")


def test_a_statement_that_was_changed_does_not_verify(call, place):
    """Each byte of the signed content and of the signature, every 29th."""
    file, found = place / "run" / "attestation.dsse.json", envelope(place)
    payload = base64.b64decode(found["payload"])
    for at in range(0, len(payload), 29):
        changed = bytearray(payload)
        changed[at] ^= 1
        file.write_text(json.dumps(found | {"payload": base64.b64encode(bytes(changed)).decode()}))
        assert verify(call, place).code == 2
    for damaged in ("", "[]", "{}", '{"payload": 1}', json.dumps(found | {"payloadType": "text/plain"})):
        file.write_text(damaged)
        assert_one_line_error(verify(call, place), "attestation.dsse.json")


@pytest.mark.parametrize("field", ["epsilon", "delta", "unit", "private", "events", "ledger"])
def test_a_signer_who_claims_something_else_is_found_out(call, place, field):
    """The signature is good; what it says is not what the ledger says."""
    from synthward.run.attest import pre_authentication_encoding

    found = envelope(place)
    statement = json.loads(base64.b64decode(found["payload"]))
    false = {"epsilon": 0.1, "delta": 1e-9, "unit": "hospital", "private": False, "events": [], "ledger": {}}
    statement["predicate"][field] = false[field]
    payload = json.dumps(statement).encode()
    key = serialization.load_pem_private_key((place / "key.pem").read_bytes(), None)
    signature = key.sign(pre_authentication_encoding(PAYLOAD, payload))
    found["payload"] = base64.b64encode(payload).decode()
    found["signatures"][0]["sig"] = base64.b64encode(signature).decode()
    (place / "run" / "attestation.dsse.json").write_text(json.dumps(found))
    assert_one_line_error(verify(call, place), field)


def test_without_a_key_the_files_are_checked_and_the_signature_is_not(call, place):
    outcome = call("verify", place / "run")
    assert outcome.code == 0 and "NOT checked" in outcome.stderr and "good" not in outcome.stdout
    assert json.loads(call("verify", place / "run", "--json").stdout)["signed"] is False
    (place / "run" / "encoder.json").write_text("{}")
    assert_one_line_error(call("verify", place / "run"), "encoder.json")


def test_keys_are_made_for_their_owner_alone_and_never_overwritten(call, place):
    assert stat.S_IMODE((place / "key.pem").stat().st_mode) == 0o600
    assert b"PRIVATE" not in (place / "key.pub.pem").read_bytes()
    assert_one_line_error(call("sign", "--new-key", place / "key.pem"), "exists")


@pytest.mark.parametrize(
    ("words", "mention"),
    [
        ((), "RUN"),
        (("run",), "--key"),
        (("run", "--key", "key.pub.pem"), "no private key"),
        (("run", "--key", "nosuch.pem"), "can not be read"),
        (("run", "--key", "key.pem", "--cohort", "nosuch.csv"), "nosuch.csv"),
        (("run", "--key", "key.pem", "--cohort", "run"), "folder"),
    ],
)
def test_what_can_not_be_signed_is_one_line(call, place, monkeypatch, words, mention):
    monkeypatch.chdir(place)
    before = (place / "run" / "attestation.dsse.json").read_bytes()
    assert_one_line_error(call("sign", *words), mention)
    assert (place / "run" / "attestation.dsse.json").read_bytes() == before


def test_the_ledger_alone_says_what_was_spent(call, place):
    """All else is gone: nothing but the ledger is read."""
    whole = json.loads(call("ledger", place / "run", "--json").stdout)
    for file in (place / "run").iterdir():
        if file.name != "ledger.jsonl":
            file.unlink()
    alone = json.loads(call("ledger", place / "run", "--json").stdout)
    assert alone == whole and alone["epsilon"] > 0
    bare = (place / "run" / "ledger.jsonl").rename(place / "bare.jsonl")
    outcome = call("ledger", bare, "--json")
    assert json.loads(outcome.stdout) == whole | {"run": str(bare)}
    text = call("ledger", bare).stdout
    for shown in (whole["head"], whole["keys"][0]["key_id"], "poisson_gaussian", "mechanism", f"{DELTA:g}"):
        assert shown in text


def test_a_broken_ledger_is_one_line(call, place):
    file = place / "run" / "ledger.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([lines[0], *lines[2:]]))
    assert_one_line_error(call("ledger", place / "run"), "line 2", "can not be trusted")


def test_fit_draws_on_the_budget(call, place):
    shown = json.loads(call("budget", "show", place / "budget.jsonl", "--json").stdout)
    spent = json.loads(call("ledger", place / "run", "--json").stdout)
    [run] = shown["runs"]
    assert (run["run_id"], run["state"]) == (spent["run_id"], "settled")
    assert run["ledger_head"] == spent["head"] and run["events"] == spent["events"]
    assert 0 < shown["spent"] == shown["spent_and_reserved"] <= 30
    text = call("budget", "show", place / "budget.jsonl").stdout
    assert spent["run_id"] in text and "settled" in text


def fit_again(call, place, *more, epsilon=3):
    small = ["--steps", 10, "--accountant", "rdp", "--set", "hidden=8", "--set", "blocks=1"]
    return call(
        *("fit", place / "data.csv", "--schema", place / "schema.toml", "--out", place / "again"),
        *("--epsilon", epsilon, "--delta", DELTA, *small, *more),
    )


def test_a_fit_beyond_the_budget_is_refused_before_a_record_is_read(call, place):
    (place / "data.csv").unlink()
    content = (place / "budget.jsonl").read_bytes()
    outcome = fit_again(call, place, "--budget", place / "budget.jsonl", epsilon=29)
    assert_one_line_error(outcome, "nothing was read or spent")
    assert not (place / "again").exists() and (place / "budget.jsonl").read_bytes() == content


def test_a_fit_that_fails_before_it_spends_gives_its_reservation_back(call, place):
    (place / "data.csv").write_text("a,b\n1,2\n")
    assert_one_line_error(fit_again(call, place, "--budget", place / "budget.jsonl"))
    shown = json.loads(call("budget", "show", place / "budget.jsonl", "--json").stdout)
    assert [run["state"] for run in shown["runs"]] == ["settled", "cancelled"]
    assert shown["spent_and_reserved"] == shown["spent"]


@pytest.mark.parametrize("unit", ["hospital"])
def test_a_budget_for_another_unit_is_refused(call, place, unit):
    other = place / "other.jsonl"
    assert call("budget", "create", other, "--epsilon", 9, "--delta", DELTA, "--unit", unit).code == 0
    assert_one_line_error(fit_again(call, place, "--budget", other), "unit", unit)


@pytest.mark.parametrize(
    ("words", "mention"),
    [
        (("mend", "b.jsonl"), "create, show"),
        (("create", "b.jsonl", "--epsilon", 3), "--delta"),
        (("create", "budget.jsonl", "--epsilon", 3, "--delta", 1e-6), "exists"),
        (("create", "b.jsonl", "--epsilon", -3, "--delta", 1e-6), "epsilon"),
        (("show", "nosuch.jsonl"), "no budget file"),
        (("show", "run/ledger.jsonl"), "can not be trusted"),
        (("show", "budget.jsonl", "--epsilon", 3), "--epsilon"),
        (("cancel", "budget.jsonl"), "--run-id"),
        (("cancel", "budget.jsonl", "--run-id", "x"), "not in it"),
    ],
)
def test_misuse_of_budget_is_one_line(call, place, monkeypatch, words, mention):
    monkeypatch.chdir(place)
    content = (place / "budget.jsonl").read_bytes()
    assert_one_line_error(call("budget", *words), mention)
    assert (place / "budget.jsonl").read_bytes() == content and not (place / "b.jsonl").exists()
