"""Each kernel's time against its floor; first it is held to float64, and what is wrong is not timed.

A floor is the longest of three times: the fewest bytes at the rate of torch's own copy, the products at that of cuBLAS
for the operands' dtype, the integer operations at that of a loop of them (ceilings.py).
"""

from __future__ import annotations

import functools
import importlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu.case import Case, Make, Maker, error_of, title
from benchmarks.gpu.ceilings import rates
from benchmarks.gpu.clock import interleaved, spread, timed
from benchmarks.gpu.correctness import all_kernels
from benchmarks.gpu.result import recorded
from benchmarks.gpu.section import Job, Options, Section
from benchmarks.gpu.worker import answers

_ROUNDS, _SECONDS = 20, 2.0
# Where a kernel's block shapes are chosen.
_SWEPT = {
    "gram_norms": ("triton_impl", "gram_blocks"),
    "tile_norms": ("triton_impl", "gradient_blocks"),
    "outer_sum": ("triton_sum", "sum_blocks"),
}
_BINDS = {"copy": "bytes", "integers": "integer operations"}


def floors(case: Case, rate: dict[str, float]) -> dict[str, float]:
    """Seconds by what takes them."""
    return {
        "copy": case.bytes / rate["copy"],
        title(case.dtype): case.flops / rate[title(case.dtype)],
        "integers": case.operations / rate["integers"],
    }


def measure(make: Make, options: Options, rate: Callable[[], dict[str, float]]) -> dict[str, Any]:
    case = make()
    row: dict[str, Any] = {
        "kernel": case.name,
        "shape": case.shape,
        "dtype": title(case.dtype),
        "bytes": case.bytes,
        "flops": case.flops,
        "operations": case.operations,
    }
    wrong = _wrong(case)
    if wrong:
        return {**row, "wrong": [f"{wrong}: not timed"]}
    times = spread(interleaved({"": case.run}, _ROUNDS, _SECONDS)[""])
    if not times:
        return row
    parts = floors(case, rate())
    binds = max(parts, key=lambda name: parts[name])
    floor = parts[binds]
    return {
        **row,
        **times,
        "floor": floor,
        "binds": _BINDS.get(binds, "products"),
        "of_floor": floor / times["seconds"],
    }


def _wrong(case: Case) -> str:
    """Why a case may not be timed. What the correctness section has found right at this shape is not checked again."""
    label = f"{case.name.split()[0]} {title(case.dtype)}"
    rows = recorded("correctness")
    for job in (label, f"{label} large"):
        if rows.get(job, {}).get("wrong"):
            return f"wrong in {job}"
    if case.shape in rows.get(f"{label} large", {}).get("right", []):
        return ""
    error = error_of(case)
    return "" if error <= case.tolerance else f"error {error:.1e}, more than {case.tolerance:.1e}"


def sweep(make: Make) -> dict[str, Any]:
    """Times of other block shapes of the outer family, in turns; the best five and the usual one."""
    case = make()
    module_name, choice = _SWEPT[case.name]
    module = importlib.import_module(f"synthward.kernels.outer.{module_name}")
    usual: Callable[..., Any] = getattr(module, choice)
    variants: dict[str, Callable[[], object]] = {"usual": case.run}
    refused = {}
    for blocks in _block_shapes(case) if timed() else []:

        def run(blocks: Any = blocks) -> None:
            setattr(module, choice, lambda *_, **__: blocks)
            try:
                case.run()
            finally:
                setattr(module, choice, usual)

        name = " ".join(f"{key} {value}" for key, value in blocks._asdict().items())
        problem = _problem(case, run)
        if problem:  # a shape that does not fit on the chip is an answer too
            refused[name] = problem
        else:
            variants[name] = run
    taken = interleaved(variants, 10, 20.0)
    ranked = sorted((name for name in taken if taken[name]), key=lambda name: statistics.median(taken[name]))
    best = {name: spread(taken[name]) for name in [*ranked[:5], *(["usual"] if taken["usual"] else [])]}
    return {
        "kernel": case.name,
        "shape": case.shape,
        "dtype": title(case.dtype),
        "best": best,
        "refused": refused,
    }


