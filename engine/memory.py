"""Memory that a step frees is kept for the next one.

glibc gives large freed blocks back to the kernel and asks for them again in the next step: thousands of page faults,
each of which zeroes a page. On the MLPs of benchmarks/ that is a tenth of a plain step. A training loop asks for the
same blocks again and again, so the allocator is told to keep them. It says so for the whole process; the peak stays
what it is. Set ``SYNTHWARD_MALLOC=default`` to leave the allocator alone.
"""

from __future__ import annotations

import ctypes
import os
import platform

# From malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# The most that glibc takes (DEFAULT_MMAP_THRESHOLD_MAX); blocks beyond go to the kernel as before.
_LARGEST_BLOCK = 32 << 20
_KEPT = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed; whether it was told."""
    if os.environ.get("SYNTHWARD_MALLOC") == "default" or platform.libc_ver()[0] != "glibc":
        return False
    if {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & set(os.environ):
        return False  # the user's own setting
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _KEPT) and mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK))
