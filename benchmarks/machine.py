"""What a result was measured on: versions and hardware, without names of machines or people."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("synthward", "torch", "numpy", "dp-accounting", "opacus", "scikit-learn", "pyarrow")


def describe() -> dict[str, Any]:
    """Processor, cores, memory, threads and package versions."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        model = next(
            (x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x), model
        )
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": platform.system(),
        "versions": versions,
    }


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Write a result beside the command that made it."""
    RESULTS.mkdir(exist_ok=True)
    modules = [a for a in sys.argv[1:]]
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    command = f"python -m {spec.name} {' '.join(modules)}".strip() if spec else " ".join(sys.argv)
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps({"command": command, "machine": describe(), **result}, indent=1) + "\n")
    return file
