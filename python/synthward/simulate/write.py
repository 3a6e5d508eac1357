"""Simulated records as Arrow batches and files: streamed, seeded, the same prefix for any number of patients."""

from __future__ import annotations

import contextlib
import gzip
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from synthward.engine.errors import ConfigError, OutputError
from synthward.engine.files import sync_file
from synthward.progress import NullProgress, Progress
from synthward.schema import Schema, load_schema
from synthward.simulate.patients import INSURANCE, REGIONS, SMOKING, draw_patients
from synthward.simulate.truth import COMORBIDITIES, Floats
from synthward.simulate.visits import ADMISSION, DIAGNOSES, INSULIN, draw_visits, to_days

BLOCK_PATIENTS = 8192
SIMULATION_SCHEMA_TOML = Path(str(files("synthward.simulate").joinpath("hospital.toml")))
_SUFFIXES = (".csv", ".csv.gz", ".parquet")


def simulation_schema() -> Schema:
    """The declared schema of simulated records."""
    return load_schema(SIMULATION_SCHEMA_TOML)


def simulate_batches(patients: int, seed: int = 1) -> Iterator[pa.RecordBatch]:
    """Visits of ``patients`` invented patients, one batch per block of 8,192 patients.

    A patient depends on (seed, its number) alone: more patients only add rows.

    Raises:
        ConfigError: fewer than one patient, or a negative seed.
    """
    if patients < 1:
        raise ConfigError(f"patients: got {patients}; give a whole number of at least 1")
    if seed < 0:
        raise ConfigError(f"seed: got {seed}; give a whole number of at least 0")
    for block in range(-(-patients // BLOCK_PATIENTS)):
        rng = np.random.Generator(np.random.Philox(key=[seed, block]))
        people = draw_patients(rng, BLOCK_PATIENTS)
        visits = draw_visits(rng, people)
        wanted = min(BLOCK_PATIENTS, patients - block * BLOCK_PATIENTS)
        keep = visits["patient"] < wanted
        yield _batch(people, {k: v[keep] for k, v in visits.items()}, block * BLOCK_PATIENTS)


def write_simulation(
    out: Path, patients: int, seed: int = 1, *, overwrite: bool = False, progress: Progress | None = None
) -> int:
    """Write simulated records to .csv, .csv.gz or .parquet in constant memory; returns the number of rows.

    Raises:
        OutputError: the path exists (without ``overwrite``), has another suffix, or can not be written.
    """
    out = Path(out)
    if not out.name.endswith(_SUFFIXES):
        raise OutputError(f"{out}: records are written as {', '.join(_SUFFIXES)}")
    if out.exists() and not overwrite:
        raise OutputError(f"{out}: exists already: give another path or --overwrite")
    temporary = out.with_name(f".{out.name}.partial")
    task = (progress or NullProgress()).task("simulate", patients)
    rows, done = 0, 0
    try:
        task.advance(0)
        with _open_writer(temporary, out.name) as writer:
            for batch in simulate_batches(patients, seed):
                writer.write_batch(batch)
                rows += batch.num_rows
                task.advance(min(BLOCK_PATIENTS, patients - done))
                done += BLOCK_PATIENTS
        temporary.replace(out)
    except OSError as error:
        raise OutputError(f"{out}: can not be written ({error.strerror or error})") from None
    finally:
        task.close()
        temporary.unlink(missing_ok=True)
    return rows


@contextlib.contextmanager
def _open_writer(path: Path, name: str) -> Iterator[Any]:
    schema = next(iter(simulate_batches(1, 0))).schema
    with path.open("wb") as file:
        if name.endswith(".parquet"):
            with pq.ParquetWriter(file, schema) as writer:
                yield writer
        else:
            with _compressed(file, name) as target, csv.CSVWriter(target, schema) as writer:
                yield writer
        sync_file(file)


@contextlib.contextmanager
def _compressed(file: IO[bytes], name: str) -> Iterator[Any]:
    if not name.endswith(".gz"):
        yield file
        return
    with gzip.GzipFile(fileobj=file, mode="wb", mtime=0) as packed:
        yield packed


def _batch(people: dict[str, Floats], visits: dict[str, Floats], first_patient: int) -> pa.RecordBatch:
    row = visits["patient"].astype(np.int64)
    number = row + first_patient
    columns: dict[str, pa.Array] = {
        "patient_id": _texts("p", number),
        "visit_id": pa.array(
            [f"v{p}-{k}" for p, k in zip(number, visits["prior_visits"].astype(int), strict=True)]
        ),
        "age": _integers(people["age"][row]),
        "sex": _labels(("F", "M"), people["sex"][row]),
        "region": _labels(REGIONS, people["region"][row]),
        "insurance": _labels(INSURANCE, people["insurance"][row]),
        "smoking": _labels(SMOKING, people["smoking"][row]),
        "bmi": _measured(np.round(people["bmi"][row], 1)),
        **{name: pa.array(people[name][row] > 0) for name in COMORBIDITIES},
        "pregnant": pa.array(visits["pregnant"] > 0),
        "admission_date": pa.array(to_days(visits["admission"])),
        "discharge_date": pa.array(to_days(visits["discharge"])),
        "admission_type": _labels(ADMISSION, visits["admission_type"]),
        "prior_visits": _integers(visits["prior_visits"]),
        "diagnosis": _labels(DIAGNOSES, visits["diagnosis"]),
        "medications": _integers(visits["medications"]),
        "insulin": _labels(INSULIN, visits["insulin"]),
        "hba1c": _measured(visits["hba1c"]),
        "creatinine": _measured(visits["creatinine"]),
        "haemoglobin": _measured(visits["haemoglobin"]),
        "systolic_bp": _measured(visits["systolic_bp"]),
        "readmitted_30d": pa.array(visits["readmitted"] > 0),
    }
    return pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))


def _texts(prefix: str, numbers: NDArray[np.int64]) -> pa.Array:
    return pa.array([f"{prefix}{n}" for n in numbers])


def _integers(values: Floats) -> pa.Array:
    return pa.array(values.astype(np.int64))


def _labels(names: tuple[str, ...], index: Floats) -> pa.Array:
    return pa.array(np.array(names, dtype=object)[index.astype(np.int64)])


def _measured(values: Floats) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))
