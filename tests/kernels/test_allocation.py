"""Freed blocks of torch are used again, whatever glibc this is; the allocator can be left alone."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# Blocks that are kept lie between blocks that are freed, as activations and gradients do in a step.
_RUN = """
import sys, torch
from pathlib import Path
from synthward.engine.memory import keep_freed_memory

def peak():
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")]
    return int(line.split()[1]) << 10

assert keep_freed_memory() == ("told" in sys.argv)
size = 1 << 22
kept, freed = [], []
for _ in range(24):
    kept.append(torch.ones(size // 4))
    freed.append(torch.ones(size // 4))
before = peak()
freed.clear()
for _ in range(24):
    kept.append(torch.ones(size // 4))
assert all(float(t.sum()) == size // 4 for t in kept)
print((peak() - before) // size)
"""


def _blocks_more(*words: str, **environment: str) -> int:
    """Blocks of fresh memory that were taken for 24 new ones, with 24 freed ones of that size at hand."""
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "SYNTHWARD_MALLOC", "LD_PRELOAD"))
    }
    command = [sys.executable, "-P", "-c", _RUN, *words]
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_freed_blocks_are_used_again():
    assert _blocks_more("told") <= 2


def test_the_allocator_can_be_left_alone():
    code = "from synthward.engine.memory import keep_freed_memory as k; assert not k()"
    for setting in ({"SYNTHWARD_MALLOC": "default"}, {"MALLOC_TRIM_THRESHOLD_": "131072"}):
        subprocess.run([sys.executable, "-P", "-c", code], env=os.environ | setting, check=True)
