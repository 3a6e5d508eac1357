"""Writes a cohort of any size as a folder of Parquet parts, by any number of processes, each in constant memory.

The parts grow in a folder beside the output (`OUT.parts`). A part is flushed to disk under a name of its own, noted
with its SHA-256 in its writer's journal, and renamed; so what bears a part's name is whole, and a later start can tell
whether it still is what was written. When all parts are there, the manifest is written, and the folder is renamed to
the output. So the output is either absent (or what it was before) or complete.

Nothing here knows how many processes there are: one begins and finishes, and each writes the parts it is given.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa

from synthward.data.arrow import arrow_schema
from synthward.data.disk import ROW_GROUP, ParquetOutput, disk_reason, write_lasting
from synthward.data.lock import LOCK_FILE, FolderLock
from synthward.data.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    STATE_FILE,
    Layout,
    PartRecord,
    file_digest,
    make_manifest,
    read_manifest,
)
from synthward.engine.errors import OutputError
from synthward.engine.files import sync_file, sync_path
from synthward.schema import Schema

_SEED_BITS = 62
_PART = re.compile(r"part-(\d{5,})\.parquet")
# Everything that is ever written into such a folder.
_OURS = re.compile(
    rf"{_PART.pattern}|\.part-\d+\.parquet\.[0-9a-f]+\.tmp|_journal-[0-9a-f]+\.jsonl"
    rf"|({MANIFEST_FILE}|{STATE_FILE})(\.tmp)?|{LOCK_FILE}"
)


@dataclass(frozen=True)
class Job:
    """What is written, the same for every process (it can be pickled).

    Attributes:
        layout: which rows are in which part.
        request: what determines the rows beside the seed (JSON); an unfinished dataset goes on with the same only.
        facts: where the rows come from (JSON, with `run_id`), for the manifest and, as text, the footer of every part.
        seed: of the rows; drawn where none was given.
        is_given: whether the seed was given.
        overwrite: whether a complete dataset at the output is replaced when this one is complete.
        present: parts that have their name already; each is to be checked by `DatasetWriter.verify`.
        is_finished: nothing is left to do.
    """

    layout: Layout
    request: dict[str, Any]
    facts: dict[str, Any]
    seed: int
    is_given: bool
    overwrite: bool = False
    present: tuple[int, ...] = ()
    is_finished: bool = False


class DatasetWriter:
    """One process's hand in a dataset.

    Usage: one process calls `begin` and hands `job` to the others, which make writers of their own with it. Each
        writes parts; the first calls `finish` when all are written. To be used in a `with` block.

    Args:
        path: the output folder, see `check_dataset_path`.
        schema: the declared schema; the cohort has its modelled columns.
        job: as `begin` settled it.

    Raises:
        OutputError: another command writes this dataset.
    """

    def __init__(self, path: Path | str, schema: Schema, job: Job, *, lock: FolderLock | None = None) -> None:
        self.path = Path(path)
        self.job = job
        self._schema = schema
        footer = {f"synthward.{key}": str(value) for key, value in job.facts.items() if value is not None}
        self._arrow_schema = arrow_schema(schema).with_metadata(footer)
        self._staging = staging_folder(self.path)
        # Temporary files of two writers never have the same name, whatever is left over from a kill.
        self._token = secrets.token_hex(6)
        self._noted: dict[int, list[PartRecord]] | None = None
        self._lock = lock
        if lock is None and not job.is_finished:
            self._lock = FolderLock(self._staging, is_shared=True)

    @classmethod
    def begin(
        cls,
        path: Path | str,
        schema: Schema,
        *,
        layout: Layout,
        request: dict[str, Any],
        facts: dict[str, Any],
        seed: int | None = None,
        resume: bool = False,
        overwrite: bool = False,
    ) -> DatasetWriter:
        """Begin a dataset, or go on with an unfinished one; the writer's `job` says what is left to do.

        Raises:
            OutputError: the output exists, can not be written, or was begun by something else.
        """
        path = Path(path)
        request = {**request, "schema": schema.fingerprint(), "layout": asdict(layout)}
        wanted = Job(
            layout,
            request,
            facts,
            seed=secrets.randbits(_SEED_BITS) if seed is None else seed,
            is_given=seed is not None,
            overwrite=overwrite,
        )
        with _disk_errors(path):
            check_dataset_path(path)
            complete = _complete_at(path)
            if complete is not None:
                if resume and _is_same(complete, wanted) and not staging_folder(path).exists():
                    # Killed after its last move, before its cleaning.
                    (path / LOCK_FILE).unlink(missing_ok=True)
                    _remove(_old_folder(path))
                    return cls(path, schema, replace(wanted, is_finished=True))
                if not overwrite:
                    raise OutputError(f"{path}: exists already: give another folder or --overwrite")
            return cls._begin(path, schema, wanted, resume=resume)

    @classmethod
    def _begin(cls, path: Path, schema: Schema, wanted: Job, *, resume: bool) -> DatasetWriter:
        staging = staging_folder(path)
        staging.mkdir(exist_ok=True)
        lock = FolderLock(staging, is_shared=False)
        try:
            job, is_complete = _job_in(staging, wanted, resume=resume)
            writer = cls(path, schema, job, lock=lock)
            if is_complete:
                # Killed between its last two moves.
                writer._publish()
            else:
                writer._write_state()
                lock.share()
        except BaseException:
            lock.remove()
            raise
        return writer

    def verify(self, part: int) -> PartRecord | None:
        """Reads a part that has its name; None unless it is byte for byte what was written."""
        if self._noted is None:
            self._noted = _journals(self._staging)
        with _disk_errors(self.path):
            file = self._staging / self.job.layout.name(part)
            size = file.stat().st_size
            noted = [record for record in self._noted.get(part, []) if record.bytes == size]
            digest = file_digest(file) if noted else None
        return next((record for record in noted if record.sha256 == digest), None)

    def write(self, part: int, batches: Iterable[pa.RecordBatch]) -> PartRecord:
        """Writes one part from all its rows, in batches with the schema of `arrow_schema`.

        Raises:
            OutputError: the disk refuses. ValueError: the batches have other rows than the part, or other columns.
        """
        name = self.job.layout.name(part)
        temporary = self._staging / f".{name}.{self._token}.tmp"
        with _disk_errors(self.path):
            output = ParquetOutput(temporary, self._arrow_schema)
            try:
                rows = 0
                for table in _row_groups(batches, self._arrow_schema):
                    rows += table.num_rows
                    output.write(table)
                if rows != self.job.layout.rows_of(part):
                    raise ValueError(f"part {part} has {self.job.layout.rows_of(part)} rows, got {rows}")
                output.close()
                record = PartRecord(part, rows, output.size, output.digest)
                self._note(record)
                temporary.replace(self._staging / name)
            except BaseException:
                output.abandon()
                temporary.unlink(missing_ok=True)
                raise
            sync_path(self._staging)
        return record

    def parts_on_disk(self) -> int:
        """How many parts have their name, by whomever they were written."""
        with _disk_errors(self.path):
            return len(_parts_in(self._staging))

    def finish(self, records: Iterable[PartRecord]) -> Path:
        """Writes the manifest and moves the folder to the output, which is returned.

        Raises:
            OutputError: a part changed since it was written or verified; the disk refuses.
        """
        found = sorted(records, key=lambda record: record.part)
        layout = self.job.layout
        if [record.part for record in found] != list(range(layout.parts)):
            raise ValueError(f"a dataset of {layout.parts} parts is not finished with {len(found)} of them")
        with _disk_errors(self.path):
            for record in found:
                file = self._staging / layout.name(record.part)
                if not file.is_file() or file.stat().st_size != record.bytes:
                    raise OutputError(f"{file}: was changed by something else; --resume makes it anew")
            seed = {"mode": "given", "value": self.job.seed} if self.job.is_given else {"mode": "drawn"}
            facts = {**self.job.facts, "seed": seed, "request": self.job.request}
            manifest = make_manifest(layout, self._schema, found, facts)
            text = json.dumps(manifest, indent=1, allow_nan=False) + "\n"
            write_lasting(self._staging / MANIFEST_FILE, text.encode())
            self._publish()
        return self.path

    def close(self) -> None:
        """Lets others write here. Where no part was finished, nothing stays."""
        if self._lock is None:
            return
        with contextlib.suppress(OSError):
            if self._staging.is_dir() and not _parts_in(self._staging) and self._lock.is_last():
                _remove(self._staging)
        self._lock.close()
        self._lock = None

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write_state(self) -> None:
        state = {"version": FORMAT_VERSION, "request": self.job.request, "run_id": self.job.facts["run_id"]}
        state |= {"seed": self.job.seed, "is_given": self.job.is_given}
        write_lasting(self._staging / STATE_FILE, (json.dumps(state) + "\n").encode())

    def _note(self, record: PartRecord) -> None:
        """One line in this writer's journal, on the disk before the part has its name."""
        with (self._staging / f"_journal-{self._token}.jsonl").open("ab") as file:
            file.write((json.dumps(asdict(record)) + "\n").encode())
            sync_file(file)

    def _publish(self) -> None:
        """Moves a folder that has its manifest to the output."""
        for file in self._staging.iterdir():
            if not _PART.fullmatch(file.name) and file.name not in (MANIFEST_FILE, LOCK_FILE):
                _refuse_foreign(file)
                file.unlink()
        old = _old_folder(self.path)
        _remove(old)
        if _complete_at(self.path) is not None:
            if not self.job.overwrite:
                raise OutputError(
                    f"{self.path}: exists already: move it away and give --resume, or --overwrite"
                )
            self.path.rename(old)
        # An empty folder is replaced by a rename, and no other.
        self._staging.rename(self.path)
        sync_path(self.path.parent)
        (self.path / LOCK_FILE).unlink(missing_ok=True)
        _remove(old)
        self.job = replace(self.job, is_finished=True)


