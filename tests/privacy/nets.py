"""Small networks of the supported layer kinds, and units of records for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Unit = tuple[Tensor, Tensor]  # inputs [rows, ...], targets [rows]


@dataclass(frozen=True)
class Case:
    """A network with the kind of input that it takes. `make_inputs(rows, generator)` -> inputs [rows,
    ...]."""

    name: str
    build: Callable[[], nn.Module]
    make_inputs: Callable[[int, torch.Generator], Tensor]
    classes: int = 3

    def module(self, seed: int = 0) -> nn.Module:
        """The network with weights that are the same for the same seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.build()

    def units(self, row_counts: Sequence[int], seed: int = 1) -> list[Unit]:
        """One unit per entry of `row_counts`, with that many rows."""
        generator = torch.Generator().manual_seed(seed)
        return [
            (
                self.make_inputs(rows, generator),
                torch.randint(0, self.classes, (rows,), generator=generator),
            )
            for rows in row_counts
        ]


def row_losses(module: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each row, [rows]."""
    return F.cross_entropy(module(inputs), targets, reduction="none")


def unit_loss(module: nn.Module, unit: object) -> Tensor:
    """The loss of one unit: the sum over its rows, a scalar."""
    inputs, targets = unit  # type: ignore[misc]
    return row_losses(module, inputs, targets).sum()


def stack(units: Sequence[Unit]) -> tuple[Tensor, Tensor, Tensor]:
    """Units as one batch, rows unit by unit: inputs [N, ...], targets [N], offsets int64 [U+1]."""
    counts = torch.tensor([0] + [len(targets) for _, targets in units])
    inputs = torch.cat([inputs for inputs, _ in units])
    return inputs, torch.cat([targets for _, targets in units]), counts.cumsum(0)


class EmbeddingNet(nn.Module):
    """Two categorical columns through one table (so one unit meets the same table row twice)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.silu(self.table(ids).flatten(1)))


class ReusedLinear(nn.Module):
    """One Linear called three times: its uses are rows of one gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = F.gelu(self.shared(x))
        return self.head(x)


class ReusedNorm(nn.Module):
    """One LayerNorm and one bias-free Linear called twice, with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.mix = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + F.silu(self.mix(self.norm(x)))
        return self.head(x)


def _vectors(width: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda rows, generator: torch.randn(rows, width, generator=generator)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))


def _layer_norm() -> nn.Module:
    net = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))
    with torch.no_grad():
        net[1].weight.copy_(torch.rand(8) + 0.5)
    return net


def _ids(rows: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 7, (rows, 2), generator=generator)


CASES = [
    Case("mlp", _mlp, _vectors(5)),
    Case("layer_norm", _layer_norm, _vectors(5)),
    Case("embedding", EmbeddingNet, _ids),
    Case("reused_linear", ReusedLinear, _vectors(6)),
    Case("reused_norm", ReusedNorm, _vectors(6)),
]
FLOAT_CASES = [case for case in CASES if case.name != "embedding"]
