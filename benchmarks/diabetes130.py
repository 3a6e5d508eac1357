"""The whole job on real records: fit, sample, evaluate on diabetes130, for both table generators.

Reads the records from ``shared/data`` (``SYNTHWARD_SHARED`` or ``../shared`` beside the checkout). The unit is the
patient; a fifth of the patients is held out and never seen by the generators. Figures printed here compare
with real records: they are for whoever holds those, and are not covered by epsilon.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import write_result
from synthward.data import Records, read_records, split_records
from synthward.engine.accounting import epsilon_of
from synthward.evaluate import evaluate_records
from synthward.evaluate.result import plain
from synthward.run import FitOptions, fit_run, sample_run
from synthward.schema import load_schema

SCHEMA = Path(__file__).parent / "schemas" / "diabetes130.toml"


def records_path() -> Path:
    """The records' file; exits with one line when it is not there."""
    shared = Path(os.environ.get("SYNTHWARD_SHARED", Path(__file__).parents[2] / "shared"))
    file = shared / "data" / "diabetes130" / "diabetic_data.csv.gz"
    if not file.is_file():
        raise SystemExit(f"{file}: not here; set SYNTHWARD_SHARED to the folder that holds data/diabetes130")
    return file


def run_job(
    records: Records, data: Path, options: FitOptions, epsilon: float, delta: float, out: Path
) -> dict[str, Any]:
    """One generator's figures and times."""
    schema = records.schema
    begin = time.perf_counter()
    folder = fit_run(data, schema, epsilon=epsilon, delta=delta, out=out, options=options)
    fitted = time.perf_counter()
    cohort = out / "cohort.parquet"
    facts = sample_run(out, None, cohort)
    sampled = time.perf_counter()
    holdout = folder.info["holdout"]
    train, held = split_records(records, holdout_fraction=holdout["fraction"], salt=holdout["salt"])
    synthetic = read_records(cohort, schema.cohort())
    with folder.open_ledger() as ledger:
        spent = epsilon_of(ledger.events(), delta, folder.info["accountant"])
    evaluated = time.perf_counter()
    privacy = {"epsilon": spent, "delta": delta, "unit": schema.unit, "private": True}
    result = evaluate_records(schema, train, held, synthetic, privacy=privacy, settings={}, epsilon_curve=[])
    compared = result.comparison
    assert compared is not None
    return {
        "epsilon_spent": spent,
        "delta": delta,
        "plan": {
            k: folder.info[k] for k in ("sample_rate", "noise_multiplier", "query_noise_multiplier", "steps")
        },
        "settings": folder.info["settings"],
        "rows_sampled": facts["rows"],
        "columns": len(schema.modelled),
        "seconds": {
            "fit": round(fitted - begin, 1),
            "sample": round(sampled - fitted, 1),
            "evaluate": round(time.perf_counter() - evaluated, 1),
        },
        "mean_two_way_tv": compared.pairs.mean,
        "mean_two_way_tv_heldout_real": compared.pairs_floor.mean,
        "utility": plain(compared.utility),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epsilon", type=float, default=3.0)
    parser.add_argument("--delta", type=float, default=1e-6)
    parser.add_argument("--generators", default="diffusion,gan")
    parser.add_argument("--steps", type=int, default=FitOptions.steps)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--dry", action="store_true", help="print only; write no result")
    options = parser.parse_args()
    data = records_path()
    records = read_records(data, load_schema(SCHEMA))
    results = {}
    for name in options.generators.split(","):
        settings = dict(pair.split("=", 1) for pair in options.set)
        fit = FitOptions(generator=name, steps=options.steps, settings=settings)
        with tempfile.TemporaryDirectory() as folder:
            results[name] = run_job(records, data, fit, options.epsilon, options.delta, Path(folder) / "run")
        print(name, results[name])
    if not options.dry:
        print(write_result("diabetes130", {"generators": results}))


if __name__ == "__main__":
    main()
