"""Every Triton kernel against float64 on the device: each dtype, every family of shapes, and the shapes that are timed.

Families: every row a unit, ragged units, empty ones, none; widths of one, of primes, of no column; rows that hold what
is no number, and rows of weight zero that do. Noise and updates are held to those in CPU memory, bit for bit.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu.case import Case, Kernel, Make, Maker, error_of, title
from benchmarks.gpu.section import Job, Options, Section
from benchmarks.gpu.worker import answers, one_line

_NAMED, _STEP = 8, 7


def all_kernels() -> dict[str, Kernel]:
    from benchmarks.gpu import cases_conv, cases_decode, cases_noise, cases_outer, cases_rows

    return {
        **cases_outer.KERNELS,
        **cases_rows.KERNELS,
        **cases_conv.KERNELS,
        **cases_decode.KERNELS,
        **cases_noise.KERNELS,
    }


def check(cases: Iterator[Make], *, named: bool = False) -> dict[str, Any]:
    """How many there were, which are wrong, and how much of its tolerance the worst one took; `named`: those that are
    right, too."""
    right, wrong, worst = [], [], 0.0
    for make in cases:
        name, problem = _problem(make)
        if isinstance(problem, str):
            wrong.append(f"{name}: {problem}")
        else:
            right.append(name)
            worst = max(worst, problem)
    row = {"cases": len(right) + len(wrong), "wrong": wrong, "worst_of_tolerance": round(worst, 4)}
    return {**row, "right": right} if named else row


def _problem(make: Make) -> tuple[str, float | str]:
    """What is wrong with a case; a number, its part of the tolerance, if nothing is."""
    case: Case | None = None
    try:
        case = make()
        error = error_of(case)
    except Exception as raised:
        if not answers():  # the device is lost to this process
            raise
        return case.shape if case else "a case", one_line(raised)
    if error <= case.tolerance:
        return case.shape, error / case.tolerance if case.tolerance else 0.0
    return case.shape, f"error {error:.1e}, more than {case.tolerance:.1e}"


def _jobs(options: Options) -> list[Job]:
    jobs = []
    for name, kernel in all_kernels().items():
        for dtype in kernel.dtypes:
            label = f"{name} {title(dtype)}"
            jobs.append(Job(label, 20.0, _job(kernel.edges, dtype, options)))
            # Half precision of the other kind runs the same code.
            if dtype != torch.float16:
                jobs.append(Job(f"{label} large", 10.0, _job(kernel.timed, dtype, options, named=True)))
    return jobs


def _job(
    cases: Callable[[Maker, torch.dtype], Iterator[Make]],
    dtype: torch.dtype,
    options: Options,
    *,
    named: bool = False,
) -> Callable[[], dict[str, Any]]:
    # In the interpreter, which the tests of the kernels run in, one case in so many.
    step = _STEP if options.device == "cpu" and not named else 1

    def run() -> dict[str, Any]:
        made = cases(Maker(options.device, options.small), dtype)
        return check(itertools.islice(made, 0, None, step), named=named)

    return run


def _table(rows: dict[str, dict[str, Any]]) -> str:
    wrong = [f"{job}: {case}" for job, row in rows.items() for case in row["wrong"]]
    cases = sum(row["cases"] for row in rows.values())
    kernels = {job.split()[0] for job in rows}
    lines = [
        f"{cases - len(wrong)} of {cases} cases of {len(kernels)} kernels are right, in {len(rows)} groups"
    ]
    lines += [f"WRONG {name}" for name in wrong[:_NAMED]]
    if len(wrong) > _NAMED:
        lines.append(f"WRONG and {len(wrong) - _NAMED} more")
    return "\n".join(lines)


# Nothing is timed here, and most of the time goes into compiling.
SECTION = Section(
    "correctness",
    "Triton kernels against float64",
    _jobs,
    _table,
    parallel=max(1, min(8, (os.cpu_count() or 1) // 2)),
)