def _problem(case: Case, run: Callable[[], None]) -> str:
    changed = Case(**{**case.__dict__, "run": run})
    try:
        error = error_of(changed)
    except Exception as problem:
        if not answers():
            raise
        return type(problem).__name__
    return "" if error <= case.tolerance else f"error {error:.1e}"


def _block_shapes(case: Case) -> list[Any]:
    from synthward.kernels.outer.triton_impl import Blocks
    from synthward.kernels.outer.triton_sum import ROWS, SumBlocks

    is_half = case.dtype != torch.float32
    launches = [(warps, stages) for warps in (4, 8) for stages in (2, 3, 4)]
    if case.name == "gram_norms":
        sides, lengths = ((32, 64, 128), (16, 32, 64, 128)) if is_half else ((16, 32, 64), (16, 32, 64))
        return [Blocks(k, k, rows, *launch) for k in sides for rows in lengths for launch in launches]
    wide = [(64, 64), (64, 128), (128, 64), (128, 128), (128, 256)]
    if case.name == "tile_norms":
        lengths = (32, 64) if is_half else (16, 32)
        return [Blocks(p, d, rows, *launch) for p, d in wide for rows in lengths for launch in launches]
    lengths = (ROWS,) if is_half else (16, 32)
    return [SumBlocks(p, d, rows, *launch) for p, d in wide for rows in lengths for launch in launches]


def _cases(options: Options) -> Iterator[tuple[str, Make]]:
    """Names and makers of cases, which are not made yet: their number and order name them."""
    for name, kernel in all_kernels().items():
        for dtype in kernel.dtypes:
            if dtype != torch.float16:
                make = Maker(options.device, options.small)
                for number, case in enumerate(kernel.timed(make, dtype), 1):
                    yield f"{name} {title(dtype)} {number}", case


def _jobs(options: Options) -> list[Job]:
    rate = functools.cache(lambda: rates(options))
    cases = [*_cases(options)]
    jobs = [Job(name, 4.0, functools.partial(measure, case, options, rate)) for name, case in cases]
    if options.sweep:
        swept = [(name, case) for name, case in cases if name.split()[0] in _SWEPT and name.endswith(" 1")]
        jobs += [Job(f"sweep {name}", 120.0, functools.partial(sweep, case)) for name, case in swept]
    return jobs


def _table(rows: dict[str, dict[str, Any]]) -> str:
    """A kernel a line: of each dtype the first shape's microseconds, then of every shape its share of the floor."""
    lines, kernels = [], dict[str, dict[str, list[dict[str, Any]]]]()
    for job, row in rows.items():
        if "best" in row:
            lines.append(f"{job}: best {next(iter(row['best']), 'nothing')}")
        else:
            kernels.setdefault(row["kernel"].split()[0], {}).setdefault(row["dtype"], []).append(row)
    for name, by_dtype in kernels.items():
        said = " | ".join(
            f"{dtype.replace('loat', '')} {_shares(found)}" for dtype, found in by_dtype.items()
        )
        lines.append(f"{name:22s} {said}")
    return "\n".join(lines)


def _shares(rows: list[dict[str, Any]]) -> str:
    first = f"{1e6 * rows[0]['seconds']:.0f} us:" if "seconds" in rows[0] else ""
    return " ".join([first, *map(_share, rows)]).strip()


def _share(row: dict[str, Any]) -> str:
    """Percent of the floor, and the first letter of what that is made of."""
    if row.get("wrong"):
        return "WRONG"
    return f"{100 * row['of_floor']:.0f}%{row['binds'][0]}" if "of_floor" in row else "right"


SECTION = Section(
    "kernels",
    "kernels: time, and share of the floor of bytes, products or integer operations by shape",
    _jobs,
    _table,
)
