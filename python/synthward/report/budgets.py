"""What the budget file of a data set says of a run: all releases from the same records together."""

from __future__ import annotations

from pathlib import Path

from synthward.engine.errors import LedgerError
from synthward.report.documents import DataSetBudget, Guarantee, Unit

# The file's sum is that of a fully adaptive filter over Rényi orders that its header fixed.
FILTER = "rdp"


def read_data_set(path: Path, run_id: str, ledger_head: str) -> DataSetBudget:
    """The budget file at ``path`` as far as it concerns a run.

    Raises:
        LedgerError: the file is missing or damaged, or does not know the run, or settled it for another ledger.
    """
    from synthward.engine.budget import DatasetBudget

    file = DatasetBudget(path)
    entries = [entry for entry in file.entries() if entry.state != "cancelled"]
    own = next((entry for entry in entries if entry.run_id == run_id), None)
    if own is None:
        raise LedgerError(
            f"{path}: does not know the run {run_id}; name the budget file that it was fitted under"
        )
    if own.ledger_head not in (None, ledger_head):
        raise LedgerError(f"{path}: settled the run {run_id} for another ledger; one of them was changed")
    header = file.header
    total = Guarantee(
        epsilon=header["epsilon"],
        delta=header["delta"],
        unit=Unit(column=None if header["unit"] == "row" else header["unit"]),
        relation=header["relation"],
        accountant=FILTER,
    )
    return DataSetBudget(
        name=str(header["dataset"]),
        total=total,
        counted=total.model_copy(update={"epsilon": file.cost(entries)}),
        releases=len(entries),
        state=own.state,
        head=file.head,
    )
