"""Progress: counts, rates and lines."""

from __future__ import annotations

import io

import pytest

from synthward.progress import BarProgress, LineProgress, NullProgress, make_progress


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def lines_of(steps: list[tuple[float, int]], total: int | None) -> list[str]:
    """Lines shown when, after each pause, so many items more are done."""
    clock, stream = Clock(), io.StringIO()
    task = LineProgress(stream, clock=clock).task("fit", total)
    for pause, count in steps:
        clock.now += pause
        task.advance(count, epsilon=0.5)
    task.close()
    task.close()
    return stream.getvalue().splitlines()


def test_lines_come_every_few_seconds_and_at_the_end():
    lines = lines_of([(0, 0), *[(1.0, 10)] * 12], 240)
    assert lines == [
        "fit: 50/240 (20%), 10/s, 0:00:19 left, epsilon 0.5",
        "fit: 100/240 (41%), 10/s, 0:00:14 left, epsilon 0.5",
        "fit: 120/240 (50%), 10/s, 0:00:12 taken, epsilon 0.5",
    ]


def test_a_resumed_task_does_not_count_what_was_done_before():
    [line] = lines_of([(0, 5000), (2.0, 4), (2.0, 4)], 6000)
    assert line.startswith("fit: 5,008/6,000 (83%), 2/s")


def test_the_rate_forgets_the_distant_past():
    lines = lines_of([(0, 0), *[(1.0, 100)] * 60, *[(1.0, 1)] * 60], None)
    assert ", 1/s" in lines[-1]


def test_an_open_end_has_no_time_left():
    lines = lines_of([(0, 0), *[(1.0, 10)] * 6], None)
    assert lines[0] == "fit: 50, 10/s, epsilon 0.5"


def test_nothing_done_divides_by_nothing():
    assert lines_of([], 0) == ["fit: 0/0 (0%), 0:00:00 taken"]
    assert lines_of([(0, 0), (6.0, 0)], 10)[0].startswith("fit: 0/10")


@pytest.mark.parametrize("total", [None, 10])
def test_work_that_broke_off_before_its_first_item_says_nothing(total):
    assert lines_of([(0, 0)], total) == lines_of([], total) == []
    stream = Terminal()
    with BarProgress(stream) as progress:
        progress.task("read", total).close()
    assert "read" not in stream.getvalue().split("\x1b[2K")[-1], "what stays on the screen"
    assert len(lines_of([(0, 3)], total)) == 1, "what was done is told"


def test_an_epsilon_is_rounded_up():
    stream = io.StringIO()
    task = LineProgress(stream).task("fit", 1)
    task.advance(1, epsilon=2.9712, loss_scale=2.9712)
    task.close()
    assert "epsilon 2.98" in stream.getvalue() and "loss_scale 2.97" in stream.getvalue()


@pytest.mark.parametrize(
    ("environment", "shows"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, True),
        ({"WORLD_SIZE": "2", "RANK": "1"}, False),
        ({"WORLD_SIZE": "1", "RANK": "0"}, True),
        ({"RANK": "3"}, True),
        ({}, True),
    ],
)
def test_of_several_processes_the_first_shows(monkeypatch, environment, shows):
    """A RANK without a WORLD_SIZE is of another launcher: the process works alone."""
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert isinstance(make_progress(io.StringIO()), LineProgress if shows else NullProgress)
    assert isinstance(make_progress(Terminal()), BarProgress if shows else NullProgress)


def test_at_counts_from_the_whole():
    task = NullProgress().task("read")
    task.at(10)
    task.at(25)
    assert task.done == 25


def test_a_file_gets_lines_and_a_terminal_bars():
    assert isinstance(make_progress(io.StringIO()), LineProgress)
    stream = Terminal()
    progress = make_progress(stream)
    assert isinstance(progress, BarProgress)
    with progress:
        task = progress.task("sample [rows]", 4)
        task.advance(4, epsilon=1.25)
        task.close()
        progress.note("half [way]")
    shown = stream.getvalue()
    assert "4/4 (100%)" in shown and "sample [rows]" in shown and "half [way]" in shown
