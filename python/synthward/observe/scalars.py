"""Scalars for TensorBoard: the figures of the log's progress lines, and no others."""

from __future__ import annotations

import importlib.util
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from synthward.engine.errors import ConfigError, PrivacyError
from synthward.observe.events import Progress
from synthward.observe.log import write_all

TAGS = {
    "epsilon": "privacy/epsilon",
    "clip_bound": "privacy/clip_bound",
    "learning_rate": "training/learning_rate",
    "parameter_norm": "training/parameter_norm",
    "update_norm": "training/update_norm",
    "steps_per_second": "speed/steps_per_second",
}


def check_tensorboard() -> None:
    """`ConfigError` with what to install where TensorBoard is missing; to be called before records are read."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "--tensorboard: the package tensorboard is not installed; install it: "
            "pip install 'synthward[tensorboard]'"
        )


class NullScalars:
    """Writes nothing: without ``--tensorboard``, and on ranks other than 0."""

    def write(self, progress: Progress) -> None:
        """One point of each scalar, at the step of the line.

        Raises:
            PrivacyError: `progress` is not a line of the closed set.
        """
        if type(progress) is not Progress:
            raise PrivacyError(f"scalars: are those of 'progress' lines, not of {type(progress).__name__}")

    def close(self) -> None:
        """No more points come; calling it twice does no harm."""


class Scalars(NullScalars):
    """Event files in a folder.

    Args:
        folder: where TensorBoard looks; made if need be. Event files of earlier processes stay.
        step: points of earlier processes beyond it are of steps that were lost, and are not shown.
        remark: shows one line to the user: once, if the files can not be written. The run then goes on without them.

    Written by TensorBoard's own `RecordWriter`. torch's `SummaryWriter` would write from a thread, whose failure on a
    full disk shows as a traceback, and names the machine in each file's name.
    """

    def __init__(self, folder: Path, step: int, remark: Callable[[str], None]) -> None:
        self._folder, self._remark = folder, remark
        self._file: BinaryIO | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Read in the order of their names.
            self._file = (folder / f"events.out.tfevents.{time.time_ns()}").open("ab", buffering=0)
        except OSError as error:
            self._give_up(error)
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self._add(Event(step=step, file_version="brain.Event:2"))
        if step:
            self._add(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, progress: Progress) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from torch.utils.tensorboard.summary import scalar

        super().write(progress)
        for field, tag in TAGS.items():
            if (value := getattr(progress, field)) is not None:
                self._add(Event(step=progress.step, summary=scalar(tag, value)))

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _add(self, event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        if self._file is None:
            return
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        try:
            write_all(self._file, record.getvalue())
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.close()
        what = error.strerror or error
        self._remark(f"{self._folder}: can not be written ({what}); the run goes on without TensorBoard")
