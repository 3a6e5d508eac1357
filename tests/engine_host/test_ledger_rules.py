"""What a ledger charges where steps, queries, crashes and processes meet."""

from __future__ import annotations

import errno
import os

import pytest

from synthward.engine import Ledger
from synthward.engine.accounting import GaussianEvent, PoissonGaussianEvent
from synthward.engine.errors import LedgerError

STEP = PoissonGaussianEvent(0.1, 1.3, 1)
QUERY = GaussianEvent(5.0, 1)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def create(path):
    return Ledger.create(path, run_id="r", unit="patient", delta=1e-5, key_id="ab" * 16, private=True)


def reread(path):
    with Ledger.open(path) as ledger:
        return ledger.events()


def steps(count):
    return PoissonGaussianEvent(0.1, 1.3, count)


def test_a_query_in_the_middle_of_a_lease_leaves_a_ledger_that_opens(path):
    with create(path) as ledger:
        ledger.lease(STEP, 0, 10)
        ledger.append_event(QUERY, note="in the middle")
        ledger.close_lease(4)
        expected = ledger.events()
    assert reread(path) == expected
    assert set(expected) == {QUERY, steps(4)}


def test_a_lease_pays_for_a_step_once(path):
    """Going back to a checkpoint under an open lease: the repeated step is a second release."""
    with create(path) as ledger:
        ledger.lease(STEP, 0, 10)
        assert [ledger.covers(step, STEP) for step in (0, 1, 2)] == [True] * 3
        assert not ledger.covers(1, STEP)
        assert not ledger.covers(2, STEP)
        assert ledger.covers(3, STEP)


def test_steps_that_passed_stay_charged_whatever_the_closing_call_says(path):
    with create(path) as ledger:
        ledger.lease(STEP, 5, 10)
        for step in range(5, 9):
            assert ledger.covers(step, STEP)
        ledger.close_lease(1)
    assert reread(path) == [steps(4)]


def test_only_a_lease_that_this_process_opened_covers_steps(path):
    ledger = create(path)
    ledger.lease(STEP, 0, 10)
    ledger.close()
    assert not ledger.covers(0, STEP)
    with Ledger.open(path) as resumed:
        assert not resumed.covers(0, STEP)
        with pytest.raises(LedgerError):
            resumed.close_lease(0)


def test_a_forked_process_can_neither_use_nor_write_the_ledger(path):
    """Both would take the steps that one line pays for."""
    with create(path) as ledger:
        ledger.lease(STEP, 0, 10)
        ledger._chain._pid -= 1  # what a fork sees: another process opened it
        assert not ledger.covers(0, STEP)
        with pytest.raises(LedgerError, match="fork"):
            ledger.append_event(QUERY, note="")
    assert reread(path) == [steps(10)]


def test_a_key_is_not_changed_under_an_open_lease(path):
    with create(path) as ledger:
        ledger.lease(STEP, 0, 10)
        with pytest.raises(LedgerError, match="lease"):
            ledger.add_key("cd" * 16)


@pytest.mark.parametrize("readonly", [True, False])
def test_a_torn_lease_is_charged_whole(path, readonly):
    """Wherever it was cut behind its event; the number of steps lost, it counts as the longest before it."""
    with create(path) as ledger:
        ledger.lease(STEP, 0, 30)
        ledger.close_lease(10)
        ledger.lease(STEP, 10, 20)
    content = path.read_bytes()
    start = content.rindex(b'\n{"event"') + 1
    known = content.rindex(b'"steps":20,') + len(b'"steps":20,')
    readable = content.index(b"}", start) + 1
    for cut in [*range(readable, known, 29), *range(known, len(content))]:
        path.write_bytes(content[:cut])
        with Ledger.open(path, readonly=readonly) as ledger:
            assert ledger.events() == [steps(30 if cut >= known else 40)], f"cut at {cut}"
        assert readonly or reread(path) == ledger.events(), "charged once, also when opened again"


def test_a_torn_query_is_charged(path):
    with create(path) as ledger:
        ledger.append_event(QUERY, note='told "steps":7, and more')
    path.write_bytes(path.read_bytes()[:-3])
    assert reread(path) == [QUERY]
    assert reread(path) == [QUERY]


def test_a_torn_closing_line_gives_nothing_back(path):
    with create(path) as ledger:
        ledger.lease(STEP, 0, 30)
        ledger.close_lease(10)
    path.write_bytes(path.read_bytes()[:-1])
    assert reread(path) == [steps(30)]


@pytest.mark.parametrize("used", [2.5, True, -1, 11])
def test_a_count_of_used_steps_is_a_whole_number_within_the_lease(path, used):
    with create(path) as ledger:
        ledger.lease(STEP, 0, 10)
        with pytest.raises(ValueError, match="used_steps"):
            ledger.close_lease(used)
    assert reread(path) == [steps(10)]


def test_a_full_disk_charges_nothing_and_leaves_a_whole_ledger(path, monkeypatch):
    """Half of the line reaches the file, then the disk is full."""
    ledger = create(path)
    content, write = path.read_bytes(), os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[: len(data) // 2]))
    with pytest.raises(LedgerError, match="nothing was spent"):
        ledger.append_event(QUERY, note="")
    assert path.read_bytes() == content and ledger.events() == []
    monkeypatch.undo()
    ledger.append_event(QUERY, note="")
    ledger.close()
    assert reread(path) == [QUERY]


def test_a_ledger_that_could_not_be_begun_does_not_bar_the_next_attempt(path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LedgerError, match="No space left"):
        create(path)
    assert not path.exists()
    monkeypatch.undo()
    create(path).close()


def test_what_the_system_refuses_is_a_ledger_error(tmp_path):
    with pytest.raises(LedgerError, match="can not be opened"):
        Ledger.open(tmp_path)
    with pytest.raises(LedgerError, match="can not be written"):
        create(tmp_path / "missing" / "ledger.jsonl")
