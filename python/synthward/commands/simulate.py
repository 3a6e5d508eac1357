"""``synthward simulate``: records of an invented hospital, with the schema beside them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from synthward.commands.common import Json, Overwrite, emit, interruptible
from synthward.progress import Progress, make_progress


@interruptible("nothing was written; run the command again")
def simulate(
    out: Annotated[Path, typer.Option("--out", help="Table to write: .csv or .parquet.")],
    patients: Annotated[int, typer.Option("--patients", help="Number of patients.")] = 20_000,
    seed: Annotated[int, typer.Option("--seed", help="The same patients each time.")] = 1,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write the records of an invented hospital, and their schema beside them (same name, .toml)."""
    from synthward.data.writer import check_output

    check_output(out)
    schema = out.with_suffix(".toml")
    begin = time.perf_counter()
    with make_progress() as progress:
        rows = write_hospital(out, schema, patients, seed=seed, overwrite=overwrite, progress=progress)
    seconds = round(time.perf_counter() - begin, 1)
    result = {
        "out": out,
        "schema": schema,
        "patients": patients,
        "rows": rows,
        "seed": seed,
        "seconds": seconds,
    }
    lines = [f"records: {out} ({rows:,} rows of {patients:,} invented patients)", f"schema: {schema}"]
    emit(result, lines, as_json=json)


def write_hospital(
    out: Path, schema: Path, patients: int, *, seed: int, overwrite: bool, progress: Progress
) -> int:
    """Simulate to ``out`` and copy the simulator's schema to ``schema``; returns the number of rows."""
    from synthward.report.write import refuse_existing, write_new_file
    from synthward.simulate import SIMULATION_SCHEMA_TOML, write_simulation

    refuse_existing(schema, overwrite)
    rows = write_simulation(out, patients, seed, overwrite=overwrite, progress=progress)
    write_new_file(schema, Path(SIMULATION_SCHEMA_TOML).read_bytes(), overwrite=overwrite)
    return int(rows)
