"""All measurements on a GPU: `python -m benchmarks.gpu` writes benchmarks/results/<gpu>.json and prints a short table.

    python -m benchmarks.gpu [--sections correctness,kernels] [--minutes 8] [--again SECTIONS] [--only gram] [--sweep]

A run that was ended, or had too little time, is gone on with by the next of the same source, versions and device; a job
that failed is tried again. `--small` takes small shapes; without a GPU it needs TRITON_INTERPRET=1, and times nothing.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

import torch

from benchmarks.gpu import section
from benchmarks.gpu.result import Result, describe, failures, file_name, print_progress, read_rows_from
from benchmarks.gpu.runner import Run
from benchmarks.gpu.table import table
from benchmarks.machine import RESULTS


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--sections", type=_names, default=[*section.NAMES], help="by commas; all of them")
    parser.add_argument("--again", type=_names, default=[], help="sections that are measured anew")
    parser.add_argument("--only", default="", help="jobs whose name has this in it")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--sweep", action="store_true", help="other block shapes of the outer family, too")
    parser.add_argument("--small", action="store_true", help="small shapes; no file unless --out names one")
    parser.add_argument("--out", type=Path, help="file or folder; benchmarks/results")
    given = parser.parse_args()
    deadline = time.monotonic() + 60 * given.minutes
    _check(given.small)
    from synthward.kernels._triton import INTERPRETED

    measured_on = describe(on_gpu=not INTERPRETED)
    options = section.Options("cpu" if INTERPRETED else "cuda", given.small, given.sweep, given.only)
    with tempfile.TemporaryDirectory() as folder:
        file = given.out or (Path(folder) if given.small else RESULTS)
        if file.is_dir():
            file /= file_name(measured_on["device"])
        result = Result(file.resolve())
        result.begin(measured_on)
        read_rows_from(result.file)
        return _run(Run(result, options, deadline), given.sections, given.again)


def _names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in section.NAMES and "." not in name]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"no section {', '.join(unknown)}; there are {', '.join(section.NAMES)}"
        )
    return names


def _check(small: bool) -> None:
    """Refuse, in one line, what could not be measured or would not be true."""
    try:
        from synthward.kernels._triton import INTERPRETED
    except ImportError as problem:
        raise SystemExit(f"benchmarks.gpu: Triton cannot be imported ({problem})") from None
    if INTERPRETED and not small:
        raise SystemExit(
            "benchmarks.gpu: TRITON_INTERPRET is set; unset it to measure, or give --small to check"
        )
    if not INTERPRETED and not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: no CUDA device here, so nothing was checked or measured")


def _run(run: Run, sections: list[str], again: list[str]) -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    interrupted = 0
    try:
        for name in sections:
            if name in again:
                run.result.drop(name, [job for job in run.result.rows(name) if run.options.only in job])
            run.section(name)
    except KeyboardInterrupt as signalled:
        interrupted = signalled.args[0] if signalled.args else signal.SIGINT
        print_progress("benchmarks.gpu: interrupted; what was measured is kept")
    finally:
        run.close()
    print(table(run.result, sections, run.not_run))
    if interrupted:
        return 128 + interrupted
    return int(any(failures(run.result.rows(name)) for name in sections))


def _interrupt(number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    sys.exit(main())
