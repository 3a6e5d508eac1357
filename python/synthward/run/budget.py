"""How a run's budget is divided, decided before any record is read.

Every privacy parameter (sampling rate, steps, noise of the query and of the steps) is a function of the
user's settings alone. Were one of them chosen from a noisy answer, the composition would be adaptive and
the PLD accountant's sum would not be valid for it (Feldman & Zrnic 2021, section 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from synthward.engine.accounting import Event, GaussianEvent, calibrate_noise, epsilon_of
from synthward.engine.accounting.calibrate import calibrate_noise_of
from synthward.engine.errors import ConfigError
from synthward.run.mechanism import Mechanism

# Share of epsilon that the histogram query would cost by itself; composed with the steps it costs far less.
QUERY_SHARE = 0.25


@dataclass(frozen=True)
class Budget:
    """Privacy parameters of a run; ``query_noise_multiplier`` and ``noise_multiplier`` meet ``epsilon``."""

    epsilon: float
    delta: float
    accountant: str
    sample_rate: float
    steps: int
    query_noise_multiplier: float
    noise_multiplier: float


def plan_budget(
    epsilon: float,
    delta: float,
    accountant: str,
    mechanism: Mechanism,
    steps: int,
    *,
    lost: tuple[Event, ...] = (),
) -> Budget:
    """Calibrate the query's noise to its share, then the steps' noise to what the whole may cost.

    `lost` are charges whose answers were never kept (the run was killed in between); they stay charged, and the
    steps get more noise for it. How many there are says nothing of any answer.
    """
    if not 0.0 < epsilon < float("inf"):
        raise ConfigError(f"epsilon: got {epsilon}; give a positive finite number, for example 3")
    if not 0.0 < delta < 1.0:
        raise ConfigError(f"delta: got {delta}; give a number between 0 and 1, well below 1 / patients")
    if steps < 1:
        raise ConfigError(f"steps: got {steps}; give a whole number of at least 1")
    return _plan(float(epsilon), float(delta), accountant, mechanism, int(steps), lost)


@lru_cache(maxsize=32)
def _plan(
    epsilon: float, delta: float, accountant: str, mechanism: Mechanism, steps: int, lost: tuple[Event, ...]
) -> Budget:
    query = calibrate_noise(QUERY_SHARE * epsilon, delta, 1.0, 1, accountant)
    charged = (*lost, GaussianEvent(noise_multiplier=query, count=1))
    if epsilon_of(charged, delta, accountant) > epsilon:
        again = f", {len(lost)} of which were paid for and lost; start a new run" if lost else ""
        raise ConfigError(
            f"epsilon: {epsilon} is too small for {len(charged)} query(s) at delta {delta}{again}"
        )
    noise = calibrate_noise_of(
        lambda multiplier: mechanism.event(multiplier, steps),
        epsilon,
        delta,
        accountant,
        other_events=charged,
    )
    return Budget(epsilon, delta, accountant, mechanism.sample_rate, steps, query, noise)
