"""Runs sections: their jobs in worker processes, each row into the file as soon as it is there.

One thread, so that a worker's parent is gone exactly when this process is. Every worker leads a process group of its
own, which is ended with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.gpu.result import ROOT, Result, print_progress
from benchmarks.gpu.section import Options

START_LIMIT = 180.0
# A section that could not start, or not again, has its reason under this name.
START = "(start)"
_MOST_FAILED_STARTS = 3


def job_limit(seconds: float) -> float:
    """When a job that is expected to take `seconds` is given up."""
    return 4 * seconds + 30


class Worker:
    """A process that runs the jobs of one section: first it starts, then it has a job or waits for one."""

    def __init__(self, section: str, options: Options, result: Result) -> None:
        command = [sys.executable, *(f"-W{option}" for option in sys.warnoptions)]
        command += ["-m", "benchmarks.gpu.worker", section]
        self.process = subprocess.Popen(
            [*command, json.dumps(asdict(options)), str(result.file)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._stdin, self.stdout = self.process.stdin, self.process.stdout
        self.job: str | None = None
        self.is_starting = True
        self.ends = time.monotonic() + START_LIMIT
        self._said = b""

    def take(self, job: str, limit: float) -> None:
        self.job, self.ends = job, time.monotonic() + limit
        # If it has just ended, that shows where its answer is waited for.
        with contextlib.suppress(BrokenPipeError):
            self._stdin.write(json.dumps(job).encode() + b"\n")

    def messages(self) -> list[dict[str, Any]] | None:
        """What it has said since; None if it says nothing more."""
        said = os.read(self.stdout.fileno(), 1 << 16)
        if not said:
            return None
        *lines, self._said = (self._said + said).split(b"\n")
        return [json.loads(line) for line in lines]

    def end(self, wait: float = 0.0) -> str:
        """End it and all that it started, and say how it ended, if it did by itself within `wait` seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(wait)
        code = self.process.poll()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._stdin.close()
        self.stdout.close()
        if code is not None and code < 0:
            return f"the process ended by {signal.Signals(-code).name}"
        return "the process was ended" if code is None else f"the process ended: exit code {code}"


@dataclass
class Run:
    """Sections one after the other, until `deadline` on the monotonic clock.

    `not_run` has, by section, the jobs that did not fit into the time.
    """

    result: Result
    options: Options
    deadline: float
    limit: Callable[[float], float] = job_limit
    not_run: dict[str, list[str]] = field(default_factory=dict)
    _workers: list[Worker] = field(default_factory=list)

    def section(self, name: str) -> None:
        """Run the jobs of a section that have no row yet, or a failed one."""
        self._name, self._parallel = name, 1
        self._seconds: dict[str, float] | None = None
        self._failed_starts = self._done = 0
        known = None if self.options.sweep else self.result.jobs(name)
        if known is not None and not self._wanted(known):
            return
        if self._left() <= 0:
            self.not_run[name] = self._wanted(known) if known else ["all"]
            return
        self.result.drop(name, [START])
        try:
            self._run()
        except RuntimeError as error:
            self.result.put(name, START, {"failed": str(error)})
            print_progress(f"[{name}] {error}")
        finally:
            self.close()

    def close(self) -> None:
        """End all processes."""
        while self._workers:
            self._workers.pop().end()

    def _left(self) -> float:
        return self.deadline - time.monotonic()

    def _wanted(self, jobs: list[str]) -> list[str]:
        rows = self.result.rows(self._name)
        return [
            job for job in jobs if self.options.only in job and (job not in rows or "failed" in rows[job])
        ]

    def _run(self) -> None:
        pending: deque[str] = deque()
        while True:
            self._assign(pending)
            self._grow(pending)
            waited = [w for w in self._workers if w.job is not None or w.is_starting]
            if not waited:
                return
            for worker in _ready(waited, min(self.deadline, *(w.ends for w in waited))):
                self._hear(worker, pending)
            if self._left() <= 0:
                begun = [w.job for w in self._workers if w.job is not None]
                self._leave_out([*begun, *pending] if self._seconds is not None else ["all"])
                return
            for worker in waited:
                if worker in self._workers and worker.ends <= time.monotonic():
                    self._give_up(worker)

    def _assign(self, pending: deque[str]) -> None:
        """Give out jobs that fit into the time that is left; a later, shorter one may."""
        idle = [w for w in self._workers if w.job is None and not w.is_starting]
        while pending and idle and self._seconds is not None:
            job = pending.popleft()
            if self._seconds[job] > self._left():
                self._leave_out([job])
                continue
            idle.pop().take(job, self.limit(self._seconds[job]))

    def _grow(self, pending: deque[str]) -> None:
        """Start as many workers as there is work for; the first says what that is."""
        busy = sum(w.job is not None for w in self._workers)
        wanted = 1 if self._seconds is None else min(self._parallel, len(pending) + busy)
        while len(self._workers) < wanted:
            if self._failed_starts >= _MOST_FAILED_STARTS:
                raise RuntimeError(self._why)
            self._workers.append(Worker(self._name, self.options, self.result))

    def _hear(self, worker: Worker, pending: deque[str]) -> None:
        messages = worker.messages()
        if messages is None:
            self._lose(worker, worker.end(wait=5.0))
            return
        for message in messages:
            if worker.is_starting:
                self._greet(worker, message, pending)
            elif worker.job is not None:
                job, worker.job = worker.job, None
                self._put(job, message["row"])
                if message["ends"]:
                    self._lose(worker, "")

    def _greet(self, worker: Worker, message: dict[str, Any], pending: deque[str]) -> None:
        if "failed" in message:
            self._lose(worker, message["failed"])
            return
        worker.is_starting = False
        self._failed_starts = 0
        if self._seconds is not None:
            return
        self._seconds, self._parallel = dict(message["jobs"]), message["parallel"]
        if not self.options.only and not self.options.sweep:
            self.result.put_jobs(self._name, [*self._seconds])
        pending.extend(self._wanted([*self._seconds]))
        self._count = len(pending)

    def _lose(self, worker: Worker, why: str) -> None:
        """Go on without a worker; one more is started if there is work for it."""
        worker.end()
        self._workers.remove(worker)
        if worker.is_starting:
            self._failed_starts, self._why = self._failed_starts + 1, why
        if worker.job is not None:
            self._put(worker.job, {"failed": why})

    def _give_up(self, worker: Worker) -> None:
        limit = START_LIMIT
        if worker.job is not None and self._seconds is not None:
            limit = self.limit(self._seconds[worker.job])
        self._lose(worker, f"longer than {limit:.0f} s")

    def _leave_out(self, jobs: list[str]) -> None:
        self.not_run.setdefault(self._name, []).extend(jobs)

    def _put(self, job: str, row: dict[str, Any]) -> None:
        self._done += 1
        self.result.put(self._name, job, row)
        said = [f"{row['took']:.1f} s"] if "took" in row else []
        if "failed" in row:
            said.append(f"failed: {row['failed']}")
        elif row.get("wrong"):
            said.append("WRONG")
        place = f"[{self._name} {self._done}/{self._count}]"
        print_progress(f"{place} {job}: {', '.join(said)} ({max(0.0, self._left()):.0f} s left)")


def _ready(workers: list[Worker], until: float) -> list[Worker]:
    """Those that have something to say, or nothing more."""
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.stdout, selectors.EVENT_READ, worker)
        return [key.data for key, _ in selector.select(max(0.0, until - time.monotonic()))]
