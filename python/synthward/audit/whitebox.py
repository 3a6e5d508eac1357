"""The checks that need no records: the engine's own step under a run's plan, held against what the plan claims."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from synthward.audit.bounds import (
    best_one_run,
    clopper_pearson_epsilon,
    f_dp_epsilon,
    gaussian_epsilon,
    one_run_epsilon,
)
from synthward.audit.canaries import CANARIES, CanaryRun, run_canaries, run_full_participation
from synthward.audit.law import COORDINATES, DEVIATIONS, LEAST_P, run_law_test
from synthward.engine import KeySchedule, PrivacyPlan
from synthward.engine.accounting import epsilon_of
from synthward.engine.errors import ConfigError

#: Of the lower bounds that are shown.
SIGNIFICANCE = 0.05
#: Of the bound that decides whether a check passes: a sound engine fails one audit in a million.
GATE = 1e-6
# Steps of the plan that are audited with their sampling; more of them say no more about the engine.
MOST_STEPS = 300
# Below it the PLD takes seconds and gigabytes.
_LEAST_PLD_NOISE = 0.3


@dataclass(frozen=True)
class Check:
    """One line of an audit.

    Attributes:
        name: what was checked. lower_bound: on epsilon, at 95 % confidence. claimed: the epsilon that it is held
            against. passed: None for what is reported and never decides.
        from_records: whether real records were used; such a figure is for their custodian's eyes only.
        details: everything else that was found.
    """

    name: str
    lower_bound: float | None
    claimed: float | None
    passed: bool | None
    from_records: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "lower_bound": self.lower_bound,
            "claimed": self.claimed,
            "passed": self.passed,
            "releasable": not self.from_records,
            "from_records": self.from_records,
            **self.details,
        }


def audit_step(
    plan: PrivacyPlan,
    delta: float,
    keys: KeySchedule | None = None,
    *,
    canaries: int = CANARIES,
    coordinates: int = COORDINATES,
    steps: int = MOST_STEPS,
    progress: Callable[[str], None] | None = None,
) -> list[Check]:
    """The white-box checks of a plan: law of the noise, canaries in every step, canaries as the sampler draws them.

    Args:
        plan: of the run. delta: of its claim. keys: of the audit; fresh ones from the operating system by default.
        canaries: more of them catch smaller faults. coordinates: of the noise whose law is tested.
        steps: of the plan that are audited with sampling.

    Raises:
        ConfigError: the plan has no noise, so that it claims nothing.
    """
    if plan.noise_multiplier == 0.0:
        raise ConfigError(
            "audit: the run has no noise, so that its epsilon is infinite and nothing can exceed it"
        )
    keys, say = keys or KeySchedule.from_os(), progress or (lambda name: None)
    say("law of the noise")
    checks = [_law(plan, keys, coordinates)]
    say("canaries in every step")
    checks.append(_canaries("canaries in every step", run_full_participation(plan, keys, canaries), delta))
    say("sampled canaries")
    part = replace(plan, steps=min(plan.steps, steps))
    if part.steps:
        checks.append(_canaries("sampled canaries", run_canaries(part, keys, canaries), delta))
    return checks


def _law(plan: PrivacyPlan, keys: KeySchedule, coordinates: int) -> Check:
    found = run_law_test(plan, keys, coordinates)
    details = {
        "noise_over_claim": found.std_ratio,
        "tolerance": found.std_tolerance,
        "deviations": DEVIATIONS,
        "p_values": found.p_values,
        "least_p_value": LEAST_P,
    }
    return Check("law of the noise", None, None, found.passed, details=details)


def _canaries(name: str, run: CanaryRun, delta: float) -> Check:
    """Bounds from a run's scores, beside the epsilon of exactly the steps that were taken."""
    claimed = _claim(run.plan, delta)
    bits, scores = run.included, run.scores
    lower = gaussian_epsilon(bits, scores, delta, SIGNIFICANCE)
    gate = gaussian_epsilon(bits, scores, delta, GATE)
    rng = np.random.default_rng(len(scores))
    details = {
        "confidence": 1.0 - SIGNIFICANCE,
        "gate": gate,
        "gate_significance": GATE,
        "canaries": len(scores),
        "steps": run.plan.steps,
        "sample_rate": run.plan.sample_rate,
        "one_run": best_one_run(bits, scores, delta, SIGNIFICANCE, bound=one_run_epsilon),
        "one_run_f_dp": best_one_run(bits, scores, delta, SIGNIFICANCE, bound=f_dp_epsilon),
        "clopper_pearson": clopper_pearson_epsilon(bits, scores, delta, SIGNIFICANCE, rng),
    }
    return Check(name, lower, claimed, gate <= claimed, details=details)


def _claim(plan: PrivacyPlan, delta: float) -> float:
    # The least valid claim there is: an accountant that claims more would let more pass.
    rounds = plan.steps if plan.sample_rate == 1.0 else 1
    kind = "pld" if plan.noise_multiplier / math.sqrt(max(rounds, 1)) >= _LEAST_PLD_NOISE else "rdp"
    return float(epsilon_of([plan.event()], delta, kind))
