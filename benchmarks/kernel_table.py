"""Every kernel against its floor and against plain torch: "kernels" in benchmarks/results/<machine>.json.

    python -m benchmarks.kernel_table [--passes 3] [--only EXPRESSION] [--quick] [--dry]

Runs `pytest benchmarks/kernels` on one thread, several times over. Within a pass the executors of one shape are
measured one after the other; the ratio to torch is the median over passes of kernel / torch in the same pass. The floor
is what the kernel's bytes or flops take at the machine's own rates (benchmarks/kernels/rates.py), of the same pass. If
any result is wrong, there is no table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import write_part

ROOT = Path(__file__).resolve().parent.parent

# Kernel, shape as text, executor.
Key = tuple[str, str, str]


def run_pass(options: list[str]) -> dict[str, Any]:
    """What pytest-benchmark measured in one run of the suites."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pass.json"
        # -P: with the root in its path, engine and kernels would be importable a second time.
        command = [sys.executable, "-P", "-m", "pytest", "benchmarks/kernels", "-q", "-p", "no:cacheprovider"]
        command += [f"--benchmark-json={file}", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{done.stdout}{done.stderr}\nbenchmarks.kernel_table: the benchmarks failed")
        measured: dict[str, Any] = json.loads(file.read_text())
    return measured


def rows_of(passes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each kernel, shape and executor, of medians over passes."""
    found = [{_key(b): b for b in one["benchmarks"]} for one in passes]
    rows = []
    for key in found[0]:
        own = [one[key] for one in found]
        infos = [b["extra_info"] for b in own]
        row = {name: infos[0][name] for name in ("kernel", "shape", "executor")}
        row["rounds"] = sum(b["stats"]["rounds"] for b in own)
        row["median_ms"] = 1e3 * statistics.median(_seconds(b) for b in own)
        row |= {
            name: statistics.median(info[name] for info in infos)
            for name in infos[0]
            if name.endswith("/s") or name in ("floor_ms", "over_floor")
        }
        if "floor" in infos[0]:
            row["floor"] = infos[0]["floor"]
        torch_key = (*key[:2], "torch")
        if key != torch_key and torch_key in found[0]:
            ratios = [_seconds(one[key]) / _seconds(one[torch_key]) for one in found]
            row |= {"over_torch": statistics.median(ratios), "over_torch_range": [min(ratios), max(ratios)]}
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """A line per kernel, shape and executor."""
    lines = [
        f"{'kernel':22} {'shape':54} {'executor':8} {'ms':>9} {'rate':>19} {'over floor':>10} {'over torch':>10}"
    ]
    for row in rows:
        rate = f"G{row['floor']}/s" if "floor" in row else next(name for name in row if name.endswith("/s"))
        ratios = (f"{row[name]:10.2f}" if name in row else " " * 10 for name in ("over_floor", "over_torch"))
        lines.append(
            f"{row['kernel']:22} {_text(row['shape']):54} {row['executor']:8} {row['median_ms']:9.3f} "
            f"{row[rate]:7.2f} {rate:>11} {' '.join(ratios)}"
        )
    return "\n".join(lines)


def _key(benchmark: dict[str, Any]) -> Key:
    info = benchmark["extra_info"]
    return info["kernel"], _text(info["shape"]), info["executor"]


def _text(shape: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in shape.items())


def _seconds(benchmark: dict[str, Any]) -> float:
    return float(benchmark["stats"]["median"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--only", help="a choice of benchmarks, as pytest's -k takes it")
    parser.add_argument("--quick", action="store_true", help="one shape of each, once: no figures to use")
    parser.add_argument("--dry", action="store_true", help="print only")
    arguments = parser.parse_args()
    options = (["--quick"] if arguments.quick else []) + (["-k", arguments.only] if arguments.only else [])
    passes = [run_pass(options) for _ in range(arguments.passes)]
    rows = rows_of(passes)
    print(table(rows))
    if not arguments.dry:
        rates = [one["rates"] for one in passes]
        result = {"passes": arguments.passes, "rates": rates, "rows": rows}
        print(write_part("kernels", result, machine=passes[0]["machine_info"]))


if __name__ == "__main__":
    main()
