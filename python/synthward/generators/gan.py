"""A GAN for tables under DP-SGD: only the discriminator sees records, only it is clipped and noised.

The generator network is trained on the private discriminator alone, which is post-processing. Many
discriminator steps are taken per generator step, more of them when the discriminator stops telling fakes
apart (Bie, Kamath & Zhang 2023, "Private GANs, Revisited", section 4); the test is on fakes only, so the
schedule costs no privacy. Several real records of a unit and as many fakes form one clipped contribution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from synthward.encoding.layout import Layout
from synthward.generators.base import Batch, Generator, average_into
from synthward.generators.networks import ResidualMLP
from synthward.generators.randomness import Randomness, TorchRandomness, as_randomness
from synthward.generators.sampler import Sampler

# Discriminator steps per generator step, from the eager to the patient end.
STEPS_PER_UPDATE = (1, 2, 5, 10, 20, 50)
UPDATES_BEFORE_RAISE = 20


@dataclass(frozen=True)
class GanSettings:
    """Settings of the GAN; none of them changes epsilon."""

    hidden: int = 256
    blocks: int = 1
    latent: int = 64
    draws: int = 2
    learning_rate: float = 1e-3
    generator_learning_rate: float = 5e-4
    generator_batch: int = 2048
    temperature: float = 0.7
    raise_below: float = 0.6
    ema_decay: float = 0.98


class GanGenerator(Generator):
    """Generator and discriminator over an encoded table."""

    name: ClassVar[str] = "gan"
    settings: GanSettings

    def __init__(self, layout: Layout, token_mass: np.ndarray, settings: GanSettings | None = None) -> None:
        super().__init__(layout, token_mass, settings or GanSettings())
        s = self.settings
        data = layout.vocabulary + layout.continuous
        self.network = ResidualMLP(s.latent + layout.contexts, s.hidden, 2, data)
        with torch.no_grad():
            self.network.head.bias[: layout.vocabulary] = self.log_mass
        self.averaged = ResidualMLP(s.latent + layout.contexts, s.hidden, 2, data)
        self.averaged.load_state_dict(self.network.state_dict())
        self.averaged.requires_grad_(False)
        self.discriminator = ResidualMLP(data + layout.contexts, s.hidden, s.blocks, 1, zero_head=False)
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=s.generator_learning_rate, betas=(0.0, 0.99), foreach=True
        )
        # Looked at now and then only: on a GPU it would have to be waited for.
        self._fake_accuracy = torch.tensor(0.5, dtype=torch.float64)
        self._updates = 0
        self._level = 0

    def to(self, device: torch.device) -> Self:
        super().to(device)
        self.optimizer.param_groups[0]["params"] = [*self.network.parameters()]
        return self

    @property
    def private_module(self) -> nn.Module:
        return self.discriminator

    @property
    def rows_per_unit(self) -> int:
        return 2 * self.settings.draws

    @property
    def records_per_unit(self) -> int:
        return self.settings.draws

    def unit_losses(self, batch: Batch, rng: Randomness | torch.Generator) -> Tensor:
        draws = self.settings.draws
        units = len(batch.context) // draws
        real = torch.cat([self.one_hot(batch.tokens)[:, :-1], batch.scores], dim=1)
        with torch.no_grad():
            fake = self._fake(self.network, batch.context, as_randomness(rng, self.device), rows=draws)
        rows = torch.cat([real.view(units, draws, -1), fake.view(units, draws, -1)], dim=1).flatten(0, 1)
        context = batch.context.view(units, draws).repeat(1, 2).flatten()
        logits = self._discriminate(rows, context).view(units, 2, draws)
        return nn.functional.softplus(-logits[:, 0]).mean(1) + nn.functional.softplus(logits[:, 1]).mean(1)

    def after_step(self, step: int, steps: int, rng: torch.Generator) -> None:
        if (step + 1) % STEPS_PER_UPDATE[self._level]:
            return
        random = TorchRandomness(rng, self.device)
        context = random.integers(self.settings.generator_batch, self.layout.contexts)
        fake = self._fake(self.network, context, random)
        logits = self._discriminate(fake, context).squeeze(1)
        loss = nn.functional.softplus(-logits).mean()
        weights = list(self.network.parameters())
        # Gradients of the generator network alone: the discriminator's belong to the private engine.
        for weight, grad in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.grad = grad
        self.optimizer.step()
        average_into(
            self.averaged.parameters(), self.network.parameters(), self.settings.ema_decay, self._updates
        )
        self._adapt((logits < 0).float().mean())

    @torch.no_grad()
    def sample(
        self, context: Tensor, rng: Randomness | torch.Generator, allowed: dict[int, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw rows; a GAN can not condition on tokens, so ``allowed`` is left to the caller's filter."""
        layout, rows, random = self.layout, len(context), as_randomness(rng, self.device)
        latent = self.settings.latent
        sampler = Sampler(self.averaged, layout, self.logit_shift)
        sums = sampler.inputs(latent, layout.contexts)[context]
        values = random.normal(rows, latent)
        features = sampler.features(sums, sampler.bias, values, sampler.inputs(0, latent))
        every = torch.arange(layout.tokens, device=self.device).repeat(rows, 1)
        tokens = sampler.draw(features, every, random.uniform(rows, layout.tokens))
        return tokens, sampler.further(features) + random.normal(rows, layout.continuous)

    def state(self, *, resume: bool) -> dict[str, Tensor]:
        tensors = {f"averaged.{k}": v for k, v in self.averaged.state_dict().items()}
        tensors["logit_shift"] = self.logit_shift
        if resume:
            tensors |= {f"network.{k}": v for k, v in self.network.state_dict().items()}
            for index, values in self.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{index}.{k}": v for k, v in values.items()}
            tensors["schedule"] = torch.tensor([float(self._fake_accuracy), self._updates, self._level])
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.averaged.load_state_dict(_with_prefix(tensors, "averaged."))
        self.logit_shift = tensors["logit_shift"].clone().to(self.device)
        if "schedule" not in tensors:
            return
        self.network.load_state_dict(_with_prefix(tensors, "network."))
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in _with_prefix(tensors, "optimizer.").items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value.clone()
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        accuracy, updates, level = tensors["schedule"].tolist()
        self._fake_accuracy.fill_(accuracy)
        self._updates, self._level = int(updates), int(level)

    def _adapt(self, accuracy: Tensor) -> None:
        """Take more discriminator steps per update when the discriminator no longer tells fakes apart."""
        self._updates += 1
        self._fake_accuracy.mul_(0.95).add_(0.05 * accuracy.double())
        settled = self._updates % UPDATES_BEFORE_RAISE == 0
        if settled and float(self._fake_accuracy) <= self.settings.raise_below:
            self._level = min(self._level + 1, len(STEPS_PER_UPDATE) - 1)

    def _output(self, network: nn.Module, context: Tensor, random: Randomness, rows: int = 1) -> Tensor:
        latent = _numbers(random.normal, len(context), self.settings.latent, rows)
        situation = nn.functional.one_hot(context, self.layout.contexts).float()
        return network(torch.cat([latent, situation], dim=1))

    def _fake(self, network: nn.Module, context: Tensor, random: Randomness, rows: int = 1) -> Tensor:
        """Fake rows float [R, vocabulary + continuous]: Gumbel-softmax tokens, straight through to one-hot.

        `rows` of them are one unit's.
        """
        layout = self.layout
        output = self._output(network, context, random, rows)
        logits, shift = output.split([layout.vocabulary, layout.continuous], dim=1)
        uniform = _numbers(random.uniform, len(context), layout.vocabulary, rows).clamp(1e-12, 1.0 - 1e-7)
        perturbed = (logits - torch.log(-torch.log(uniform))) / self.settings.temperature
        share = (perturbed - self.log_normalizers(perturbed)[:, self.column_of_token]).exp()
        hard = self._harden(share.detach())
        noise = _numbers(random.normal, len(context), layout.continuous, rows)
        return torch.cat([hard + share - share.detach(), shift + noise], dim=1)

    def _harden(self, share: Tensor) -> Tensor:
        """One-hot of the largest share per token column, [R, vocabulary]."""
        index = [part.argmax(1) for part in share.split(list(self.layout.token_sizes), dim=1)]
        none = torch.zeros(len(share), 0, dtype=torch.int64, device=share.device)
        tokens = torch.stack(index, 1) if index else none
        return self.one_hot(tokens)[:, :-1]

    def _discriminate(self, rows: Tensor, context: Tensor) -> Tensor:
        situation = nn.functional.one_hot(context, self.layout.contexts).float()
        return self.discriminator(torch.cat([rows, situation], dim=1))


def _numbers(draw: Callable[[int, int], Tensor], count: int, k: int, rows: int) -> Tensor:
    """Random numbers [count, k] for rows of which `rows` each belong to one unit."""
    return draw(count // rows, rows * k).view(count, k)


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
