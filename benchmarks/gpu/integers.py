"""A loop of additions, exclusive ors and rotations: how fast this machine's integer units are."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_STEPS, _BLOCK = 256, 1024
# Per element; a rotation by a constant is one instruction.
OPERATIONS = 3 * _STEPS


@triton.jit
def _integers_kernel(out_ptr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = place.to(tl.uint32)
    for _ in range(STEPS):
        x += 0x9E3779B9
        x ^= 0x3C6EF372
        x = (x << 7) | (x >> 25)
    tl.store(out_ptr + place, x.to(tl.int32, bitcast=True))


def run(out: torch.Tensor) -> None:
    """Fill int32 `out`, whose length is a multiple of 1024."""
    _integers_kernel[(len(out) // _BLOCK,)](out, STEPS=_STEPS, BLOCK=_BLOCK, enable_fp_fusion=True)
