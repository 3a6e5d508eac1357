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
        run, run_id, unit, relation, epsilon, delta, accountant, target_epsilon, private, lines, head, and
        events (what was charged, equal mechanisms together).

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
            "target_epsilon": header["target_epsilon"],
            "private": ledger.is_private,
            "lines": len(ledger.lines),
            "head": ledger.head,
            "events": [event.to_dict() for event in ledger.events()],
        }
