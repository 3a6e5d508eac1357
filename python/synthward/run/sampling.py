"""Sampling a cohort from a trained run: streamed, resumable, by any number of processes, and without any record in
reach."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import torch

from synthward import __version__
from synthward.data import CohortWriter, DatasetWriter, Layout, PartRecord
from synthward.data.dataset import Job
from synthward.engine.device import choose_device, describe, use_device
from synthward.engine.distributed.ranks import Ranks
from synthward.engine.errors import ConfigError, OutputError, RankLostError, SynthwardError
from synthward.progress import NullProgress, Progress, Task
from synthward.run.cohort import CHUNK_ROWS, CohortSampler
from synthward.run.folder import RunFolder, write_atomic
from synthward.run.where import parse_where
from synthward.schema import Schema

T = TypeVar("T")
FILES = (".parquet", ".csv")
_FACTS = ("run_id", "generator", "epsilon", "delta", "unit", "private")


def sample_run(
    run: Path,
    rows: int | None,
    out: Path,
    *,
    where: str | None = None,
    seed: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Write a cohort of ``rows`` rows (default: the run's noisy number of records).

    Sampling is post-processing: it costs no privacy, whatever the number of rows and whether seeded or not.

    Args:
        out: a .parquet or .csv file, which one process writes; or a folder of Parquet parts with a manifest
            (`synthward.data.dataset`), which all of ``ranks`` write together.
        device: where the generator computes: "auto" (a GPU where torch sees one), "cpu", "cuda" or "cuda:N". Kinds of
            device may round differently: a seed gives the same rows again on one of them.
        ranks: the processes that sample together; each calls this with the same arguments.

    Returns:
        The facts that the command line prints.

    Raises:
        ConfigError, OutputError: on all ranks, for what is wrong on any of them. RankLostError: one of them died.
    """
    progress, ranks = progress or NullProgress(), ranks or Ranks.alone()
    place = _agreed(ranks, partial(choose_device, device, one_each=ranks.world_size > 1))[ranks.rank]
    use_device(place)
    asked = _Asked(Path(run), rows, Path(out), where, seed, resume, overwrite, place)
    if asked.out.suffix not in FILES:
        return _sample_dataset(asked, progress, ranks)
    ranks.lead(lambda: _refuse_ranks(asked.out, ranks))
    return _sample_file(asked, progress)


@dataclass(frozen=True)
class _Asked:
    run: Path
    rows: int | None
    out: Path
    where: str | None
    seed: int | None
    resume: bool
    overwrite: bool
    device: torch.device


@dataclass(frozen=True)
class _Source:
    """A trained run, ready to give rows."""

    folder: RunFolder
    schema: Schema
    sampler: CohortSampler
    rows: int

    @classmethod
    def load(cls, asked: _Asked) -> _Source:
        folder, rows, where = RunFolder(asked.run), asked.rows, asked.where
        encoder, schema = folder.load_encoder(), folder.schema
        rows = round(encoder.records) if rows is None else rows
        if rows < 1:
            raise ConfigError(f"--rows: got {rows}; give a whole number of at least 1")
        generator = folder.load_generator(encoder, asked.device)
        condition = parse_where(where, schema) if where else None
        return cls(folder, schema, CohortSampler(schema, encoder, generator, condition), rows)


def _refuse_ranks(out: Path, ranks: Ranks) -> None:
    if ranks.world_size > 1:
        raise OutputError(
            f"{out}: a file is written by one process: name a folder (--out {out.with_suffix('')}), or leave "
            "torchrun away"
        )


def _sample_file(asked: _Asked, progress: Progress) -> dict[str, Any]:
    out, source = asked.out, _Source.load(asked)
    request = json.dumps([source.folder.info["run_id"], source.rows, asked.where])
    seed = _settle_seed(out, request, asked.seed, resume=asked.resume)
    task = progress.task("sample", source.rows)
    try:
        with CohortWriter(
            out, source.schema, resume=asked.resume, run_id=request, overwrite=asked.overwrite
        ) as writer:
            write_atomic(_seed_file(out), json.dumps({"request": request, "seed": seed}).encode())
            progress.note(f"device: {describe(asked.device)}")
            task.advance(min(writer.rows_done, source.rows))
            for batch in source.sampler.batches(seed, writer.rows_done, source.rows):
                writer.write(batch)
                task.advance(batch.num_rows)
            writer.close(_metadata(source.folder))
    finally:
        task.close()
        if not out.with_name(out.name + ".parts").exists():
            _seed_file(out).unlink(missing_ok=True)
    return _result(source, out)


