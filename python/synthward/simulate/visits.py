"""Visits of patients over time: diagnosis, medication, laboratory values, missing values, outcome."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from synthward.simulate.truth import COMORBIDITIES, Floats, outcome_probability, sigmoid

MAX_VISITS = 20
FIRST_DAY, LAST_DAY = np.datetime64("2015-01-01"), np.datetime64("2020-12-31")
ADMISSION = ("elective", "urgent", "emergency")
INSULIN = ("none", "steady", "changed")
#: ICD-9 categories; the first six belong to the comorbidities in their order, the rest to everybody.
DIAGNOSES = (
    "250",
    "401",
    "585",
    "428",
    "491",
    "162",
    "414",
    "410",
    "427",
    "486",
    "599",
    "715",
    "786",
    "820",
    "276",
    "650",
)


def draw_visits(rng: np.random.Generator, patients: dict[str, Floats]) -> dict[str, Floats]:
    """All visits of a block of patients, ordered by patient and time, float64 [visits].

    ``patient`` is the row of the patient in the block. Values that were not measured are NaN.
    """
    count = len(patients["age"])
    severity = sum(patients[name] for name in COMORBIDITIES) + np.zeros(count)
    visits = 1 + np.minimum(rng.poisson(0.25 + 0.38 * severity), MAX_VISITS - 1)
    span = int((LAST_DAY - FIRST_DAY).astype(int))
    free_from = rng.uniform(0, 0.7 * span, count)
    parts: list[dict[str, Floats]] = []
    for number in range(int(visits.max(initial=0))):
        active = np.flatnonzero((visits > number) & (free_from < span - 40))
        if not len(active):
            break
        visit = _draw_visit(rng, {k: v[active] for k, v in patients.items()}, severity[active], number)
        visit["patient"] = active.astype(np.float64)
        visit["admission"] = np.floor(free_from[active])
        visit["discharge"] = visit["admission"] + visit.pop("stay")
        soon = visit["readmitted"] > 0
        gap = np.where(soon, rng.uniform(1, 30, len(active)), 31 + rng.exponential(170.0, len(active)))
        free_from[active] = visit["discharge"] + gap
        parts.append(visit)
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort((joined["prior_visits"], joined["patient"]))
    return {name: values[order] for name, values in joined.items()}


def _draw_visit(
    rng: np.random.Generator, p: dict[str, Floats], severity: Floats, number: int
) -> dict[str, Floats]:
    rows = len(severity)
    age10 = (p["age"] - 50.0) / 10.0
    emergency = sigmoid(-0.9 + 0.25 * severity + 0.1 * age10)
    drawn = rng.random(rows)
    admission = np.where(
        drawn < emergency, 2.0, np.where(drawn < emergency + 0.5 * (1 - emergency), 1.0, 0.0)
    )
    stay = np.minimum(1 + rng.geometric(1.0 / (2.0 + 0.7 * severity)), 35).astype(np.float64)
    fertile = (p["sex"] == 0) & (p["age"] >= 18) & (p["age"] <= 45)
    pregnant = (fertile & (rng.random(rows) < 0.10)).astype(np.float64)
    insulin = np.where((p["diabetes"] > 0) & (rng.random(rows) < 0.6), 1.0 + (rng.random(rows) < 0.35), 0.0)
    medications = np.minimum(rng.poisson(3.0 + 2.4 * severity), 40).astype(np.float64)
    labs = _draw_labs(rng, p, age10, severity)
    chance = outcome_probability(
        {
            "prior_visits": np.full(rows, float(number)),
            **{name: p[name] for name in ("heart_failure", "ckd", "copd", "cancer")},
            "age10": age10,
            "emergency": (admission == 2).astype(np.float64),
            "high_creatinine": (labs["creatinine"] > 1.8).astype(np.float64),
            "low_haemoglobin": (labs["haemoglobin"] < 10.5).astype(np.float64),
            "insulin_changed": (insulin == 2).astype(np.float64),
        }
    )
    visit = {
        "prior_visits": np.full(rows, float(number)),
        "admission_type": admission,
        "stay": stay,
        "diagnosis": _draw_diagnosis(rng, p, pregnant),
        "pregnant": pregnant,
        "insulin": insulin,
        "medications": medications,
        "outcome_chance": chance,
        "readmitted": (rng.random(rows) < chance).astype(np.float64),
        **_hide_labs(rng, labs, p, severity, admission),
    }
    return visit


def _draw_labs(
    rng: np.random.Generator, p: dict[str, Floats], age10: Floats, severity: Floats
) -> dict[str, Floats]:
    """True values, whether they are measured or not."""
    rows = len(severity)
    sugar = 5.4 + 1.9 * p["diabetes"] + rng.gamma(2.0, 0.25 + 0.45 * p["diabetes"], rows) - 0.5
    kidney = np.exp(rng.normal(-0.1 + 0.04 * age10 + 0.75 * p["ckd"] + 0.12 * p["sex"], 0.28, rows))
    blood = rng.normal(13.4 + 1.3 * p["sex"] - 1.1 * p["ckd"] - 1.3 * p["cancer"] - 0.15 * age10, 1.5, rows)
    pressure = rng.normal(122 + 14 * p["hypertension"] + 2.0 * age10, 15, rows)
    return {
        "hba1c": np.clip(np.round(sugar, 1), 3.5, 18.0),
        "creatinine": np.clip(np.round(kidney, 2), 0.2, 12.0),
        "haemoglobin": np.clip(np.round(blood, 1), 4.0, 20.0),
        "systolic_bp": np.clip(np.rint(pressure), 70, 230),
    }


def _hide_labs(
    rng: np.random.Generator,
    labs: dict[str, Floats],
    p: dict[str, Floats],
    severity: Floats,
    admission: Floats,
) -> dict[str, Floats]:
    """Not missing at random: who is sicker, older or abnormal is measured more often."""
    rows = len(severity)
    chance = {
        "hba1c": sigmoid(-1.2 + 2.2 * p["diabetes"] + 0.25 * (labs["hba1c"] - 6.0)),
        "creatinine": sigmoid(0.6 + 0.5 * severity + 0.5 * (admission == 2)),
        "haemoglobin": sigmoid(0.9 + 0.4 * severity - 0.15 * (labs["haemoglobin"] - 13.0)),
        "systolic_bp": np.full(rows, 0.97),
    }
    return {name: np.where(rng.random(rows) < chance[name], labs[name], np.nan) for name in labs}


def _draw_diagnosis(rng: np.random.Generator, p: dict[str, Floats], pregnant: Floats) -> Floats:
    """Index into `DIAGNOSES`: own comorbidities weigh more, deliveries are for the pregnant."""
    rows = len(pregnant)
    weights = np.tile([0.02] * 6 + [0.5, 0.25, 0.4, 0.6, 0.5, 0.5, 1.2, 0.15, 0.4, 0.0], (rows, 1))
    own = np.stack([p[name] for name in COMORBIDITIES], axis=1)
    weights[:, :6] += own * np.array([0.9, 0.4, 0.9, 2.2, 1.6, 2.0])
    weights[:, 6:9] *= np.exp(0.3 * (p["age"] - 50.0) / 10.0)[:, None]
    weights[:, 13] *= np.exp(0.6 * (p["age"] - 60.0) / 10.0)
    weights[:, 15] += 6.0 * pregnant
    cumulative = np.cumsum(weights, axis=1)
    target = rng.random(rows) * cumulative[:, -1]
    return np.asarray((cumulative <= target[:, None]).sum(axis=1), dtype=np.float64)


def to_days(days: Floats) -> NDArray[np.datetime64]:
    """Days since the first day as dates."""
    return FIRST_DAY + days.astype("timedelta64[D]")
