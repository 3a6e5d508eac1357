"""The manifest of a cohort in parts: a folder of Parquet files of one schema, and what makes it complete.

`_manifest.json` names every part with its first row, rows, bytes and SHA-256, and says from which run and at which
epsilon the rows come. Readers of tables ignore it: the names of hidden files begin with `_` or a dot.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from synthward.data.arrow import arrow_schema
from synthward.engine.errors import DataError
from synthward.schema import Schema

MANIFEST_FILE, STATE_FILE = "_manifest.json", "_state.json"
FORMAT, FORMAT_VERSION = "synthward cohort", 1
MOST_ROWS = 1 << 19
"""Rows of a part at most, unless a chunk of rows has more."""

_USUAL_PARTS = 64


@dataclass(frozen=True)
class Layout:
    """Which rows are in which part; it follows from the number of rows, never from who writes them.

    Attributes:
        rows: of the whole cohort, at least 1.
        rows_per_part: of every part but the last, at least 1.
    """

    rows: int
    rows_per_part: int

    @classmethod
    def of(cls, rows: int, chunk: int) -> Layout:
        """Parts of whole chunks of ``chunk`` rows: up to 64 of them, more where they would pass `MOST_ROWS`."""
        wanted = min(-(-rows // _USUAL_PARTS), MOST_ROWS)
        return cls(rows, -(-wanted // chunk) * chunk)

    @property
    def parts(self) -> int:
        return -(-self.rows // self.rows_per_part)

    def name(self, part: int) -> str:
        """The file of a part. All names have the same length, so that they sort as their rows do."""
        return f"part-{part:0{max(5, len(str(self.parts - 1)))}d}.parquet"

    def first_row(self, part: int) -> int:
        return part * self.rows_per_part

    def rows_of(self, part: int) -> int:
        return min(self.rows_per_part, self.rows - self.first_row(part))


@dataclass(frozen=True)
class PartRecord:
    """A part on the disk: its number, rows, bytes, and SHA-256 (hex)."""

    part: int
    rows: int
    bytes: int
    sha256: str


def make_manifest(
    layout: Layout, schema: Schema, records: list[PartRecord], facts: dict[str, Any]
) -> dict[str, Any]:
    """The manifest of all parts of a layout; ``facts`` (JSON) say where the rows come from."""
    fields = zip(schema.modelled, arrow_schema(schema), strict=True)
    columns = [
        {"name": field.name, "kind": column.kind, "type": str(field.type), "nullable": field.nullable}
        for column, field in fields
    ]
    parts = []
    for record in sorted(records, key=lambda found: found.part):
        entry = {"file": layout.name(record.part), "first_row": layout.first_row(record.part)}
        parts.append(entry | {k: v for k, v in asdict(record).items() if k != "part"})
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **facts,
        "rows": layout.rows,
        "rows_per_part": layout.rows_per_part,
        "schema": {"fingerprint": schema.fingerprint(), "columns": columns},
        "parts": parts,
    }


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete dataset; None in a folder that has none of ours.

    Raises:
        DataError: it is damaged, or of a later version.
    """
    file = folder / MANIFEST_FILE
    try:
        found = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError):
        raise DataError(f"{file}: can not be read as a manifest: make the cohort anew") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        return None
    if found.get("format_version") != FORMAT_VERSION:
        raise DataError(f"{file}: is of another version of synthward")
    try:
        for entry in found["parts"]:
            if Path(entry["file"]).name != entry["file"]:
                raise ValueError("not the name of a file")
            int(entry["rows"]), int(entry["bytes"]), str(entry["sha256"])
        int(found["rows"])
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{file}: is damaged: make the cohort anew") from None
    return found


def dataset_files(folder: Path) -> list[Path]:
    """The Parquet files of a folder in the order of their rows: those of its manifest, else all that are not hidden.

    Raises:
        DataError: a part is missing or of another size than the manifest says, or the dataset is unfinished.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        if (folder / STATE_FILE).exists():
            raise DataError(
                f"{folder}: is an unfinished cohort: finish it with `synthward sample ... --resume`"
            )
        return sorted(file for file in folder.glob("*.parquet") if file.name[0] not in "._")
    return [_sized(folder / entry["file"], int(entry["bytes"])) for entry in manifest["parts"]]


def check_dataset(folder: Path) -> dict[str, Any]:
    """Reads every part and compares it with the manifest, which is returned.

    Raises:
        DataError: there is no manifest, or a part is missing, changed, or not named by it.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise DataError(f"{folder}: is a folder without a manifest ({MANIFEST_FILE}) of a cohort")
    files = dataset_files(folder)
    for file, entry in zip(files, manifest["parts"], strict=True):
        if file_digest(file) != entry["sha256"]:
            raise DataError(f"{file}: is not what the manifest names (its SHA-256 differs)")
    # Whoever reads the folder as a table reads these too.
    more = sorted({file for file in folder.glob("*.parquet") if file.name[0] not in "._"} - set(files))
    if more:
        raise DataError(f"{more[0]}: is not named by the manifest beside it")
    return manifest


def file_digest(file: Path) -> str:
    """SHA-256 of a file, hex."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sized(file: Path, size: int) -> Path:
    try:
        found = file.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{file}: is missing; the manifest of the cohort names it") from None
    if found != size:
        raise DataError(f"{file}: has {found} bytes, the manifest of the cohort says {size}")
    return file
