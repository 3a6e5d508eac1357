"""Epsilon of a mechanism that is not run, or the noise, rate or steps that a target epsilon allows."""

from __future__ import annotations

from typing import Any

from synthward.engine.accounting import (
    PoissonGaussianEvent,
    calibrate_noise,
    calibrate_sample_rate,
    calibrate_steps,
    epsilon_of,
)
from synthward.engine.accounting.events import (
    check_delta,
    check_epsilon,
    check_noise_multiplier,
    check_sample_rate,
    check_steps,
)
from synthward.engine.errors import ConfigError


def account(
    noise_multiplier: float | None = None,
    sample_rate: float | None = None,
    steps: int | None = None,
    *,
    delta: float,
    target_epsilon: float | None = None,
    accountant: str = "pld",
) -> dict[str, Any]:
    """Account for DP-SGD over Poisson samples, neighbours one unit added or removed.

    Args:
        noise_multiplier, sample_rate, steps: all three, or all but the one that is solved for.
        delta: failure probability.
        target_epsilon: solve for the missing one; what is found meets the target from below.
        accountant: "pld", "rdp" or "prv".

    Returns:
        epsilon, delta, noise_multiplier, sample_rate, steps, accountant.

    Raises:
        ConfigError: an option is missing, superfluous or no mechanism.
    """
    given = {"noise-multiplier": noise_multiplier, "sample-rate": sample_rate, "steps": steps}
    missing = [name for name, value in given.items() if value is None]
    _check(noise_multiplier, sample_rate, steps, delta)
    if target_epsilon is None:
        if missing:
            raise ConfigError(f"--{missing[0]}: is missing; give it, or --target-epsilon to solve for it")
    else:
        check_epsilon(target_epsilon)
        if len(missing) != 1:
            what = ", ".join(f"--{name}" for name in missing) or "none"
            raise ConfigError(
                "--target-epsilon: solves for exactly one of --noise-multiplier, --sample-rate and --steps; "
                f"left out: {what}"
            )
        if noise_multiplier is None:
            assert sample_rate is not None and steps is not None
            noise_multiplier = calibrate_noise(target_epsilon, delta, sample_rate, steps, accountant)
        elif sample_rate is None:
            assert steps is not None
            sample_rate = calibrate_sample_rate(target_epsilon, delta, noise_multiplier, steps, accountant)
        else:
            steps = calibrate_steps(target_epsilon, delta, sample_rate, noise_multiplier, accountant)
    assert noise_multiplier is not None and sample_rate is not None and steps is not None
    event = PoissonGaussianEvent(sample_rate, noise_multiplier, steps)
    return {
        "epsilon": epsilon_of([event], delta, accountant),
        "delta": delta,
        "noise_multiplier": noise_multiplier,
        "sample_rate": sample_rate,
        "steps": steps,
        "accountant": accountant,
    }


def _check(
    noise_multiplier: float | None, sample_rate: float | None, steps: int | None, delta: float
) -> None:
    check_delta(delta)
    if noise_multiplier is not None:
        check_noise_multiplier(noise_multiplier)
    if sample_rate is not None:
        check_sample_rate(sample_rate)
    if steps is not None:
        check_steps(steps)
