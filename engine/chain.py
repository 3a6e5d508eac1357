"""A file that only grows: canonical JSON lines, each holding the SHA-256 of the line before.

A line is on the disk when `Chain.append` returns. One process writes at a time. What kinds of lines there are, and
what fields each has, is a closed set (`Format`): reading a file runs no code. Nobody can change, remove or move a line
unseen, except at the end; there `Chain.open` needs to be told of a hash that the file must hold.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from synthward.engine.errors import LedgerError, SynthwardError
from synthward.engine.files import sync_path

Line = dict[str, Any]
# Raises ValueError, with what the line "...", if a line can not follow those before it.
Check = Callable[[Sequence[Line], Line], None]

_START = "0" * 64
_COMMON = frozenset({"seq", "prev", "time", "kind", "hash"})


@dataclass(frozen=True)
class Format:
    """What a chained file may hold.

    Attributes:
        noun: what the file is called in messages.
        domain: start of what is hashed, so that no line of one format is one of another.
        fields: of each kind of line, the fields that it has. The first line, and no other, is a "header".
        optional: of each kind of line, the fields that it may have.
        unspent: end of a message about a line that could not be written.
    """

    noun: str
    domain: bytes
    fields: Mapping[str, frozenset[str]]
    optional: Mapping[str, frozenset[str]] = field(default_factory=dict)
    unspent: str = "nothing was spent"


class Chain:
    """An open chained file.

    Guarantees: when `append` returns, its line is on the disk; when it raises, the file is as before. `lines` were
    verified, each against the one before.

    Attributes:
        lines: all lines, oldest first.
        torn: what stands behind the last whole line, or nothing.
    """

    def __init__(self, path: Path, form: Format, descriptor: int) -> None:
        self.path, self.form = path, form
        self.lines: list[Line] = []
        self.torn = b""
        self._descriptor: int | None = descriptor
        self._pid = os.getpid()

    @classmethod
    def create(cls, path: Path | str, form: Format, **header: Any) -> Chain:
        """Start a file with its header line; an existing one is a `LedgerError`.

        An empty file is none: that is what a process leaves that was killed before it wrote the header.
        """
        path = Path(path)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise LedgerError(f"{path}: can not be written ({error.strerror}); {form.unspent}") from None
        chain = cls(path, form, descriptor)
        chain._lock(0.0)
        if os.fstat(descriptor).st_size:
            chain.close()
            raise LedgerError(f"{path}: a {form.noun} exists here already; its spend can not be reset")
        try:
            chain.append("header", **header)
            sync_path(path.absolute().parent)
        except BaseException:
            # Nothing was charged yet: half a file would only bar the next attempt.
            path.unlink(missing_ok=True)
            chain.close()
            raise
        return chain

    @classmethod
    def open(
        cls,
        path: Path | str,
        form: Format,
        check: Check,
        *,
        readonly: bool = False,
        expected_head: str | None = None,
        patience: float = 0.0,
    ) -> Chain:
        """Open and verify a file.

        Args:
            check: what the fields of a line must be.
            expected_head: a hash that some line must have.
            patience: seconds to wait while another process writes.

        Raises:
            LedgerError: no file, a broken link, a line that is not of the format, the expected head is missing, or
                another process writes.
        """
        path = Path(path)
        try:
            descriptor = os.open(path, os.O_RDONLY if readonly else os.O_RDWR | os.O_APPEND)
        except FileNotFoundError:
            raise LedgerError(f"{path}: no {form.noun} here") from None
        except OSError as error:
            raise LedgerError(f"{path}: can not be opened ({error.strerror})") from None
        chain = cls(path, form, descriptor)
        try:
            if not readonly:
                chain._lock(patience)
            chain._load(check, expected_head)
        except BaseException:
            chain.close()
            raise
        return chain

    @property
    def head(self) -> str:
        """Hash of the last line, hex."""
        return str(self.lines[-1]["hash"])

    def holds(self, head: str) -> bool:
        """Whether some line has this hash."""
        return any(line["hash"] == head for line in self.lines)

    @property
    def is_open(self) -> bool:
        """Whether this process, the one that opened it, may still use the file."""
        return self._descriptor is not None and self._pid == os.getpid()

    @property
    def is_writable(self) -> bool:
        return (
            self._descriptor is not None
            and fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        )

    def append(self, kind: str, **fields: Any) -> Line:
        """Add a line; returns when it is on the disk."""
        line, data = self._next_line(kind, fields)
        assert self._descriptor is not None
        end = os.lseek(self._descriptor, 0, os.SEEK_END)
        try:
            _write(self._descriptor, data)
        except OSError as error:
            # Nothing that this line covers will happen: take back the part that was written.
            self._cut(end)
            raise self._unwritten(error) from None
        self.lines.append(line)
        return line

    def replace_torn(self, kind: str, **fields: Any) -> Line:
        """Put a line in the place of what is torn.

        The torn bytes are overwritten, not cut off first: a process killed in between leaves the one or the other.
        """
        line, data = self._next_line(kind, fields)
        assert self._descriptor is not None
        whole = os.fstat(self._descriptor).st_size - len(self.torn)
        try:
            # A descriptor that appends can not write anywhere else.
            over = os.open(self.path, os.O_WRONLY)
            try:
                os.lseek(over, whole, os.SEEK_SET)
                _write(over, data)
                os.ftruncate(over, whole + len(data))
                os.fsync(over)
            finally:
                os.close(over)
        except OSError as error:
            self.close()
            raise self._unwritten(error) from None
        self.lines.append(line)
        self.torn = b""
        return line

    def close(self) -> None:
        """Release the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _next_line(self, kind: str, fields: dict[str, Any]) -> tuple[Line, bytes]:
        if self._descriptor is None:
            raise LedgerError(f"{self.path}: the {self.form.noun} is closed")
        if self._pid != os.getpid():
            raise LedgerError(f"{self.path}: belongs to the process that opened it, not to a fork of it")
        line: Line = {
            "seq": len(self.lines),
            "prev": self.lines[-1]["hash"] if self.lines else _START,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "kind": kind,
            **fields,
        }
        line["hash"] = self._digest(line)
        return line, canonical(line) + b"\n"

    def _cut(self, end: int) -> None:
        assert self._descriptor is not None
        try:
            os.ftruncate(self._descriptor, end)
        except OSError:
            # The line may be there or not; whoever opens the file next will see which.
            self.close()

    def _unwritten(self, error: OSError) -> LedgerError:
        return LedgerError(f"{self.path}: can not be written ({error.strerror}); {self.form.unspent}")

    def _lock(self, patience: float) -> None:
        assert self._descriptor is not None
        last = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                if time.monotonic() >= last:
                    self.close()
                    raise LedgerError(
                        f"{self.path}: another process is writing this {self.form.noun}"
                    ) from None
            time.sleep(0.02)

    def _load(self, check: Check, expected_head: str | None) -> None:
        data = self._read()
        whole, _, self.torn = data.rpartition(b"\n")
        if not whole:
            raise LedgerError(f"{self.path}: is not a {self.form.noun}")
        for number, text in enumerate(whole.split(b"\n"), start=1):
            self.lines.append(self._verify(number, text, check))
        if expected_head is not None and not self.holds(expected_head):
            raise LedgerError(f"{self.path}: does not hold the expected head; lines were cut off or replaced")

    def _read(self) -> bytes:
        assert self._descriptor is not None
        parts = []
        try:
            while part := os.read(self._descriptor, 1 << 20):
                parts.append(part)
        except OSError as error:
            raise LedgerError(f"{self.path}: can not be opened ({error.strerror})") from None
        return b"".join(parts)

    def _verify(self, number: int, text: bytes, check: Check) -> Line:
        """One line, checked against the line before; any doubt is a `LedgerError` that names the line."""
        try:
            line = json.loads(text)
            if not isinstance(line, dict) or not isinstance(line.get("kind"), str):
                raise ValueError(f"is none of a {self.form.noun}")
            kind = line["kind"]
            known = self.form.fields.get(kind)
            if known is None:
                raise ValueError("is of an unknown kind")
            if set(line) - self.form.optional.get(kind, frozenset()) != _COMMON | known:
                raise ValueError("has unknown or missing fields")
            if canonical(line) != text:
                raise ValueError("is not written as it should be")
            prev = self.lines[-1]["hash"] if self.lines else _START
            if not is_count(line["seq"]) or line["seq"] != len(self.lines) or line["prev"] != prev:
                raise ValueError("does not follow the line before")
            if line["hash"] != self._digest({k: v for k, v in line.items() if k != "hash"}):
                raise ValueError("was changed after it was written")
            if (kind == "header") != (not self.lines):
                raise ValueError("is out of place")
            check(self.lines, line)
        except (json.JSONDecodeError, UnicodeError, RecursionError):
            reason = "can not be read"
        except (ValueError, TypeError, KeyError, OverflowError, SynthwardError) as error:
            reason = str(error)
        else:
            return line
        raise LedgerError(f"{self.path}: line {number} {reason}; the {self.form.noun} can not be trusted")

    def _digest(self, line: Line) -> str:
        return hashlib.sha256(self.form.domain + canonical(line)).hexdigest()


def canonical(value: Mapping[str, Any]) -> bytes:
    """Sorted keys, no blanks, shortest round-trip floats."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def is_count(value: object) -> bool:
    """Whether this is a whole number of at least 0, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _write(descriptor: int, data: bytes) -> None:
    if os.write(descriptor, data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fsync(descriptor)
