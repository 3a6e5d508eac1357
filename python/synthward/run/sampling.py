"""Sampling a cohort from a trained run: streamed, resumable, and without any record in reach."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from synthward.data import CohortWriter, to_arrow
from synthward.engine.errors import ConfigError, OutputError
from synthward.progress import NullProgress, Progress
from synthward.run.cohort import CHUNK_ROWS, CohortSampler
from synthward.run.folder import RunFolder, write_atomic
from synthward.run.where import parse_where


def sample_run(
    run: Path,
    rows: int | None,
    out: Path,
    *,
    where: str | None = None,
    seed: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a cohort of ``rows`` rows (default: the run's noisy number of records) to a Parquet or CSV file.

    Sampling is post-processing: it costs no privacy, whatever the number of rows and whether seeded or not.
    Returns the facts that the command line prints.
    """
    folder = RunFolder(run)
    encoder = folder.load_encoder()
    schema = folder.schema
    rows = round(encoder.records) if rows is None else rows
    if rows < 1:
        raise ConfigError(f"--rows: got {rows}; give a whole number of at least 1")
    generator = folder.load_generator(encoder)
    sampler = CohortSampler(schema, encoder, generator, parse_where(where, schema) if where else None)
    out = Path(out)
    request = json.dumps([folder.info["run_id"], rows, where])
    seed = _settle_seed(out, request, seed, resume=resume)
    task = (progress or NullProgress()).task("sample", rows)
    try:
        with CohortWriter(out, schema, resume=resume, run_id=request, overwrite=overwrite) as writer:
            write_atomic(_seed_file(out), json.dumps({"request": request, "seed": seed}).encode())
            task.advance(min(writer.rows_done, rows))
            for columns in _remaining(sampler, seed, writer.rows_done, rows):
                batch = to_arrow(schema, columns)
                writer.write(batch)
                task.advance(batch.num_rows)
            writer.close(_metadata(folder))
    finally:
        task.close()
        if not out.with_name(out.name + ".parts").exists():
            _seed_file(out).unlink(missing_ok=True)
    return {"rows": rows, "out": str(out), "run_id": folder.info["run_id"], "epsilon": folder.info["epsilon"]}


def _remaining(sampler: CohortSampler, seed: int, done: int, rows: int) -> Iterator[dict[str, np.ndarray]]:
    """Chunks still to be written; ``done`` rows are whole chunks, because a chunk is written at once."""
    index = done // CHUNK_ROWS
    if done >= rows:
        return
    while index * CHUNK_ROWS < rows:
        size = min(CHUNK_ROWS, rows - index * CHUNK_ROWS)
        columns = sampler.chunk(seed, index)
        yield {name: values[:size] for name, values in columns.items()}
        index += 1


def _settle_seed(out: Path, request: str, seed: int | None, *, resume: bool) -> int:
    """The sampling seed, kept beside an unfinished output so that a resumed cohort continues the same rows."""
    file = _seed_file(out)
    if resume and file.is_file():
        kept = json.loads(file.read_text())
        if kept["request"] != request or seed not in (None, kept["seed"]):
            raise OutputError(
                f"{out}: was begun with another run, --rows, --where or --seed; resume with the same"
            )
        return int(kept["seed"])
    return seed if seed is not None else secrets.randbits(62)


def _seed_file(out: Path) -> Path:
    return out.with_name(f".{out.name}.sampling.json")


def _metadata(folder: RunFolder) -> dict[str, str]:
    info = folder.info
    keys = ("run_id", "generator", "epsilon", "delta", "unit", "private")
    return {"synthward": "synthetic cohort", **{k: str(info[k]) for k in keys}}
