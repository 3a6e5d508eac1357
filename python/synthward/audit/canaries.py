"""White-box audit of the private step: canaries with gradients of their own axis, through the whole of the engine.

Unit u of the audit is row u of two embedding tables, and its loss is a large multiple of that row: its gradient has
nothing in common with any other unit's, and is clipped to exactly C. Each canary takes part in the whole run or in
none of it, by a fair coin. What the optimizer was given is read back from its moments, and the score of a canary is
the sum over steps of its coordinate of the released noisy sums, weighted as the noise's correlation asks for. If the
engine does what its plan says, scores have unit variance, and those of included canaries are larger by the mu of
Gaussian differential privacy. No record takes part (Nasr et al. 2023; Steinke et al. 2023 for the coins).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import toeplitz
from torch import Tensor, nn

from synthward.engine import KeySchedule, PoissonSampler, PrivacyPlan, PrivateTrainer, physical_batches
from synthward.engine.accounting.matrix import Strategy

#: Canaries of one audit: enough to catch noise at 0.9 of its claim.
CANARIES = 5000
#: Rows of each unit: were they clipped apart, a unit would count several times.
ROWS_PER_UNIT = 2
# Gradients this many times the bound, so that every canary is clipped, to C but for rounding.
_SCALE = 1e4
# Several of them in a step of full participation.
_PHYSICAL = 512
_BETA = 0.9
# Of full participation; with a noise multiplier above its root the audit is of less than mu = 1.
_MOST_STEPS = 400


class Canaries(nn.Module):
    """Row u of both tables belongs to unit u. Two tables, so that rules that clip by layer have two layers."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(count, 1), nn.Embedding(count, 1)
        for table in (self.first, self.second):
            nn.init.zeros_(table.weight)

    def forward(self, units: Tensor) -> Tensor:
        return (self.first(units) + self.second(units)).squeeze(1)


class AuditedStep:
    """A private trainer as the plan says, over canaries alone, whose released sums can be read back.

    Args:
        plan: the mechanism. keys: of the audit itself, never those of a run.
        count: canaries. scale: length of their gradients, over the bound; 0 for a step without gradients.
    """

    def __init__(
        self, plan: PrivacyPlan, keys: KeySchedule, count: int = CANARIES, *, scale: float = _SCALE
    ) -> None:
        clip = plan.clip
        if clip.clipping == "grouped":
            plan = replace(plan, clipping=replace(clip, groups=("first.",)))
        self.plan, self._scale, self.steps = plan, scale, 0
        self.module = Canaries(count)
        # The learning rate moves nothing: what is read are the moments.
        optimizer = torch.optim.Adam(self.module.parameters(), lr=1e-6, betas=(_BETA, 0.999))
        self.trainer = PrivateTrainer(self.module, optimizer, plan, keys=keys)
        self._moments = np.zeros((2, count))

    @property
    def bound(self) -> float:
        """The clipping bound in force: of the adaptive rule, as far as earlier steps have moved it."""
        state = self.trainer.state_dict().get("clipping.bound")
        return self.plan.max_grad_norm if state is None else float(state)

    def step(self, units: NDArray[np.int64]) -> NDArray[np.float64]:
        """One logical step over these units; returns the released noisy sum in bounds C, float64 [2, count]."""
        bound = self.bound
        for batch in physical_batches(units, _PHYSICAL):
            index = torch.from_numpy(batch)
            mask, rows = index >= 0, index.clamp(min=0).repeat_interleave(ROWS_PER_UNIT)
            with self.trainer.capture():
                losses = self.module(rows).view(-1, ROWS_PER_UNIT).sum(1) * (self._scale * bound)
            self.trainer.backward(losses, rows_per_unit=ROWS_PER_UNIT, unit_mask=mask)
        self.trainer.apply()
        self.steps += 1
        state = self.trainer.state_dict()
        moments = np.stack(
            [
                state[f"optimizer.exp_avg.{name}.weight"].double().numpy().ravel()
                for name in ("first", "second")
            ]
        )
        given = (moments - _BETA * self._moments) / (1.0 - _BETA)
        self._moments = moments
        return np.asarray(given * (self.plan.expected_batch_size / bound))


