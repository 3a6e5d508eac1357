"""The ledger of a run: what was spent on the records, written and flushed before it is spent.

Append-only canonical JSON lines, each holding the SHA-256 of the line before (`synthward.engine.chain`). Training buys
steps in leases: one line covers many steps, and a lease that its process did not close is charged whole. A last line
that was torn is charged too, as far as it can be read, in a `recovered` line: it may have been flushed and cut later.
Reading a ledger runs no code: the kinds of lines and of events are closed sets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from synthward.engine.accounting import (
    Event,
    GaussianEvent,
    PoissonGaussianEvent,
    StepsEvent,
    epsilon_of,
    event_from_dict,
)
from synthward.engine.accounting.accountant import check_accountant
from synthward.engine.accounting.events import (
    ADD_OR_REMOVE_ONE,
    SelectionEvent,
    check_delta,
    check_epsilon,
    check_relation,
)
from synthward.engine.accounting.filter import RdpFilter
from synthward.engine.chain import Chain, Format, Line, is_count
from synthward.engine.charges import charge_of_torn, charges, check_goes_on, filter_for, open_lease
from synthward.engine.errors import (
    BudgetExceededError,
    ConfigError,
    LedgerError,
    UnsupportedOperationError,
)

_VERSION = 1
# Calibration meets a target to a few parts in 1e5; this covers only the rounding of a sum.
_SLACK = 1e-9
# More steps than any run takes; a number that arithmetic on floats still holds exactly.
_MOST_STEPS = 10**12
_HEADER = frozenset(
    {
        "version",
        "run_id",
        "unit",
        "relation",
        "delta",
        "accountant",
        "key_id",
        "private",
        "target_epsilon",
    }
)
_FORMAT = Format(
    noun="ledger",
    domain=b"synthward/ledger/v1\n",
    fields={
        "header": _HEADER,
        "event": frozenset({"event", "note"}),
        "lease": frozenset({"event", "first_step", "steps"}),
        "lease_close": frozenset({"used"}),
        "key": frozenset({"key_id", "private"}),
        "recovered": frozenset({"bytes", "digest", "event"}),
    },
    # `part`: which of several networks trained under one ledger a line is of; a key without one is the whole run's.
    optional={
        "header": frozenset({"filter"}),
        **{kind: frozenset({"part"}) for kind in ("lease", "lease_close", "key")},
    },
)


class Ledger:
    """One run's ledger. One process writes it at a time; `open` verifies every link.

    Guarantees: when a method that charges returns, its line is on the disk; `epsilon` never reports less than
    what was released; an append that would pass ``target_epsilon`` raises `BudgetExceededError` and writes
    nothing.

    The sum of an accountant holds for mechanisms that are fixed in advance: leases of one part are of one event. An
    adaptive ledger lets noise and rates follow from what was released, accounted by the filter (`RdpFilter`) that its
    header fixed, for its target.
    """

    def __init__(self, chain: Chain) -> None:
        self.path, self._chain, self._lines = chain.path, chain, chain.lines
        # Open leases of this process: steps taken of each part's.
        self._taken: dict[str, int] = {}
        self._parts = 0
        self._torn: Event | None = None
        # Parts whose key this process has named; None is the whole run's.
        self._keyed: set[str | None] = set()
        self._answered: set[Event] = set()
        fixed = self._lines[0].get("filter")
        self._filter = None if fixed is None else RdpFilter.from_dict(fixed)

    @classmethod
    def create(
        cls,
        path: Path | str,
        *,
        run_id: str,
        unit: str,
        delta: float,
        key_id: str,
        private: bool,
        target_epsilon: float | None = None,
        accountant: str | None = None,
        relation: str = ADD_OR_REMOVE_ONE,
        adaptive: bool = False,
        planned: Sequence[Event] = (),
    ) -> Ledger:
        """Start a ledger; an existing file is refused, so that no spend is ever reset.

        Args:
            accountant: "pld" (default), "rdp" or "prv".
            relation: which data sets are neighbours, "add_or_remove_one" or "replace_one".
            adaptive: noise and rates may be chosen during the run, within `target_epsilon`, by RDP.
            planned: of an adaptive ledger, what is expected; its filter costs least for such. By default one Gaussian
                mechanism that spends all.

        Raises:
            UnsupportedOperationError: an adaptive ledger with an accountant that has no valid filter.
        """
        check_delta(delta)
        if target_epsilon is not None:
            check_epsilon(target_epsilon)
        accountant = accountant or ("rdp" if adaptive else "pld")
        check_accountant(accountant)
        check_relation(relation)
        fixed = _fixed_filter(accountant, target_epsilon, delta, relation, planned) if adaptive else {}
        ledger = cls(
            Chain.create(
                path,
                _FORMAT,
                version=_VERSION,
                run_id=run_id,
                unit=unit,
                relation=relation,
                delta=delta,
                accountant=accountant,
                key_id=key_id,
                private=private,
                target_epsilon=target_epsilon,
                **fixed,
            )
        )
        ledger._keyed.add(None)
        return ledger

    @classmethod
    def open(cls, path: Path | str, *, expected_head: str | None = None, readonly: bool = False) -> Ledger:
        """Open and verify a ledger; `LedgerError` when a link is broken or ``expected_head`` is not in it."""
        ledger = cls(Chain.open(path, _FORMAT, _check_line, readonly=readonly, expected_head=expected_head))
        try:
            ledger._recover()
        except BaseException:
            ledger.close()
            raise
        return ledger

    @property
    def header(self) -> dict[str, Any]:
        """The first line: run, unit, relation, delta, accountant, key id, private or not, target."""
        return {k: self._lines[0][k] for k in _HEADER}

    @property
    def head(self) -> str:
        """Hash of the last line, hex."""
        return self._chain.head

    @property
    def lines(self) -> tuple[dict[str, Any], ...]:
        """All verified lines, oldest first."""
        return tuple(self._lines)

    @property
    def is_private(self) -> bool:
        """False when any key of the run came from a seed."""
        return all(line["private"] for line in self._lines if line["kind"] in ("header", "key"))

    @property
    def is_adaptive(self) -> bool:
        """Whether parameters may change during the run."""
        return self._filter is not None

    def holds(self, head: str) -> bool:
        """Whether ``head`` was this ledger's head at some time."""
        return self._chain.holds(head)

    def append_event(self, event: Event, *, note: str) -> None:
        """Charge one event; returns when it is on the disk."""
        self._check_answer(event)
        line = {"kind": "event", "event": event.to_dict(), "note": note}
        self._check_budget(line)
        self._chain.append(**line)

    def add_key(self, key_id: str, *, private: bool = True, part: str | None = None) -> None:
        """Note a fresh key, of a resumed run or of one part; a key that was used before is refused."""
        if self._taken if part is None else part in self._taken:
            raise LedgerError(f"{self.path}: close the lease before changing the key")
        used = {line["key_id"] for line in self._lines if line["kind"] in ("header", "key")}
        if key_id in used and private:
            raise LedgerError(f"{self.path}: this key was used before; noise would repeat")
        named = {} if part is None else {"part": part}
        self._chain.append("key", key_id=key_id, private=private, **named)
        self._keyed.add(part)

    def new_part(self) -> str:
        """A name for the leases of one more network; the first is the empty one. Each leases by itself, and all are
        charged here."""
        used = {line.get("part", "") for line in self._lines if line["kind"] == "lease"}
        while True:
            self._parts += 1
            part = "" if self._parts == 1 else str(self._parts)
            if part not in used:
                return part

    def lease(self, event: StepsEvent, first_step: int, steps: int, *, part: str = "") -> None:
        """Charge ``steps`` steps of ``event`` (one step's event) from logical step ``first_step`` on.

        Raises:
            LedgerError: a lease of this part is open, or a mechanism whose noise is correlated over steps does not go
                on where it stopped (it needs a fresh key, `add_key`).
            UnsupportedOperationError: noise, rate or strategy are not those of the part's first lease.
        """
        if not isinstance(event, StepsEvent):
            raise TypeError(f"lease: got {type(event).__name__}, expected the event of a step")
        if event.steps != 1 or not 1 <= steps <= _MOST_STEPS or first_step < 0:
            raise ValueError(
                "lease: expected the event of one step, at least one step, and a first step >= 0"
            )
        if part in self._taken:
            raise LedgerError(f"{self.path}: the lease before is still open")
        self._check_unchanged(event, part)
        self._check_whole(event, first_step, part)
        self._check_answer(event)
        line = {"kind": "lease", "event": event.to_dict(), "first_step": first_step, "steps": steps}
        line |= {"part": part} if part else {}
        self._check_budget(line)
        self._chain.append(**line)
        self._taken[part] = 0

    def close_lease(self, used_steps: int, *, part: str = "") -> None:
        """Give back what a lease of this process did not use; steps that `covers` let pass stay charged."""
        lease = open_lease(self._lines, part)
        if lease is None or part not in self._taken:
            raise LedgerError(f"{self.path}: this process has no open lease")
        if not (is_count(used_steps) and used_steps <= lease["steps"]):
            raise ValueError(f"used_steps: got {used_steps}, the lease holds {lease['steps']}")
        named = {"part": part} if part else {}
        self._chain.append("lease_close", used=max(used_steps, self._taken[part]), **named)
        del self._taken[part]

    def covers(self, step: int, event: StepsEvent, *, part: str = "") -> bool:
        """Whether an open lease of this process pays for logical step ``step`` of ``event`` (one step).

        A lease pays for each step once: True counts the step, and those before it, as taken, so that going
        back to a checkpoint and taking a step again needs a lease of its own.
        """
        lease = open_lease(self._lines, part)
        if lease is None or part not in self._taken or not self._chain.is_open:
            return False
        at = step - lease["first_step"]
        if not self._taken[part] <= at < lease["steps"] or event_from_dict(lease["event"]) != event:
            return False
        self._taken[part] = at + 1
        return True

    def events(self) -> list[Event]:
        """Everything charged so far; an unclosed lease counts whole."""
        return charges(self._lines, self._torn)

    def epsilon(self, delta: float | None = None, accountant: str | None = None) -> float:
        """Epsilon of all that was charged; at the ledger's own delta and accountant by default.

        Of an adaptive ledger: the filter's, which is held against the target. There is no other then.
        """
        return self._cost(self.events(), delta, accountant)

    def close(self) -> None:
        """Release the file; a lease that is open stays charged whole."""
        self._chain.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _cost(
        self, events: Sequence[Event], delta: float | None = None, accountant: str | None = None
    ) -> float:
        header = self._lines[0]
        delta = header["delta"] if delta is None else delta
        accountant = accountant or header["accountant"]
        if self._filter is None:
            return epsilon_of(events, delta, accountant, header["relation"])
        if (delta, accountant) != (header["delta"], header["accountant"]):
            raise ConfigError(
                f"{self.path}: is adaptive: its filter was fixed at delta {header['delta']:g} by RDP, and another sum "
                "is no bound"
            )
        return self._filter.epsilon(events)

    def _check_unchanged(self, event: StepsEvent, part: str) -> None:
        """Parameters that change may have been chosen from what was released; a sum does not hold for those."""
        if self.is_adaptive:
            if event.is_one_mechanism:
                raise UnsupportedOperationError(
                    f"{self.path}: is adaptive, and {event.kind!r} steps are one mechanism that is fixed in advance"
                )
            return
        first = next(
            (x for x in self._lines if x["kind"] == "lease" and x.get("part", "") == part),
            None,
        )
        if first is not None and event_from_dict(first["event"]) != event:
            raise UnsupportedOperationError(
                f"{self.path}: the leases before are of {_words(first['event'])}, this one of "
                f"{_words(event.to_dict())}; parameters that change during a run need the adaptive filter "
                "(Ledger.create(..., adaptive=True))"
            )

    def _check_whole(self, event: StepsEvent, first_step: int, part: str) -> None:
        if event.is_one_mechanism and not self._keyed & {None, part}:
            raise LedgerError(f"{self.path}: {event.kind!r} steps need a fresh key (add_key) in each process")
        try:
            check_goes_on(self._lines, event, first_step, part)
        except ValueError as error:
            raise LedgerError(f"{self.path}: this lease {error}") from None

    def _check_answer(self, event: Event) -> None:
        """Refuse an event whose cost this ledger could not tell: it would be known only after the release."""
        header = self._lines[0]
        is_plain = isinstance(event, PoissonGaussianEvent | GaussianEvent)
        if is_plain and header["relation"] == ADD_OR_REMOVE_ONE and header["accountant"] != "prv":
            return
        if isinstance(event, StepsEvent):
            event = event.with_steps(1)
        elif not isinstance(event, SelectionEvent):
            event = replace(event, count=1)
        if event not in self._answered:
            self._cost([event])
            self._answered.add(event)

    def _check_budget(self, line: Line) -> None:
        header = self._lines[0]
        target = header["target_epsilon"]
        if target is None:
            return
        after = self._cost(charges([*self._lines, line], self._torn))
        if after > target * (1.0 if self.is_adaptive else 1.0 + _SLACK):
            raise BudgetExceededError(
                f"{self.path}: this would spend epsilon {after:.6g} of {target:g} at delta "
                f"{header['delta']:g}; training stops here"
            )

    def _recover(self) -> None:
        """Charge the last line, which lost its end; on disk where this process may write."""
        torn = self._chain.torn
        if not torn:
            return
        event = charge_of_torn(torn, self._lines)
        if not self._chain.is_writable:
            self._torn = event
            return
        self._chain.replace_torn(
            "recovered",
            bytes=len(torn),
            digest=hashlib.sha256(torn).hexdigest(),
            event=None if event is None else event.to_dict(),
        )


