"""CSV and Parquet files as a stream of Arrow batches, with one clear line for whatever is wrong with the
file."""

from __future__ import annotations

import codecs
import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from synthward.data.manifest import dataset_files
from synthward.engine.errors import DataError

_BLOCK_BYTES = 4 << 20
_PARQUET_BATCH = 65_536
_CSV_SUFFIXES = (".csv", ".csv.gz")


class Source:
    """A table on disk. `names` are its columns; `batches(names)` streams some of them.

    CSV cells arrive as text; Parquet cells in their Arrow type.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._ragged: pa_csv.InvalidRow | None = None  # the row that stopped the CSV parser
        name = self.path.name.lower()
        if not self.path.exists():
            raise DataError(f"{self.path}: no such file")
        self._is_csv = name.endswith(_CSV_SUFFIXES)
        if not self._is_csv and not self.path.is_dir() and not name.endswith(".parquet"):
            raise DataError(
                f"{self.path}: unknown kind of file: give .csv, .csv.gz, .parquet or a folder of .parquet"
            )
        if self.path.is_file() and self.path.stat().st_size == 0:
            raise DataError(f"{self.path}: the file is empty")
        self._parts = [self.path] if self.path.is_file() else dataset_files(self.path)
        if not self._parts:
            raise DataError(f"{self.path}: the folder holds no .parquet file")
        self.names: list[str] = self._csv_names() if self._is_csv else self._parquet_names()
        doubled = sorted({column for column in self.names if self.names.count(column) > 1})
        if doubled:
            raise DataError(f"{self.path}: column '{doubled[0]}' appears twice in the file")

    def batches(self, names: list[str]) -> Iterator[pa.RecordBatch]:
        """Batches of the named columns, in that order. Raises DataError for a broken file."""
        return self._csv_batches(names) if self._is_csv else self._parquet_batches(names)

    def _csv_names(self) -> list[str]:
        with self.path.open("rb") as file:
            if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
                raise DataError(f"{self.path}: is UTF-16 text, not UTF-8 text: save the file as UTF-8")
        self._check_text()
        with self._open_csv(None) as reader:
            names = list(reader.schema.names)
        for mark, word in ((";", "semicolons"), ("\t", "tabs")):
            if len(names) == 1 and mark in names[0]:
                raise DataError(f"{self.path}: its cells are separated by {word}: save it with commas")
        return names

    def _check_text(self) -> None:
        """Refuse bytes that are not UTF-8, in one quick pass: the parser only notices them in some places."""
        decoder, lines = codecs.getincrementaldecoder("utf-8")(), 0
        opened = gzip.open if self.path.suffix == ".gz" else open
        try:
            with opened(self.path, "rb") as file:
                while chunk := file.read(1 << 22):
                    try:
                        decoder.decode(chunk)
                    except UnicodeDecodeError as error:
                        lines += chunk[: error.start].count(b"\n")
                        where = f"row {lines}" if lines else "the header"
                        raise DataError(
                            f"{self.path}: {where} is not UTF-8 text: save the file as UTF-8"
                        ) from None
                    lines += chunk.count(b"\n")
        except (OSError, EOFError, zlib.error):
            return  # the parser says what is wrong with a broken file

    def _open_csv(self, names: list[str] | None) -> pa_csv.CSVStreamingReader:
        def refuse(row: pa_csv.InvalidRow) -> str:
            self._ragged = row
            return "error"

        self._ragged = None
        text = pa_csv.ConvertOptions(
            column_types=None if names is None else dict.fromkeys(names, pa.string()),
            include_columns=names,
            strings_can_be_null=False,
            null_values=[],
        )
        try:
            # One thread: only then does the parser know the numbers of bad rows.
            return pa_csv.open_csv(
                self.path,
                read_options=pa_csv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False),
                parse_options=pa_csv.ParseOptions(newlines_in_values=True, invalid_row_handler=refuse),
                convert_options=text,
            )
        except (pa.ArrowException, OSError) as error:
            raise self._csv_error(error) from None

    def _csv_batches(self, names: list[str]) -> Iterator[pa.RecordBatch]:
        with self._open_csv(names) as reader:
            while True:
                try:
                    batch = reader.read_next_batch()
                except StopIteration:
                    return
                except (pa.ArrowException, OSError) as error:
                    raise self._csv_error(error) from None
                yield batch

    def _csv_error(self, error: Exception) -> DataError:
        text = " ".join(str(error).split())
        row = self._ragged
        if row is not None:
            # The parser counts the header as row 1.
            where = f"row {row.number - 1}: " if row.number else ""
            return DataError(
                f"{self.path}: {where}has {row.actual_columns} cells, the header has {row.expected_columns}"
            )
        if "Empty CSV file" in text:
            return DataError(f"{self.path}: the file is empty")
        if "UTF8" in text:
            column = re.search(r"column #(\d+)", text)
            where = f"column {int(column[1]) + 1}: " if column else ""
            return DataError(f"{self.path}: {where}is not UTF-8 text: save the file as UTF-8")
        if "straddling" in text:
            return DataError(
                f"{self.path}: a row is longer than {_BLOCK_BYTES >> 20} MB: is a quote left open?"
            )
        return DataError(f"{self.path}: cannot read the CSV file: {text[:160]}")

    def _parquet_names(self) -> list[str]:
        names: list[str] | None = None
        for part in self._parts:
            with self._open_parquet(part) as file:
                found = list(file.schema_arrow.names)
            if names is not None and set(found) != set(names):
                raise DataError(f"{part}: has other columns than {self._parts[0].name} in the same folder")
            names = names or found
        return names or []

    def _open_parquet(self, part: Path) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(part)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{part}: not a readable Parquet file: {' '.join(str(error).split())[:120]}"
            ) from None

    def _parquet_batches(self, names: list[str]) -> Iterator[pa.RecordBatch]:
        for part in self._parts:
            with self._open_parquet(part) as file:
                batches = file.iter_batches(batch_size=_PARQUET_BATCH, columns=names, use_threads=False)
                while True:
                    try:
                        batch = next(batches, None)
                    except (pa.ArrowException, OSError) as error:
                        text = " ".join(str(error).split())[:120]
                        raise DataError(f"{part}: the Parquet file is damaged: {text}") from None
                    if batch is None:
                        break
                    yield batch.select(names)
