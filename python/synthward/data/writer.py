"""Writes a cohort of any size in constant memory, so that a kill at any moment loses at most one part.

Rows go into numbered Parquet parts in a folder beside the output (`cohort.parquet.parts`). A part is flushed
to disk under a temporary name and then renamed, so a part that has its name is whole. At the end the parts
are merged, one row group at a time, into a temporary file that is renamed to the output; only then are they
removed. So the output is either absent (or what it was before) or complete, and a later run with `resume`
continues after the last whole part.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from synthward.data.arrow import arrow_schema
from synthward.data.disk import ROW_GROUP, ParquetOutput, disk_reason, write_lasting
from synthward.engine.errors import OutputError
from synthward.engine.files import sync_file, sync_path
from synthward.schema import Schema

_STATE_VERSION = 1


class CohortWriter:
    """Streams batches of `to_arrow` into one .parquet or .csv file.

    Usage: write batches, then `close(metadata)`; leaving a `with` block by an exception keeps the whole
        parts.

    Args:
        path: the output; its suffix chooses the format. Its folder must exist.
        schema: the declared schema; the cohort has its modelled columns.
        run_id: what makes the rows (run and request). A resumed output must have been begun with the same.
        resume: continue an interrupted output, if there is one: `rows_done` rows are already there.
        overwrite: replace an existing output (it stays until the new one is complete) or an interrupted one.
        rows_per_part: a part is closed by the first batch that brings it to this many rows, so that a resumed
            output always continues at the start of a batch.

    Raises:
        OutputError: the output exists, cannot be written, or was begun by something else; the disk is full.
    """

    def __init__(
        self,
        path: Path | str,
        schema: Schema,
        *,
        run_id: str,
        resume: bool = False,
        overwrite: bool = False,
        rows_per_part: int = 200_000,
    ) -> None:
        self.path = Path(path)
        self.rows_done = 0
        self._schema = schema
        self._arrow_schema = arrow_schema(schema)
        self._run_id = run_id
        self._rows_per_part = rows_per_part
        self._folder = self.path.with_name(self.path.name + ".parts")
        self._final_temporary = self.path.with_name(f".{self.path.name}.partial")
        self._parts: list[Path] = []
        self._part: ParquetOutput | None = None
        self._pending: list[pa.RecordBatch] = []
        self._pending_rows = 0
        self._part_rows = 0
        self._finished = False
        check_output(self.path)
        with self._disk_errors():
            self._begin(resume=resume, overwrite=overwrite)

    def write(self, batch: pa.RecordBatch) -> None:
        """Appends one batch with the schema of `arrow_schema`."""
        if self._finished:
            raise ValueError("the writer is closed")
        if not batch.schema.equals(self._arrow_schema):
            raise ValueError("the batch does not have the columns of the cohort: make it with to_arrow")
        with self._disk_errors():
            self._pending.append(batch)
            self._pending_rows += batch.num_rows
            self._part_rows += batch.num_rows
            self.rows_done += batch.num_rows
            if self._pending_rows >= ROW_GROUP:
                self._flush_rows()
            if self._part_rows >= self._rows_per_part:
                self._close_part()

    def close(self, metadata: dict[str, str] | None = None) -> Path:
        """Merges the parts into the output and returns its path.

        `metadata` goes into the footer of a Parquet file, each key with the prefix `synthward.`; CSV has no
        place for it.
        """
        if self._finished:
            raise ValueError("the writer is closed")
        with self._disk_errors():
            self._close_part()
            self._write_state(merging=True)
            try:
                self._merge(metadata or {})
                self._final_temporary.replace(self.path)
            finally:
                self._final_temporary.unlink(missing_ok=True)
            sync_path(self.path.parent)
            self._remove_folder()
        self._finished = True
        return self.path

    def abort(self) -> None:
        """Stops without an output; whole parts stay for a later `resume`, and with none of them nothing
        stays."""
        if self._finished:
            return
        self._finished = True
        self._drop_part()
        self._final_temporary.unlink(missing_ok=True)
        if not self._parts:
            with contextlib.suppress(OSError):
                self._remove_folder()

    def __enter__(self) -> CohortWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and not self._finished:
            self.close()
        else:
            self.abort()

    def _begin(self, *, resume: bool, overwrite: bool) -> None:
        state = self._read_state()
        if resume and state is not None and self._matches(state, overwrite):
            # While parts are merged the output may already stand: killed after the rename, before the
            # cleaning.
            if self.path.exists() and not state["merging"] and not overwrite:
                raise OutputError(f"{self.path}: exists already: give another path or --overwrite")
            self._load_parts()
            return
        if self.path.exists() and not overwrite:
            raise OutputError(f"{self.path}: exists already: give another path or --overwrite")
        if state is not None and not overwrite and any(self._folder.glob("part-*.parquet")):
            raise OutputError(
                f"{self._folder}: holds an interrupted output: give --resume to continue it, or --overwrite"
            )
        if self._folder.exists():
            self._remove_folder()
        self._folder.mkdir()
        self._write_state(merging=False)

    def _matches(self, state: dict[str, Any], overwrite: bool) -> bool:
        if state["run_id"] == self._run_id and state["schema"] == self._schema.fingerprint():
            return True
        if overwrite:
            return False
        raise OutputError(f"{self._folder}: was begun by another run or request: --overwrite starts again")

    def _load_parts(self) -> None:
        for path in self._folder.glob("*.tmp"):
            path.unlink()
        self._parts = sorted(self._folder.glob("part-*.parquet"))
        for number, path in enumerate(self._parts):
            if path.name != _part_name(number):
                raise OutputError(f"{self._folder}: part {number} is gone: --overwrite starts again")
            try:
                self.rows_done += pq.read_metadata(path).num_rows
            except (pa.ArrowException, OSError):
                raise OutputError(f"{path}: is damaged: --overwrite starts again") from None

    def _read_state(self) -> dict[str, Any] | None:
        try:
            state = json.loads((self._folder / "state.json").read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            raise OutputError(f"{self._folder}: its state.json cannot be read: remove the folder") from None
        if not isinstance(state, dict) or state.get("version") != _STATE_VERSION:
            raise OutputError(f"{self._folder}: was written by another version: --overwrite starts again")
        return state

    def _write_state(self, *, merging: bool) -> None:
        state = {
            "version": _STATE_VERSION,
            "run_id": self._run_id,
            "schema": self._schema.fingerprint(),
            "merging": merging,
        }
        write_lasting(self._folder / "state.json", (json.dumps(state) + "\n").encode())

    def _flush_rows(self) -> None:
        if not self._pending:
            return
        if self._part is None:
            self._part = ParquetOutput(self._part_temporary, self._arrow_schema)
        self._part.write(pa.Table.from_batches(self._pending))
        self._pending.clear()
        self._pending_rows = 0

    @property
    def _part_temporary(self) -> Path:
        return self._folder / (_part_name(len(self._parts)) + ".tmp")

    def _close_part(self) -> None:
        self._flush_rows()
        if self._part is None:
            return
        self._part.close()
        path = self._folder / _part_name(len(self._parts))
        self._part_temporary.replace(path)
        sync_path(self._folder)
        self._parts.append(path)
        self._part = None
        self._part_rows = 0

    def _drop_part(self) -> None:
        if self._part is not None:
            self._part.abandon()
            self._part = None
        self._pending.clear()
        self._part_temporary.unlink(missing_ok=True)

    def _merge(self, metadata: dict[str, str]) -> None:
        if self.path.suffix == ".csv":
            with self._final_temporary.open("wb") as file:
                self._merge_csv(file)
                sync_file(file)
            return
        footer = {f"synthward.{key}": value for key, value in metadata.items()}
        merged = ParquetOutput(self._final_temporary, self._arrow_schema.with_metadata(footer))
        try:
            for table in self._row_groups():
                merged.write(table.replace_schema_metadata(footer))
            merged.close()
        except BaseException:
            merged.abandon()
            raise

    def _merge_csv(self, file: BinaryIO) -> None:
        plain = _plain(self._schema, self._arrow_schema.empty_table())
        with pa_csv.CSVWriter(file, plain.schema) as writer:
            for table in self._row_groups():
                writer.write_table(_plain(self._schema, table))

    def _row_groups(self) -> Iterator[pa.Table]:
        for path in self._parts:
            with pq.ParquetFile(path) as part:
                for group in range(part.num_row_groups):
                    yield part.read_row_group(group, use_threads=False).cast(self._arrow_schema)

    def _remove_folder(self) -> None:
        """Removes what this class writes and nothing else. The state goes first: without it nothing is
        resumed."""
        (self._folder / "state.json").unlink(missing_ok=True)
        for pattern in ("part-*.parquet", "*.tmp"):
            for path in self._folder.glob(pattern):
                path.unlink()
        try:
            self._folder.rmdir()
        except OSError:
            raise OutputError(f"{self._folder}: holds files of something else: move them away") from None

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Makes one line of what the disk refuses, and keeps the whole parts."""
        try:
            yield
        except OSError as error:
            kept = len(self._parts)
            self.abort()
            advice = f"; {kept} whole part(s) are kept, --resume continues after them" if kept else ""
            raise OutputError(f"{self.path}: cannot be written: {disk_reason(error)}{advice}") from None


def check_output(path: Path) -> None:
    """Raises OutputError where no cohort can be written to the path, whatever is there now."""
    if path.suffix not in (".parquet", ".csv"):
        raise OutputError(f"{path}: a cohort is written as .parquet or .csv")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise OutputError(f"{path}: is a folder")


def _part_name(number: int) -> str:
    return f"part-{number:05d}.parquet"


def _plain(schema: Schema, table: pa.Table) -> pa.Table:
    """The table with categories as text and datetimes in their declared format, as CSV holds them."""
    arrays = []
    for column in schema.modelled:
        values = table.column(column.name)
        if pa.types.is_dictionary(values.type):
            values = values.cast(pa.string())
        elif column.kind == "datetime" and column.format is not None:
            # Without fractions: %S would print them.
            values = pc.strftime(values.cast(pa.timestamp("s")), format=column.format)
        arrays.append(values)
    return pa.Table.from_arrays(arrays, names=table.column_names)
