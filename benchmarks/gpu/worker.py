"""Runs the jobs of one section, by name, in a process of its own.

    python -m benchmarks.gpu.worker SECTION OPTIONS RESULT

First it prints what there is to do; then for each line of its standard input, the JSON of a job's name, that job's row.
Whatever else a job prints goes to standard error. The process ends when its input does, when its parent does, and when
the device no longer answers.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1


def main(name: str, options: str, result: str) -> None:
    _end_with_parent()
    # What a library prints must not be taken for a row.
    rows = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        from benchmarks.gpu import clock, section
        from benchmarks.gpu.result import read_rows_from

        clock.no_tf32()
        read_rows_from(Path(result))
        found = section.load(name)
        jobs = {job.name: job for job in found.jobs(section.Options(**json.loads(options)))}
    except Exception as error:
        _say(rows, {"failed": one_line(error)})
        return
    listed = [[job.name, job.seconds] for job in jobs.values()]
    _say(rows, {"jobs": listed, "parallel": found.parallel})
    for line in sys.stdin:
        row = measured(jobs[json.loads(line)])
        ends = "failed" in row and not answers()
        _say(rows, {"row": row, "ends": ends})
        if ends:
            return


def measured(job: Any) -> dict[str, Any]:
    """The job's row, or what went wrong, and how long it took."""
    begun = time.monotonic()
    try:
        row = dict(job.run())
        json.dumps(row, allow_nan=False)
    except Exception as error:
        row = {"failed": one_line(error)}
    _release()
    return {**row, "took": round(time.monotonic() - begun, 2)}


def one_line(error: BaseException) -> str:
    """Kind and first line of what was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]


def _say(stream: Any, message: dict[str, Any]) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


def _release() -> None:
    """Leave the memory of one job to the next, and to other processes."""
    torch = sys.modules.get("torch")
    gc.collect()
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        try:
            torch.cuda.empty_cache()
        except RuntimeError:  # said where it is looked for: `answers`
            return


def answers() -> bool:
    """Whether the device still does what it is told: after a fault in a kernel it refuses everything."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _end_with_parent() -> None:
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended meanwhile
        raise SystemExit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
