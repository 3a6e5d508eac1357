"""What the device itself can do: bytes copied, products by cuBLAS on random numbers (no TF32), integer operations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.clock import interleaved, spread
from benchmarks.gpu.result import recorded
from benchmarks.gpu.section import Job, Options, Section

_ROUNDS, _SECONDS = 30, 3.0
_MATRICES = {"bfloat16": 8192, "float16": 8192, "float32": 8192}
_UNITS = {"copy": ("TB/s", 1e12), "integers": ("Tops/s", 1e12)}


def _copy(options: Options) -> dict[str, Any]:
    count = 1 << (10 if options.small else 30)
    here = torch.randn(count, device=options.device)
    there = torch.empty_like(here)
    return _rate("bytes", 2 * here.nbytes, lambda: there.copy_(here), f"{here.nbytes} bytes read and written")


def _products(options: Options, name: str) -> dict[str, Any]:
    size, dtype = 64 if options.small else _MATRICES[name], getattr(torch, name)
    a, b = (torch.randn(size, size, device=options.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return _rate("flops", 2 * size**3, lambda: torch.mm(a, b, out=out), f"{size} x {size} x {size}")


def _integers(options: Options) -> dict[str, Any]:
    from benchmarks.gpu.integers import OPERATIONS, run

    out = torch.empty(1 << (12 if options.small else 26), dtype=torch.int32, device=options.device)
    return _rate(
        "operations", OPERATIONS * len(out), lambda: run(out), f"{len(out)} lanes, {OPERATIONS} each"
    )


def _rate(what: str, amount: float, run: Callable[[], object], shape: str) -> dict[str, Any]:
    times = spread(interleaved({"": run}, _ROUNDS, _SECONDS)[""])
    row: dict[str, Any] = {"what": what, "shape": shape, "amount": amount, **times}
    return {**row, "per_second": amount / times["seconds"]} if times else row


def _makers(options: Options) -> dict[str, Callable[[], dict[str, Any]]]:
    return {
        "copy": lambda: _copy(options),
        **{name: functools.partial(_products, options, name) for name in _MATRICES},
        "integers": lambda: _integers(options),
    }


def rates(options: Options) -> dict[str, float]:
    """Per second: "copy" in bytes, "float32", "bfloat16" and "float16" in operations, "integers".

    As the section has measured them in this run's file, or measured now. Empty where nothing is timed.
    """
    kept = recorded("ceilings")
    found = {}
    for name, measure in _makers(options).items():
        row = kept.get(name, {})
        if "per_second" not in row:
            row = measure()
        if "per_second" in row:
            found[name] = float(row["per_second"])
    return found


def _jobs(options: Options) -> list[Job]:
    return [Job(name, 5.0, run) for name, run in _makers(options).items()]


def _table(rows: dict[str, dict[str, Any]]) -> str:
    said = []
    for name, row in rows.items():
        unit, scale = _UNITS.get(name, ("TFLOP/s", 1e12))
        said.append(
            f"{name} {row['per_second'] / scale:.4g} {unit}" if "per_second" in row else f"{name} ran"
        )
    return ", ".join(said)


SECTION = Section("ceilings", "what the device can do", _jobs, _table)
