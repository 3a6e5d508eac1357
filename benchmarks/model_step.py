"""Whole steps of five models: plain PyTorch, this engine, Opacus: "steps" in benchmarks/results/<machine>.json.

    python -m benchmarks.model_step [--models gan,mlp] [--variants ...] [--seconds 20]

Each variant runs in a process of its own, as a user would run it; the processes take turns, one step each a round in an
order of its own, so that a machine whose speed drifts slows all of them. The ratio is the median over rounds of
variant / plain in the same round. Peak memory is that of the process over what it held before the network was built.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks.machine import write_part
from benchmarks.models import WORKLOADS
from benchmarks.steps import VARIANTS

PLAIN = "plain"


class Worker:
    """A variant of a step, in its own process."""

    def __init__(self, model: str, variant: str) -> None:
        command = [sys.executable, "-m", "benchmarks.worker", model, variant]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._line() != "ready":
            raise RuntimeError(f"{model}, {variant}: did not start")

    def step(self) -> float:
        """Seconds of one step."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._line())

    def end(self) -> int:
        """Peak memory in bytes."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        peak = json.loads(self._line())["peak_bytes"]
        self._process.wait()
        return int(peak)

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process ended: exit code " + str(self._process.wait()))
        return line.strip()


def measure(model: str, variants: list[str], seconds: float, rounds: int) -> dict[str, Any]:
    """Times, ratios and peaks of one model's variants."""
    workers, failed = {}, {}
    for variant in variants:
        try:
            workers[variant] = Worker(model, variant)
        except RuntimeError as error:
            failed[variant] = {"failed": str(error)}
    times: dict[str, list[float]] = {variant: [] for variant in workers}
    order, begun = random.Random(0), time.monotonic()
    while len(times[PLAIN]) < rounds or time.monotonic() - begun < seconds:
        # In another order each time: a step that follows one of gigabytes finds its memory gone.
        for variant in order.sample([*workers], len(workers)):
            times[variant].append(workers[variant].step())
    peaks = {variant: worker.end() for variant, worker in workers.items()}
    found: dict[str, Any] = dict(failed)
    for variant, taken in times.items():
        ratios = [own / plain for own, plain in zip(taken, times[PLAIN], strict=True)]
        found[variant] = {
            "seconds": statistics.median(taken),
            "ratio": statistics.median(ratios),
            "ratio_quartiles": [statistics.quantiles(ratios, n=4, method="inclusive")[i] for i in (0, 2)],
            "rounds": len(taken),
            "peak_mb": peaks[variant] / 1e6,
            "peak_ratio": peaks[variant] / max(peaks[PLAIN], 1),
        }
    return found


def table(results: dict[str, Any]) -> str:
    """A line per model and variant."""
    lines = [f"{'model':6} {'variant':22} {'ms':>9} {'ratio':>7} {'peak MB':>9} {'ratio':>7}"]
    for model, variants in results.items():
        for variant, r in variants.items():
            if "failed" in r:
                lines.append(f"{model:6} {variant:22} {r['failed']}")
            else:
                lines.append(
                    f"{model:6} {variant:22} {1e3 * r['seconds']:9.1f} {r['ratio']:7.3f} {r['peak_mb']:9.1f} "
                    f"{r['peak_ratio']:7.3f}"
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", default=",".join(WORKLOADS))
    parser.add_argument("--variants", default=";".join(VARIANTS), help="separated by semicolons")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each model, at least")
    parser.add_argument("--rounds", type=int, default=9, help="at least")
    parser.add_argument("--dry", action="store_true", help="print only")
    arguments = parser.parse_args()
    variants = [v for v in arguments.variants.split(";") if v != PLAIN]
    results = {}
    for model in arguments.models.split(","):
        results[model] = measure(model, [PLAIN, *variants], arguments.seconds, arguments.rounds)
        print(table({model: results[model]}), flush=True)
    if not arguments.dry:
        print(write_part("steps", {"models": results}))


if __name__ == "__main__":
    main()
