"""What the lines of a ledger add up to."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from synthward.engine.accounting import (
    Event,
    GaussianEvent,
    RdpFilter,
    StepsEvent,
    calibrate_noise,
    event_from_dict,
)
from synthward.engine.accounting.accountant import merge_events
from synthward.engine.accounting.events import ADD_OR_REMOVE_ONE
from synthward.engine.chain import Line
from synthward.engine.errors import ConfigError


@dataclass
class _Leased:
    """The last lease of a part, and where in the list of charges it stands."""

    event: StepsEvent
    at: int
    # Steps of the closed leases before, where all of them are one mechanism.
    before: int
    steps: int

    @property
    def charge(self) -> Event:
        return self.event.with_steps(self.before + self.steps)


def charges(lines: Iterable[Line], torn: Event | None = None) -> list[Event]:
    """All events that the lines charge; an unclosed lease counts whole.

    Leases in a row of one part under one key are one event where their event is one mechanism: its cost is not a sum
    over steps. A new key, or a line that was torn, ends the row.

    Args:
        torn: what a torn last line is charged as (`charge_of_torn`).
    """
    charged: list[Event] = []
    parts: dict[str, _Leased] = {}
    for line in lines:
        kind = line["kind"]
        if kind == "event":
            charged.append(event_from_dict(line["event"]))
        elif kind == "lease":
            _charge_lease(charged, parts, line)
        elif kind == "lease_close":
            leased = parts[line.get("part", "")]
            leased.steps = line["used"]
            charged[leased.at] = leased.charge
        elif kind == "key":
            _end_rows(parts, line)
        elif kind == "recovered":
            if line["event"] is not None:
                _charge_torn(charged, parts, event_from_dict(line["event"]))
            parts.clear()
    if torn is not None:
        _charge_torn(charged, parts, torn)
    return merge_events(charged)


def last_lease(lines: Sequence[Line], part: str) -> tuple[Line | None, Line | None]:
    """The last lease of a part under the key that holds now and the line that closed it, None where there is none.

    A key or a torn line is the mark of another process: only the process that leases may close.
    """
    close = None
    for line in reversed(lines):
        kind = line["kind"]
        if kind == "recovered" or (kind == "key" and line.get("part", part) == part):
            break
        if kind in ("lease", "lease_close") and line.get("part", "") == part:
            if kind == "lease":
                return line, close
            close = line
    return None, None


def open_lease(lines: Sequence[Line], part: str) -> Line | None:
    """The open lease of a part, or None."""
    lease, close = last_lease(lines, part)
    return lease if close is None else None


def check_goes_on(lines: Sequence[Line], event: StepsEvent, first_step: int, part: str) -> None:
    """`ValueError` if a lease would tear apart what is one mechanism.

    What correlated noise hides in one stretch of steps is held by the noise of those before: the stretches do not
    compose as mechanisms of their own while the key is the same.
    """
    if not event.is_one_mechanism:
        return
    # The last line that says whose noise it is: a torn one leaves that open.
    marks = ("header", "key", "recovered")
    mark = next((x for x in reversed(lines) if x["kind"] in marks and x.get("part", part) == part), None)
    lease, close = last_lease(lines, part)
    goes_on = lease is None or (
        close is not None
        and event_from_dict(lease["event"]) == event
        and first_step == lease["first_step"] + close["used"]
    )
    if not goes_on or mark is None or mark["kind"] == "recovered":
        raise ValueError(
            f"leases {event.kind!r} steps that do not follow those before them; that needs a fresh key"
        )


def charge_of_torn(torn: bytes, lines: Sequence[Line]) -> Event | None:
    """What a line without its end has to be charged as.

    In canonical order the event comes first (behind two short fields in a line that stands for a torn one) and a
    lease's number of steps near the end. Where that number is lost, the lease counts as long as the longest before it.
    None for lines that charge nothing, and for one cut inside its event: of that one only its length and digest are
    kept.
    """
    text = torn.decode("utf-8", errors="replace")
    start = re.match(r'\{(?:"bytes":[0-9]{1,12},"digest":"[0-9a-f]{64}",)?"event":', text)
    if start is None:
        return None
    try:
        data, end = json.JSONDecoder().raw_decode(text, start.end())
        event = event_from_dict(data)
    except (ValueError, RecursionError, OverflowError, ConfigError):
        return None
    if not isinstance(event, StepsEvent) or text.startswith(',"hash":', end):
        return event
    found = re.search(r'"steps":([0-9]{1,12}),', text[end:])
    longest = max((line["steps"] for line in lines if line["kind"] == "lease"), default=1)
    return event.with_steps(max(event.steps, int(found.group(1)) if found else longest))


def filter_for(target: float, delta: float, relation: str, planned: Sequence[Event] = ()) -> RdpFilter:
    """A filter for what is planned, or for one Gaussian mechanism that spends all of the target."""
    if not planned:
        noise = calibrate_noise(target, delta, 1.0, 1, "rdp")
        planned = [GaussianEvent(noise if relation == ADD_OR_REMOVE_ONE else 2.0 * noise, 1)]
    return RdpFilter.planned(planned, delta, relation)


def _charge_lease(charged: list[Event], parts: dict[str, _Leased], line: Line) -> None:
    part, steps = line.get("part", ""), line["steps"]
    event = event_from_dict(line["event"])
    assert isinstance(event, StepsEvent)
    before = parts.get(part)
    if before is not None and event.is_one_mechanism and before.event == event:
        before.before, before.steps = before.before + before.steps, steps
        charged[before.at] = before.charge
        return
    parts[part] = _Leased(event, len(charged), 0, steps)
    charged.append(parts[part].charge)


def _charge_torn(charged: list[Event], parts: dict[str, _Leased], event: Event) -> None:
    """A torn line has lost the name of its part: it lengthens each mechanism that it may have gone on with."""
    rows: list[_Leased] = []
    if isinstance(event, StepsEvent) and event.is_one_mechanism:
        rows = [leased for leased in parts.values() if leased.event == event.with_steps(1)]
        for leased in rows:
            leased.before += event.steps
            charged[leased.at] = leased.charge
    if not rows:
        charged.append(event)


def _end_rows(parts: dict[str, _Leased], line: Line) -> None:
    if "part" in line:
        parts.pop(line["part"], None)
    else:
        parts.clear()