def _check_line(before: Sequence[Line], line: Line) -> None:
    kind = line["kind"]
    if kind == "header":
        _check_header(line)
    if kind in ("event", "lease") or (kind == "recovered" and line["event"] is not None):
        event_from_dict(line["event"])
    if kind == "event" and not isinstance(line["note"], str):
        raise ValueError("has no note")
    if kind == "key":
        _check_key(line)
    if kind == "recovered" and not (is_count(line["bytes"]) and isinstance(line["digest"], str)):
        raise ValueError("stands for no torn line")
    if kind == "lease":
        _check_lease(before, line)
    if kind != "key" and "part" in line and not (isinstance(line["part"], str) and line["part"]):
        raise ValueError("names no part")
    if kind == "lease_close":
        lease = open_lease(before, line.get("part", ""))
        if lease is None or not (is_count(line["used"]) and line["used"] <= lease["steps"]):
            raise ValueError("closes no lease")


def _check_header(line: Line) -> None:
    if line["version"] != _VERSION:
        raise ValueError("is of another version")
    check_delta(line["delta"])
    check_accountant(line["accountant"])
    check_relation(line["relation"])
    if line["target_epsilon"] is not None:
        check_epsilon(line["target_epsilon"])
    if not all(isinstance(line[name], str) for name in ("run_id", "unit")):
        raise ValueError("names no run or no unit")
    if "filter" in line:
        fixed = RdpFilter.from_dict(line["filter"])
        if (fixed.delta, fixed.relation, "rdp") != (line["delta"], line["relation"], line["accountant"]):
            raise ValueError("has a filter of something else")
        if line["target_epsilon"] is None:
            raise ValueError("has a filter and no target")
    _check_key(line)


