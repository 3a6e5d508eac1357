"""Patients: demographics, and comorbidities drawn from the graphical model."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from synthward.simulate.truth import COMORBIDITIES, DIAGRAM, Floats, logit_of, sigmoid

REGIONS = ("north", "east", "south", "west")
INSURANCE = ("public", "private", "none")
SMOKING = ("never", "former", "current")

Patients = dict[str, NDArray[np.generic]]


def draw_patients(rng: np.random.Generator, count: int) -> dict[str, NDArray[np.float64]]:
    """Columns of ``count`` patients, float64 [count]; categories as their index."""
    young = rng.random(count) < 0.35
    age = np.where(young, rng.normal(38, 11, count), rng.normal(68, 12, count))
    age = np.clip(np.rint(age), 18, 100)
    sex = (rng.random(count) < 0.47).astype(np.float64)  # 1 is male
    smoking = np.searchsorted([0.55, 0.82], rng.random(count)).astype(np.float64)
    bmi = np.clip(rng.normal(27.0 + 0.02 * (age - 50), 5.2, count), 14.0, 65.0)
    region = np.searchsorted([0.4, 0.65, 0.85], rng.random(count)).astype(np.float64)
    public = sigmoid(-0.6 + 0.09 * (age - 62))
    drawn = rng.random(count)
    insurance = np.where(drawn < public, 0.0, np.where(drawn < public + 0.85 * (1 - public), 1.0, 2.0))
    patients = {
        "age": age,
        "sex": sex,
        "smoking": smoking,
        "bmi": bmi,
        "region": region,
        "insurance": insurance,
    }
    values = parents_of(age, smoking == 2, bmi >= 30.0)
    for name in COMORBIDITIES:
        chance = sigmoid(logit_of(DIAGRAM[name], values))
        values[name] = (rng.random(count) < chance).astype(np.float64)
        patients[name] = values[name]
    return patients


def parents_of(age: Floats, smoker: NDArray[np.bool_], obese: NDArray[np.bool_]) -> dict[str, Floats]:
    """What the roots of the graphical model look like to its nodes."""
    return {
        "age10": (np.asarray(age, dtype=np.float64) - 50.0) / 10.0,
        "smoker": np.asarray(smoker, dtype=np.float64),
        "obese": np.asarray(obese, dtype=np.float64),
    }


def comorbidity_probability(
    age: Floats, smoker: NDArray[np.bool_], obese: NDArray[np.bool_]
) -> dict[str, Floats]:
    """Exact marginal probability of each comorbidity given the roots, by enumeration of all 64 states."""
    roots = parents_of(age, smoker, obese)
    result = {name: np.zeros_like(roots["age10"]) for name in COMORBIDITIES}
    for state in itertools.product((0.0, 1.0), repeat=len(COMORBIDITIES)):
        values = {
            **roots,
            **{n: np.full_like(roots["age10"], s) for n, s in zip(COMORBIDITIES, state, strict=True)},
        }
        weight = np.ones_like(roots["age10"])
        for name, present in zip(COMORBIDITIES, state, strict=True):
            chance = sigmoid(logit_of(DIAGRAM[name], values))
            weight = weight * (chance if present else 1.0 - chance)
        for name, present in zip(COMORBIDITIES, state, strict=True):
            result[name] = result[name] + present * weight
    return result
