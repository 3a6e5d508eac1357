"""The small residual networks that the generators share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ResidualMLP(nn.Module):
    """Linear, then residual blocks ``x + SiLU(Linear(LayerNorm(x)))``, then LayerNorm and a Linear head.

    Input float [R, inputs], output float [R, outputs]. The head starts at zero, so that the network starts
    as whatever its caller adds to it.
    """

    def __init__(
        self, inputs: int, hidden: int, blocks: int, outputs: int, *, zero_head: bool = True
    ) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, hidden)
        self.norms = nn.ModuleList([nn.LayerNorm(hidden) for _ in range(blocks)])
        self.blocks = nn.ModuleList([nn.Linear(hidden, hidden) for _ in range(blocks)])
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, outputs)
        with torch.no_grad():
            # One-hot inputs have few ones: the default scale would start the stem close to its bias.
            self.stem.weight.mul_(3.0)
            if zero_head:
                self.head.weight.zero_()
                self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.stem(x))
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + nn.functional.silu(block(norm(x)))
        return self.head(self.norm(x))
