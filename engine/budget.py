"""The budget of a data set: what all releases from the same records may cost together.

One file beside the records, chained as a ledger is (`synthward.engine.chain`). Whoever releases something reserves what
it may cost first: a reservation that would pass the total is refused, before a record is read (a privacy filter). When
the release is done it is settled at what was really charged (a privacy odometer); one that never is counts whole. What
is reserved may depend on earlier releases, so the sum is that of the fully adaptive RDP filter whose orders and weights
the header fixed. Any number of processes may use the file at once.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from synthward.engine.accounting import Event, RdpFilter, event_from_dict
from synthward.engine.accounting.accountant import merge_events
from synthward.engine.accounting.events import (
    ADD_OR_REMOVE_ONE,
    check_delta,
    check_epsilon,
    check_relation,
    is_event,
)
from synthward.engine.chain import Chain, Format, Line, is_count
from synthward.engine.charges import filter_for
from synthward.engine.errors import BudgetExceededError, ConfigError, LedgerError

State = Literal["reserved", "started", "settled", "cancelled"]
_VERSION = 1
# Seconds to wait while another process writes its line.
_PATIENCE = 60.0
_FORMAT = Format(
    noun="budget file",
    domain=b"synthward/budget/v1\n",
    fields={
        "header": frozenset(
            {"version", "budget_id", "dataset", "unit", "relation", "epsilon", "delta", "filter"}
        ),
        "reserve": frozenset({"run_id", "events"}),
        "start": frozenset({"run_id"}),
        "settle": frozenset({"run_id", "events", "ledger_head"}),
        "cancel": frozenset({"run_id"}),
        "recovered": frozenset({"bytes", "digest"}),
    },
    unspent="nothing was reserved or spent",
)
# Of each kind of line, the states that it may follow (None: a run that the file does not know).
_AFTER: dict[str, set[str | None]] = {
    "reserve": {None, "reserved", "started", "cancelled"},
    "start": {"reserved", "started"},
    "settle": {"started"},
    "cancel": {"reserved"},
}
_STATES: dict[str, State] = {"start": "started", "settle": "settled", "cancel": "cancelled"}


@dataclass(frozen=True)
class Entry:
    """One release or run of a budget.

    Attributes:
        state: "reserved" (nothing was charged yet), "started", "settled" or "cancelled".
        events: what it counts as: all that it reserved, or once settled what it was charged.
        ledger_head: of a settled run, the last hash of its ledger, if it has one.
    """

    run_id: str
    state: State
    events: tuple[Event, ...]
    ledger_head: str | None = None


class DatasetBudget:
    """A budget file. Each method reads the file anew, so that an object never goes stale.

    One release goes: `reserve`, `start` just before the first record is touched by a mechanism, `settle`::

        budget = DatasetBudget(path)
        budget.reserve("counts of may", [GaussianEvent(10.0)], unit="patient")
        budget.start("counts of may")
        ...
        budget.settle("counts of may", [GaussianEvent(10.0)])

    Guarantees: a line is on the disk when its method returns; what all entries count as is within (epsilon, delta) if
    each settles at no more than it reserved.

    Raises:
        LedgerError: the file is missing, damaged or altered.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        with self._opened(readonly=True) as chain:
            self._header = chain.lines[0]

    @classmethod
    def create(
        cls,
        path: Path | str,
        *,
        epsilon: float,
        delta: float,
        unit: str,
        dataset: str = "",
        relation: str = ADD_OR_REMOVE_ONE,
        planned: Sequence[Event] = (),
    ) -> DatasetBudget:
        """Start a budget file; an existing one is refused.

        Args:
            epsilon, delta: the total for all releases.
            unit: whose data is protected; runs of another unit are refused.
            dataset: a name for the records, as public as the file.
            planned: what is expected to be released: the filter costs least for such. By default one Gaussian
                mechanism that spends all.
        """
        check_epsilon(epsilon)
        check_delta(delta)
        check_relation(relation)
        _check_name("unit", unit)
        Chain.create(
            path,
            _FORMAT,
            version=_VERSION,
            budget_id=secrets.token_hex(8),
            dataset=dataset,
            unit=unit,
            relation=relation,
            epsilon=float(epsilon),
            delta=float(delta),
            filter=filter_for(epsilon, delta, relation, planned).to_dict(),
        ).close()
        return cls(path)

    @property
    def header(self) -> dict[str, Any]:
        """dataset, unit, relation, epsilon, delta and filter."""
        return {k: self._header[k] for k in ("dataset", "unit", "relation", "epsilon", "delta", "filter")}

    @property
    def budget_id(self) -> str:
        """Names this file among all."""
        return str(self._header["budget_id"])

    def entries(self) -> list[Entry]:
        """All releases, in the order in which they were first reserved."""
        with self._opened(readonly=True) as chain:
            return list(_entries(chain.lines).values())

    def spent(self) -> float:
        """Epsilon of all entries at the file's delta; those that never settled count whole."""
        return self.cost(self.entries())

    def cost(self, entries: Sequence[Entry]) -> float:
        """Epsilon of these entries, by the file's filter at its delta."""
        return RdpFilter.from_dict(self._header["filter"]).epsilon(
            [event for entry in entries for event in entry.events]
        )

    @property
    def head(self) -> str:
        """Hash of the last line, hex."""
        with self._opened(readonly=True) as chain:
            return chain.head

    def reserve(
        self, run_id: str, events: Sequence[Event], *, unit: str, relation: str = ADD_OR_REMOVE_ONE
    ) -> None:
        """Set aside what a release may cost, before anything of it is read or spent.

        Again for a run that has not settled: what it has been charged so far and what is still to come takes the place
        of what was reserved before.

        Raises:
            BudgetExceededError: it would pass the total; nothing is written.
            ConfigError: a run of another unit or relation, or an event that the filter can not answer for.
            LedgerError: the run has settled, or was cancelled.
        """
        _check_name("run id", run_id)
        _check_events(events)
        for name, mine in (("unit", unit), ("relation", relation)):
            if mine != self._header[name]:
                raise ConfigError(
                    f"{self.path}: is a budget for {name} {self._header[name]!r}, this run has {mine!r}"
                )
        with self._opened() as chain:
            entries = _entries(chain.lines)
            self._check_order("reserve", run_id, entries)
            before = self.cost(list(entries.values()))
            known = entries.get(run_id)
            entries[run_id] = Entry(run_id, "reserved", tuple(events))
            kept = "nothing more is spent" if known else "nothing was read or spent"
            after, total = self.cost(list(entries.values())), self._header["epsilon"]
            if after > total:
                raise BudgetExceededError(
                    f"{self.path}: this would bring what is spent and reserved from epsilon {before:.6g} to "
                    f"{after:.6g} of {total:g} at delta {self._header['delta']:g} (by RDP, as releases here "
                    f"may depend on each other); {kept}"
                )
            chain.append("reserve", run_id=run_id, events=[e.to_dict() for e in merge_events(events)])

    def start(self, run_id: str) -> None:
        """Note that the run is about to be charged; from here on it can not be cancelled."""
        self._append("start", run_id)

    def settle(self, run_id: str, events: Sequence[Event], *, ledger_head: str | None = None) -> None:
        """Count the run at what it was really charged, whatever it had reserved.

        Args:
            events: all that the run's ledger holds.
            ledger_head: the ledger's last hash.
        """
        _check_events(events)
        charged = [event.to_dict() for event in merge_events(events)]
        self._append("settle", run_id, events=charged, ledger_head=ledger_head)

    def cancel(self, run_id: str) -> None:
        """Give back the reservation of a run that never started; `LedgerError` for any other."""
        self._append("cancel", run_id)

    def _append(self, kind: str, run_id: str, **fields: Any) -> None:
        with self._opened() as chain:
            self._check_order(kind, run_id, _entries(chain.lines))
            chain.append(kind, run_id=run_id, **fields)

    def _check_order(self, kind: str, run_id: str, entries: dict[str, Entry]) -> None:
        state = entries[run_id].state if run_id in entries else None
        if state not in _AFTER[kind]:
            raise LedgerError(
                f"{self.path}: run {run_id!r} {_said(state)}; it can not be {_STATES.get(kind, 'reserved')}"
            )

    @contextmanager
    def _opened(self, *, readonly: bool = False) -> Iterator[Chain]:
        chain = Chain.open(self.path, _FORMAT, _check_line, readonly=readonly, patience=_PATIENCE)
        try:
            if chain.torn and not readonly:
                digest = hashlib.sha256(chain.torn).hexdigest()
                chain.replace_torn("recovered", bytes=len(chain.torn), digest=digest)
            yield chain
        finally:
            chain.close()