def staging_folder(path: Path) -> Path:
    """Where the parts grow."""
    return path.with_name(f"{path.name}.parts")


def check_dataset_path(path: Path) -> None:
    """Raises OutputError where no dataset can be written, whatever the options."""
    if path.suffix or path.name in ("", ".."):
        raise OutputError(f"{path}: a cohort is written as .parquet, .csv, or a folder named without a dot")
    if path.is_symlink() or path.is_mount():
        raise OutputError(f"{path}: is a link or the root of a disk: name a folder inside it")
    if path.is_file():
        raise OutputError(f"{path}: is a file: name a folder, or a file that ends in .parquet or .csv")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder {path.parent} does not exist")


def _job_in(staging: Path, wanted: Job, *, resume: bool) -> tuple[Job, bool]:
    """The job to do in a staging folder that may hold an unfinished one, and whether only its last move is missing."""
    for file in staging.iterdir():
        _refuse_foreign(file)
    kept = read_manifest(staging) or _read_state(staging)
    present = tuple(sorted(_parts_in(staging)))
    if resume and kept is not None and _is_same(kept, wanted):
        for file in staging.glob("*.tmp"):
            file.unlink()
        if "parts" in kept:
            return replace(wanted, is_finished=True), True
        return replace(wanted, seed=kept["seed"], is_given=kept["is_given"], present=present), False
    if present and not wanted.overwrite:
        if resume:
            raise OutputError(
                f"{staging}: was begun with another run, --rows, --where or --seed: resume with the same, or "
                "--overwrite"
            )
        raise OutputError(
            f"{staging}: holds an interrupted cohort: give --resume to continue it, or --overwrite"
        )
    _clear(staging)
    return wanted, False


