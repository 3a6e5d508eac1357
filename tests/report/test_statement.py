"""The privacy statement says what the ledger says, in the order of the pyramid, and nothing that a run contradicts."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest
from pydantic import ValidationError

from synthward.engine.accounting import (
    ApproximateEvent,
    CorrelatedGaussianEvent,
    CyclicPoissonGaussianEvent,
    Event,
    FixedSizeGaussianEvent,
    GaussianEvent,
    LaplaceEvent,
    PoissonGaussianEvent,
    SelectionEvent,
    TruncatedPoissonGaussianEvent,
    epsilon_of,
    event_from_dict,
)
from synthward.engine.accounting.matrix import Strategy
from synthward.engine.budget import DatasetBudget
from synthward.engine.errors import CheckpointError, LedgerError, SchemaError
from synthward.engine.ledger import Ledger
from synthward.report import Guarantee, PrivacyDocuments, read_facts, render_documents, write_documents
from synthward.report.documents import Statement, Unit
from synthward.report.mechanisms import describe_event
from synthward.report.numbers import format_epsilon
from synthward.report.statement import write_statement
from synthward.schema.load import schema_from_dict
from tests.report.runs import NOISY_UNITS, QUERY, SEED, TRAINING, make_run, texts, tiny_schema

PYRAMID = (
    ("parameters", "top"), ("unit", "top"), ("other-releases", "top"), ("audit", "top"),
    ("algorithms", "middle"), ("utility", "middle"), ("bias", "middle"),
    ("query-model", "base"), ("trust-model", "base"), ("side-channels", "base"), ("security", "base"),
    ("collection", "base"),
)  # fmt: skip

UNIT = Unit(column="patient")
POISSON = PoissonGaussianEvent(0.03125, 1.375, 2500)
KINDS: tuple[tuple[Event, tuple[str, ...]], ...] = (
    (POISSON, ("2,500", "0.03125", "1.375", "independently", "Poisson")),
    (TruncatedPoissonGaussianEvent(0.25, 1.5, 77, 4099, 8209), ("77", "0.25", "1.5", "4,099", "8,209", "cut")),
    (CyclicPoissonGaussianEvent(0.25, 1.5, 7, 100), ("100", "0.25", "1.5", "7 groups", "at most 15 times")),
    (
        CorrelatedGaussianEvent(2.5, Strategy("banded", (1.0, 0.5)), 8, 64),
        ("64", "2.5", "banded", "any 8 steps", "not claimed"),
    ),
    (FixedSizeGaussianEvent(9973, 128, 1.5, 64), ("9,973", "128", "1.5", "64", "without replacement", "public")),
    (GaussianEvent(5.25, 3), ("3 queries", "5.25", "L2")),
    (LaplaceEvent(5.25, 1), ("One query", "5.25", "L1")),
    (ApproximateEvent(0.375, 1e-9, 2), ("2 mechanisms", "0.375", "1e-09")),
    (
        SelectionEvent((GaussianEvent(5.25, 1), POISSON), 10.0, 0.0),
        ("logarithmic", "10 on average", "5.25", "2,500", "0.03125"),
    ),
)  # fmt: skip


def section(statement: Statement, name: str):
    return next(s for s in statement.sections if s.id == name)


def said(part) -> str:
    return " ".join([*part.paragraphs, *(f"{fact.name}: {fact.value}" for fact in part.table)])


def test_sections_are_those_of_the_pyramid_from_the_top_to_the_base(tmp_path):
    statement = write_statement(read_facts(make_run(tmp_path / "run")))
    assert tuple((s.id, s.level) for s in statement.sections) == PYRAMID
    assert "800-226" in statement.outline and "March 2025" in statement.outline
    assert all(s.heading and (s.paragraphs or s.table) for s in statement.sections)
    headings = [s.heading for s in statement.sections]
    assert headings[:2] == ["Privacy parameters", "Unit of privacy"]
    assert headings[-1] == "Data collection exposure"
    for part in (
        statement.held_constant,
        statement.assumptions,
        statement.not_covered,
        statement.residual_risks,
    ):
        assert part


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_values_are_the_ledgers(tmp_path, accountant):
    run = make_run(tmp_path / "run", accountant=accountant, delta=3e-6)
    bundle = write_documents(read_facts(run))
    with Ledger.open(run / "ledger.jsonl", readonly=True) as ledger:
        events, head, lines = ledger.events(), ledger.head, ledger.lines
    expected = epsilon_of([QUERY, TRAINING], 3e-6, accountant)
    statement = bundle.statement
    assert statement.guarantee == Guarantee(
        epsilon=expected, delta=3e-6, unit=UNIT, relation="add_or_remove_one", accountant=accountant
    )
    assert statement.budget is not None and statement.budget.epsilon == 9.5
    assert [event_from_dict({"kind": m.kind, **m.parameters}) for m in statement.mechanisms] == events
    table = {fact.name: fact.value for s in statement.sections for fact in s.table}
    assert table["Epsilon"] == format_epsilon(expected)
    assert table["Last entry of the ledger (SHA-256)"] == head
    assert table["Ledger"].startswith(f"{len(lines)} lines")
    assert accountant.upper() in table["Accountant"] and "dp-accounting 0.6.0" in table["Accountant"]
    assert format_epsilon(expected) in statement.headline and "3e-06" in statement.headline
    assert "12 one-way histograms" in said(section(statement, "algorithms"))
    assert "patient" in said(section(statement, "unit"))
    assert tiny_schema().fingerprint() in statement.held_constant[0]
    assert "max_grad_norm 0.75" in statement.held_constant[1]


def test_another_ledger_gives_another_statement(tmp_path):
    first, second = (
        write_statement(read_facts(make_run(tmp_path / str(steps), (QUERY, TRAINING.with_steps(steps)))))
        for steps in (40, 41)
    )
    assert first.guarantee and second.guarantee
    assert second.guarantee.epsilon > first.guarantee.epsilon
    assert "41 training steps" in said(section(second, "algorithms"))


@pytest.mark.parametrize(("event", "words"), KINDS, ids=[event.kind for event, _ in KINDS])
def test_every_kind_of_event_is_told_with_its_numbers(event, words):
    found = describe_event(event, UNIT)
    assert event_from_dict({"kind": found.kind, **found.parameters}) == event
    for word in words:
        assert word in found.text, (word, found.text)
    json.loads(found.model_dump_json())


def test_no_kind_of_event_is_without_words():
    assert {event.kind for event, _ in KINDS} == {event.kind for event in Event.__args__}


def test_sampling_is_claimed_only_where_it_was_charged(tmp_path):
    sampled = write_statement(read_facts(make_run(tmp_path / "a")))
    correlated = dataclasses.replace(read_facts(tmp_path / "a"), events=(KINDS[3][0],))
    assert any("draws each unit independently" in line for line in sampled.assumptions)
    assert not any("independently" in line for line in write_statement(correlated).assumptions)
    cyclic = dataclasses.replace(correlated, events=(KINDS[2][0],))
    assert any("group whose turn it is" in line for line in write_statement(cyclic).assumptions)


def test_a_seeded_run_says_not_private_and_claims_nothing(tmp_path):
    run = make_run(tmp_path / "run", private=False)
    with Ledger.open(run / "ledger.jsonl", readonly=True) as ledger:
        hidden = ledger.epsilon()
    bundle = write_documents(read_facts(run))
    assert not bundle.statement.private and bundle.statement.guarantee is None
    assert bundle.statement.budget is None and bundle.statement.interpretation is None
    assert bundle.model_card.warning and bundle.datasheet.warning
    document = json.loads(bundle.model_dump_json())
    page = render_documents(bundle, tmp_path / "s.html").read_text()
    assert re.search('class="banner red" role="alert">Reproducible, not private', page)
    for text in (" ".join(texts(document)), re.sub("<style>.*</style>", "", page, flags=re.DOTALL)):
        assert "-differentially private" not in text and "-differential privacy for" not in text
        assert format_epsilon(hidden) not in text
        assert "not private" in text.lower() and "seed" in text
        assert str(SEED) not in text, "the seed is what takes the noise away"
        assert f"{round(NOISY_UNITS):,}" not in text, "a noisy number whose noise is known is an exact one"


def test_a_key_from_a_seed_later_in_the_run_is_enough(tmp_path):
    run = make_run(tmp_path / "run")
    with Ledger.open(run / "ledger.jsonl") as ledger:
        ledger.add_key("s" * 16, private=False)
    assert not write_statement(read_facts(run)).private


def test_no_noise_is_no_guarantee(tmp_path):
    run = make_run(tmp_path / "run", (QUERY, PoissonGaussianEvent(0.036, 0.0, 5)), target=None)
    statement = write_statement(read_facts(run))
    assert not statement.private and statement.guarantee is None
    assert "epsilon is infinite" in said(section(statement, "parameters"))


def test_replacing_one_is_told_as_such(tmp_path):
    facts = read_facts(make_run(tmp_path / "run"))
    assert facts.guarantee is not None
    guarantee = facts.guarantee.model_copy(update={"relation": "replace_one"})
    statement = write_statement(dataclasses.replace(facts, relation="replace_one", guarantee=guarantee))
    assert "others in their place" in said(section(statement, "parameters"))
    assert "replace one" in said(section(statement, "unit")) and "counts as public" in said(
        section(statement, "unit")
    )
    assert "The number of units." in statement.held_constant
    assert not any("treated as private" in line for line in statement.assumptions)


def test_rows_as_units_warn_of_persons_with_several(tmp_path):
    schema = tiny_schema().with_unit(None)
    statement = write_statement(read_facts(make_run(tmp_path / "run", schema=schema)))
    assert "every row" in statement.headline and statement.guarantee.unit == Unit(column=None)
    assert "several rows is protected less" in said(section(statement, "unit"))


@pytest.mark.parametrize("missing", ["epsilon", "delta", "unit", "relation", "accountant"])
def test_no_epsilon_without_all_that_gives_it_a_meaning(missing):
    whole = {"epsilon": 1.0, "delta": 1e-6, "unit": UNIT, "relation": "replace_one", "accountant": "pld"}
    assert Guarantee(**whole).epsilon == 1.0
    with pytest.raises(ValidationError, match=missing):
        Guarantee(**{name: value for name, value in whole.items() if name != missing})
    with pytest.raises(ValidationError):
        Guarantee(**(whole | {missing: None}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("epsilon", math.inf), ("epsilon", math.nan), ("epsilon", -0.1), ("delta", 0.0), ("delta", 1.0),
     ("delta", math.nan), ("relation", "none"), ("extra", 1)],
)  # fmt: skip
def test_a_guarantee_holds_nothing_that_is_none(name, value):
    whole = {"epsilon": 1.0, "delta": 1e-6, "unit": UNIT, "relation": "replace_one", "accountant": "pld"}
    with pytest.raises(ValidationError):
        Guarantee(**(whole | {name: value}))


def test_epsilons_stand_in_the_documents_only_where_they_have_a_meaning():
    """Every field of the JSON schema that is called epsilon belongs to a type that has a delta beside it."""
    definitions = PrivacyDocuments.model_json_schema()["$defs"]
    for name, definition in definitions.items():
        fields = definition.get("properties", {})
        if any("epsilon" in field for field in fields):
            assert "delta" in fields, name


def test_a_statement_that_is_not_private_can_not_carry_a_guarantee(tmp_path):
    statement = write_statement(read_facts(make_run(tmp_path / "run")))
    data = statement.model_dump()
    for change in ({"private": False}, {"guarantee": None}, {"private": False, "guarantee": None}):
        with pytest.raises(ValidationError):
            Statement(**(data | change))


def test_json_reads_back_to_the_same_documents_and_refuses_others(tmp_path):
    bundle = write_documents(read_facts(make_run(tmp_path / "run")))
    text = bundle.model_dump_json()
    assert PrivacyDocuments.model_validate_json(text) == bundle
    data = json.loads(text)
    with pytest.raises(ValidationError):
        PrivacyDocuments.model_validate(data | {"train_rows": 3})
    with pytest.raises(ValidationError):
        PrivacyDocuments.model_validate({k: v for k, v in data.items() if k != "statement"})


def test_a_run_whose_files_disagree_has_no_statement(tmp_path):
    for k, change in enumerate(
        ({"delta": 1e-9}, {"unit": "row"}, {"run_id": "other"}, {"accountant": "pld"})
    ):
        with pytest.raises(LedgerError, match=next(iter(change))):
            read_facts(make_run(tmp_path / str(k), info=change))
    run = make_run(tmp_path / "schema")
    schema = run / "schema.toml"
    schema.write_text(schema.read_text().replace("max = 100", "max = 99"))
    with pytest.raises(CheckpointError, match="schema"):
        read_facts(run)
    lie = make_run(tmp_path / "lie", private=False, info={"private": True})
    assert not read_facts(lie).is_private, "the ledger's word on keys counts"


def test_missing_and_damaged_pieces(tmp_path):
    with pytest.raises(CheckpointError, match="no run here"):
        read_facts(tmp_path)
    errors = {"ledger.jsonl": LedgerError, "schema.toml": SchemaError, "run.json": CheckpointError}
    for name, error in errors.items():
        run = make_run(tmp_path / name)
        (run / name).unlink()
        with pytest.raises(error):
            read_facts(run)
        (run / name).write_text("[]")
        with pytest.raises(error):
            read_facts(run)
    early = make_run(tmp_path / "early", (QUERY,), encoder=False, info={"status": "started"})
    statement = write_statement(read_facts(early))
    assert "so far" in statement.headline and any("not finished" in line for line in statement.residual_risks)
    assert "Delta times units" not in said(section(statement, "parameters"))


@pytest.mark.parametrize(
    ("arithmetic", "words"),
    [(None, "not recorded"), ("float", "not excluded"), ("discrete", "closes attacks on the rounding")],
)
def test_arithmetic_is_told_as_recorded(tmp_path, arithmetic, words):
    info = {} if arithmetic is None else {"mechanism": {"arithmetic": arithmetic, "sample_rate": 0.288}}
    statement = write_statement(read_facts(make_run(tmp_path / "run", info=info)))
    assert words in said(section(statement, "side-channels"))
    assert any(words in line for line in statement.residual_risks)
    named = any("sample_rate" in line for line in statement.held_constant)
    assert named == (arithmetic is None), (
        "of a mechanism that has its own rate, the option's is no setting of steps"
    )


def test_markup_in_a_schema_stays_text(tmp_path):
    columns = {
        "<b>cost</b> {{ 7*7 }}": {"kind": "categorical", "categories": ["<script>", "& co"]},
        "p": {"kind": "id"},
    }
    schema = schema_from_dict({"version": 1, "name": "<i>x</i>", "columns": columns, "unit": "p"})
    bundle = write_documents(read_facts(make_run(tmp_path / "run", schema=schema)))
    page = render_documents(bundle, tmp_path / "s.html").read_text()
    assert "<b>cost" not in page and "<i>x" not in page and "<script" not in page
    assert "&lt;b&gt;cost&lt;/b&gt; {{ 7*7 }}" in page


def test_the_budget_of_the_data_set_counts_all_releases(tmp_path):
    run, file = make_run(tmp_path / "run"), tmp_path / "patients.budget"
    budget = DatasetBudget.create(file, epsilon=20.0, delta=1e-6, unit="patient", dataset="the ward")
    with pytest.raises(LedgerError, match="does not know"):
        read_facts(run, file)
    other, head = GaussianEvent(9.5, 2), read_facts(run).ledger.head
    budget.reserve("counts of may", [other], unit="patient")
    budget.reserve("1234abcd", [QUERY, TRAINING], unit="patient")
    budget.start("1234abcd")
    budget.settle("1234abcd", [QUERY, TRAINING], ledger_head=head)
    statement = write_statement(read_facts(run, file))
    found = statement.data_set
    assert found is not None and (found.name, found.releases, found.state) == ("the ward", 2, "settled")
    assert found.total.epsilon == 20.0 and found.counted.epsilon == budget.spent()
    assert found.counted.epsilon > statement.guarantee.epsilon
    text = said(section(statement, "other-releases"))
    assert f"epsilon {format_epsilon(budget.spent())} at delta 1e-06" in text and "2 releases" in text
    assert "knows of this run alone" not in " ".join(statement.residual_risks)
    with Ledger.open(run / "ledger.jsonl") as ledger:
        ledger.append_event(GaussianEvent(50.0, 1), note="one more")
    with pytest.raises(LedgerError, match="another ledger"):
        read_facts(run, file)
    seeded = make_run(tmp_path / "seeded", private=False)
    assert read_facts(seeded).data_set is None


def test_an_adaptive_run_is_told_as_one_and_bounded_by_its_filter_alone(tmp_path):
    facts = read_facts(make_run(tmp_path / "run"))
    fixed, adaptive = write_statement(facts), write_statement(dataclasses.replace(facts, adaptive=True))
    assert "fully adaptive filter" in said(section(adaptive, "parameters"))
    assert "fully adaptive filter" not in said(section(fixed, "parameters"))
    assert any("followed from what was released" in line for line in adaptive.assumptions)
    for loose, close in zip(adaptive.interpretation.rates, fixed.interpretation.rates, strict=True):
        assert loose.true_positive_rate >= close.true_positive_rate


def test_a_signature_is_named_and_not_vouched_for(tmp_path):
    run = make_run(tmp_path / "run")
    assert "Signature" not in said(section(write_statement(read_facts(run)), "security"))
    (run / "attestation.dsse.json").write_text("{}")
    assert "`synthward verify` checks it" in said(section(write_statement(read_facts(run)), "security"))


SELECTION = SelectionEvent((QUERY, TRAINING), 4.0, 0.0)
CHOICE = {
    "mean_trials": 4.0,
    "shape": 0.0,
    "grid": {"hidden": [64, 96], "max_grad_norm": [0.5, 0.75]},
    "score": 0.125,
}


def test_what_a_selection_chose_is_an_output_and_no_constant(tmp_path):
    facts = read_facts(make_run(tmp_path / "run", (SELECTION,), target=30.0, info={"selection": CHOICE}))
    bundle = write_documents(facts)
    constant, assumed = " ".join(bundle.statement.held_constant), " ".join(bundle.statement.assumptions)
    assert "settings.hidden 96" not in constant and "max_grad_norm 0.75" not in constant
    assert "hidden: 64, 96; max_grad_norm: 0.5, 0.75" in constant and "sample_rate 0.036" in constant
    assert "All settings but those that the charged selection chose" in assumed
    assert "0.125" in said(section(bundle.statement, "utility"))
    assert "the selection is charged" in said(section(bundle.statement, "side-channels"))
    card = " ".join(texts(bundle.model_card.model_dump(mode="json")))
    assert "settings.hidden: 96" in card and "settings.hidden, max_grad_norm" in card
    assert facts.units == NOISY_UNITS, "a query of the trial gave it, and the selection charges the trial"


def test_a_selection_that_was_not_charged_has_no_statement(tmp_path):
    with pytest.raises(LedgerError, match="selection"):
        read_facts(make_run(tmp_path / "run", info={"selection": CHOICE}))


def test_a_ledger_that_was_cut_short_has_no_statement(tmp_path):
    """The statement would tell less than what was spent; run.json keeps the hash of the last line."""
    run = make_run(tmp_path / "run")
    head = read_facts(run).ledger.head
    recorded = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(recorded | {"ledger_head": head}))
    assert read_facts(run).is_private
    ledger = run / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(LedgerError, match="head"):
        read_facts(run)


def test_a_budget_file_that_was_not_given_is_named(tmp_path):
    facts = read_facts(make_run(tmp_path / "run", info={"budget_id": "beefcafe"}))
    assert any("beefcafe" in line and "not given" in line for line in write_statement(facts).residual_risks)
