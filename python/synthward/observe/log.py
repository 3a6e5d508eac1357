"""The log of a run: JSON lines, appended to over all its processes' lives."""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from synthward.observe.events import Event, make_event

LOG_FILE = "log.jsonl"


class NullLog:
    """Checks fields as a log does, and keeps nothing: what ranks other than 0 have."""

    def write(self, name: str, **fields: Any) -> Event:
        """One line ``{"time": ..., "event": name, **fields}``; returns its fields.

        Raises:
            PrivacyError: a field that the closed set of `synthward.observe.events` does not have.
        """
        return make_event(name, fields)

    def close(self) -> None:
        """No more lines come; calling it twice does no harm."""


class RunLog(NullLog):
    """The log of one run folder.

    A line that an earlier process's end tore is left as it is and ended, so that the lines after it can be read.
    Where the file can not be written, one remark says so and the run goes on without: steps that are paid for are worth
    more than lines about them.
    """

    def __init__(self, path: Path, remark: Callable[[str], None]) -> None:
        self.path, self._remark = path, remark
        self._file: BinaryIO | None = None
        try:
            self._file = path.open("ab", buffering=0)
            if _is_torn(path):
                write_all(self._file, b"\n")
        except OSError as error:
            self._give_up(error)

    def write(self, name: str, **fields: Any) -> Event:
        event = super().write(name, **fields)
        if self._file is None:
            return event
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = _json_ready({"time": now, "event": name, **event.model_dump()})
        try:
            write_all(self._file, json.dumps(line, allow_nan=False).encode() + b"\n")
        except OSError as error:
            self._give_up(error)
        return event

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _give_up(self, error: OSError) -> None:
        self.close()
        self._remark(
            f"{self.path}: can not be written ({error.strerror or error}); the run goes on without its log"
        )


def _is_torn(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def write_all(file: BinaryIO, data: bytes) -> None:
    """An unbuffered file may take a part only, as when the disk is nearly full: the next call then says why."""
    while data:
        data = data[file.write(data) :]


def _json_ready(value: Any) -> Any:
    """Infinity as text and NaN as null, as the command line prints them."""
    if isinstance(value, dict):
        return {name: _json_ready(item) for name, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value