def _entries(lines: Sequence[Line]) -> dict[str, Entry]:
    """Entries by run, as the lines leave them."""
    found: dict[str, Entry] = {}
    for line in lines[1:]:
        if line["kind"] == "recovered":
            # The torn line may have said that a run starts: none that is reserved can be cancelled any more.
            found = {k: replace(e, state="started") if e.state == "reserved" else e for k, e in found.items()}
            continue
        run_id, kind = line["run_id"], line["kind"]
        known = found.get(run_id)
        if kind in ("reserve", "settle"):
            events = tuple(event_from_dict(event) for event in line["events"])
        else:
            events = known.events if known and kind != "cancel" else ()
        state = _next_state(kind, known.state if known else None)
        found[run_id] = Entry(run_id, state, events, line.get("ledger_head"))
    return found


def _state(lines: Sequence[Line], run_id: str) -> State | None:
    """What the lines leave a run in; the same as `_entries`, without reading any event."""
    state: State | None = None
    for line in lines[1:]:
        if line["kind"] == "recovered":
            state = "started" if state == "reserved" else state
        elif line["run_id"] == run_id:
            state = _next_state(line["kind"], state)
    return state


def _next_state(kind: str, state: State | None) -> State:
    """A run that reserves anew stays started if it was."""
    return _STATES.get(kind) or ("started" if state == "started" else "reserved")


