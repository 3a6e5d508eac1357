"""What a result was measured on: versions and hardware, without names of machines or people."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable
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
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": platform.system(),
        "versions": versions(PACKAGES),
    }


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Installed versions; None where there is none."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def machine_name() -> str:
    """Processor and cores, fit for a file's name."""
    info = describe()
    words = re.sub(r"\(r\)|\(tm\)|processor|cpu|@.*", " ", str(info["processor"]).lower())
    return "-".join([*re.findall(r"[a-z0-9]+", words), f"{info['cores']}-cores"])


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Write a result beside the command that made it."""
    return _write(name, {"command": command(), "machine": describe(), **result})


def write_part(part: str, result: dict[str, Any], machine: dict[str, Any] | None = None) -> Path:
    """Write one part of this machine's file, with its own command and machine; the other parts stay as they are.

    `machine`: what `describe` gave where it was measured, if that was in another process.
    """
    name = machine_name()
    parts = _read(name)
    own = {"command": command(), "machine": machine or describe(), **result}
    return _write(name, {**parts, part: own})


def read_part(part: str) -> dict[str, Any]:
    """One part of this machine's file; empty where there is none."""
    found: dict[str, Any] = _read(machine_name()).get(part, {})
    return found


def command() -> str:
    """How this program was called."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name} {shlex.join(sys.argv[1:])}".strip() if spec else shlex.join(sys.argv)


def _read(name: str) -> dict[str, Any]:
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def _write(name: str, content: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps(content, indent=1) + "\n")
    return file
