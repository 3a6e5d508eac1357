"""The ground truth: every coefficient of the simulator in one place, as docs/simulator.md prints it.

Comorbidities form a directed graphical model: each is Bernoulli with a logit that is linear in its parents.
``age10`` is (age - 50) / 10; the others are 0 or 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

COMORBIDITIES = ("diabetes", "hypertension", "ckd", "heart_failure", "copd", "cancer")

#: Parents and weights of each comorbidity, in topological order.
DIAGRAM: dict[str, dict[str, float]] = {
    "diabetes": {"intercept": -2.0, "age10": 0.35, "obese": 1.1},
    "hypertension": {"intercept": -1.0, "age10": 0.55, "obese": 0.6, "diabetes": 0.7},
    "ckd": {"intercept": -3.4, "age10": 0.40, "diabetes": 1.0, "hypertension": 0.9},
    "heart_failure": {"intercept": -4.0, "age10": 0.60, "hypertension": 0.8, "diabetes": 0.5, "ckd": 0.9},
    "copd": {"intercept": -3.2, "age10": 0.30, "smoker": 1.9},
    "cancer": {"intercept": -3.2, "age10": 0.45, "smoker": 0.6},
}

#: Logit of readmission within 30 days of a visit.
OUTCOME: dict[str, float] = {
    "intercept": -3.35,
    "prior_visits": 0.30,  # per earlier visit, six at the most
    "heart_failure": 0.9,
    "ckd": 0.6,
    "copd": 0.6,
    "cancer": 0.8,
    "age10": 0.10,
    "emergency": 0.6,
    "high_creatinine": 0.6,  # above 1.8 mg/dL, measured or not
    "low_haemoglobin": 0.6,  # below 10.5 g/dL, measured or not
    "insulin_changed": 0.4,
}


def sigmoid(logit: Floats) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-logit)))


def logit_of(weights: Mapping[str, float], values: Mapping[str, Floats]) -> Floats:
    """Intercept plus the weighted sum of the parents' values."""
    total = np.asarray(weights["intercept"], dtype=np.float64)
    for name, weight in weights.items():
        if name != "intercept":
            total = total + weight * np.asarray(values[name], dtype=np.float64)
    return total


def outcome_probability(features: Mapping[str, Floats]) -> Floats:
    """True probability of readmission, [rows], from the features that `OUTCOME` names."""
    return sigmoid(logit_of(OUTCOME, {**features, "prior_visits": np.minimum(features["prior_visits"], 6.0)}))
