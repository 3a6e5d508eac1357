"""Files that are whole or not there: flushed to the disk under a temporary name, then renamed.

Every part of the house may use this. What the disk refuses is an `OSError`: the caller says what could not be written,
and clears away the temporary file where it has no use for it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO


def sync_file(file: IO[bytes]) -> None:
    """Flush what was written to an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_path(path: Path) -> None:
    """Flush to the disk a file that others wrote, or a folder, that is the names in it: a rename lasts from then on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes, *, is_new: bool = False) -> None:
    """Write a file and flush it to the disk.

    Args:
        is_new: a file that is there already is a `FileExistsError`, and stays as it is.
    """
    with path.open("xb" if is_new else "wb") as file:
        file.write(data)
        sync_file(file)


def replace_synced(path: Path, data: bytes, temporary: Path, *, is_new: bool = False) -> None:
    """Write a file under a temporary name, flush it and rename it: whoever opens `path` finds the old or the new one,
    whole.

    The folder is not flushed: after a loss of power it may be the old one again (`sync_path`).

    Args:
        temporary: in the same folder.
        is_new: a temporary file that is there already is a `FileExistsError`, and stays as it is.
    """
    write_synced(temporary, data, is_new=is_new)
    temporary.replace(path)
