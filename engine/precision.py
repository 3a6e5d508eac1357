"""Products of float32 as IEEE has them, whatever the user has set for the network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_backends: Any = torch.backends
# Where torch may be told to round the operands of float32 products (TF32 on GPUs, bf16 on CPUs).
_PLACES: tuple[Any, ...] = (
    _backends.cuda.matmul,
    _backends.mkldnn.matmul,
    _backends.mkldnn.conv,
    # On by default, so looked at only where it matters.
    *((_backends.cudnn.conv,) if _backends.cuda.is_built() else ()),
)
_EXACT = ("none", "ieee")


@contextmanager
def exact_products() -> Iterator[None]:
    """No TF32 and no bf16 inside: operands that are rounded would let a norm be smaller, or a released sum larger, than
    what was measured."""
    general = _backends.fp32_precision not in _EXACT
    before = [(place, place.fp32_precision) for place in _PLACES]
    changed = [(place, value) for place, value in before if general or value not in _EXACT]
    for place, _ in changed:
        place.fp32_precision = "ieee"
    try:
        yield
    finally:
        for place, value in changed:
            place.fp32_precision = value
