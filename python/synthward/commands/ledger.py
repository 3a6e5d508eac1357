"""What a run has spent, from its ledger alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from synthward.engine.errors import LedgerError
from synthward.engine.ledger import Ledger

# As synthward.run names it; importing that would load torch.
LEDGER_FILE = "ledger.jsonl"


def show_ledger(run: Path) -> dict[str, Any]:
    """Verify every link of a run's ledger and add up what it charged; nothing is written.

    Args:
        run: a run folder, or a ledger file. It may belong to a run that is under way.

    Returns:
        run, run_id, unit, relation, epsilon, delta, accountant, adaptive, target_epsilon, private, lines, head, keys
        (each with its line's time) and events (what was charged, equal mechanisms together).

    Raises:
        LedgerError: there is no ledger, or a link is broken.
    """
    run = Path(run)
    if not run.exists():
        raise LedgerError(f"{run}: does not exist; name the folder of a run")
    path = run / LEDGER_FILE if run.is_dir() else run
    with Ledger.open(path, readonly=True) as ledger:
        header = ledger.header
        return {
            "run": str(run),
            "run_id": header["run_id"],
            "unit": header["unit"],
            "relation": header["relation"],
            "epsilon": ledger.epsilon(),
            "delta": header["delta"],
            "accountant": header["accountant"],
            "adaptive": ledger.is_adaptive,
            "target_epsilon": header["target_epsilon"],
            "private": ledger.is_private,
            "lines": len(ledger.lines),
            "head": ledger.head,
            "keys": [
                {"key_id": line["key_id"], "private": line["private"], "time": line["time"]}
                for line in ledger.lines
                if line["kind"] in ("header", "key")
            ],
            "events": [event.to_dict() for event in ledger.events()],
        }


def event_table(events: list[dict[str, Any]]) -> list[str]:
    """Events as aligned lines: kind, how often, parameters."""
    rows = [("mechanism", "times", "parameters")]
    for event in events:
        times = event.get("steps", event.get("count", 1))
        parameters = [
            f"{name} {_parameter(value)}"
            for name, value in event.items()
            if name not in ("kind", "steps", "count")
        ]
        rows.append((event["kind"], str(times), ", ".join(parameters)))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return [f"{kind:{widths[0]}}  {times:>{widths[1]}}  {rest}" for kind, times, rest in rows]


def _parameter(value: Any) -> str:
    if isinstance(value, dict):
        return str(value.get("kind"))
    if isinstance(value, list):
        return " + ".join(str(item["kind"]) for item in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)
