"""A lock on a folder that several processes of one command write to."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path

from synthward.engine.errors import OutputError

LOCK_FILE = "_lock"
PATIENCE_SECONDS = 5.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class FolderLock:
    """Held by every process that writes a dataset, shared once it is begun: nobody else can begin there meanwhile."""

    def __init__(self, folder: Path, *, is_shared: bool) -> None:
        self._folder = folder
        try:
            self._handle = (folder / LOCK_FILE).open("a+b")
        except FileNotFoundError:
            raise self._taken() from None
        kind = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
        last = time.monotonic() + PATIENCE_SECONDS
        # Processes of a command that was killed may take a moment to end.
        while not self._try(kind):
            if time.monotonic() > last:
                self._handle.close()
                raise self._taken()
            time.sleep(0.05)
        # Where the folder was moved or removed meanwhile, this is a lock on nothing.
        if not (folder / LOCK_FILE).exists() or not os.path.samestat(
            os.fstat(self._handle.fileno()), (folder / LOCK_FILE).stat()
        ):
            self._handle.close()
            raise self._taken()

    def share(self) -> None:
        """Let the other processes of this command in."""
        if not self._try(fcntl.LOCK_SH):
            raise self._taken()

    def is_last(self) -> bool:
        """Whether no other process writes here; if so, none can begin until this one closes."""
        return self._try(fcntl.LOCK_EX)

    def close(self) -> None:
        self._handle.close()

    def remove(self) -> None:
        """Close it, and leave nothing of it behind."""
        with contextlib.suppress(OSError):
            (self._folder / LOCK_FILE).unlink()
            self._folder.rmdir()
        self.close()

    def _try(self, kind: int) -> bool:
        try:
            fcntl.flock(self._handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            # Some file systems of clusters have no locks; names that differ still keep writers apart.
            if error.errno not in _NO_LOCKS:
                raise
        return True

    def _taken(self) -> OutputError:
        return OutputError(f"{self._folder}: another process writes here: wait for it, or end it")
