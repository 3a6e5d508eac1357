"""Memory that a step frees is kept for the next one.

glibc gives large freed blocks back to the kernel and asks for them again in the next step: thousands of page faults,
each of which zeroes a page. On the MLPs of benchmarks/ that is a tenth of a plain step. A training loop asks for the
same blocks again and again, so the allocator is told to keep them, and an old glibc is kept from asking for fresh
memory where a freed block would do (`reuse_freed_blocks`). Both hold for the whole process and for plain torch in it
as well. Set ``SYNTHWARD_MALLOC=default`` to leave the allocator alone.
"""

from __future__ import annotations

import ctypes
import os
import platform

from synthward.kernels import reuse_freed_blocks

# From malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# The most that glibc takes (DEFAULT_MMAP_THRESHOLD_MAX); blocks beyond go to the kernel as before.
_LARGEST_BLOCK = 32 << 20
_KEPT = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed, and use it again; whether it was told to keep it."""
    if os.environ.get("SYNTHWARD_MALLOC") == "default" or platform.libc_ver()[0] != "glibc":
        return False
    reuse_freed_blocks()
    if {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & set(os.environ):
        return False  # the user's own setting
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _KEPT) and mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK))
