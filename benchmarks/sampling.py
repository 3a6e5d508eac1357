"""Rows per second and peak memory of `synthward sample`, all included, from a generator trained on diabetes130.

    python -m benchmarks.sampling [--run RUN] [--long] [--peer PYTHON]

Without a run, one of 60 steps is trained first: rows cost the same however good they are. Each measurement is the
command in a process of its own, its start included; `start_seconds` is what it takes for a hundred rows. `--long`
makes 10,000,000 rows instead, or as many as it is given, once. `--peer` is the interpreter of an environment that has
the package ctgan (not free software, hence in no environment of ours): its sampler is measured on the same columns
after one epoch on 20,000 records, in its own process, without its start.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.diabetes130 import SCHEMA, records_path
from benchmarks.machine import write_result

START_ROWS, ROWS, LONG_ROWS = 100, 100_000, 10_000_000
GOAL = 1_000_000 / 60
PEER_RECORDS, PEER_ROWS = 20_000, 50_000

PEER = """
import json, os, sys, time
import pandas, torch
from ctgan import CTGAN
from importlib.metadata import version
table = pandas.read_csv(sys.argv[1], nrows=int(sys.argv[2]), usecols=json.loads(sys.argv[4]), dtype=str)
discrete = [name for name in table if name not in json.loads(sys.argv[5])]
table = table.fillna("?").astype({name: float for name in table if name not in discrete})
if os.path.exists(sys.argv[6]):
    model = CTGAN.load(sys.argv[6])
else:
    model = CTGAN(epochs=1, enable_gpu=False)
    model.fit(table, discrete)
    model.save(sys.argv[6])
model.sample(1000)
begin = time.perf_counter()
rows = len(model.sample(int(sys.argv[3])))
seconds = time.perf_counter() - begin
print(json.dumps({"version": version("ctgan"), "rows": rows, "seconds": seconds, "columns": table.shape[1],
                  "rows_per_second": rows / seconds, "threads": torch.get_num_threads()}))
"""


def train(out: Path) -> Path:
    """A short run of the default generator."""
    options = ["--epsilon", "3", "--delta", "1e-6", "--steps", "60", "--out", str(out)]
    command = [
        sys.executable,
        "-m",
        "synthward",
        "fit",
        str(records_path()),
        "--schema",
        str(SCHEMA),
        *options,
    ]
    subprocess.run(command, check=True)
    return out


def measure(run: Path, rows: int) -> dict[str, Any]:
    """Wall time, rate and peak resident memory of one command."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "cohort.parquet"
        command = [
            "-m",
            "synthward",
            "sample",
            str(run),
            "--rows",
            str(rows),
            "--out",
            str(out),
            "--seed",
            "1",
        ]
        begin = time.perf_counter()
        process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        if status:
            raise SystemExit(f"synthward sample failed with status {status}")
        return {
            "rows": rows,
            "seconds": round(seconds, 2),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
            "rows_per_second": round(rows / seconds),
            "peak_mib": round(usage.ru_maxrss / 1024),
            "file_mib": round(out.stat().st_size / 2**20, 1),
        }


def measure_peer(interpreter: Path, model: Path) -> dict[str, Any]:
    """The sampler of CTGAN (Xu et al. 2019) after a fit without privacy, whose model is kept in a file."""
    from synthward.schema import load_schema

    columns = load_schema(SCHEMA).modelled
    numeric = [column.name for column in columns if column.kind in ("integer", "continuous")]
    arguments = [str(records_path()), str(PEER_RECORDS), str(PEER_ROWS)]
    arguments += [json.dumps([column.name for column in columns]), json.dumps(numeric), str(model)]
    done = subprocess.run(
        [interpreter, "-c", PEER, *arguments], check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_rates(run: Path, repeats: int) -> dict[str, Any]:
    """The best of several runs, and every one of them."""
    start = min((measure(run, START_ROWS) for _ in range(repeats)), key=lambda m: m["seconds"])
    made = [measure(run, ROWS) for _ in range(repeats)]
    best = min(made, key=lambda m: m["seconds"])
    return {
        "goal_rows_per_second": round(GOAL),
        "rows_per_second": best["rows_per_second"],
        "start_seconds": start["seconds"],
        "rows_per_second_after_start": round(ROWS / (best["seconds"] - start["seconds"])),
        "peak_mib": max(m["peak_mib"] for m in made),
        "measured": made,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="a folder of `synthward fit`; else one is trained")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--long", type=int, nargs="?", const=LONG_ROWS, help="measure so many rows instead, once"
    )
    parser.add_argument(
        "--peer", type=Path, metavar="PYTHON", help="measure ctgan in this environment instead"
    )
    parser.add_argument(
        "--peer-model", type=Path, help="keep the peer's model here, or take it if it is there"
    )
    parser.add_argument("--dry", action="store_true", help="print only; write no result")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.peer:
            model = options.peer_model or Path(folder) / "model.pkl"
            name, result = "sampling_ctgan", measure_peer(options.peer, model)
        else:
            run = options.run or train(Path(folder) / "run")
            name = "sampling_long" if options.long else "sampling"
            result = measure(run, options.long) if options.long else measure_rates(run, options.repeats)
    print(json.dumps(result, indent=1))
    if not options.dry:
        print(write_result(name, result))


if __name__ == "__main__":
    main()
