"""`synthward account`: relations and ways of sampling, solving, and one line for what is no mechanism."""

from __future__ import annotations

import json

import pytest

from synthward.cli import main
from synthward.engine.accounting import (
    CyclicPoissonGaussianEvent,
    GaussianEvent,
    PoissonGaussianEvent,
    TruncatedPoissonGaussianEvent,
    epsilon_of,
)


@pytest.fixture
def call(capsys):
    """`synthward account ...` in this process: (code, stdout, stderr)."""

    def invoke(*arguments):
        capsys.readouterr()
        code = main(["account", *map(str, arguments)])
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return invoke


def answer(outcome):
    code, out, _ = outcome
    assert code == 0, outcome
    return json.loads(out)


STEP = ("--noise-multiplier", 1.5, "--sample-rate", 0.02, "--steps", 50, "--delta", 1e-5)
TRUNCATED = ("--sampling", "truncated", "--max-units", 2000)


def test_the_contract_s_fields(call):
    code, out, errors = call(*STEP, "--json")
    found = json.loads(out)
    assert (code, errors, out.count("\n")) == (0, "", 1)
    fields = {"epsilon", "delta", "noise_multiplier", "sample_rate", "steps", "accountant"}
    assert fields | {"relation", "sampling"} == set(found)
    assert found["epsilon"] == epsilon_of([PoissonGaussianEvent(0.02, 1.5, 50)], 1e-5)
    assert (found["relation"], found["sampling"]) == ("add_or_remove_one", "poisson")


def test_replacing_a_unit_costs_more(call):
    found = answer(call(*STEP, "--relation", "replace_one", "--json"))
    assert found["relation"] == "replace_one"
    expected = epsilon_of([PoissonGaussianEvent(0.02, 1.5, 50)], 1e-5, "pld", "replace_one")
    assert found["epsilon"] == expected > epsilon_of([PoissonGaussianEvent(0.02, 1.5, 50)], 1e-5)


def test_without_a_cap_one_with_head_room_is_chosen_and_told(call):
    code, out, errors = call(*STEP, *TRUNCATED, "--json")
    found = answer((code, out, errors))
    assert found["max_batch_size"] >= 40 + 4.5 * 40**0.5
    assert 0 <= found["truncation_cost"] < 0.01
    event = TruncatedPoissonGaussianEvent(0.02, 1.5, 50, found["max_batch_size"], 2000)
    assert found["epsilon"] == epsilon_of([event], 1e-5)
    assert "head-room" in errors and str(found["max_batch_size"]) in errors and errors.count("\n") == 1


def test_a_cap_that_costs_much_is_told(call):
    code, out, errors = call(*STEP, *TRUNCATED, "--max-batch-size", 52, "--json")
    found = answer((code, out, errors))
    assert found["max_batch_size"] == 52 and found["truncation_cost"] > 0.01
    assert "--max-batch-size of 69 or more costs less" in errors


@pytest.mark.parametrize("name", ["--period", "--bands"])
def test_banded_noise_is_charged_by_rounds(call, name):
    found = answer(call(*STEP, "--sampling", "cyclic", name, 4, "--json"))
    assert found["epsilon"] == epsilon_of([CyclicPoissonGaussianEvent(0.02, 1.5, 4, 50)], 1e-5)
    assert found["period"] == 4


def test_no_sampling_is_one_gaussian(call):
    found = answer(
        call("--sampling", "none", "--noise-multiplier", 20, "--steps", 50, "--delta", 1e-5, "--json")
    )
    assert found["epsilon"] == pytest.approx(epsilon_of([GaussianEvent(20.0, 50)], 1e-5), rel=1e-6)
    assert found["sample_rate"] == 1.0


SOLVED = [
    ("noise_multiplier", ("--sample-rate", 0.02, "--steps", 50, *TRUNCATED, "--accountant", "rdp")),
    ("steps", ("--sample-rate", 0.02, "--noise-multiplier", 1.5, *TRUNCATED)),
    (
        "sample_rate",
        ("--noise-multiplier", 1.5, "--steps", 50, *TRUNCATED, "--max-batch-size", 80),
    ),
    ("noise_multiplier", ("--sample-rate", 0.02, "--steps", 50, "--sampling", "cyclic", "--period", 4)),
    ("noise_multiplier", ("--steps", 50, "--sampling", "none", "--relation", "replace_one")),
    ("steps", ("--noise-multiplier", 20, "--sampling", "none")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), SOLVED)
def test_a_target_is_met_from_below_in_every_way_of_sampling(call, name, options):
    found = answer(call("--target-epsilon", 1.5, "--delta", 1e-5, *options, "--json"))
    assert found["epsilon"] <= 1.5
    assert found["epsilon"] > (1.3 if name == "steps" else 1.499) or found.get("truncation_cost") == 0.0
    assert found[name] > 0


REFUSED = [
    (STEP[:-2], "--delta"),
    ((*STEP, "--relation", "swap"), "swap"),
    ((*STEP, "--relation", "replace_one", "--accountant", "rdp"), "replace_one"),
    ((*STEP, "--sampling", "shuffled"), "not amplified"),
    ((*STEP, "--sampling", "none"), "--sample-rate"),
    ((*STEP, "--sampling", "truncated"), "--max-units"),
    ((*STEP, "--sampling", "cyclic"), "--period"),
    ((*STEP, "--sampling", "cyclic", "--period", 0), "--period"),
    ((*STEP, "--sampling", "cyclic", "--bands", 0), "--bands"),
    ((*STEP, "--sampling", "cyclic", "--bands", 4, "--period", 4), "--bands: is another name of --period"),
    ((*STEP, "--period", 4), "--period: has no meaning"),
    ((*STEP, "--bands", 4), "--bands: has no meaning"),
    ((*STEP, "--max-units", 100), "--max-units: has no meaning"),
    ((*STEP, *TRUNCATED, "--max-batch-size", 41), "at least 69"),
    ((*STEP, *TRUNCATED, "--accountant", "prv"), "truncated_poisson_gaussian"),
    ((*STEP[:2], *STEP[4:], *TRUNCATED, "--target-epsilon", 1), "--max-batch-size"),
    ((*STEP[:-1], "nan"), "delta"),
]


@pytest.mark.parametrize(("options", "mention"), REFUSED)
def test_what_is_no_mechanism_is_one_line(call, options, mention):
    code, out, errors = call(*options, "--json")
    assert code == 2 and not out
    assert errors.startswith("synthward: error: ") and errors.count("\n") == 1
    assert mention in errors
