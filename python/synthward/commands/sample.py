"""``synthward sample``: a synthetic cohort from a trained run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from synthward.commands.common import Json, Overwrite, emit, interruptible
from synthward.progress import make_progress


@interruptible("the same command with --resume goes on after the last whole part")
def sample(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    out: Annotated[Path, typer.Option("--out", help="Cohort to write: .parquet or .csv.")],
    rows: Annotated[
        int | None, typer.Option("--rows", help="Rows; default: the run's noisy number of records.")
    ] = None,
    where: Annotated[
        str | None, typer.Option("--where", help="Condition, for example \"sex='F' and age>=65\".")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="The same rows each time; costs no privacy.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted cohort.")] = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Draw a cohort. This costs no privacy, however many rows are drawn."""
    from synthward.data.writer import check_output
    from synthward.engine.errors import ConfigError
    from synthward.run import sample_run

    if where is not None and not where.strip():
        raise ConfigError("--where: is empty; leave it away, or write a condition such as \"sex='F'\"")
    check_output(out)
    begin = time.perf_counter()
    with make_progress() as progress:
        result = sample_run(
            run, rows, out, where=where, seed=seed, resume=resume, overwrite=overwrite, progress=progress
        )
    seconds = round(time.perf_counter() - begin, 1)
    emit({**result, "seconds": seconds}, [f"cohort: {out} ({result['rows']:,} rows)"], as_json=json)
