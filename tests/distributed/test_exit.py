"""How one of several processes ends: by its exit code, when all is said, without the interpreter's last steps."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.commandline import environment

# Threads of gloo abort a process when they let go of a tensor while the interpreter ends.
PROGRAM = """
import atexit, sys
atexit.register(print, "the interpreter ends")
from synthward.cli import main
print("said before")
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("ranks", "words", "code", "ends"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, ["account"], 2, False),
        ({"WORLD_SIZE": "2", "RANK": "1"}, ["fit", "--help"], 0, False),
        ({"WORLD_SIZE": "1"}, ["--version"], 0, True),
        ({}, ["no-such-command"], 2, True),
    ],
)
def test_one_of_several_processes_leaves_at_once(ranks, words, code, ends):
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, *words],
        **{"capture_output": True, "text": True, "timeout": 60, "check": False},
        env=environment() | ranks,
    )
    assert done.returncode == code, done.stderr
    assert done.stdout.startswith("said before") and ("the interpreter ends" in done.stdout) == ends
    assert code == 0 or len(done.stderr.splitlines()) == 1, done.stderr
