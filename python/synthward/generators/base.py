"""What every generator of tables offers; none of them knows about clipping, noise or accounting."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from synthward.encoding.layout import Layout
from synthward.engine.device import CPU, copy_to
from synthward.generators.randomness import Randomness


@dataclass(frozen=True)
class Batch:
    """Rows of one physical batch, unit by unit, ``rows_per_unit`` rows each.

    tokens int64 [R, tokens] (token index inside its column), scores float32 [R, continuous],
    context int64 [R].
    """

    tokens: Tensor
    scores: Tensor
    context: Tensor


class Generator(ABC):
    """A table generator: a private network trained on records, and a sampler that never sees any.

    Attributes:
        device: where it computes; what it is given has to be there, numbers of a `torch.Generator` apart.
    """

    name: ClassVar[str]
    #: Whether `sample` draws the allowed tokens itself; else the caller rejects rows.
    honours_conditions: ClassVar[bool] = False

    def __init__(self, layout: Layout, token_mass: np.ndarray, settings: Any) -> None:
        self.layout = layout
        self.settings = settings
        self.device = CPU
        self.offsets = torch.from_numpy(layout.offsets)
        self.log_mass = torch.from_numpy(np.log(np.maximum(token_mass, 1e-12))).float()
        self.token_mass = torch.from_numpy(token_mass).float()
        # Added to the token logits when sampling; set by `calibrate`, zero until then.
        self.logit_shift = torch.zeros(layout.vocabulary)
        column = torch.from_numpy(np.repeat(np.arange(layout.tokens), layout.token_sizes))
        self.column_of_token = column
        self.membership = nn.functional.one_hot(column, max(layout.tokens, 1)).float()

    def to(self, device: torch.device) -> Self:
        """Move all of it to a device; before anybody holds its parameters, which may be other objects then."""
        self.device = device
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
            elif isinstance(value, nn.Module):
                value.to(device)
        return self

    @property
    @abstractmethod
    def private_module(self) -> nn.Module:
        """The only network that ever sees records; all its gradients pass through the private engine."""

    @property
    def sharded_modules(self) -> list[nn.Module]:
        """What may be spread over ranks: the private network, and what is added to or averaged with it in place."""
        return [self.private_module]

    @property
    @abstractmethod
    def rows_per_unit(self) -> int:
        """Rows that the private network sees per privacy unit and step."""

    @property
    @abstractmethod
    def records_per_unit(self) -> int:
        """Records drawn (with repetition) from a privacy unit at each step."""

    @abstractmethod
    def unit_losses(self, batch: Batch, rng: Randomness | torch.Generator) -> Tensor:
        """Losses [units] of a batch of ``records_per_unit`` records per unit; runs the private network.

        Random numbers are asked for with one row per unit, so that a unit's do not depend on the batch it is in.
        """

    @abstractmethod
    def after_step(self, step: int, steps: int, rng: torch.Generator) -> None:
        """Post-processing after a private step: averages of weights, steps of networks that see no records."""

    @abstractmethod
    def sample(
        self, context: Tensor, rng: Randomness | torch.Generator, allowed: dict[int, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw tokens int64 [R, tokens] and scores float32 [R, continuous] for ``context`` int64 [R].

        With numbered random numbers a row is a function of its number and its context alone, to the bit.

        ``allowed`` maps token columns to bool [size] masks that the drawn tokens should satisfy, where the
        generator can condition on them; the caller filters what it cannot.
        """

    @abstractmethod
    def state(self, *, resume: bool) -> dict[str, Tensor]:
        """Tensors to store: what sampling needs, and with ``resume`` what training needs besides."""

    @abstractmethod
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state` gave."""

    def context_weights(self, allowed: dict[int, Tensor]) -> Tensor:
        """Relative probability of the allowed tokens under each context, float [contexts]."""
        return torch.ones(self.layout.contexts, device=self.device)

    def learning_rate(self, step: int, steps: int) -> float:
        """Learning rate of the private optimizer at a step: linear warm-up, then a cosine to a tenth."""
        warm = min(1.0, (step + 1) / max(1.0, 0.02 * steps))
        cosine = 0.5 * (1.0 + float(np.cos(np.pi * step / max(steps, 1))))
        return float(self.settings.learning_rate) * warm * (0.1 + 0.9 * cosine)

    def one_hot(self, tokens: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Float [R, vocabulary + 1] indicator of all token columns; hidden tokens fall on the last cell."""
        width = self.layout.vocabulary
        index = tokens + self.offsets[:-1]
        if hidden is not None:
            index = torch.where(hidden, width, index)
        out = torch.zeros(len(tokens), width + 1, device=tokens.device)
        return out.scatter_(1, index, 1.0)

    def log_normalizers(self, logits: Tensor) -> Tensor:
        """Log-sum-exp per token column, [R, tokens], by one small GEMM instead of a loop over columns."""
        if not self.layout.tokens:
            return logits.new_zeros(len(logits), 0)
        top = logits.detach().amax(dim=1, keepdim=True)
        return torch.log((logits - top).exp() @ self.membership + 1e-30) + top

    def calibrate(self, draw_context: Callable[[int], Tensor], rng: torch.Generator, rounds: int = 6) -> None:
        """Shift the token logits until sampled one-way shares meet the noisy ones already paid for.

        Clipping shrinks the gradients of rare tokens more than those of common ones; this undoes the bias
        by post-processing: only samples and the noisy histograms are used.
        """
        self.logit_shift.zero_()
        rows = 8192
        for _ in range(rounds if self.layout.tokens else 0):
            tokens, _ = self.sample(copy_to(draw_context(rows), self.device), rng)
            counts = self.one_hot(tokens)[:, :-1].sum(0)
            got = (counts + 1.0) / (rows + 1.0)
            want = (self.token_mass * rows + 1.0) / (rows + 1.0)
            self.logit_shift += (0.8 * torch.log(want / got)).clamp(-1.0, 1.0)


def average_into(averages: Iterable[Tensor], current: Iterable[Tensor], decay: float, step: int) -> None:
    """Exponential moving average with a warm-up: the first steps weigh more."""
    weight = 1.0 - min(decay, (step + 1.0) / (step + 10.0))
    with torch.no_grad():
        # Of what is spread over ranks each has the same rows of both.
        torch._foreach_lerp_([_local(a) for a in averages], [_local(c) for c in current], weight)


def _local(value: Tensor) -> Tensor:
    # By name: the module of DTensor takes long to import, and samplers need none.
    to_local: Callable[[], Tensor] | None = getattr(value.detach(), "to_local", None)
    return value.detach() if to_local is None else to_local()