def _sample_dataset(asked: _Asked, progress: Progress, ranks: Ranks) -> dict[str, Any]:
    sources: list[_Source] = []
    writers: list[DatasetWriter] = []

    def begin() -> Job:
        source = _Source.load(asked)
        writer = DatasetWriter.begin(
            asked.out,
            source.schema,
            layout=Layout.of(source.rows, CHUNK_ROWS),
            request={"rows": source.rows, "where": asked.where, "chunk": CHUNK_ROWS},
            facts=_facts(source.folder),
            seed=asked.seed,
            resume=asked.resume,
            overwrite=asked.overwrite,
        )
        sources.append(source)
        writers.append(closing.enter_context(writer))
        return writer.job

    def join() -> None:
        if not ranks.is_main:
            source = _Source.load(asked)
            sources.append(source)
            writers.append(closing.enter_context(DatasetWriter(asked.out, source.schema, job)))

    try:
        with ExitStack() as closing:
            job = ranks.lead(begin)
            _agreed(ranks, join)
            source, writer = sources[0], writers[0]
            if not job.is_finished:
                progress.note(f"device: {describe(asked.device)}")
                records = _write_parts(source, writer, progress, ranks)
                ranks.lead(lambda: str(writer.finish(records)))
    except RankLostError as error:
        lost = RankLostError(
            f"{asked.out}: another process stopped or can not be reached; all of them end here. Whole parts are "
            "kept: the same command with --resume goes on"
        )
        lost.is_told = error.is_told
        raise lost from error
    return {**_result(source, asked.out), "parts": job.layout.parts}


def _write_parts(
    source: _Source, writer: DatasetWriter, progress: Progress, ranks: Ranks
) -> list[PartRecord]:
    """All parts, dealt out round-robin: first those that are there are read, then the others made."""
    job, layout = writer.job, writer.job.layout
    task = progress.task("sample", layout.rows)
    count = _Count(task, layout, ranks)

    def make(part: int) -> PartRecord:
        first = layout.first_row(part)
        made = source.sampler.batches(job.seed, first, first + layout.rows_of(part))
        return writer.write(part, count.through(made))

    try:
        records = {record.part: record for record in _dealt(ranks, job.present, writer.verify, count)}
        missing = [part for part in range(layout.parts) if part not in records]
        records |= {record.part: record for record in _dealt(ranks, missing, make, count)}
    finally:
        task.close()
    return list(records.values())


def _dealt(
    ranks: Ranks,
    parts: Sequence[int],
    work: Callable[[int], PartRecord | None],
    count: _Count,
) -> Iterator[PartRecord]:
    """What ``work`` gives for each part (None is left out), on all ranks.

    After each round of one part for every rank they tell each other how it went: nobody works on for long after
    another failed or died.
    """
    for start in range(0, len(parts), ranks.world_size):
        dealt = parts[start : start + ranks.world_size]
        count.begin(dealt)
        mine = dealt[ranks.rank : ranks.rank + 1]
        made: list[list[PartRecord | None]] = _agreed(ranks, partial(list, map(work, mine)))
        kept = [record for records in made for record in records if record is not None]
        count.end(kept)
        yield from kept


class _Count:
    """Progress of all ranks, guessed from this one's while a round lasts and counted after it."""

    def __init__(self, task: Task, layout: Layout, ranks: Ranks) -> None:
        self._task, self._layout, self._ranks = task, layout, ranks
        self._before = self._last = self._mine = 0
        self._dealt = 0

    def begin(self, parts: Sequence[int]) -> None:
        self._mine, self._dealt = 0, len(parts)
        self._last = self._before + sum(self._layout.rows_of(part) for part in parts)
        self._task.at(self._before)

    def through(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield batch
            self._mine += batch.num_rows
            self._task.at(min(self._before + self._mine * self._dealt, self._last))

    def end(self, records: list[PartRecord]) -> None:
        self._before += sum(record.rows for record in records)
        self._task.at(self._before)


def _agreed(ranks: Ranks, work: Callable[[], T]) -> list[T]:
    """What ``work`` gives on every rank, on all; the first error of any rank is raised on all, and told by rank 0."""
    result: T | None = None
    error: SynthwardError | None = None
    try:
        result = work()
    except SynthwardError as raised:
        error = raised
    outcomes = ranks.gather((result, error))
    errors = [failed for _, failed in outcomes if failed is not None]
    if errors:
        errors[0].is_told = not ranks.is_main
        raise errors[0]
    return [value for value, _ in outcomes]  # type: ignore[misc]


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


def _facts(folder: RunFolder) -> dict[str, Any]:
    """Where rows come from, for a manifest: JSON has no infinite numbers."""
    facts = {key: folder.info[key] for key in _FACTS}
    if not math.isfinite(facts["epsilon"]):
        facts["epsilon"] = "inf"
    return {"made_by": f"synthward {__version__}", **facts}


def _metadata(folder: RunFolder) -> dict[str, str]:
    return {"synthward": "synthetic cohort", **{key: str(folder.info[key]) for key in _FACTS}}


def _result(source: _Source, out: Path) -> dict[str, Any]:
    info = source.folder.info
    return {"rows": source.rows, "out": str(out), "run_id": info["run_id"], "epsilon": info["epsilon"]}
