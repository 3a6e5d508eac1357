"""Writing a finished file in one move, so that nothing half-written is ever at its final path."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from synthward.engine.errors import OutputError
from synthward.engine.files import replace_synced


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise OutputError when ``path`` may not be written."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give the path of a file")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists already; choose another path or allow overwriting (--overwrite)")
    if not path.parent.is_dir():
        raise OutputError(f"the folder {path.parent} does not exist")


def write_new_file(path: Path, content: bytes, *, overwrite: bool) -> Path:
    """Write ``content`` beside ``path`` and move it there when it is complete and on disk.

    Raises:
        OutputError: the path exists and ``overwrite`` is False, its folder does not exist, or the disk is
            full.
    """
    refuse_existing(path, overwrite)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        replace_synced(path, content, temporary, is_new=True)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return path
