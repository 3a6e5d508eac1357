"""What this machine does in a second, measured once and kept: the constants of the planner's cost model."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch

from synthward.kernels import cpu_isa, outer_norms, product

_VERSION = 3
_known: dict[str, Rates] = {}


@dataclass(frozen=True)
class Rates:
    """Floating-point operations a second of the two kinds of norms, bytes a second to and from memory, and operations
    a second of a product by the compiled kernel (0 where there is none) and by torch's library."""

    gram: float
    tile: float
    bytes: float
    product: float
    library: float


def measured_rates(device: torch.device, dtype: torch.dtype = torch.float32) -> Rates:
    """The rates of a device at torch's present number of threads, for operands of a type; measured in a fraction of a
    second, then kept in memory and in ``$XDG_CACHE_HOME/synthward`` (where that can be written)."""
    name = _name(device)
    if dtype != torch.float32:
        name = f"{name} {str(dtype).removeprefix('torch.')}"
    if name not in _known:
        path = _cache_path()
        _known[name] = _read(path, name) or _measure(device, dtype)
        _write(path, name, _known[name])
    return _known[name]


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{_VERSION} {torch.cuda.get_device_name(device)}"
    return f"{_VERSION} {_processor()} {cpu_isa()} {torch.get_num_threads()}"


@lru_cache(maxsize=1)
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")


def _cache_path() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "synthward" / "rates.json"


def _read(path: Path, name: str) -> Rates | None:
    try:
        found = Rates(**{key: float(value) for key, value in json.loads(path.read_text())[name].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return (
        found if min(asdict(found).values()) >= 0.0 and found.gram * found.tile * found.bytes > 0.0 else None
    )


def _write(path: Path, name: str, rates: Rates) -> None:
    """Best effort: another process may write as well, and the last one wins."""
    try:
        known = json.loads(path.read_text()) if path.is_file() else {}
        if known.get(name) == asdict(rates):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps({**known, name: asdict(rates)}, indent=1))
        new.replace(path)
    except (OSError, ValueError, AttributeError):
        return


def _measure(device: torch.device, dtype: torch.dtype) -> Rates:
    # On a GPU so large that the launch does not count.
    units, rows, width = (16, 128, 256) if device.type == "cpu" else (256, 256, 1024)
    a = torch.rand(units * rows, width, device=device).to(dtype)
    offsets = torch.arange(0, units * rows + 1, rows, device=device)
    out = torch.zeros(units, device=device)
    gram = _seconds(lambda: outer_norms(a, a, offsets, out, out.clone(), method="gram"), device)
    tile = _seconds(lambda: outer_norms(a, a, offsets, out, out.clone(), method="tile"), device)
    # Larger than most caches.
    block = torch.ones(1 << (23 if device.type == "cpu" else 28), device=device)
    target = torch.empty_like(block)
    copy = _seconds(lambda: target.copy_(block), device)
    high, deep = (1024, 512) if device.type == "cpu" else (8192, 4096)
    left = torch.rand(high, deep, device=device).to(dtype)
    right = torch.rand(deep, deep, device=device).to(dtype)
    own = _seconds(lambda: product(left, right, backend="cpp"), device) if device.type == "cpu" else math.inf
    library = _seconds(lambda: product(left, right, backend="reference"), device)
    work = 2 * high * deep * deep
    return Rates(
        product=work / own,
        library=work / library,
        gram=units * rows * rows * 2 * width / gram,
        tile=2 * units * rows * width * width / tile,
        bytes=2 * block.nbytes / copy,
    )


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    def once() -> float:
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    once()
    return max(statistics.median(once() for _ in range(7)), 1e-9)
