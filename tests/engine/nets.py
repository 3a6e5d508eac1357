"""Networks and batches for the engine's tests, and the float64 loop that they are held to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synthward.engine import KeySchedule, PerfSpec, PrivacyPlan, PrivateTrainer
from tests.oracles import clipped_sum, flat_parameters, per_unit_gradients


class Mixed(nn.Module):
    """Embedding with padding, concatenated with numbers; LayerNorm, residuals, a layer used twice."""

    def __init__(self, width: int = 5, act: type[nn.Module] = nn.SiLU) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 3, padding_idx=0)
        self.stem = nn.Linear(4 + 3, width)
        self.norm = nn.LayerNorm(width)
        self.twice = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, 2)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., 5]: an id, then four numbers."""
        hidden = self.stem(torch.cat([self.table(x[..., 0].long()), x[..., 1:]], dim=-1))
        for _ in range(2):
            hidden = hidden + self.act(self.twice(self.norm(hidden)))
        return self.head(hidden)


class Tied(nn.Module):
    """A table that is looked up, mixed, and used as the weight of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.mix(self.table(x[..., 0].long()))), self.table.weight)


def mixed_inputs(*shape: int, seed: int = 0) -> Tensor:
    """[*shape, 5]: ids 0..5 (0 is padding) and four numbers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, 5, generator=generator)
    x[..., 0] = torch.randint(0, 6, shape, generator=generator).float()
    return x


def row_losses(module: nn.Module, x: Tensor) -> Tensor:
    """A loss per leading row: of the row's whole output, time axis included."""
    out = module(x).flatten(1)
    return torch.sin(out).sum(1) + out.square().mean(1)


def unit_losses(module: nn.Module, x: Tensor, counts: Sequence[int]) -> Tensor:
    """A loss per unit; unit u owns ``counts[u]`` rows."""
    units = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    losses = row_losses(module, x)
    return losses.new_zeros(len(counts)).index_add(0, units, losses)


def assert_clipped_sum(
    found: np.ndarray, gradients: Sequence[np.ndarray], max_grad_norm: float, *, slack: float = 5e-3
) -> None:
    """`found` [P] is a sum of the units' gradients, each by a factor of at most ``min(1, C / norm)``, and of less by no
    more than `slack`: the norm is inflated by the bound of its rounding, which is large where many rows cancel."""
    lengths = [float(np.linalg.norm(gradient)) for gradient in gradients]
    kept = [(g, n) for g, n in zip(gradients, lengths, strict=True) if n > 0.0]
    if not kept:
        np.testing.assert_array_equal(found, 0.0)
        return
    # Unknowns are factors over the ideal ones, of columns of about unit length.
    ideal = np.stack([g * min(1.0, max_grad_norm / n) for g, n in kept], axis=1)
    scale = np.linalg.norm(ideal, axis=0)
    share = np.linalg.lstsq(ideal / scale, found, rcond=1e-9)[0] / scale
    error = np.linalg.norm(ideal @ share - found)
    assert error <= 2e-5 * np.linalg.norm(found) + 2e-6 * np.sqrt(len(found)), (
        "not a sum of the units' gradients"
    )
    # Reading a sum back as a difference of fp32 parameters of magnitude up to 2 loses 1.2e-7 a coordinate.
    lost = 1e-5 + 1e-6 * np.sqrt(len(found)) / scale
    alone = np.linalg.svd(ideal / scale, compute_uv=False)[-1]
    if len(kept) <= len(found) and alone > 0.05:  # else the units' shares can not be told apart
        assert (share <= 1.0 + lost / alone).all() and (share >= 1.0 - slack - lost / alone).all(), share


def oracle(module: nn.Module, x: Tensor, counts: Sequence[int], max_grad_norm: float) -> np.ndarray:
    """The clipped sum by the float64 loop over units, [P]."""
    parts = [part for part in torch.split(x, list(counts)) if len(part)]
    gradients = per_unit_gradients(module, lambda net, part: row_losses(net, part).sum(), parts)
    return clipped_sum(gradients, max_grad_norm) if gradients else np.zeros(len(flat_parameters(module)))


def make_trainer(
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    perf: PerfSpec | None = None,
    **changes,
) -> PrivateTrainer:
    """A trainer whose update is the released sum (SGD at rate 1, expected batch 1, no noise) unless
    changed."""
    fields = {
        "sample_rate": 0.1,
        "noise_multiplier": 0.0,
        "max_grad_norm": 1.0,
        "steps": 1000,
        "expected_batch_size": 1.0,
    }
    optimizer = optimizer or torch.optim.SGD(module.parameters(), lr=1.0)
    plan = PrivacyPlan(**(fields | changes))
    return PrivateTrainer(module, optimizer, plan, keys=KeySchedule.from_os(), perf=perf)


def accumulate(trainer: PrivateTrainer, module: nn.Module, x: Tensor, counts: Sequence[int], **where) -> None:
    """One physical batch."""
    with trainer.capture():
        losses = unit_losses(module, x, counts)
    if not where:
        where = {"offsets": torch.tensor([0, *counts]).cumsum(0)}
    trainer.backward(losses, **where)


def released(
    module: nn.Module, x: Tensor, counts: Sequence[int], max_grad_norm: float, **where
) -> np.ndarray:
    """The released sum of one noiseless step, [P]; moves the module's parameters."""
    trainer, before = make_trainer(module, max_grad_norm=max_grad_norm), flat_parameters(module)
    accumulate(trainer, module, x, counts, **where)
    trainer.apply()
    return before - flat_parameters(module)
