"""A run's claim on the budget of its data set: reserved before a record is read, settled when all is charged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from synthward.engine import Ledger
from synthward.engine.accounting import Event
from synthward.engine.accounting.accountant import merge_events
from synthward.engine.budget import DatasetBudget, Entry
from synthward.engine.errors import ConfigError


class Claim:
    """What a run holds of a budget file; of a run without one, nothing, and every method does nothing.

    Args:
        file: the budget file, or None.
        run_id, unit, relation: of the run.
    """

    def __init__(self, file: Path | None, run_id: str, unit: str, relation: str) -> None:
        self.budget = None if file is None else DatasetBudget(file)
        self._run_id, self._unit, self._relation = run_id, unit, relation

    @classmethod
    def of_run(cls, file: Path | None, info: dict[str, Any]) -> Claim:
        """The claim of a run that was begun before; it must be on the same budget.

        Raises:
            ConfigError: the run draws on a budget and none, or another one, was given; or the other way round.
        """
        claim = cls(file, info["run_id"], info["unit"], info["relation"])
        then, now = info.get("budget_id"), claim.budget_id
        if then != now:
            began = "no budget file" if then is None else f"the budget file {then}"
            given = "none" if now is None else f"{file} ({now})"
            raise ConfigError(f"--budget: the run was begun with {began}; given was {given}")
        return claim

    @property
    def budget_id(self) -> str | None:
        return None if self.budget is None else self.budget.budget_id

    def reserve(self, events: Sequence[Event]) -> None:
        """Set aside what the run costs in all, what it was charged so far included.

        Raises:
            BudgetExceededError: the data set's budget does not cover it.
        """
        if self.budget is None:
            return
        known = self._entry()
        held = known is not None and known.state in ("reserved", "started")
        if not held or list(known.events) != merge_events(events):
            self.budget.reserve(self._run_id, events, unit=self._unit, relation=self._relation)

    def start(self) -> None:
        """The run is about to be charged."""
        if self.budget is not None:
            self.budget.start(self._run_id)

    @contextmanager
    def reserved(self, events: Sequence[Event]) -> Iterator[None]:
        """As `reserve`, around what comes before any charge: if that fails, the reservation is given back."""
        self.reserve(events)
        try:
            yield
        except BaseException:
            if self.budget is not None:
                self.budget.cancel(self._run_id)
            raise

    def settle(self, ledger: Ledger) -> None:
        """Count the run at what its ledger charges; a second time changes nothing."""
        known = self._entry()
        if self.budget is not None and (known is None or known.state != "settled"):
            self.budget.settle(self._run_id, ledger.events(), ledger_head=ledger.head)

    def _entry(self) -> Entry | None:
        entries = [] if self.budget is None else self.budget.entries()
        return next((entry for entry in entries if entry.run_id == self._run_id), None)
