"""What `python -m benchmarks.gpu` is made of: sections, each of jobs that are measured one by one."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# In the order in which they are measured.
NAMES = ("correctness", "ceilings", "kernels", "noise", "steps", "peers", "sampling")


@dataclass(frozen=True)
class Options:
    """How a section is run. On "cpu" (Triton's interpreter) everything is run once and nothing is timed."""

    device: str = "cuda"
    small: bool = False
    sweep: bool = False
    only: str = ""


@dataclass(frozen=True)
class Job:
    """One measurement: its row is written before the next begins, and a later run goes on without it.

    `name` is the row's key within its section; `seconds` is the time it is expected to take on an H200; `run` measures
    and returns the row, which JSON must be able to hold. What it raises is the row: {"failed": "..."}.
    """

    name: str
    seconds: float
    run: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Section:
    """Jobs that belong together, and the few lines that say what they found.

    `parallel`: how many processes may run its jobs at once; one where anything is timed.
    """

    name: str
    title: str
    jobs: Callable[[Options], list[Job]]
    table: Callable[[dict[str, dict[str, Any]]], str]
    parallel: int = 1


def load(name: str) -> Section:
    """The section of that name; a name with a dot is that of a module that has one."""
    section = importlib.import_module(name if "." in name else f"benchmarks.gpu.{name}").SECTION
    assert isinstance(section, Section)
    return section
