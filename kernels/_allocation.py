"""What the compiled extension does about torch's memory on the CPU."""

from __future__ import annotations

import torch as torch  # its libraries must be there to be found

from synthward import _C

# The library of torch's that takes memory.
_CORE = "libc10.so"


def reuse_freed_blocks() -> bool:
    """Let torch's large blocks (512 KiB and more) in CPU memory come from malloc, for the whole process; whether that
    was done.

    Done only under glibc before 2.38, whose posix_memalign hardly ever gives a freed block out again (its bug 14581),
    and only where glibc's allocator is the one in use. Blocks are then aligned to 16 bytes instead of 64.
    """
    return bool(_C.reuse_freed_blocks(_CORE))
