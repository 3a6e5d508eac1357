"""What training tells, when, and to whom."""

from __future__ import annotations

import math

import pytest
import torch

from synthward.engine.errors import BudgetExceededError, ConfigError, DataError, UnsupportedOperationError
from synthward.observe import LOG_FILE, Observer, TrainingObserver
from synthward.observe.norms import ParameterNorms
from tests.observe.lines import INFO, Clock, lines, plan, train
from tests.observe.test_scalars import read


def observer(folder, clock, **options) -> TrainingObserver:
    return TrainingObserver(folder, **({"every": 5, "clock": clock, "remark": pytest.fail} | options))


def parameters() -> list[torch.nn.Parameter]:
    frozen = torch.nn.Parameter(torch.full((3,), 100.0), requires_grad=False)
    return [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(10)), frozen]


def test_the_course_of_a_run(tmp_path):
    clock = Clock()
    train(observer(tmp_path, clock), clock, parameters()[:2])
    found = lines(tmp_path)
    assert [line["event"] for line in found] == [
        "started",
        "leased",
        *["progress"] * 3,
        "checkpointed",
        "finished",
    ]
    begun, shown = found[0], found[2:5]
    assert begun["steps"] == 12 and begun["run_id"] == INFO["run_id"] and begun["world_size"] == 1
    assert begun["versions"]["torch"] == torch.__version__ and "num_rows" not in begun
    assert [line["step"] for line in shown] == [5, 10, 12]
    assert [line["steps_per_second"] for line in shown] == [2.0, 2.0, 2.0]
    assert [line["seconds_left"] for line in shown] == [4, 1, 0]
    assert [line["epsilon"] for line in shown] == pytest.approx([0.5, 1.0, 1.2])
    # 16 entries, which are the sum of the steps' numbers.
    assert [line["parameter_norm"] for line in shown] == pytest.approx([4 * 15, 4 * 55, 4 * 78])
    assert [line["update_norm"] for line in shown] == pytest.approx([4 * 5, 4 * 10, 4 * 12])
    assert found[-1] == {"event": "finished", "step": 12, "epsilon": 1.2, "seconds": 6}


def test_a_rate_is_over_many_steps(tmp_path):
    """One of fewer than lie between two lines would tell of single draws."""
    clock = Clock()
    train(observer(tmp_path, clock), clock, parameters(), first=3)
    shown = [line for line in lines(tmp_path) if line["event"] == "progress"]
    assert [(line["step"], line["steps_per_second"]) for line in shown] == [(5, None), (10, 2.0), (12, 2.0)]
    assert shown[0]["seconds_left"] is None


def test_a_run_that_goes_on_adds_to_its_log(tmp_path):
    clock = Clock()
    for first in (0, 5):
        train(observer(tmp_path, clock, resumed=first > 0), clock, parameters(), first=first)
    found = [line["event"] for line in lines(tmp_path) if line["event"] in ("started", "resumed", "finished")]
    assert found == ["started", "finished", "resumed", "finished"]


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    """And look at no parameter, unless the parameters are in pieces."""
    monkeypatch.setattr(ParameterNorms, "parameters", pytest.fail)
    clock = Clock()
    train(observer(tmp_path, clock, is_main=False, tensorboard=tmp_path / "tb"), clock, parameters())
    assert list(tmp_path.iterdir()) == []


def test_scalars_are_those_of_the_log(tmp_path):
    clock = Clock()
    train(observer(tmp_path, clock, tensorboard=tmp_path / "tb", clip_bound=lambda: 0.5), clock, parameters())
    shown = [line for line in lines(tmp_path) if line["event"] == "progress"]
    found = read(tmp_path / "tb")
    assert found["privacy/clip_bound"] == [(5, 0.5), (10, 0.5), (12, 0.5)]
    for name in ("parameter_norm", "update_norm", "learning_rate"):
        expected = [(line["step"], pytest.approx(line[name])) for line in shown]
        assert found[f"training/{name}"] == expected


QUOTED = "row 17: '1931-02-03' is no number"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (BudgetExceededError("nothing is left\nof 3.0"), "nothing is left of 3.0"),
        (DataError(QUOTED), None),
        (ConfigError(QUOTED), None),
        (UnsupportedOperationError(QUOTED), None),
        (RuntimeError(QUOTED), None),
        (KeyboardInterrupt(), None),
    ],
)
def test_an_error_is_told_without_what_it_may_quote(tmp_path, error, message):
    with pytest.raises(type(error)), observer(tmp_path, Clock()) as watched:
        watched.started(INFO, plan(), parameters(), step=0)
        raise error
    assert lines(tmp_path)[-1] == {"event": "stopped", "error": type(error).__name__, "message": message}
    assert "1931" not in (tmp_path / LOG_FILE).read_text()


def test_the_observer_of_nothing_takes_the_same(tmp_path):
    with Observer() as silent:
        pass
    silent.started(INFO, plan(), parameters(), step=0)
    silent.leased(0, 5)
    silent.stepped(1, 0.1, 1e-3)
    silent.checkpointed(1)
    silent.finished(1, 0.1)
    silent.failed(ConfigError("no"))


def test_a_copy_that_is_too_large_is_not_made(monkeypatch):
    norms = ParameterNorms(parameters())
    norms.remember()
    assert norms.update() == 0.0 and norms.update() is None
    monkeypatch.setattr("synthward.observe.norms.MOST_COPIED", 15)
    norms.remember()
    assert norms.update() is None


def test_norms_of_half_precision_are_taken_in_double():
    many = ParameterNorms([torch.nn.Parameter(torch.full((70_000,), 300.0, dtype=torch.float16))])
    assert many.parameters() == pytest.approx(300.0 * math.sqrt(70_000), rel=1e-12)
    assert ParameterNorms([]).parameters() == 0.0
