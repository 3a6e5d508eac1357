"""Files that are whole or not there: flushed to the disk under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from synthward.engine.files import replace_synced, sync_file, sync_path

ROW_GROUP = 65_536
_FULL = (errno.ENOSPC, errno.EDQUOT)


def disk_reason(error: OSError) -> str:
    """What the disk refused, in words."""
    return "no space left on the disk" if error.errno in _FULL else (error.strerror or str(error))


def write_lasting(path: Path, data: bytes) -> None:
    """Writes a small file in one move: a reader, or a later start after a kill, finds the old or the new one."""
    replace_synced(path, data, path.with_name(f"{path.name}.tmp"))
    sync_path(path.parent)


class ParquetOutput:
    """A Parquet file that is on the disk when `close` returns, and can be given up without complaint.

    Attributes:
        digest: SHA-256 of what was written, hex; once it is closed.
        size: bytes that were written.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._file = _Counted(path.open("wb"))
        self._writer = pq.ParquetWriter(self._file, schema)

    @property
    def digest(self) -> str:
        return self._file.hash.hexdigest()

    @property
    def size(self) -> int:
        return self._file.tell()

    def write(self, table: pa.Table) -> None:
        self._writer.write_table(table, row_group_size=ROW_GROUP)

    def close(self) -> None:
        self._writer.close()
        self._file.sync()
        self._file.close()

    def abandon(self) -> None:
        # The library's writer closes itself when collected, which would raise once more on a full disk.
        self._writer.is_open = False
        with contextlib.suppress(OSError):
            self._file.close()


class _Counted:
    """A file to be written from its beginning to its end, hashed on the way.

    So the hash is of what was meant, and a disk that keeps something else is found out.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size = file, 0
        self.hash = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self._size += memoryview(data).nbytes
        return self._file.write(data)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        self._file.flush()

    def sync(self) -> None:
        sync_file(self._file)

    def close(self) -> None:
        self._file.close()

    @property
    def closed(self) -> bool:
        return self._file.closed

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False
