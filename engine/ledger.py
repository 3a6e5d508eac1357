"""The ledger of a run: what was spent on the records, written and flushed before it is spent.

Append-only canonical JSON lines, each holding the SHA-256 of the line before. Training buys steps in leases:
one line covers many steps, and a lease that its process did not close is charged whole. A last line that was
torn is charged too, as far as it can be read, in a `recovered` line: it may have been flushed and cut later.
Reading a ledger runs no code: the kinds of lines and of events are closed sets.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from synthward.engine.accounting import Event, PoissonGaussianEvent, epsilon_of, event_from_dict
from synthward.engine.accounting.accountant import ACCOUNTANTS, merge_events
from synthward.engine.accounting.events import check_delta, check_epsilon
from synthward.engine.chain import Chain, Format, Line, is_count
from synthward.engine.errors import BudgetExceededError, ConfigError, LedgerError

_VERSION = 1
# Calibration meets a target to a few parts in 1e5; this covers only the rounding of a sum.
_SLACK = 1e-9
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
    # Which of several networks trained under one ledger a lease is of.
    optional={"lease": frozenset({"part"}), "lease_close": frozenset({"part"})},
)


class Ledger:
    """One run's ledger. One process writes it at a time; `open` verifies every link.

    Guarantees: when a method that charges returns, its line is on the disk; `epsilon` never reports less than
    what was released; an append that would pass ``target_epsilon`` raises `BudgetExceededError` and writes
    nothing.
    """

    def __init__(self, chain: Chain) -> None:
        self.path, self._chain, self._lines = chain.path, chain, chain.lines
        # Open leases of this process: steps taken of each part's.
        self._taken: dict[str, int] = {}
        self._parts = 0
        self._torn: Event | None = None

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
        accountant: str = "pld",
    ) -> Ledger:
        """Start a ledger; an existing file is refused, so that no spend is ever reset."""
        check_delta(delta)
        if target_epsilon is not None:
            check_epsilon(target_epsilon)
        if accountant not in ACCOUNTANTS:
            raise ConfigError(f"accountant: got {accountant!r}; choose one of {', '.join(ACCOUNTANTS)}")
        return cls(
            Chain.create(
                path,
                _FORMAT,
                version=_VERSION,
                run_id=run_id,
                unit=unit,
                relation="add_or_remove_one",
                delta=delta,
                accountant=accountant,
                key_id=key_id,
                private=private,
                target_epsilon=target_epsilon,
            )
        )

    @classmethod
    def open(cls, path: Path | str, *, expected_head: str | None = None, readonly: bool = False) -> Ledger:
        """Open and verify a ledger; `LedgerError` when a link is broken or ``expected_head`` is not in it."""
        chain = Chain.open(path, _FORMAT, _check_line, readonly=readonly, expected_head=expected_head)
        ledger = cls(chain)
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

    def append_event(self, event: Event, *, note: str) -> None:
        """Charge one event; returns when it is on the disk."""
        self._check_budget([event])
        self._chain.append("event", event=event.to_dict(), note=note)

    def add_key(self, key_id: str, *, private: bool = True) -> None:
        """Note the fresh key of a resumed run; a key that was used before is refused."""
        if self._taken:
            raise LedgerError(f"{self.path}: close the lease before changing the key")
        used = {line["key_id"] for line in self._lines if line["kind"] in ("header", "key")}
        if key_id in used and private:
            raise LedgerError(f"{self.path}: this key was used before; noise would repeat")
        self._chain.append("key", key_id=key_id, private=private)

    def new_part(self) -> str:
        """A name for the leases of one more network; the first is the empty one. Each leases by itself, and all are
        charged here."""
        self._parts += 1
        return "" if self._parts == 1 else str(self._parts)

    def lease(self, event: PoissonGaussianEvent, first_step: int, steps: int, *, part: str = "") -> None:
        """Charge ``steps`` steps of ``event`` (one step's event) from logical step ``first_step`` on."""
        if event.steps != 1 or steps < 1 or first_step < 0:
            raise ValueError(
                "lease: expected the event of one step, at least one step, and a first step >= 0"
            )
        if part in self._taken:
            raise LedgerError(f"{self.path}: the lease before is still open")
        whole = PoissonGaussianEvent(event.sample_rate, event.noise_multiplier, steps)
        self._check_budget([whole])
        named = {"part": part} if part else {}
        self._chain.append("lease", event=event.to_dict(), first_step=first_step, steps=steps, **named)
        self._taken[part] = 0

    def close_lease(self, used_steps: int, *, part: str = "") -> None:
        """Give back what a lease of this process did not use; steps that `covers` let pass stay charged."""
        lease = _open_lease(self._lines, part)
        if lease is None or part not in self._taken:
            raise LedgerError(f"{self.path}: this process has no open lease")
        if not (is_count(used_steps) and used_steps <= lease["steps"]):
            raise ValueError(f"used_steps: got {used_steps}, the lease holds {lease['steps']}")
        named = {"part": part} if part else {}
        self._chain.append("lease_close", used=max(used_steps, self._taken[part]), **named)
        del self._taken[part]

    def covers(self, step: int, event: PoissonGaussianEvent, *, part: str = "") -> bool:
        """Whether an open lease of this process pays for logical step ``step`` of ``event`` (one step).

        A lease pays for each step once: True counts the step, and those before it, as taken, so that going
        back to a checkpoint and taking a step again needs a lease of its own.
        """
        lease = _open_lease(self._lines, part)
        if lease is None or part not in self._taken or not self._chain.is_open:
            return False
        at = step - lease["first_step"]
        if not self._taken[part] <= at < lease["steps"] or event_from_dict(lease["event"]) != event:
            return False
        self._taken[part] = at + 1
        return True

    def events(self) -> list[Event]:
        """Everything charged so far; an unclosed lease counts whole."""
        charged: list[Event] = []
        lease_at: dict[str, int] = {}
        for line in self._lines:
            if line["kind"] == "event" or (line["kind"] == "recovered" and line["event"] is not None):
                charged.append(event_from_dict(line["event"]))
            elif line["kind"] == "lease":
                lease_at[line.get("part", "")] = len(charged)
                charged.append(_steps_of(line["event"], line["steps"]))
            elif line["kind"] == "lease_close":
                at = lease_at[line.get("part", "")]
                charged[at] = _steps_of(charged[at].to_dict(), line["used"])
        if self._torn is not None:
            charged.append(self._torn)
        return merge_events(charged)

    def epsilon(self, delta: float | None = None, accountant: str | None = None) -> float:
        """Epsilon of all that was charged; at the ledger's own delta and accountant by default."""
        header = self._lines[0]
        return epsilon_of(
            self.events(), header["delta"] if delta is None else delta, accountant or header["accountant"]
        )

    def close(self) -> None:
        """Release the file; a lease that is open stays charged whole."""
        self._chain.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_budget(self, more: list[Event]) -> None:
        header = self._lines[0]
        target = header["target_epsilon"]
        if target is None:
            return
        after = epsilon_of([*self.events(), *more], header["delta"], header["accountant"])
        if after > target * (1.0 + _SLACK):
            raise BudgetExceededError(
                f"{self.path}: this would spend epsilon {after:.6g} of {target:g} at delta "
                f"{header['delta']:g}; training stops here"
            )

    def _recover(self) -> None:
        """Charge the last line, which lost its end; on disk where this process may write."""
        torn = self._chain.torn
        if not torn:
            return
        leased = [line["steps"] for line in self._lines if line["kind"] == "lease"]
        event = _charge_of_torn(torn, max(leased, default=1))
        if not self._chain.is_writable:
            self._torn = event
            return
        self._chain.replace_torn(
            "recovered",
            bytes=len(torn),
            digest=hashlib.sha256(torn).hexdigest(),
            event=None if event is None else event.to_dict(),
        )


def _open_lease(lines: Sequence[Line], part: str) -> Line | None:
    # A key or a torn line is the mark of another process: only the process that leases may close.
    def ends(line: Line) -> bool:
        is_own = line["kind"] in ("lease", "lease_close") and line.get("part", "") == part
        return is_own or line["kind"] in ("key", "recovered")

    last = next((line for line in reversed(lines) if ends(line)), None)
    return last if last is not None and last["kind"] == "lease" else None


def _check_line(before: Sequence[Line], line: Line) -> None:
    kind = line["kind"]
    if kind == "header":
        check_delta(line["delta"])
        if line["version"] != _VERSION or line["accountant"] not in ACCOUNTANTS:
            raise ValueError("is of another version")
    if kind in ("event", "lease") or (kind == "recovered" and line["event"] is not None):
        event_from_dict(line["event"])
    if kind == "lease":
        if line["event"]["kind"] != PoissonGaussianEvent.kind or line["event"]["steps"] != 1:
            raise ValueError("leases something else than single steps")
        if not (is_count(line["steps"]) and line["steps"] >= 1 and is_count(line["first_step"])):
            raise ValueError("leases no steps")
    if "part" in line and not (isinstance(line["part"], str) and line["part"]):
        raise ValueError("names no part")
    if kind == "lease_close":
        lease = _open_lease(before, line.get("part", ""))
        if lease is None or not (is_count(line["used"]) and line["used"] <= lease["steps"]):
            raise ValueError("closes no lease")


def _steps_of(event: dict[str, Any], steps: int) -> PoissonGaussianEvent:
    return PoissonGaussianEvent(event["sample_rate"], event["noise_multiplier"], steps)


def _charge_of_torn(torn: bytes, longest_lease: int) -> Event | None:
    """What a line without its end has to be charged as.

    In canonical order the event comes first and a lease's number of steps near the end. Where that number is
    lost, the lease counts as long as the longest before it. None for lines that charge nothing, and for one
    cut inside its event: of that one only its length and digest are kept.
    """
    text = torn.decode("utf-8", errors="replace")
    start = '{"event":'
    if not text.startswith(start):
        return None
    try:
        data, end = json.JSONDecoder().raw_decode(text, len(start))
        event = event_from_dict(data)
    except (ValueError, RecursionError, OverflowError, ConfigError):
        return None
    if not isinstance(event, PoissonGaussianEvent) or text.startswith(',"hash":', end):
        return event
    steps = re.search(r'"steps":([0-9]{1,12}),', text[end:])
    return _steps_of(data, int(steps.group(1)) if steps else longest_lease)