def _is_same(kept: dict[str, Any], wanted: Job) -> bool:
    """Whether a state or a manifest is of the same rows: of the same request, run, and seed if one is asked for."""
    same = kept.get("request") == wanted.request and kept.get("run_id") == wanted.facts["run_id"]
    seed = kept.get("seed")
    known = seed.get("value") if isinstance(seed, dict) else seed
    return same and (not wanted.is_given or known == wanted.seed)


def _read_state(staging: Path) -> dict[str, Any] | None:
    file = staging / STATE_FILE
    try:
        state = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        raise OutputError(f"{file}: can not be read: remove the folder") from None
    # Of another version: nothing that could be continued.
    return state if isinstance(state, dict) and state.get("version") == FORMAT_VERSION else None


def _journals(staging: Path) -> dict[int, list[PartRecord]]:
    """What was ever written, by part. A line that a kill cut short is of a part that never got its name."""
    noted: dict[int, list[PartRecord]] = {}
    for file in staging.glob("_journal-*.jsonl"):
        for line in file.read_bytes().splitlines():
            with contextlib.suppress(ValueError, TypeError):
                record = PartRecord(**json.loads(line))
                noted.setdefault(record.part, []).append(record)
    return noted


def _complete_at(path: Path) -> dict[str, Any] | None:
    """The manifest of a dataset at the output; None where there is nothing. Anything else is refused."""
    if not path.is_dir():
        return None
    names = [file.name for file in path.iterdir()]
    complete = read_manifest(path)
    if names and complete is None:
        raise OutputError(f"{path}: is a folder that holds other files: give another folder")
    for name in names:
        _refuse_foreign(path / name)
    return complete