def _check_line(before: Sequence[Line], line: Line) -> None:
    kind = line["kind"]
    if kind == "header":
        _check_header(line)
    elif kind == "recovered":
        if not (is_count(line["bytes"]) and isinstance(line["digest"], str)):
            raise ValueError("stands for no torn line")
    else:
        _check_name("run id", line["run_id"])
        if kind in ("reserve", "settle"):
            if not isinstance(line["events"], list):
                raise ValueError("holds no events")
            for event in line["events"]:
                event_from_dict(event)
        if not isinstance(line.get("ledger_head", ""), str | None):
            raise ValueError("names no ledger")
        state = _state(before, line["run_id"])
        if state not in _AFTER[kind]:
            raise ValueError(f"does not follow: the run {_said(state)}")


def _check_header(line: Line) -> None:
    if line["version"] != _VERSION:
        raise ValueError("is of another version")
    check_epsilon(line["epsilon"])
    check_delta(line["delta"])
    check_relation(line["relation"])
    _check_name("unit", line["unit"])
    _check_name("budget id", line["budget_id"])
    if not isinstance(line["dataset"], str):
        raise ValueError("names no data set")
    found = RdpFilter.from_dict(line["filter"])
    if (found.delta, found.relation) != (line["delta"], line["relation"]):
        raise ValueError("has a filter for another delta or relation")


def _check_events(events: Sequence[Event]) -> None:
    for event in events:
        if not is_event(event):
            raise TypeError(f"events: got {type(event).__name__}, expected privacy events")


def _check_name(what: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{what}: got {str(value)[:80]!r}; give a name")


def _said(state: State | None) -> str:
    return "is not in it" if state is None else f"is {state} there"
