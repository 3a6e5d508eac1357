"""Every query is in the ledger's file before its noise is drawn, and one that is not paid for has no answer."""

from __future__ import annotations

import json

import numpy as np
import pytest

from synthward.engine import KeySchedule, Ledger, QueryMechanism
from synthward.engine.accounting import ApproximateEvent, GaussianEvent
from synthward.engine.errors import BudgetExceededError, LedgerError
from tests.queries.asking import QUERIES, rows

TABLE = rows([0, 0, 1, 2], [0, 1, 2, 0], [5, 5, 6, 7], [1.0, 2.0, 3.0, np.nan], [True, True, False, True])


def create(path, **changes):
    return Ledger.create(
        path, run_id="r", unit="patient", delta=1e-5, key_id="ab" * 16, private=True, **changes
    )


def events_in(path):
    return [
        line["event"] for line in map(json.loads, path.read_text().splitlines()) if line["kind"] == "event"
    ]


def expected(query):
    gaussian = GaussianEvent(2.0, 1).to_dict()
    return [ApproximateEvent(0.0, 0.2, 1).to_dict(), gaussian] if "categories" in query else [gaussian]


@pytest.mark.parametrize("query", QUERIES)
def test_the_event_is_in_the_file_before_the_noise_is_drawn(query, tmp_path, monkeypatch):
    from synthward.engine.queries import mechanism as module

    path, seen, original = tmp_path / "ledger.jsonl", [], module.integer_noise

    def noise(*args, **settings):
        seen.append(events_in(path))
        return original(*args, **settings)

    monkeypatch.setattr(module, "integer_noise", noise)
    with create(path) as ledger:
        QUERIES[query](QueryMechanism(ledger, KeySchedule.from_os()), TABLE, 2.0)
    assert seen == [expected(query)]
    assert events_in(path) == expected(query), "nothing is charged after it, or twice"


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_beyond_the_budget_draws_no_noise(query, tmp_path, monkeypatch):
    from synthward.engine.queries import mechanism as module

    drawn = []
    monkeypatch.setattr(module, "integer_noise", lambda *args, **_: drawn.append(args))
    with create(tmp_path / "ledger.jsonl", target_epsilon=0.1) as ledger:
        asked = QueryMechanism(ledger, KeySchedule.from_os())
        with pytest.raises(BudgetExceededError):
            QUERIES[query](asked, TABLE, 2.0)
        assert ledger.epsilon() <= 0.1
    assert drawn == []


@pytest.mark.parametrize("query", QUERIES)
def test_a_closed_ledger_answers_nothing(query, tmp_path, monkeypatch):
    from synthward.engine.queries import mechanism as module

    drawn = []
    monkeypatch.setattr(module, "integer_noise", lambda *args, **_: drawn.append(args))
    ledger = create(tmp_path / "ledger.jsonl")
    ledger.close()
    with pytest.raises(LedgerError, match="closed"):
        QUERIES[query](QueryMechanism(ledger, KeySchedule.from_os()), TABLE, 2.0)
    assert drawn == []


def test_no_note_tells_anything_of_the_records(tmp_path):
    """Two very different tables leave the same lines, but for times and hashes."""
    lines = []
    for name, table in (("a", TABLE), ("b", rows([], [], [], [], []))):
        path = tmp_path / name
        with create(path) as ledger:
            asked = QueryMechanism(ledger, KeySchedule.from_os())
            for query in QUERIES.values():
                query(asked, table, 2.0)
        found = [json.loads(line) for line in path.read_text().splitlines()]
        lines.append([{k: v for k, v in line.items() if k in ("kind", "event", "note")} for line in found])
    assert lines[0] == lines[1]
