"""Run folders made by hand: what ``fit`` would record, without a fit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from synthward.engine.accounting import Event, GaussianEvent, PoissonGaussianEvent
from synthward.engine.ledger import Ledger
from synthward.schema import Schema
from synthward.schema.load import parse_schema
from tests.tinydata import SCHEMA

QUERY = GaussianEvent(5.25, 1)
TRAINING = PoissonGaussianEvent(0.036, 1.3125, 40)
SEED = 739_182_645
NOISY_UNITS, NOISY_RECORDS = 4321.75, 8765.25


def tiny_schema() -> Schema:
    return parse_schema(SCHEMA)


def make_run(
    folder: Path,
    events: Sequence[Event] = (QUERY, TRAINING),
    *,
    private: bool = True,
    schema: Schema | None = None,
    delta: float = 1e-6,
    accountant: str = "rdp",
    target: float | None = 9.5,
    info: dict[str, Any] | None = None,
    encoder: bool = True,
) -> Path:
    """A finished run in ``folder`` whose ledger charges ``events``; ``info`` replaces fields of run.json."""
    schema = schema or tiny_schema()
    folder.mkdir(parents=True)
    unit = schema.unit or "row"
    with Ledger.create(
        folder / "ledger.jsonl",
        run_id="1234abcd",
        unit=unit,
        delta=delta,
        key_id="k" * 16,
        private=private,
        target_epsilon=target,
        accountant=accountant,
    ) as ledger:
        for event in events:
            ledger.append_event(event, note="12 one-way histograms" if event is QUERY else "")
    recorded = {
        "version": 1,
        "run_id": "1234abcd",
        "status": "complete",
        "created": "2026-11-25T12:00:00+00:00",
        "generator": "diffusion",
        "settings": {"hidden": 96},
        "unit": unit,
        "relation": "add_or_remove_one",
        "private": private,
        "holdout": {"fraction": 0.2, "salt": "tell-nobody"},
        "schema_fingerprint": schema.fingerprint(),
        "max_grad_norm": 0.75,
        "seed": None if private else SEED,
        "epsilon": target,
        "delta": delta,
        "accountant": accountant,
        "sample_rate": TRAINING.sample_rate,
        "steps": TRAINING.steps,
        "noise_multiplier": TRAINING.noise_multiplier,
        "query_noise_multiplier": QUERY.noise_multiplier,
    }
    (folder / "run.json").write_text(json.dumps(recorded | (info or {})))
    (folder / "schema.toml").write_text(schema.to_toml())
    if encoder:
        (folder / "encoder.json").write_text(json.dumps({"units": NOISY_UNITS, "records": NOISY_RECORDS}))
    return folder


def texts(value: Any) -> list[str]:
    """All texts in a nested JSON value, keys included."""
    if isinstance(value, dict):
        return [text for key, item in value.items() for text in (str(key), *texts(item))]
    if isinstance(value, list):
        return [text for item in value for text in texts(item)]
    return [value] if isinstance(value, str) else []
