"""A whole `fit` under each mechanism: the ledger pays for what was run, within the target, also after a kill."""

from __future__ import annotations

import pytest

from synthward.engine import Ledger
from synthward.engine.accounting.events import (
    CorrelatedGaussianEvent,
    CyclicPoissonGaussianEvent,
    PoissonGaussianEvent,
    TruncatedPoissonGaussianEvent,
)
from synthward.engine.errors import ConfigError
from synthward.run import FitOptions, RunFolder, fit_run
from synthward.run.mechanism import Mechanism
from synthward.run.training import Training
from synthward.schema import load_schema
from tests.privacy.test_fit_artifacts import SCHEMA
from tests.tinydata import table, write_csv

EVENTS = {
    "independent": PoissonGaussianEvent,
    "banded": CyclicPoissonGaussianEvent,
    "blt": CorrelatedGaussianEvent,
    "banded-inverse": CorrelatedGaussianEvent,
}


def settings(tmp_path, **options):
    data = write_csv(tmp_path / "data.csv", table(60, 90))
    (tmp_path / "schema.toml").write_text(SCHEMA)
    fields = {"accountant": "rdp", "steps": 24, "holdout": 0.0, "sample_rate": 0.1, "bands": 4}
    return {
        "data": data,
        "schema": load_schema(tmp_path / "schema.toml"),
        "epsilon": 3.0,
        "delta": 1e-5,
        "out": tmp_path / "run",
        "options": FitOptions(**(fields | options)),
    }


def trained(folder):
    with Ledger.open(folder.ledger_path, readonly=True) as ledger:
        events = [event for event in ledger.events() if hasattr(event, "steps")]
        return events, ledger.epsilon()


@pytest.mark.slow
@pytest.mark.parametrize("noise", EVENTS)
def test_the_ledger_pays_for_the_noise_that_was_run(tmp_path, noise):
    folder = fit_run(**settings(tmp_path, noise=noise))
    events, epsilon = trained(folder)
    assert [type(event) for event in events] == [EVENTS[noise]]
    assert events[0].steps == 24 == folder.info["steps_taken"]
    assert 2.9 < epsilon <= 3.0
    mechanism = Mechanism.from_info(folder.info)
    assert mechanism.event(folder.info["noise_multiplier"], 24) == events[0]


@pytest.mark.slow
def test_batches_of_one_static_size_are_told_and_charged(tmp_path):
    folder = fit_run(**settings(tmp_path, max_units=80, accountant="pld"))
    events, epsilon = trained(folder)
    assert [type(event) for event in events] == [TruncatedPoissonGaussianEvent]
    assert 2.9 < epsilon <= 3.0
    info = folder.info
    room = Mechanism.from_info(info).head_room(info["noise_multiplier"], 24, 1e-5, "pld")
    assert room.max_batch_size == events[0].max_batch_size < 80
    assert room.cost < 0.02


def test_more_units_than_declared_spend_nothing(tmp_path):
    with pytest.raises(ConfigError, match="max_units"):
        fit_run(**settings(tmp_path, max_units=50, accountant="pld"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_discrete_arithmetic_fits(tmp_path):
    folder = fit_run(**settings(tmp_path, arithmetic="discrete", steps=5))
    events, epsilon = trained(folder)
    assert events == [Mechanism(0.1).event(folder.info["noise_multiplier"], 5)]
    assert folder.info["mechanism"]["arithmetic"] == "discrete" and epsilon <= 3.0


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["banded", "blt"])
def test_a_killed_run_of_correlated_noise_ends_within_its_budget(tmp_path, monkeypatch, noise):
    """The resumed process begins a mechanism of its own: both are charged, and the end may come a little early."""
    given = settings(tmp_path, noise=noise)
    step = Training._step
    taken = []

    def killed(self, number):
        if number == 9:
            raise KeyboardInterrupt
        taken.append(number)
        step(self, number)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("synthward.run.training.LEASE_STEPS", 6)
        patch.setattr(Training, "_step", killed)
        fit_run(**given)
    folder = fit_run(**given, resume=True)
    events, epsilon = trained(folder)
    assert len(events) == 2 and all(isinstance(event, EVENTS[noise]) for event in events)
    assert events[0].steps == 12, "two leases of six, the second of them lost"
    assert events[1].steps == folder.info["steps_taken"] - 12 <= 12
    assert epsilon <= 3.0
    assert RunFolder(given["out"]).is_complete


def test_options_that_do_not_go_together_are_one_line(tmp_path):
    for options, word in (
        ({"noise": "pink"}, "noise"),
        ({"noise": "banded", "bands": 0}, "bands"),
        ({"noise": "banded", "max_units": 80}, "max-units"),
        ({"noise": "blt", "arithmetic": "discrete"}, "arithmetic"),
        ({"arithmetic": "exact"}, "arithmetic"),
    ):
        with pytest.raises(ConfigError, match=word) as caught:
            fit_run(**settings(tmp_path, **options))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()
