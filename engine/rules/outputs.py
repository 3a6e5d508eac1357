"""What the functions of captured calls return."""

from __future__ import annotations

import torch
from torch import Tensor


def owned(out: Tensor) -> Tensor:
    """`out`, made in the forward pass of a function, as a tensor of its own where it is a view of a fresh one: autograd
    refuses to write in place into a view that such a function returns."""
    if not out._is_view():
        return out
    found: Tensor = torch.ops.aten._unsafe_view(out, out.shape)
    return found
