"""The file that a GPU's measurements are kept in: rows by section and job, and what they were measured on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import PACKAGES, command, versions

ROOT = Path(__file__).resolve().parents[2]
Rows = dict[str, dict[str, Any]]
# Of what a row was measured on, what it may not be resumed without.
_KEYS = ("device", "versions", "digest")
_rows_file: list[Path] = []


def read_rows_from(file: Path) -> None:
    """Where `recorded` looks."""
    _rows_file[:] = [file]


def recorded(section: str) -> Rows:
    """What another section found so far, of this source on this device; empty before."""
    return Result(_rows_file[0]).rows(section) if _rows_file else {}


class Result:
    """One file. Every change is written at once, beside it and then in its place."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.content: dict[str, Any] = {"sections": {}}
        if file.is_file():
            self.content |= json.loads(file.read_text())

    def begin(self, measured_on: dict[str, Any]) -> None:
        """What is written from now on was measured on this."""
        self.content = {"command": command(), **measured_on, "sections": self.content["sections"]}

    @property
    def measured_on(self) -> dict[str, Any]:
        return {name: value for name, value in self.content.items() if name not in ("command", "sections")}

    def is_current(self, section: str) -> bool:
        """Whether the section's rows are of the same source, versions and device."""
        kept = self.content["sections"].get(section, {}).get("measured_on", {})
        return all(kept.get(key) == self.content.get(key) for key in _KEYS)

    def rows(self, section: str) -> Rows:
        """Rows by job; those of another source or device are not among them."""
        return self.all_rows(section) if self.is_current(section) else {}

    def all_rows(self, section: str) -> Rows:
        """Rows by job, whatever they were measured on."""
        found: Rows = self.content["sections"].get(section, {}).get("rows", {})
        return found

    def put(self, section: str, job: str, row: dict[str, Any]) -> None:
        self._open(section)["rows"][job] = row
        self.write()

    def put_jobs(self, section: str, jobs: list[str]) -> None:
        """All that the section consists of, so that a later run knows without asking."""
        self._open(section)["jobs"] = jobs
        self.write()

    def jobs(self, section: str) -> list[str] | None:
        found: list[str] | None = self.content["sections"].get(section, {}).get("jobs")
        return found if self.is_current(section) else None

    def drop(self, section: str, jobs: Iterable[str]) -> None:
        for job in [*jobs]:
            self.rows(section).pop(job, None)

    def _open(self, section: str) -> dict[str, Any]:
        sections = self.content["sections"]
        if not self.is_current(section):
            sections[section] = {"measured_on": self.measured_on, "rows": {}}
        opened: dict[str, Any] = sections[section]
        return opened

    def write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        beside = self.file.with_name(f".{self.file.name}.{os.getpid()}")
        beside.write_text(json.dumps(self.content, indent=1, allow_nan=False) + "\n")
        beside.replace(self.file)


def file_name(device: dict[str, Any]) -> str:
    """Of the file with a device's results."""
    return re.sub(r"[^a-z0-9]+", "-", device["name"].lower()).strip("-") + ".json"


def describe(on_gpu: bool) -> dict[str, Any]:
    """Device, versions and source, without names of machines or people."""
    return {
        "device": _gpu() if on_gpu else {"name": "Triton's interpreter"},
        "versions": {**versions((*PACKAGES, "triton")), "python": platform.python_version()},
        "digest": _digest(),
        "commit": _commit(),
        "tf32": False,
    }


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "processors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": _driver(),
        "cuda": torch.version.cuda,
    }


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None


def _commit() -> str | None:
    """That of the checkout, with a plus where it was changed since; or SYNTHWARD_COMMIT, of a copy that has none."""
    given = os.environ.get("SYNTHWARD_COMMIT")
    if given:
        return given
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit = _git("rev-parse", "HEAD").strip()
        changed = _git(
            "status", "--porcelain", "--untracked-files=no", "--", "engine", "kernels", "csrc", "python"
        )
        return commit + ("+" if changed.strip() else "")
    return None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def _digest() -> str:
    """Of all that is measured and measures: the package's files as they are imported, and these."""
    import synthward
    from synthward import _C

    folders = [Path(place) for place in synthward.__path__ if Path(place) != ROOT]
    folders += [ROOT / name for name in ("engine", "kernels") if str(ROOT) in synthward.__path__]
    files = {file for folder in (*folders, Path(__file__).parent) for file in folder.rglob("*.py")}
    found = hashlib.sha256(Path(_C.__file__).read_bytes())
    for file in sorted(files, key=lambda file: (file.name, str(file))):
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def failures(rows: Rows) -> list[str]:
    """Jobs that failed or found something wrong."""
    return [job for job, row in rows.items() if "failed" in row or row.get("wrong")]


def print_progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