@dataclass(frozen=True)
class CanaryRun:
    """Scores of a white-box audit.

    Attributes:
        included: bool [m], the coins. scores: float64 [m], of unit variance if the noise is what the plan says.
        plan: of the steps that were audited; what it claims is what the scores are held against.
    """

    included: NDArray[np.bool_]
    scores: NDArray[np.float64]
    plan: PrivacyPlan


def run_canaries(plan: PrivacyPlan, keys: KeySchedule, count: int = CANARIES) -> CanaryRun:
    """All steps of a plan: each included canary is drawn as the plan's sampler says."""
    included = _coins(keys, count)
    members = np.flatnonzero(included)
    sampler = PoissonSampler(len(members), plan.sample_rate, keys.key("sampler"))
    return _run(plan, keys, included, lambda step: members[sampler.draw(step)], np.ones(plan.steps))


def run_full_participation(plan: PrivacyPlan, keys: KeySchedule, count: int = CANARIES) -> CanaryRun:
    """Each included canary as often as the plan's participation allows, without sampling.

    The strongest audit of clip, sum and noise: the claim of so many steps at rate 1 is met with equality. There are as
    many steps as make mu about 1.
    """
    included = _coins(keys, count)
    steps = 1
    while _mu(plan, steps) < 1.0 and steps < _MOST_STEPS:
        steps += 1
    whole, takes_part = replace(plan, sample_rate=1.0, steps=steps), _participation(plan, steps)
    members, none = np.flatnonzero(included), np.zeros(0, dtype=np.int64)
    return _run(whole, keys, included, lambda step: members if takes_part[step] else none, takes_part)


def whiten(plan: PrivacyPlan, series: NDArray[np.float64]) -> NDArray[np.float64]:
    """What was released [steps, ...], with the noise of each step independent of the others again."""
    return series if _strategy(plan) is None else np.tensordot(_matrix(plan, len(series)), series, axes=1)


def matched_filter(plan: PrivacyPlan, signal: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights of the steps [steps] whose sum tells a canary's part `signal` from the noise best: noise of unit
    variance, C the strategy, s the signal: ``<C s, C x> / |C s|`` for what was released, x."""
    matrix = _matrix(plan, len(signal))
    moved = matrix @ signal
    return np.asarray(matrix.T @ moved / np.linalg.norm(moved))


def _strategy(plan: PrivacyPlan) -> Strategy | None:
    return getattr(plan, "strategy", None)


def _period(plan: PrivacyPlan) -> int:
    return int(getattr(plan, "period", 1))


def _matrix(plan: PrivacyPlan, steps: int) -> NDArray[np.float64]:
    """The strategy matrix C [steps, steps]."""
    strategy = _strategy(plan)
    return np.eye(steps) if strategy is None else toeplitz(strategy.column(steps), np.zeros(steps))


def _participation(plan: PrivacyPlan, steps: int) -> NDArray[np.float64]:
    """1 in the steps in which a unit may take part: every `period`-th."""
    return (np.arange(steps) % _period(plan) == 0).astype(np.float64)


def _mu(plan: PrivacyPlan, steps: int) -> float:
    """Of full participation in so many steps."""
    strategy, period = _strategy(plan), _period(plan)
    moved = math.sqrt(-(-steps // period)) if strategy is None else strategy.sensitivity(steps, period)
    return moved / plan.noise_multiplier


def _run(
    plan: PrivacyPlan,
    keys: KeySchedule,
    included: NDArray[np.bool_],
    draw: Callable[[int], NDArray[np.int64]],
    signal: NDArray[np.float64],
) -> CanaryRun:
    weights = matched_filter(plan, signal)
    audited, scores = AuditedStep(plan, keys, len(included)), np.zeros(len(included))
    for step in range(plan.steps):
        scores += weights[step] * audited.step(draw(step)).sum(0) / math.sqrt(2.0)
    return CanaryRun(included, scores / plan.noise_multiplier, plan)


def _coins(keys: KeySchedule, count: int) -> NDArray[np.bool_]:
    """Fair coins from the key of canaries."""
    rng = np.random.default_rng(int.from_bytes(keys.key("canaries"), "little"))
    return rng.random(count) < 0.5