def _parts_in(folder: Path) -> list[int]:
    return [int(found[1]) for file in folder.iterdir() if (found := _PART.fullmatch(file.name))]


def _refuse_foreign(file: Path) -> None:
    if not _OURS.fullmatch(file.name) or file.is_dir():
        raise OutputError(
            f"{file.parent}: holds a file of something else, {file.name}: move it away; nothing was lost"
        )


def _clear(folder: Path) -> None:
    """Removes what is ours and nothing else, but for the lock. First what makes it complete, or resumable."""
    for name in (MANIFEST_FILE, STATE_FILE):
        (folder / name).unlink(missing_ok=True)
    for file in folder.iterdir():
        if file.name != LOCK_FILE and _OURS.fullmatch(file.name) and not file.is_dir():
            file.unlink()


def _remove(folder: Path) -> None:
    """Removes a folder of ours; one that holds something else as well stays with that."""
    if folder.is_dir():
        _clear(folder)
        (folder / LOCK_FILE).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()


def _old_folder(path: Path) -> Path:
    """Where a dataset that is replaced lies until the new one has its place."""
    return path.with_name(f".{path.name}.old")


def _row_groups(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.Table]:
    """The batches as one table for each row group, all but the last of the same size."""
    pending: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        if not batch.schema.equals(schema):
            raise ValueError("the batch does not have the columns of the cohort: make it with to_arrow")
        pending.append(batch)
        rows += batch.num_rows
        while rows >= ROW_GROUP:
            table = pa.Table.from_batches(pending)
            yield table.slice(0, ROW_GROUP)
            rows -= ROW_GROUP
            pending = table.slice(ROW_GROUP).to_batches()
    if rows:
        yield pa.Table.from_batches(pending)


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Makes one line of what the disk refuses."""
    try:
        yield
    except OSError as error:
        kept = 0
        with contextlib.suppress(OSError):
            kept = len(_parts_in(staging_folder(path)))
        advice = f"; {kept} whole part(s) are kept, --resume goes on with the others" if kept else ""
        raise OutputError(f"{path}: cannot be written: {disk_reason(error)}{advice}") from None
