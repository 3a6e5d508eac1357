"""``synthward account`` and ``synthward ledger``: what a mechanism costs, and what a run has spent."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from synthward.commands.common import Json, budget_line, emit, interruptible, remark


@interruptible("run the command again")
def account(
    noise_multiplier: Annotated[
        float | None, typer.Option("--noise-multiplier", help="Noise over sensitivity.")
    ] = None,
    sample_rate: Annotated[
        float | None, typer.Option("--sample-rate", help="Poisson probability per unit and step.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Number of steps.")] = None,
    delta: Annotated[float | None, typer.Option("--delta", help="Failure probability.")] = None,
    target_epsilon: Annotated[
        float | None,
        typer.Option(
            "--target-epsilon", help="Solve for the one of noise, rate and steps that is not given."
        ),
    ] = None,
    accountant: Annotated[str, typer.Option("--accountant", help="pld, rdp or prv.")] = "pld",
    relation: Annotated[
        str, typer.Option("--relation", help="Neighbours: add_or_remove_one or replace_one.")
    ] = "add_or_remove_one",
    sampling: Annotated[
        str,
        typer.Option(
            "--sampling",
            help="poisson, truncated (static batch), cyclic (banded noise) or none (no amplification).",
        ),
    ] = "poisson",
    max_batch_size: Annotated[
        int | None,
        typer.Option(
            "--max-batch-size", help="truncated: largest batch; chosen with head-room if not given."
        ),
    ] = None,
    max_units: Annotated[
        int | None, typer.Option("--max-units", help="truncated: public upper bound of the number of units.")
    ] = None,
    period: Annotated[
        int | None, typer.Option("--period", help="cyclic: groups of units, and most bands.")
    ] = None,
    bands: Annotated[int | None, typer.Option("--bands", help="cyclic: the same as --period.")] = None,
    json: Json = False,
) -> None:
    """Epsilon of a DP-SGD run, or the noise, rate or steps that a target epsilon allows."""
    from synthward.commands.account import account as solve
    from synthward.commands.account import head_room_line
    from synthward.engine.errors import ConfigError

    if delta is None:
        raise ConfigError("--delta: is missing; give a number well below 1 / patients, for example 1e-6")
    result = solve(
        noise_multiplier=noise_multiplier,
        sample_rate=sample_rate,
        steps=steps,
        delta=delta,
        target_epsilon=target_epsilon,
        accountant=accountant,
        relation=relation,
        sampling=sampling,
        max_batch_size=max_batch_size,
        max_units=max_units,
        period=period,
        bands=bands,
    )
    if (line := head_room_line(result)) is not None:
        remark(line)
    emit(result, _lines(result), as_json=json)


@interruptible("run the command again")
def ledger(
    run: Annotated[Path, typer.Argument(help="Folder of the run, or its ledger file.")],
    json: Json = False,
) -> None:
    """Verify a run's ledger and show what was spent; from the ledger alone."""
    from synthward.commands.ledger import event_table, show_ledger

    result = show_ledger(run)
    budget = budget_line(result["epsilon"], result["delta"], result["unit"], private=result["private"])
    facts = {name: value for name, value in result.items() if name != "events"}
    lines = [*_lines(facts), "events:", *(f"  {line}" for line in event_table(result["events"])), budget]
    emit(result, lines, as_json=json)


def _lines(result: dict[str, Any]) -> list[str]:
    """One `name: value` line per fact; lists (events) one line per item."""
    lines = []
    for name, value in result.items():
        if isinstance(value, (list, tuple)):
            lines += [f"{name}:", *(f"  {_words(item)}" for item in value)]
        else:
            lines.append(f"{name}: {_words(value)}")
    return lines


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(item)}" for name, item in value.items())
    return f"{value:.6g}" if isinstance(value, float) else str(value)