def _fixed_filter(
    accountant: str, target: float | None, delta: float, relation: str, planned: Sequence[Event]
) -> dict[str, Any]:
    """The header's field of an adaptive ledger."""
    if accountant != "rdp":
        raise UnsupportedOperationError(
            f"accountant: {accountant!r} is no bound where parameters are chosen during a run; an adaptive "
            "ledger needs 'rdp'"
        )
    if target is None:
        raise ConfigError("target_epsilon: is missing; an adaptive ledger guarantees a target, fixed before")
    return {"filter": filter_for(target, delta, relation, planned).to_dict()}


def _check_key(line: Line) -> None:
    if not isinstance(line["key_id"], str) or not isinstance(line["private"], bool):
        raise ValueError("names no key")
    if not isinstance(line.get("part", ""), str):
        raise ValueError("names no part")


def _check_lease(before: Sequence[Line], line: Line) -> None:
    event = event_from_dict(line["event"])
    if not isinstance(event, StepsEvent) or event.steps != 1:
        raise ValueError("leases something else than single steps")
    if not (is_count(line["steps"]) and 1 <= line["steps"] <= _MOST_STEPS and is_count(line["first_step"])):
        raise ValueError("leases no steps")
    check_goes_on(before, event, line["first_step"], line.get("part", ""))


def _words(event: dict[str, Any]) -> str:
    """An event in a message, without what would fill a page."""
    shown = {k: v for k, v in event.items() if k not in ("kind", "steps", "strategy")}
    return ", ".join([event["kind"], *(f"{k} {v}" for k, v in shown.items())])
