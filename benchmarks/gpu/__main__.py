"""Every Triton kernel on the GPU: first held to float64, then timed against its floor.

A kernel's floor is the longest of three times: its bytes at the rate of torch's own copy, its products at the rate of
cuBLAS for that dtype (fp32 as IEEE, no TF32), its integer operations at the rate of a loop of them; all measured here.
A kernel that is wrong is not timed. `python -m benchmarks.gpu` writes `results/<gpu>.json`; `--sweep` also times other
block shapes; `--small` takes small shapes and writes nothing (without a GPU it needs TRITON_INTERPRET=1, and times
nothing).
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.machine import write_result

ROUNDS, WARM_UP = 20, 3


def seconds(run: Callable[[], object]) -> list[float]:
    """Times of one call each, in order of size, by events on the device's own clock."""
    for _ in range(WARM_UP):
        run()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(ROUNDS)]
    for begin, end in marks:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) / 1e3 for begin, end in marks)


def machine_rates() -> dict[str, float]:
    """Bytes, products (one multiply-add is two) and integer operations per second."""
    assert not torch.backends.cuda.matmul.allow_tf32
    rates = {"bytes": _copy_rate()}
    for dtype, size in ((torch.float32, 8192), (torch.bfloat16, 16384)):
        a = torch.randn(size, size, device="cuda").to(dtype)
        out = torch.empty_like(a)
        time = statistics.median(seconds(lambda a=a, out=out: torch.mm(a, a, out=out)))
        rates[str(dtype).removeprefix("torch.")] = 2 * size**3 / time
    rates["operations"] = _integer_rate()
    return rates


def _copy_rate() -> float:
    here, there = torch.empty(1 << 28, device="cuda"), torch.empty(1 << 28, device="cuda")
    return 2 * here.nbytes / statistics.median(seconds(lambda: there.copy_(here)))


def _integer_rate() -> float:
    from benchmarks.gpu.integers import OPERATIONS, run

    out = torch.empty(1 << 24, dtype=torch.int32, device="cuda")
    return OPERATIONS * out.numel() / statistics.median(seconds(lambda: run(out)))


def error_of(case: Any) -> float:
    """Largest difference from float64 after one call, over the size of the terms."""
    for tensor in case.clear:
        tensor.zero_()
    case.run()
    exact, magnitude = case.exact()
    off = (case.result().double() - exact).abs() / magnitude.clamp_min(1e-30)
    return float(off.max()) if off.isfinite().all() else float("inf")


def floor_of(case: Any, rates: dict[str, float]) -> tuple[float, str]:
    times = {
        "bytes": case.bytes / rates["bytes"],
        "products": case.flops / rates[str(case.dtype).removeprefix("torch.")],
        "integer operations": case.operations / rates["operations"],
    }
    binding = max(times, key=lambda name: times[name])
    return times[binding], binding


def measure(case: Any, rates: dict[str, float] | None) -> dict[str, Any]:
    error = error_of(case)
    row: dict[str, Any] = {
        "kernel": case.name,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "error": error,
        "tolerance": case.tolerance,
        "right": error <= case.tolerance,
    }
    if rates and row["right"]:
        times, (floor, binding) = seconds(case.run), floor_of(case, rates)
        row |= {
            "median_us": round(1e6 * statistics.median(times), 1),
            "p20_p80_us": [round(1e6 * times[len(times) * k // 5], 1) for k in (1, 4)],
            "floor_us": round(1e6 * floor, 1),
            "binding": binding,
            "of_floor": round(floor / statistics.median(times), 3),
        }
    return row


def sweep(case: Any, name: str) -> list[dict[str, Any]]:
    """Times of other block shapes of a kernel of the outer family, the best first."""
    from synthward.kernels.outer import triton_impl as outer

    choice = "gram_blocks" if case.name == "gram_norms" else "gradient_blocks"
    usual: Callable[..., Any] = getattr(outer, choice)
    found = []
    for blocks in _block_shapes(choice):
        setattr(outer, choice, lambda *_, blocks=blocks: blocks)
        try:
            time = statistics.median(seconds(case.run)) if error_of(case) <= case.tolerance else float("inf")
        except Exception as problem:  # a shape that does not fit on the chip is an answer too
            print(f"  {name} {tuple(blocks)}: {type(problem).__name__}", file=sys.stderr)
            continue
        finally:
            setattr(outer, choice, usual)
        found.append({"blocks": blocks._asdict(), "median_us": round(1e6 * time, 1)})
    return sorted(found, key=lambda row: row["median_us"])[:5]


def _block_shapes(choice: str) -> list[Any]:
    from synthward.kernels.outer.triton_impl import Blocks

    if choice == "gram_blocks":
        return [
            Blocks(k, k, rows, warps, stages)
            for rows in (16, 32, 64)
            for k in (16, 32, 64)
            for warps in (4, 8)
            for stages in (2, 4)
        ]
    return [
        Blocks(p, d, rows, warps, stages)
        for p, d in ((64, 64), (64, 128), (128, 128), (128, 64), (128, 256))
        for rows in (16, 32, 64)
        for warps in (4, 8)
        for stages in (2, 4)
    ]


def line(row: dict[str, Any]) -> str:
    head = f"{row['kernel']:22s} {row['dtype']:9s} {row['shape']:46s} error {row['error']:.1e}"
    if not row["right"]:
        return f"{head}  WRONG (more than {row['tolerance']:.1e})"
    if "median_us" not in row:
        return head
    return (
        f"{head} {row['median_us']:10.1f} us  {100 * row['of_floor']:5.1f}% of the floor ({row['binding']})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="small shapes; write no result")
    parser.add_argument(
        "--sweep", action="store_true", help="time other block shapes of the outer family, too"
    )
    parser.add_argument("--only", default="", help="kernels whose name has this in it")
    options = parser.parse_args()
    try:
        from synthward.kernels._triton import INTERPRETED
    except ImportError as problem:
        raise SystemExit(f"benchmarks.gpu: Triton cannot be imported ({problem})") from None
    if INTERPRETED and not options.small:
        raise SystemExit(
            "benchmarks.gpu: TRITON_INTERPRET is set; unset it to measure, or give --small to check"
        )
    if not INTERPRETED and not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: no CUDA device here, so nothing was checked or measured")
    from benchmarks.gpu.cases import all_cases

    rates = None if INTERPRETED else machine_rates()
    for name, rate in (rates or {}).items():
        print(f"machine: {rate:.3e} {name}/s")
    rows = []
    for make in all_cases("cpu" if INTERPRETED else "cuda", small=options.small):
        case = make()
        if options.only not in case.name:
            continue
        row = measure(case, rates)
        if options.sweep and rates and case.name in ("gram_norms", "tile_norms", "outer_sum"):
            row["sweep"] = sweep(case, case.name)
        print(line(row), flush=True)
        rows.append(row)
    if rates and not options.small:
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
        print(write_result(name, {"gpu": gpu(), "rates": rates, "kernels": rows}))
    wrong = [row["kernel"] for row in rows if not row["right"]]
    if wrong:
        raise SystemExit(f"benchmarks.gpu: wrong: {', '.join(wrong)}")


def gpu() -> dict[str, Any]:
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "processors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


if __name__ == "__main__":
    main()
