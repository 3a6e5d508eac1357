"""Compiled product."""

from __future__ import annotations

import torch
from torch import Tensor

from synthward import _C
from synthward.kernels._select import maybe_view, threads, view


def product(x: Tensor, weight: Tensor, bias: Tensor | None, *, is_transposed: bool) -> Tensor:
    out = torch.empty(len(x), weight.shape[0 if is_transposed else 1], dtype=torch.float32)
    _C.product(view(x), view(weight), maybe_view(bias), is_transposed, view(out), threads())
    return out
