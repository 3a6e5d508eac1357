"""Norms of released parameters, plain or sharded."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

# The norm of an update needs the parameters of before it: beyond so many, the copy is not worth its memory.
MOST_COPIED = 1 << 28


class ParameterNorms:
    """L2 norms of parameters and of their change over one step.

    Of sharded parameters (DTensor) the norms are those of the whole; each method is then collective.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._before: list[Tensor] | None = None

    @property
    def are_collective(self) -> bool:
        return any(isinstance(p, DTensor) for p in self._parameters)

    def remember(self) -> None:
        """The next step is the one whose update is asked for."""
        # Equal on all ranks, whatever part each has.
        if sum(p.numel() / _parts(p) for p in self._parameters) <= MOST_COPIED:
            self._before = [p.detach().clone() for p in self._parameters]

    def parameters(self) -> float:
        return _norm([p.detach() for p in self._parameters])

    def update(self) -> float | None:
        """Of the change since `remember`, which is then forgotten; None without one."""
        if self._before is None:
            return None
        before, self._before = self._before, None
        return _norm([p.detach() - old for p, old in zip(self._parameters, before, strict=True)])


def _parts(parameter: Tensor) -> int:
    return parameter.device_mesh.size() if isinstance(parameter, DTensor) else 1


def _norm(tensors: list[Tensor]) -> float:
    with torch.no_grad():
        norms = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]
        norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
