"""The log of a run: lines that last, and what happens when they can not."""

from __future__ import annotations

import json
import math
import os
import re

import pytest

from synthward.engine.errors import PrivacyError
from synthward.observe import LOG_FILE, NullLog, RunLog
from synthward.observe.events import EVENTS
from tests.observe.lines import PROGRESS, lines


def unexpected(text: str) -> None:
    raise AssertionError(text)


def test_a_line_is_one_object_with_its_time(tmp_path):
    log = RunLog(tmp_path / LOG_FILE, unexpected)
    log.write("progress", **PROGRESS)
    log.write("checkpointed", step=50)
    log.close()
    log.close()
    assert lines(tmp_path) == [{"event": "progress", **PROGRESS}, {"event": "checkpointed", "step": 50}]
    time = json.loads((tmp_path / LOG_FILE).read_text().splitlines()[0])["time"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", time)


def test_a_line_is_on_the_file_before_the_next_step(tmp_path):
    log = RunLog(tmp_path / LOG_FILE, unexpected)
    log.write("checkpointed", step=50)
    assert len(lines(tmp_path)) == 1
    log.close()


def test_numbers_that_json_does_not_have(tmp_path):
    log = RunLog(tmp_path / LOG_FILE, unexpected)
    log.write("progress", **(PROGRESS | {"epsilon": math.inf, "parameter_norm": math.nan}))
    log.close()
    [line] = lines(tmp_path)
    assert line["epsilon"] == "inf" and line["parameter_norm"] is None


@pytest.mark.parametrize("torn", [b'{"time": "2026-01-01T0', b'{"event": "checkpointed"}'])
def test_a_torn_line_is_ended_and_kept(tmp_path, torn):
    file = tmp_path / LOG_FILE
    before = b'{"event": "leased"}\n' + torn
    file.write_bytes(before)
    for step in (1, 2):
        log = RunLog(file, unexpected)
        log.write("checkpointed", step=step)
        log.close()
    data = file.read_bytes()
    assert data.startswith(before + b"\n{")
    assert [json.loads(line)["step"] for line in data.splitlines()[2:]] == [1, 2]


def test_a_log_that_can_not_be_opened_is_told_once(tmp_path):
    said: list[str] = []
    (tmp_path / LOG_FILE).mkdir()
    log = RunLog(tmp_path / LOG_FILE, said.append)
    log.write("checkpointed", step=1)
    log.close()
    assert len(said) == 1 and LOG_FILE in said[0] and "goes on" in said[0]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")  # noqa: PTH110
def test_a_full_disk_is_told_once(tmp_path):
    said: list[str] = []
    (tmp_path / LOG_FILE).symlink_to("/dev/full")
    log = RunLog(tmp_path / LOG_FILE, said.append)
    for step in range(3):
        log.write("checkpointed", step=step)
    log.close()
    assert len(said) == 1 and "No space left" in said[0]


@pytest.mark.parametrize("make", [lambda path: NullLog(), lambda path: RunLog(path, unexpected)])
def test_ranks_that_write_nothing_refuse_the_same(tmp_path, make):
    log = make(tmp_path / LOG_FILE)
    with pytest.raises(PrivacyError, match="'loss' is no field of 'checkpointed' lines"):
        log.write("checkpointed", step=1, loss=0.5)
    log.close()


@pytest.mark.parametrize(
    ("name", "fields", "mention"),
    [
        ("losses", {"step": 1}, "'losses' is no line"),
        ("checkpointed", {}, "'step' of 'checkpointed' lines: Field required"),
        ("checkpointed", {"step": 1.5}, "'step'"),
        ("checkpointed", {"step": "1"}, "'step'"),
        ("checkpointed", {"step": True}, "'step'"),
        ("progress", PROGRESS | {"epsilon": [0.5]}, "'epsilon'"),
    ],
)
def test_a_line_of_another_kind_is_refused(tmp_path, name, fields, mention):
    log = RunLog(tmp_path / LOG_FILE, unexpected)
    with pytest.raises(PrivacyError, match=mention):
        log.write(name, **fields)
    log.close()
    assert (tmp_path / LOG_FILE).read_bytes() == b""


def test_no_value_is_open():
    """Numbers, flags and texts that are declared one by one: no mapping or list into which more would go."""
    leaf = {int, float, bool, str}
    for kind in EVENTS.values():
        for name, field in kind.model_fields.items():
            parts = getattr(field.annotation, "__args__", (field.annotation,))
            assert set(parts) <= {*leaf, type(None)} or (kind.__name__, name) == ("Started", "versions"), name
