"""``synthward budget``: what all releases from one data set may cost together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from synthward.commands.common import Json, emit, epsilon_up, interruptible

ACTIONS = ("create", "show", "cancel")


@interruptible("run the command again")
def budget(
    action: Annotated[str, typer.Argument(help="create, show or cancel.", metavar="ACTION")],
    file: Annotated[Path, typer.Argument(help="The budget file, kept beside the records.")],
    epsilon: Annotated[float | None, typer.Option("--epsilon", help="create: total epsilon.")] = None,
    delta: Annotated[float | None, typer.Option("--delta", help="create: total delta.")] = None,
    unit: Annotated[
        str | None, typer.Option("--unit", help="create: column of the privacy unit [row].")
    ] = None,
    dataset: Annotated[str | None, typer.Option("--dataset", help="create: a name for the records.")] = None,
    run_id: Annotated[
        str | None, typer.Option("--run-id", help="cancel: a reserved run that never started.")
    ] = None,
    json: Json = False,
) -> None:
    """Create or show the budget of a data set, which `fit --budget FILE` and others draw on."""
    from synthward.engine.budget import DatasetBudget
    from synthward.engine.errors import ConfigError

    if action not in ACTIONS:
        raise ConfigError(f"budget: got {action!r}; choose one of {', '.join(ACTIONS)}")
    given = {"epsilon": epsilon, "delta": delta, "unit": unit, "dataset": dataset, "run-id": run_id}
    meant = {"create": ("epsilon", "delta", "unit", "dataset"), "show": (), "cancel": ("run-id",)}[action]
    for name, value in given.items():
        if value is not None and name not in meant:
            raise ConfigError(f"--{name}: means nothing to `budget {action}`; leave it out")
        if value is None and name in meant and name not in ("unit", "dataset"):
            raise ConfigError(f"--{name}: is missing")
    if action == "create":
        assert epsilon is not None and delta is not None
        made = DatasetBudget.create(
            file, epsilon=epsilon, delta=delta, unit=unit or "row", dataset=dataset or ""
        )
    else:
        made = DatasetBudget(file)
    if run_id is not None:
        made.cancel(run_id)
    result = describe(made)
    emit(result, _lines(result), as_json=json)


def describe(budget: Any) -> dict[str, Any]:
    """The file as one dictionary: totals, and each run with what it counts for by itself."""
    header, entries = budget.header, budget.entries()
    runs = [
        {
            "run_id": entry.run_id,
            "state": entry.state,
            "epsilon": budget.cost([entry]),
            "ledger_head": entry.ledger_head,
            "events": [event.to_dict() for event in entry.events],
        }
        for entry in entries
    ]
    settled = [entry for entry in entries if entry.state == "settled"]
    return {
        "budget": budget.path,
        **{name: header[name] for name in ("dataset", "unit", "relation", "epsilon", "delta")},
        "spent": budget.cost(settled),
        "spent_and_reserved": budget.cost(entries),
        "head": budget.head,
        "runs": runs,
    }


def _lines(result: dict[str, Any]) -> list[str]:
    named = f" of {result['dataset']}" if result["dataset"] else ""
    lines = [
        f"budget{named}: epsilon {result['epsilon']:g} at delta {result['delta']:g}, privacy unit: {result['unit']}",
        f"spent: {epsilon_up(result['spent'])}",
        f"spent and reserved: {epsilon_up(result['spent_and_reserved'])}",
        f"head: {result['head']}",
    ]
    if result["runs"]:
        width = max(len(run["run_id"]) for run in result["runs"])
        lines.append(f"{'run':{max(width, 3)}}  {'state':9}  epsilon by itself")
        lines += [
            f"{run['run_id']:{max(width, 3)}}  {run['state']:9}  {epsilon_up(run['epsilon'])}"
            for run in result["runs"]
        ]
    return lines
