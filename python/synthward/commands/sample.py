"""``synthward sample``: a synthetic cohort from a trained run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from synthward.commands.common import Device, Json, Overwrite, emit, interruptible
from synthward.progress import make_progress

# The longest that one process waits for another to make a part.
PATIENCE_SECONDS = 1800.0


@interruptible("the same command with --resume goes on after the last whole part")
def sample(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    out: Annotated[
        Path, typer.Option("--out", help="Cohort to write: .parquet, .csv, or a folder for many parts.")
    ],
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
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Draw a cohort. This costs no privacy, however many rows are drawn."""
    from synthward.engine.distributed.ranks import Ranks
    from synthward.run import sample_run

    with Ranks.join(PATIENCE_SECONDS) as ranks, ranks.telling():
        ranks.lead(lambda: _check(where, out))
        begin = time.perf_counter()
        with make_progress() as progress:
            result = sample_run(
                run,
                rows,
                out,
                where=where,
                seed=seed,
                resume=resume,
                overwrite=overwrite,
                device=device,
                progress=progress,
                ranks=ranks,
            )
        seconds = round(time.perf_counter() - begin, 1)
        if ranks.is_main:
            emit({**result, "seconds": seconds}, [f"cohort: {out} ({result['rows']:,} rows)"], as_json=json)


def _check(where: str | None, out: Path) -> None:
    from synthward.data.dataset import check_dataset_path
    from synthward.data.writer import check_output
    from synthward.engine.errors import ConfigError
    from synthward.run.sampling import FILES

    if where is not None and not where.strip():
        raise ConfigError("--where: is empty; leave it away, or write a condition such as \"sex='F'\"")
    if out.suffix in FILES:
        check_output(out)
    else:
        check_dataset_path(out)
