"""The float64 loop over privacy units that every number of ranks is held to.

One unit at a time, by torch's own autograd and optimizers; of the engine, only the sampler's draws and the bits of the
noise are taken.
"""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from synthward.engine import DPAdamBC, KeySchedule
from synthward.kernels import discrete_release_, gaussian_noise
from tests.distributed.cases import CLIP, CLIPPINGS, EXPECTED, SEED, SIGMA, STEPS, UNITS, Case
from tests.engine.nets import row_losses

# Where a parameter begins in the noise of a step: the next multiple.
ALIGN = 16


@cache
def reference(case: Case) -> dict[str, np.ndarray]:
    """All parameters after `STEPS` steps, float64."""
    module = case.module().double()
    optimizer = _Corrected(case, module) if case.optimizer == "adam_bc" else case.make_optimizer(module)
    loop = _Loop(case, module, optimizer)
    for step in range(STEPS):
        if step == STEPS // 2:
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
        loop.step(step)
    return {name: p.detach().numpy().copy() for name, p in module.named_parameters()}


class _Loop:
    def __init__(self, case: Case, module: nn.Module, optimizer: Any) -> None:
        self.case, self.module, self.optimizer = case, module, optimizer
        self.units = [rows.double() for rows in case.units()]
        keys = KeySchedule.reproducible(SEED)
        self.sampler, self.key = case.plan().sampler(UNITS, keys.key("sampler")), keys.key("noise")
        names = {id(p): name for name, p in module.named_parameters()}
        self.order: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        self.groups = _clipping_groups(case, [names[id(p)] for p in self.order])
        sizes = [-(-p.numel() // ALIGN) * ALIGN for p in self.order]
        self.starts, self.length = np.cumsum([0, *sizes])[:-1].tolist(), sum(sizes)
        self.bound = CLIP

    def step(self, step: int) -> None:
        gradients = [self.gradients(self.units[unit]) for unit in self.sampler.draw(step)]
        clipped = [self.clip(parts) for parts in gradients]
        sums = [
            sum((unit[i] for unit in clipped), torch.zeros_like(p, dtype=torch.float64))
            for i, p in enumerate(self.order)
        ]
        noised = self.noised(step, sums)
        if self.case.clipping == "adaptive":
            self.move_bound(step, gradients)
        for parameter, total in zip(self.order, noised, strict=True):
            parameter.grad = total / EXPECTED
        self.optimizer.step()

    def gradients(self, rows: Tensor) -> list[Tensor]:
        loss = row_losses(self.module, rows).sum()
        if self.case.is_silent:
            loss = loss * 0.0
        return list(torch.autograd.grad(loss, self.order))

    def clip(self, parts: list[Tensor]) -> list[Tensor]:
        factors = {}
        for group in set(self.groups):
            own = [p for p, g in zip(parts, self.groups, strict=True) if g == group]
            norm = math.sqrt(sum(float(p.square().sum()) for p in own))
            bound = self.bound / math.sqrt(len(set(self.groups)))
            if self.case.clipping == "automatic":
                factors[group] = bound / (norm + CLIPPINGS["automatic"].gamma)
            else:
                factors[group] = min(1.0, bound / norm) if norm else 1.0
        return [p * factors[g] for p, g in zip(parts, self.groups, strict=True)]

    def noised(self, step: int, sums: list[Tensor]) -> list[Tensor]:
        if self.case.noise == "discrete":
            return self.discrete(step, sums)
        multiplier = 0.0 if self.case.noise == "none" else SIGMA
        if self.case.clipping == "adaptive":
            count_noise = CLIPPINGS["adaptive"].count_noise
            assert count_noise is not None
            multiplier = (multiplier**-2 - (2.0 * count_noise) ** -2) ** -0.5
        noise = multiplier * self.bound * self.white(step)
        strategy = self.case.strategy
        if strategy is not None:
            taps = strategy.inverse_column(STEPS)
            noise = SIGMA * CLIP * sum(float(taps[j]) * self.white(step - j) for j in range(step + 1))
        return [s + self.part(noise, i) for i, s in enumerate(sums)]

    def discrete(self, step: int, sums: list[Tensor]) -> list[Tensor]:
        """Sums rounded to a grid, a power of two, so fine that it adds at most 2^-13 to the sensitivity; the noise
        covers that and as much again for the rounding of the sums themselves."""
        share, length = 2.0**-13, math.sqrt(self.length)
        grid = 2.0 ** math.floor(math.log2(CLIP * share / length))
        flat, out = torch.zeros(self.length, dtype=torch.float64), torch.zeros(self.length)
        for i, total in enumerate(sums):
            self.part(flat, i).copy_(total)
        std = SIGMA * (CLIP * (1.0 + share) + length * grid)
        discrete_release_(flat, out, key=self.key, stream=1, step=step, grid=grid, noise_std=std)
        return [self.part(out.double(), i) for i in range(len(sums))]

    def white(self, step: int, start: int = 0, count: int | None = None) -> Tensor:
        count = self.length if count is None else count
        return gaussian_noise(count, key=self.key, stream=1, step=step, start=start).double()

    def part(self, flat: Tensor, index: int) -> Tensor:
        parameter, start = self.order[index], self.starts[index]
        return flat[start : start + parameter.numel()].view(parameter.shape)

    def move_bound(self, step: int, gradients: list[list[Tensor]]) -> None:
        """Andrew et al. 2021, algorithm 1, of counts about a half."""
        spec = CLIPPINGS["adaptive"]
        assert spec.count_noise is not None
        norms = [math.sqrt(sum(float(p.square().sum()) for p in parts)) for parts in gradients]
        total = sum((norm <= self.bound) - 0.5 for norm in norms)
        noise = float(self.white(step, self.length, 1)[0]) * spec.count_noise
        share = (total + noise) / EXPECTED + 0.5
        self.bound *= math.exp(-spec.quantile_rate * (share - spec.target_quantile))


def _clipping_groups(case: Case, names: list[str]) -> list[str]:
    if case.clipping == "per-layer":
        return [name.rpartition(".")[0] for name in names]
    if case.clipping == "grouped":
        groups = CLIPPINGS["grouped"].groups
        return [next((g for g in groups if name.startswith(g)), "") for name in names]
    return [""] * len(names)


class _Corrected:
    """DP-AdamBC (Tang, Shpilevskiy and Lecuyer 2023, algorithm 1) in float64."""

    def __init__(self, case: Case, module: nn.Module) -> None:
        made = case.make_optimizer(module)
        assert isinstance(made, DPAdamBC)
        self.param_groups, self.moments, self.steps = made.param_groups, {}, 0
        self.strategy = case.strategy
        self.average = 0.0

    def step(self) -> None:
        self.steps += 1
        taps = np.ones(1) if self.strategy is None else self.strategy.inverse_column(STEPS)
        variance = (SIGMA * CLIP / EXPECTED) ** 2 * float(np.square(taps[: self.steps]).sum())
        beta2 = self.param_groups[0]["betas"][1]
        self.average = beta2 * self.average + (1 - beta2) * variance
        for group in self.param_groups:
            for parameter in group["params"]:
                self.update(parameter, group)

    def update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        (beta1, beta2), gradient = group["betas"], parameter.grad
        zeros = torch.zeros_like(parameter), torch.zeros_like(parameter)
        first, second = self.moments.get(parameter, zeros)
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        self.moments[parameter] = copy.copy((first, second))
        signal = (second - self.average) / (1 - beta2**self.steps)
        root = signal.clamp_min(group["min_second_moment"]).sqrt()
        with torch.no_grad():
            parameter.sub_(group["lr"] * (first / (1 - beta1**self.steps)) / root)
