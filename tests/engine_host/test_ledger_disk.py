"""What a ledger is after a power cut: bytes that were not flushed are gone, and nothing was released on them."""

from __future__ import annotations

import datetime
import os
import shutil

import pytest

from synthward.engine import Ledger, chain
from synthward.engine.accounting import GaussianEvent, PoissonGaussianEvent
from synthward.engine.errors import LedgerError

STEP, QUERY = PoissonGaussianEvent(0.1, 1.3, 1), GaussianEvent(5.0, 1)


class Disk:
    """Keeps of a file what was flushed; `crash` gives what a power cut may leave, by how many bytes more it kept."""

    def __init__(self, path, monkeypatch):
        self.path, self.durable = path, b""
        flush = os.fsync

        def fsync(descriptor):
            flush(descriptor)
            if path.exists() and self._is_ours(descriptor):
                self.durable = path.read_bytes()

        monkeypatch.setattr(os, "fsync", fsync)

    def _is_ours(self, descriptor):
        found, ours = os.fstat(descriptor), self.path.stat()
        return (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino)

    def crash(self, to, kept):
        written = self.path.read_bytes()
        more = written[len(self.durable) :][:kept] if written.startswith(self.durable) else b""
        to.write_bytes(self.durable + more)
        return to


def charged(path):
    with Ledger.open(path, readonly=True) as ledger:
        events = ledger.events()
    steps = sum(e.steps for e in events if isinstance(e, PoissonGaussianEvent))
    return steps, sum(e.count for e in events if isinstance(e, GaussianEvent))


def spend(path, after):
    """A run's worth of charges; calls `after` with what was released, after each release."""
    ledger = Ledger.create(path, run_id="r", unit="patient", delta=1e-5, key_id="00" * 16, private=True)
    steps = queries = 0
    with ledger:
        for first in (0, 7):
            ledger.append_event(QUERY, note="")
            queries += 1
            after(steps, queries)
            ledger.lease(STEP, first, 10)
            for step in range(first, first + 7):
                assert ledger.covers(step, STEP)
                steps += 1
                after(steps, queries)
            ledger.close_lease(7)
            after(steps, queries)


def test_a_power_cut_at_any_moment_loses_nothing_that_was_released(tmp_path, monkeypatch):
    path, seen = tmp_path / "ledger.jsonl", 0
    disk = Disk(path, monkeypatch)

    def cut(steps, queries):
        nonlocal seen
        for kept in (0, 1, 40, 10_000):
            left = charged(disk.crash(tmp_path / "left.jsonl", kept))
            assert left[0] >= steps and left[1] >= queries, (steps, queries, kept)
            seen += 1

    spend(path, cut)
    assert seen == 72


def test_the_disk_of_these_tests_would_show_a_missing_flush(tmp_path, monkeypatch):
    disk = Disk(tmp_path / "ledger.jsonl", monkeypatch)
    monkeypatch.setattr(chain, "_write", os.write)
    lost = []

    def cut(steps, queries):
        try:
            lost.append(charged(disk.crash(tmp_path / "left.jsonl", 0)) < (steps, queries))
        except LedgerError:
            lost.append(True)

    spend(tmp_path / "ledger.jsonl", cut)
    assert any(lost)


def test_a_power_cut_while_a_torn_line_is_replaced(tmp_path, monkeypatch):
    """The torn line or the one in its place, whatever part of it was written: both are charged."""
    path = tmp_path / "ledger.jsonl"
    with Ledger.create(path, run_id="r", unit="p", delta=1e-5, key_id="00" * 16, private=True) as ledger:
        ledger.lease(STEP, 0, 9)
        ledger.close_lease(9)
        ledger.lease(STEP, 9, 9)
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, len(whole) - 1) + 1
    torn = path.read_bytes()[:-4]
    path.write_bytes(torn)
    Ledger.open(path).close()
    replaced = path.read_bytes()
    for written in range(0, len(replaced) - start, 13):
        mixed = replaced[: start + written] + torn[start + written :]
        left = tmp_path / "left.jsonl"
        left.write_bytes(mixed)
        try:
            assert charged(left)[0] >= 9, written
        except LedgerError:
            continue
    assert charged(path)[0] == 18


def test_a_disk_that_can_take_nothing_back_closes_the_ledger(tmp_path, monkeypatch):
    """The write failed and so did cutting it off: this process writes no more, the next one charges what is there."""

    def broken(*_):
        raise OSError(5, "Input/output error")

    path = tmp_path / "ledger.jsonl"
    ledger = Ledger.create(path, run_id="r", unit="p", delta=1e-5, key_id="00" * 16, private=True)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", broken)
        patched.setattr(os, "ftruncate", broken)
        with pytest.raises(LedgerError, match="nothing was spent"):
            ledger.lease(STEP, 0, 5)
    assert not ledger.covers(0, STEP)
    with pytest.raises(LedgerError, match="closed"):
        ledger.append_event(QUERY, note="")
    assert charged(path) == (5, 0)


def test_a_clock_that_was_set_back_changes_nothing(tmp_path, monkeypatch):
    class Earlier(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz) - datetime.timedelta(days=4000)

    path = tmp_path / "ledger.jsonl"
    with Ledger.create(path, run_id="r", unit="p", delta=1e-5, key_id="00" * 16, private=True) as ledger:
        ledger.lease(STEP, 0, 5)
        monkeypatch.setattr(datetime, "datetime", Earlier)
        ledger.close_lease(3)
        ledger.append_event(QUERY, note="")
    assert charged(path) == (3, 1)
    with Ledger.open(path) as ledger:
        assert ledger.lines[-1]["time"] < ledger.lines[0]["time"]
        ledger.lease(STEP, 3, 5)
    assert charged(path) == (8, 1)


def test_an_older_copy_put_back_is_refused_by_its_head(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with Ledger.create(path, run_id="r", unit="p", delta=1e-5, key_id="00" * 16, private=True) as ledger:
        old = shutil.copy(path, tmp_path / "old.jsonl")
        ledger.lease(STEP, 0, 5)
        head = ledger.head
        ledger.close_lease(5)
        assert ledger.holds(head)
    shutil.copy(old, path)
    with pytest.raises(LedgerError, match="expected head"):
        Ledger.open(path, expected_head=head)


def test_an_empty_file_is_no_ledger_yet(tmp_path):
    """What a process leaves that was killed between making the file and its first line."""
    path = tmp_path / "ledger.jsonl"
    path.touch()
    with pytest.raises(LedgerError, match="is not a ledger"):
        Ledger.open(path)
    Ledger.create(path, run_id="r", unit="p", delta=1e-5, key_id="00" * 16, private=True).close()
    assert charged(path) == (0, 0)
