"""Sampling a cohort from a trained run: streamed, resumable, and without any record in reach."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from synthward.data import CohortWriter, enforce_constraints, to_arrow
from synthward.encoding import TableEncoder, TokenCoder
from synthward.engine.errors import ConfigError, OutputError
from synthward.generators import Generator
from synthward.progress import NullProgress, Progress
from synthward.run.folder import RunFolder, write_atomic
from synthward.run.where import Where, parse_where
from synthward.schema import Schema

# Rows are made in chunks; each depends on (seed, chunk) alone, so that a resumed cohort is the same cohort.
CHUNK_ROWS = 8192
MAX_BARREN_ROUNDS = 40


class CohortSampler:
    """Draws typed columns from a trained generator, under conditions if there are any."""

    def __init__(
        self, schema: Schema, encoder: TableEncoder, generator: Generator, where: Where | None = None
    ) -> None:
        self.schema, self.encoder, self.generator, self.where = schema, encoder, generator, where
        self.allowed_levels = where.allowed_levels() if where else {}
        self.allowed_tokens: dict[int, torch.Tensor] = {}
        coders = [c for c in encoder.coders if isinstance(c, TokenCoder)]
        for column, coder in enumerate(coders):
            levels = self.allowed_levels.get(coder.name)
            if levels is not None and len(levels) == len(coder.group):
                tokens = coder.allowed_tokens(levels)
                if not tokens.any():
                    raise ConfigError(
                        f"--where: the generator never draws such a value of column {coder.name!r}"
                    )
                self.allowed_tokens[column] = torch.from_numpy(tokens)
        mass = torch.from_numpy(encoder.context_mass)
        self.context_mass = (mass * generator.context_weights(self.allowed_tokens).double()).numpy()

    def chunk(self, seed: int, index: int, rows: int = CHUNK_ROWS) -> dict[str, np.ndarray]:
        """The columns of one chunk of exactly ``rows`` rows, a function of (seed, index) alone."""
        rng = np.random.default_rng([seed, index])
        torch_rng = torch.Generator().manual_seed(int(rng.integers(2**62)))
        pieces: list[dict[str, np.ndarray]] = []
        found = barren = 0
        while found < rows:
            columns = self._draw(rows, rng, torch_rng)
            if self.where is not None:
                held = self.where.holds(columns)
                columns = {name: values[held] for name, values in columns.items()}
            got = len(next(iter(columns.values())))
            barren = 0 if got else barren + 1
            if barren >= MAX_BARREN_ROUNDS:
                raise ConfigError(
                    f"--where: none of {barren * rows} sampled rows satisfied it; the condition is too rare"
                )
            pieces.append(columns)
            found += got
        return {name: np.concatenate([p[name] for p in pieces])[:rows] for name in pieces[0]}

    def _draw(self, rows: int, rng: np.random.Generator, torch_rng: torch.Generator) -> dict[str, np.ndarray]:
        share = self.context_mass / self.context_mass.sum()
        context = torch.from_numpy(rng.choice(len(share), size=rows, p=share).astype(np.int64))
        tokens, scores = self.generator.sample(context, torch_rng, self.allowed_tokens or None)
        honoured = self.allowed_levels if self.generator.honours_conditions else {}
        columns = self.encoder.decode(self.schema, tokens.numpy(), scores.numpy(), rng, honoured)
        return enforce_constraints(self.schema, columns)


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
