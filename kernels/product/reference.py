"""The product in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def product(x: Tensor, weight: Tensor, bias: Tensor | None, *, is_transposed: bool) -> Tensor:
    if is_transposed:
        return F.linear(x, weight, bias)
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)
