"""Mixed denoising diffusion for tables: absorbing-state diffusion of tokens, Gaussian diffusion of scores.

Tokens are hidden with probability t and predicted from what is left (Austin et al. 2021, D3PM, section 3.1;
Sahoo et al. 2024, MDLM); scores follow the variance-preserving path cos(pi t/2) z + sin(pi t/2) e with
velocity prediction (Salimans & Ho 2022, section 4). The head starts at zero over the noisy one-way shares,
where the network already is the exact denoiser of independent columns: private steps are spent on
dependence alone. Several draws of t per record are averaged inside the privacy unit before it is clipped
(Dockhorn et al. 2023, DPDM, section 3.2), which costs no privacy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from synthward.encoding.layout import Layout
from synthward.generators.base import Batch, Generator, average_into
from synthward.generators.networks import ResidualMLP
from synthward.generators.randomness import Randomness, as_randomness
from synthward.generators.sampler import Sampler


@dataclass(frozen=True)
class DiffusionSettings:
    """Settings of the diffusion generator; none of them changes epsilon."""

    hidden: int = 256
    blocks: int = 2
    draws: int = 4
    learning_rate: float = 2e-3
    ema_decay: float = 0.99
    sampling_steps: int = 24
    label_weight: float = 3.0
    label_time: float = 0.5


class DiffusionGenerator(Generator):
    """Mixed diffusion over an encoded table."""

    name: ClassVar[str] = "diffusion"
    honours_conditions: ClassVar[bool] = True
    settings: DiffusionSettings

    def __init__(
        self, layout: Layout, token_mass: np.ndarray, settings: DiffusionSettings | None = None
    ) -> None:
        super().__init__(layout, token_mass, settings or DiffusionSettings())
        inputs = layout.vocabulary + 1 + layout.continuous + layout.contexts + 2
        outputs = layout.vocabulary + layout.continuous
        self.network = ResidualMLP(inputs, self.settings.hidden, self.settings.blocks, outputs)
        with torch.no_grad():
            self.network.head.bias[: layout.vocabulary] = self.log_mass
        self.averaged = ResidualMLP(inputs, self.settings.hidden, self.settings.blocks, outputs)
        self.averaged.load_state_dict(self.network.state_dict())
        self.averaged.requires_grad_(False)

    @property
    def private_module(self) -> nn.Module:
        return self.network

    @property
    def sharded_modules(self) -> list[nn.Module]:
        return [self.network, self.averaged]

    @property
    def rows_per_unit(self) -> int:
        return self.settings.draws

    @property
    def records_per_unit(self) -> int:
        return self.settings.draws

    def unit_losses(self, batch: Batch, rng: Randomness | torch.Generator) -> Tensor:
        draws, layout, device = self.settings.draws, self.layout, self.device
        random = as_randomness(rng, device)
        rows = len(batch.context)
        # Stratified times inside a unit: lower variance of its averaged gradient at the same cost.
        start = random.uniform(rows // draws, 1)
        time = ((start + torch.arange(draws, device=device) / draws) % 1.0).reshape(rows, 1)
        label_row = torch.zeros(rows, 1, dtype=torch.bool, device=device)
        if layout.label is not None:
            label_row = (torch.arange(rows, device=device) % draws == 0).unsqueeze(1)
            time = torch.where(label_row, self.settings.label_time * time, time)
        hidden = self._hide(time, label_row, random)
        alpha, sigma = torch.cos(0.5 * math.pi * time), torch.sin(0.5 * math.pi * time)
        noise = random.normal(rows // draws, draws * layout.continuous).view(rows, layout.continuous)
        noisy = alpha * batch.scores + sigma * noise
        output = self.network(self._inputs(batch.tokens, hidden, noisy, time, batch.context))
        logits, velocity = output.split([layout.vocabulary, layout.continuous], dim=1)
        loss = torch.zeros(rows, device=device)
        if layout.tokens:
            target = logits.gather(1, batch.tokens + self.offsets[:-1])
            entropy = (self.log_normalizers(logits) - target) * hidden
            loss = loss + entropy.sum(1) / hidden.sum(1).clamp(min=1) * layout.tokens
        if layout.continuous:
            present = self._present(batch.tokens)
            error = (velocity - (alpha * noise - sigma * batch.scores)) ** 2
            loss = loss + 0.5 * (error * present).sum(1)
        weight = torch.where(label_row.squeeze(1), self.settings.label_weight, 1.0)
        return (loss * weight).view(-1, draws).mean(1) / (layout.tokens + layout.continuous)

    def after_step(self, step: int, steps: int, rng: torch.Generator) -> None:
        average_into(self.averaged.parameters(), self.network.parameters(), self.settings.ema_decay, step)

    @torch.no_grad()
    def sample(
        self, context: Tensor, rng: Randomness | torch.Generator, allowed: dict[int, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        layout, rows, random = self.layout, len(context), as_randomness(rng, self.device)
        sampler = Sampler(self.averaged, layout, self.logit_shift, allowed)
        # The inputs in the order of `_inputs`: tokens and an unused one, scores, context, share, time.
        added = sampler.inputs(0, layout.vocabulary)
        score_weights = sampler.inputs(layout.vocabulary + 1, layout.continuous)
        at = layout.vocabulary + 1 + layout.continuous
        share_weight, time_weight = sampler.inputs(at + layout.contexts, 2)
        sums = sampler.inputs(at, layout.contexts)[context] + sampler.bias
        tokens = torch.zeros(rows, layout.tokens, dtype=torch.int64, device=self.device)
        scores = random.normal(rows, layout.continuous)
        order = self._order(rows, allowed, random)
        bounds = self._bounds()
        steps = len(bounds) - 1
        for index in range(steps):
            now, then = 1.0 - index / steps, 1.0 - (index + 1) / steps
            share = 1.0 - bounds[index] / layout.tokens if layout.tokens else now
            features = sampler.features(sums, share * share_weight + now * time_weight, scores, score_weights)
            chosen = order[:, bounds[index] : bounds[index + 1]].contiguous()
            drawn = sampler.draw(features, chosen, random.uniform(*chosen.shape), added, sums)
            tokens.scatter_(1, chosen, drawn)
            if layout.continuous:
                fresh = random.normal(rows, layout.continuous)
                scores = _ancestral_step(scores, sampler.further(features), now, then, fresh)
        return tokens, scores

    @torch.no_grad()
    def context_weights(self, allowed: dict[int, Tensor]) -> Tensor:
        """Probability of the allowed tokens at the start of the path, where all columns are hidden."""
        layout, contexts, device = self.layout, self.layout.contexts, self.device
        weights = torch.ones(contexts, device=device)
        if not allowed:
            return weights
        tokens = torch.zeros(contexts, layout.tokens, dtype=torch.int64, device=device)
        hidden = torch.ones(contexts, layout.tokens, dtype=torch.bool, device=device)
        scores = torch.zeros(contexts, layout.continuous, device=device)
        start = torch.ones(contexts, 1, device=device)
        inputs = self._inputs(tokens, hidden, scores, start, torch.arange(contexts, device=device))
        logits = self.averaged(inputs)[:, : layout.vocabulary] + self.logit_shift
        share = (logits - self.log_normalizers(logits)[:, self.column_of_token]).exp()
        for column, mask in allowed.items():
            first = int(layout.offsets[column])
            weights = weights * (share[:, first : first + len(mask)] * mask.to(device)).sum(1)
        return weights.clamp(min=1e-12)

    def state(self, *, resume: bool) -> dict[str, Tensor]:
        tensors = {f"averaged.{k}": v for k, v in self.averaged.state_dict().items()}
        tensors["logit_shift"] = self.logit_shift
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        prefix = "averaged."
        kept = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        self.averaged.load_state_dict(kept)
        self.logit_shift = tensors["logit_shift"].clone().to(self.device)

    def _hide(self, time: Tensor, label_row: Tensor, random: Randomness) -> Tensor:
        """Which tokens are hidden, bool [rows, tokens]: at least one in every row."""
        rows, columns, draws = len(time), self.layout.tokens, self.settings.draws
        if not columns:
            return torch.zeros(rows, 0, dtype=torch.bool, device=time.device)
        hidden = random.uniform(rows // draws, draws * columns).view(rows, columns) < time
        if self.layout.label is not None:
            hidden[:, self.layout.label] |= label_row.squeeze(1)
        none = ~hidden.any(1)
        spare = (random.uniform(rows // draws, draws).view(rows, 1) * columns).long()
        return hidden.scatter(1, spare, hidden.gather(1, spare) | none.unsqueeze(1))

    def _inputs(
        self, tokens: Tensor, hidden: Tensor, scores: Tensor, time: Tensor, context: Tensor
    ) -> Tensor:
        share = hidden.float().mean(1, keepdim=True) if self.layout.tokens else time
        known = self.one_hot(tokens, hidden)
        # The last cell only collected the hidden tokens; their share is a feature of its own.
        known[:, -1] = 0.0
        situation = nn.functional.one_hot(context, self.layout.contexts).float()
        return torch.cat([known, scores, situation, share, time], dim=1)

    def _present(self, tokens: Tensor) -> Tensor:
        """Float [rows, continuous]: one where the continuous value is present."""
        flags = [
            tokens[:, j] > 0 if j >= 0 else torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
            for j in self.layout.presence
        ]
        return torch.stack(flags, dim=1).float()

    def _order(self, rows: int, allowed: dict[int, Tensor] | None, random: Randomness) -> Tensor:
        """Order in which tokens are revealed: conditions first, the label last, the rest at random."""
        rank = random.uniform(rows, self.layout.tokens)
        if self.layout.label is not None:
            rank[:, self.layout.label] += 1.0
        for column in allowed or {}:
            rank[:, column] -= 2.0
        return rank.argsort(dim=1, stable=True)

    def _bounds(self) -> list[int]:
        """Numbers of tokens that are known at the begin of each step and at the end."""
        steps = self.settings.sampling_steps
        if not self.layout.continuous:
            steps = min(steps, max(self.layout.tokens, 1))
        return [int(bound) for bound in np.linspace(0, self.layout.tokens, steps + 1).round()]


def _ancestral_step(scores: Tensor, velocity: Tensor, now: float, then: float, fresh: Tensor) -> Tensor:
    """One step of the reverse Gaussian path from time ``now`` to ``then`` (deterministic at the last step).

    ``fresh`` is standard normal noise like ``scores``.
    """
    alpha, sigma = math.cos(0.5 * math.pi * now), math.sin(0.5 * math.pi * now)
    clean = (alpha * scores - sigma * velocity).clamp(-4.0, 4.0)
    noise = (scores - alpha * clean) / max(sigma, 1e-6)
    alpha_next, sigma_next = math.cos(0.5 * math.pi * then), math.sin(0.5 * math.pi * then)
    # Half of the remaining noise is fresh: errors of early steps are forgotten.
    mixed = math.sqrt(0.5) * noise + math.sqrt(0.5) * fresh
    return alpha_next * clean + sigma_next * mixed
