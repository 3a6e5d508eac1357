"""Runs the command line as a user does: `python -m synthward ...` in a child process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# A fit of seconds. RDP, because calibrating by PLD for so few steps takes longer than all the rest.
ACCOUNTANT = "rdp"
SMALL = ("--steps", "20", "--accountant", ACCOUNTANT)


@dataclass(frozen=True)
class Outcome:
    """What a finished command left: exit code and both streams."""

    code: int
    stdout: str
    stderr: str


def environment() -> dict[str, str]:
    """One thread, plain text, and no byte-code written (a full disk would be met there first)."""
    plain = {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "TERM": "dumb", "PYTHONDONTWRITEBYTECODE": "1"}
    return {**os.environ, **plain, "COLUMNS": "500"}


def command(*arguments: object) -> list[str]:
    """The argument vector; `-P` keeps the current folder off the import path."""
    return [sys.executable, "-P", "-m", "synthward", *map(str, arguments)]


# Sets the limit and becomes the command. Python itself ignores SIGXFSZ, and that is inherited: the write
# fails with EFBIG.
_LIMITER = """
import os, resource, sys
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
os.execv(sys.argv[2], sys.argv[2:])
"""


def run(*arguments: object, file_size_limit: int | None = None, timeout: float = 300) -> Outcome:
    """Runs to the end. `file_size_limit` (bytes) makes every larger file fail, as a full disk does."""
    limiter = [] if file_size_limit is None else [sys.executable, "-c", _LIMITER, str(file_size_limit)]
    done = subprocess.run(
        [*limiter, *command(*arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(),
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def start(*arguments: object) -> subprocess.Popen[str]:
    """Starts a command that the test means to kill."""
    return subprocess.Popen(
        command(*arguments),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def assert_one_line_error(outcome: Outcome, *mentions: str) -> str:
    """Exit code 2, exactly one error line on stderr with every mention in it, no traceback; returns the
    line."""
    streams = outcome.stdout + outcome.stderr
    assert outcome.code == 2, f"exit code {outcome.code}: {streams[-2000:]}"
    assert "Traceback" not in streams, streams[-2000:]
    lines = [line for line in outcome.stderr.splitlines() if line.startswith("synthward: error:")]
    assert len(lines) == 1, outcome.stderr[-2000:]
    assert outcome.stderr.rstrip().endswith(lines[0]), f"text after the error: {outcome.stderr[-2000:]}"
    for mention in mentions:
        assert mention.lower() in lines[0].lower(), f"{mention!r} is not in {lines[0]!r}"
    assert len(lines[0]) < 600
    for inside in ("np.", "object at 0x", "<class"):
        assert inside not in lines[0], f"the message shows the inside of the program: {lines[0]!r}"
    return lines[0]


def fit_arguments(data: Path, schema: Path, out: Path, *extra: object, **settings: object) -> list[object]:
    """`fit` on the tiny data, small; settings by keyword replace the defaults."""
    options = {"generator": "diffusion", "epsilon": 3, "delta": 1e-5} | settings
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    return ["fit", data, "--schema", schema, "--out", out, *flags, *SMALL, *extra]


def snapshot(paths: Sequence[Path]) -> dict[str, bytes]:
    """Contents of the files, to show that a command left its inputs alone."""
    return {str(p): p.read_bytes() for p in paths if p.exists()}
