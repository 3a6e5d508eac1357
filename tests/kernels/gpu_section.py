"""A section as `python -m benchmarks.gpu` runs them, whose jobs go wrong in every way; no test.

Each job writes its name and its process's number to the file that GPU_SECTION_LOG names. With GPU_SECTION_WELL nothing
goes wrong.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.section import Job, Options, Section


def begin(name: str) -> bool:
    """Write down that the job has begun; whether it is to go well."""
    with Path(os.environ["GPU_SECTION_LOG"]).open("a") as log:
        print(name, os.getpid(), file=log)
    return "GPU_SECTION_WELL" in os.environ


def good(name: str) -> dict[str, Any]:
    begin(name)
    print("not a row")
    return {"value": name}


def raises() -> dict[str, Any]:
    if begin("raises"):
        return {"value": "raises"}
    raise ValueError("\nno such thing\nand more of it")


def no_json() -> dict[str, Any]:
    return {"value": 1.0 if begin("no json") else float("nan")}


def crashes() -> dict[str, Any]:
    if not begin("crashes"):
        os._exit(3)
    return {"value": "crashes"}


def hangs() -> dict[str, Any]:
    if not begin("hangs"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
        with Path(os.environ["GPU_SECTION_LOG"]).open("a") as log:
            print("child", child.pid, file=log)
        time.sleep(300)
    return {"value": "hangs"}


def jobs(_: Options) -> list[Job]:
    return [
        Job("first", 0.1, lambda: good("first")),
        Job("raises", 0.1, raises),
        Job("no json", 0.1, no_json),
        Job("crashes", 0.1, crashes),
        Job("too long", 1e6, lambda: good("too long")),
        Job("after", 0.1, lambda: good("after")),
        Job("hangs", 0.1, hangs),
        Job("last", 0.1, lambda: good("last")),
    ]


def table(rows: dict[str, dict[str, Any]]) -> str:
    return "\n".join(f"{name} found {row['value']}" for name, row in rows.items())


SECTION = Section(
    "tests.kernels.gpu_section",
    "what goes wrong",
    jobs,
    table,
    parallel=int(os.environ.get("GPU_SECTION_PARALLEL", "1")),
)
