"""What each rank finds of norms, for test_fit."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from synthward.observe.norms import ParameterNorms


def norms() -> list[tuple[bool, float, float | None]]:
    """Of replicas and of shards of one module: (collective, norm, norm of an update of ones)."""
    found = []
    for shards in (False, True):
        torch.manual_seed(0)
        # Odd sizes: one rank's part of a bias is empty.
        module = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 1))
        if shards:
            fully_shard(module)
        watched = ParameterNorms(module.parameters())
        watched.remember()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 1.0
        found.append((watched.are_collective, watched.parameters(), watched.update()))
    return found
