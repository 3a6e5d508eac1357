"""Noise correlated over steps: which strategies there are, and what a kernel needs at each step.

The noise of step t, counted from the first of an instance, is w_t = sum_(i<=t) d_i z_(t-i) with z white and d the first
column of C^-1. `noise_schedule` gives it as a recursion of few terms, whose past is either regenerated from counters
(``taps``) or kept in ``state``:

    w = sum_j taps[j] z(t - j) - sum_k weights[k] state[k];    state[k] = decays[k] state[k] + gains[k] w

with ``state`` zero before the first step. All that is added is white noise run through fixed numbers: it depends on no
record.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from synthward.engine.accounting.factorization import banded_inverse_strategy as banded_inverse_strategy
from synthward.engine.accounting.factorization import banded_strategy as banded_strategy
from synthward.engine.accounting.factorization import blt_strategy as blt_strategy
from synthward.engine.accounting.factorization import expected_error as expected_error
from synthward.engine.accounting.matrix import Column, Strategy
from synthward.engine.errors import ConfigError


class NoiseSchedule(NamedTuple):
    """The terms of one step's noise; where step - j would be before the first step, tap j is left out already."""

    taps: tuple[float, ...]
    weights: tuple[float, ...] = ()
    decays: tuple[float, ...] = ()
    gains: tuple[float, ...] = ()


def noise_schedule(strategy: Strategy, step: int) -> NoiseSchedule:
    """What the noise of ``step`` (0 for the first of an instance) is made of.

    A banded strategy keeps the noise of its last ``bands`` - 1 steps in as many slots, of which slot step mod
    (``bands`` - 1) is written anew while the others stay (decay 1, gain 0). A blt strategy keeps one running sum for
    each buffer. A banded inverse keeps nothing.
    """
    _check_step(step)
    if strategy.kind == "banded_inverse":
        return NoiseSchedule(strategy.coefficients[: step + 1])
    if strategy.kind == "blt":
        return NoiseSchedule((1.0,), strategy.coefficients, strategy.decays, (1.0,) * len(strategy.decays))
    diagonal, *rest = strategy.coefficients
    slots = len(rest)
    # What a slot holds is as old as the step is far from it, going round; before the first round it holds nothing.
    ages = [(step - slot - 1) % slots + 1 for slot in range(slots)]
    written = [slot == step % slots for slot in range(slots)]
    return NoiseSchedule(
        (1.0 / diagonal,),
        tuple(rest[age - 1] / diagonal if age <= step else 0.0 for age in ages),
        tuple(0.0 if now else 1.0 for now in written),
        tuple(1.0 if now else 0.0 for now in written),
    )


def state_slots(strategy: Strategy) -> int:
    """How many arrays of the parameters' size the noise keeps from step to step."""
    return {"banded": len(strategy.coefficients) - 1, "blt": len(strategy.decays), "banded_inverse": 0}[
        strategy.kind
    ]


def noise_variance(strategy: Strategy, step: int) -> float:
    """The variance of ``step``'s noise where the white noise has variance 1: sum_(i<=step) d_i^2."""
    _check_step(step)
    # Lengths are powers of two, so that one series serves many steps.
    return float(_variances(strategy, max(64, 1 << step.bit_length()))[step])


@lru_cache(maxsize=8)
def _variances(strategy: Strategy, n: int) -> Column:
    return np.cumsum(strategy.inverse_column(n) ** 2)


def _check_step(step: int) -> None:
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ConfigError(f"step: got {step!r}; give a whole number of at least 0")
