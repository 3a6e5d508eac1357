"""Model card and datasheet: the headings of their papers, filled from what the run recorded and nothing else."""

from __future__ import annotations

import json
import re

import pytest

from synthward.report import read_facts, render_documents, write_documents
from synthward.report.datasheet import write_datasheet
from synthward.report.modelcard import write_model_card
from synthward.report.numbers import format_epsilon
from tests.report.runs import NOISY_RECORDS, NOISY_UNITS, QUERY, TRAINING, make_run, texts, tiny_schema

MITCHELL_2019 = [
    "Model details", "Intended use", "Factors", "Metrics", "Evaluation data", "Training data",
    "Quantitative analyses", "Ethical considerations", "Caveats and recommendations",
]  # fmt: skip
GEBRU_2021 = [
    "Motivation", "Composition", "Collection process", "Preprocessing, cleaning, labeling", "Uses",
    "Distribution", "Maintenance",
]  # fmt: skip


@pytest.fixture
def facts(tmp_path):
    return read_facts(make_run(tmp_path / "run"))


def answers(card) -> dict[str, str | None]:
    return {
        f"{chapter.heading}/{entry.question}": entry.answer
        for chapter in card.chapters
        for entry in chapter.entries
    }


def every_text(facts) -> str:
    return " ".join(texts(json.loads(write_documents(facts).model_dump_json())))


def test_headings_are_those_of_the_papers(facts):
    assert [chapter.heading for chapter in write_model_card(facts).chapters] == MITCHELL_2019
    assert [chapter.heading for chapter in write_datasheet(facts).chapters] == GEBRU_2021


def test_cards_are_filled_from_the_run(facts):
    card, sheet = answers(write_model_card(facts)), answers(write_datasheet(facts))
    assert card["Model details/Model type"] == "diffusion"
    assert card["Model details/Model version"] == "run 1234abcd"
    assert card["Model details/Model date"].startswith("2026-11-25")
    assert "settings.hidden: 96" in card["Model details/Parameters and constraints"]
    assert card["Evaluation data/Datasets"].startswith("20 % of the units")
    for column in tiny_schema().modelled:
        assert column.name in card["Training data/Columns"]
        assert column.name in sheet["Composition/What data does each instance consist of?"]
    assert "30 to 180" in sheet["Composition/What data does each instance consist of?"]
    assert "outcome" in sheet["Composition/Is there a label or target associated with each instance?"]
    assert "weight, stage" in sheet["Composition/Is any information missing from individual instances?"]
    assert (
        "patient"
        in sheet[
            "Preprocessing, cleaning, labeling/Was any preprocessing/cleaning/labeling of the data done?"
        ]
    )
    assert (
        "sex" in card["Factors/Relevant factors"]
        and "first <= last" in card["Caveats and recommendations/Caveats"]
    )
    for text in (
        card["Ethical considerations/Mitigations"],
        card["Training data/Privacy guarantee for the training data"],
    ):
        assert f"({format_epsilon(facts.guarantee.epsilon)}, 1e-06)" in text and "patient" in text
        assert "add or remove one" in text


def test_what_the_run_did_not_record_is_left_to_a_person(facts, tmp_path):
    card = answers(write_model_card(facts))
    for question in ("Person or organization developing the model", "License"):
        assert card[f"Model details/{question}"] is None
    page = render_documents(write_documents(facts), tmp_path / "s.html").read_text()
    assert "not recorded by the run; to be added by a person" in page
    assert not re.search(r">\s*None\s*<", page)


def test_sizes_are_noisy_and_charged_or_not_told(facts, tmp_path):
    text = answers(write_model_card(facts))["Training data/Size"]
    assert (
        f"{round(NOISY_UNITS):,} units" in text
        and f"{round(NOISY_RECORDS):,} records" in text
        and "noisy" in text
    )
    for k, events in enumerate(((TRAINING,), ())):
        uncharged = read_facts(make_run(tmp_path / f"uncharged{k}", events))
        assert uncharged.units is None, "a number in the encoder that no query paid for is not public"
        assert f"{round(NOISY_UNITS):,}" not in " ".join(
            texts(json.loads(write_documents(uncharged).model_dump_json()))
        )
        assert "counts as private" in answers(write_model_card(uncharged))["Training data/Size"]


def test_no_count_and_no_salt_of_the_records_is_in_any_document(tmp_path):
    """run.json may hold what an older or another version wrote into it: only what is known to be public is taken."""
    telling = {
        "train_rows": 6318,
        "num_patients": 3159,
        "data": "/ward/records.csv",
        "loss": {"last": 0.123321},
    }
    run = make_run(tmp_path / "run", info=telling | {"settings": {"hidden": 96, "train_rows": 6318}})
    text = every_text(read_facts(run))
    for word in ("6318", "6,318", "3159", "3,159", "/ward", "0.1233", "tell-nobody"):
        assert word not in text
    assert "settings.hidden" in text


def test_a_part_that_did_not_happen_is_not_told(tmp_path):
    info = {"holdout": {"fraction": 0.0, "salt": "x"}, "generator": None}
    facts = read_facts(make_run(tmp_path / "run", (QUERY,), info=info))
    card, sheet = answers(write_model_card(facts)), answers(write_datasheet(facts))
    assert card["Evaluation data/Datasets"] == "None was set aside."
    assert card["Model details/Training algorithm"] is None and card["Model details/Model type"] is None
    assert sheet["Collection process/How was the data associated with each instance acquired?"] is None
    learned = "Preprocessing, cleaning, labeling/What did the preprocessing learn from the records?"
    assert "12 one-way histograms" in sheet[learned]
    trained = read_facts(make_run(tmp_path / "trained", (TRAINING,)))
    assert "Nothing was learned" in answers(write_datasheet(trained))[learned]
