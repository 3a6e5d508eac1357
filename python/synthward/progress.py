"""Progress of long work: a bar with rate and time left on a terminal, a plain line now and then elsewhere.

Workers take a `Progress` and know nothing of displays::

    task = progress.task("fit", total=1000)
    try:
        task.advance(0)                      # the rate is counted from the first call on
        task.advance(1, epsilon=0.41)
    finally:
        task.close()

Everything goes to standard error; standard output belongs to results.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO

LINE_SECONDS = 5.0
"""Pause between two plain lines of one task."""

RATE_SECONDS = 30.0
"""The rate is measured over about this much of the past."""

REDRAW_SECONDS = 0.1


class Task:
    """Handle of one piece of work. This base keeps count and shows nothing."""

    def __init__(self, name: str, total: int | None) -> None:
        self.name, self.total, self.done = name, total, 0

    def advance(self, count: int = 1, **fields: object) -> None:
        """Add ``count`` finished items; ``fields`` (such as ``epsilon=1.2``) are shown beside the rate."""
        self.done += count

    def at(self, done: int, **fields: object) -> None:
        """As `advance`, for callers that know how many items are finished in all."""
        self.advance(done - self.done, **fields)

    def close(self) -> None:
        """No more items come; calling it twice does no harm."""


class Progress:
    """Makes tasks; a context manager that ends the display. This base shows nothing."""

    def task(self, name: str, total: int | None = None) -> Task:
        """A new task of ``total`` items (None: not known beforehand)."""
        return Task(name, total)

    def note(self, text: str) -> None:
        """Show one line about what is going on."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class NullProgress(Progress):
    """Shows nothing: the default of every function that takes a progress."""


class _Meter:
    """Rate and time left over a sliding window, started by the first sample."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._samples: deque[tuple[float, int]] = deque()

    def sample(self, done: int) -> None:
        now = self._clock()
        if len(self._samples) > 1 and now - self._samples[-2][0] < 0.25:
            self._samples[-1] = (now, done)
        else:
            self._samples.append((now, done))
        while len(self._samples) > 2 and now - self._samples[1][0] > RATE_SECONDS:
            self._samples.popleft()

    def rate(self) -> float | None:
        """Items per second; None before there is something to tell."""
        if len(self._samples) < 2:
            return None
        (first, before), (last, after) = self._samples[0], self._samples[-1]
        return (after - before) / (last - first) if last > first and after > before else None


class _ShownTask(Task):
    """A task that is drawn at most every ``pause`` seconds, and once more when it closes."""

    def __init__(
        self,
        name: str,
        total: int | None,
        draw: Callable[[_ShownTask], None],
        *,
        pause: float,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(name, total)
        self.fields: dict[str, object] = {}
        self.closed = False
        self._draw, self._pause, self._clock = draw, pause, clock
        self._meter = _Meter(clock)
        self._started = self._drawn = clock()

    def advance(self, count: int = 1, **fields: object) -> None:
        super().advance(count)
        self.fields |= fields
        self._meter.sample(self.done)
        now = self._clock()
        if now - self._drawn >= self._pause:
            self._drawn = now
            self._draw(self)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._draw(self)

    @property
    def broke_off(self) -> bool:
        """Whether it ended before its first item: the error that follows tells more than a count of nothing."""
        return self.closed and self.done == 0 and self.total != 0

    def counts(self) -> str:
        """Items done, as ``120/1,000 (12%)``."""
        if self.total is None:
            return f"{self.done:,}"
        return f"{self.done:,}/{self.total:,} ({100 * self.done // max(self.total, 1)}%)"

    def details(self) -> str:
        """Rate, time left (or taken) and fields, as ``3.4/s, 0:04:12 left, epsilon 1.2``."""
        rate = self._meter.rate()
        parts = [] if rate is None else [f"{_short(rate)}/s"]
        if self.closed:
            parts.append(f"{_clock_time(self._clock() - self._started)} taken")
        elif rate is not None and self.total is not None and self.total > self.done:
            parts.append(f"{_clock_time((self.total - self.done) / rate)} left")
        parts += [f"{name} {_shown(name, value)}" for name, value in self.fields.items()]
        return ", ".join(parts)


class LineProgress(Progress):
    """A plain line every few seconds: for log files and CI."""

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        pause: float = LINE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream, self._pause, self._clock = stream or sys.stderr, pause, clock

    def task(self, name: str, total: int | None = None) -> Task:
        return _ShownTask(name, total, self._line, pause=self._pause, clock=self._clock)

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def _line(self, task: _ShownTask) -> None:
        if not task.broke_off:
            self.note(", ".join(filter(None, [f"{task.name}: {task.counts()}", task.details()])))


class BarProgress(Progress):
    """A bar per task on a terminal (rich)."""

    def __init__(self, stream: TextIO | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn
        from rich.progress import Progress as RichProgress

        text = [TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in ("counts", "details")]
        self._bars = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            *text,
            console=Console(file=stream or sys.stderr),
        )

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bars.stop()

    def task(self, name: str, total: int | None = None) -> Task:
        bar = self._bars.add_task(name, total=total, counts="", details="")

        def draw(task: _ShownTask) -> None:
            if task.broke_off:
                self._bars.remove_task(bar)
                return
            # An open-ended task that is closed has an end after all; a broken-off one keeps its bar as it is.
            end = task.done if task.closed and task.total is None else task.total
            self._bars.update(
                bar, completed=task.done, total=end, counts=task.counts(), details=task.details()
            )
            if task.closed:
                self._bars.stop_task(bar)

        return _ShownTask(name, total, draw, pause=REDRAW_SECONDS, clock=time.monotonic)

    def note(self, text: str) -> None:
        self._bars.console.print(text, markup=False, highlight=False)


def make_progress(stream: TextIO | None = None) -> Progress:
    """Bars when ``stream`` (default: standard error) is a terminal, plain lines otherwise.

    Of several processes that `torchrun` started, the first shows what all of them do and the others nothing.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK", "0") != "0":
        return NullProgress()
    stream = stream or sys.stderr
    return BarProgress(stream) if stream.isatty() else LineProgress(stream)


def _shown(name: str, value: object) -> object:
    if not isinstance(value, float):
        return value
    if name == "epsilon" and math.isfinite(value) and value > 0.0:
        # Upwards, so that less is never claimed than was spent.
        unit = 10.0 ** (math.floor(math.log10(value)) - 2)
        value = math.ceil(value / unit - 1e-6) * unit
    return _short(value)


def _short(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
