"""Two ranks on two cores, this engine and its peers: "distributed" in benchmarks/results/<machine>.json.

    python -m benchmarks.distributed [--models gpt,mlp] [--variants ...] [--rounds 9] [--seconds 25]

One process with all threads, or ranks with their share of the threads and of the batch, in a group of gloo's: plain
PyTorch and its DDP and FSDP2, this engine's, Opacus' DDP. All processes stay up and take turns of a few steps, in
another order in each round; who waits sleeps on a pipe. The seconds of a turn are those of its slowest rank; a ratio is
the median over rounds of the ratio in a round. A turn in which other processes of the machine took more than a tenth of
a core is taken again, until patience is at its end; how many were disturbed all the same is in the result. Peak memory
is the most that a rank held over what it held before the network was built; memory that ranks have in common is counted
on each that touches it.

Then pieces, each alone: ranks that exchange nothing, the exchange without a step, each collective over loopback by
size. Opacus' hooks come last, for a few rounds: they need seconds and gigabytes. Models that are not measured now stay
in the result as they were, each with its own command and machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import command, describe, read_part, write_part
from benchmarks.models import WORKLOADS
from benchmarks.rank_steps import VARIANTS
from synthward.engine.rates import measured_rates

PLAIN, DDP, ALONE, REPLICAS = "plain", "plain DDP", "synthward", "synthward replicas"
WHOLES = (REPLICAS, "synthward replicas, loopback")
SHARDED, PLAIN_SHARDED = "synthward FSDP2", "plain FSDP2"
APART, EXCHANGE, COLLECTIVES = "apart", "exchange", "collectives"
SLOW = "opacus hooks DDP"
# In the same rounds: what is compared. In rounds of their own: pieces of that, beside the whole.
COMPARED = [v for v in VARIANTS if not v.endswith((APART, "untold", COLLECTIVES)) and EXCHANGE not in v]
PIECES = [v for v in VARIANTS if v not in COMPARED and v != COLLECTIVES]
# Goals of the issues: private over plain in one process, and what several ranks may add.
RATIO_GOALS, SLACK, THROUGHPUT_GOAL = {"mlp": 1.00, "gpt": 1.05}, 0.05, 0.90
TURN_SECONDS, SLOW_ROUNDS, MOST_BYTES = 0.4, 3, 4e9
# A turn is taken again, after a pause, while other processes of the machine take more than this share of a core.
DISTURBED, PAUSE_SECONDS = 0.1, 0.3
TICKS = os.sysconf("SC_CLK_TCK")


class Group:
    """The processes of a variant."""

    def __init__(self, model: str, variant: str, ranks: int, threads: int, meeting: Path) -> None:
        kind = VARIANTS[variant]
        self._name, self._processes = f"{model}, {variant}", list[subprocess.Popen[str]]()
        count = ranks if kind.is_split else 1
        place = str(meeting) if kind.is_group else "-"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads if kind.is_split else threads * ranks),
            "PYTHONWARNINGS": "ignore",
            "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
            "SYNTHWARD_HOST_MEMORY": "on" if kind.sees_memory else "off",
        }
        for rank in range(count):
            command = [sys.executable, "-m", "benchmarks.rank_worker", model, variant]
            self._processes.append(
                subprocess.Popen(
                    [*command, str(rank), str(count), place],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=environment,
                )
            )

    def await_ready(self) -> None:
        """Returns when two steps were taken."""
        for line in self._lines():
            if line != "ready":
                raise RuntimeError(f"{self._name}: said {line!r}")

    def steps(self, count: int) -> float:
        """Seconds of a step, on average over a turn of so many."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{count}\n")
            process.stdin.flush()
        return max(float(line) for line in self._lines())

    def cpu_seconds(self) -> float:
        """Of all its processes, since they were started."""
        ticks = 0
        for process in self._processes:
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / TICKS

    def end(self) -> list[dict[str, Any]]:
        """What each process has to tell at its end."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        found = [json.loads(line) for line in self._lines()]
        for process in self._processes:
            process.wait()
        return found

    def kill(self) -> None:
        """End what still runs."""
        for process in self._processes:
            process.kill()
            process.wait()

    def _lines(self) -> list[str]:
        lines = []
        for process in self._processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                self.kill()
                raise RuntimeError(f"{self._name}: a process ended")
            lines.append(line.strip())
        return lines


@contextmanager
def started(
    model: str, variants: list[str], ranks: int, threads: int
) -> Iterator[tuple[dict[str, Group], dict[str, str]]]:
    """The groups that came up, and why others did not."""
    with tempfile.TemporaryDirectory() as folder:
        places = {variant: Path(folder) / str(index) for index, variant in enumerate(variants)}
        groups = {v: Group(model, v, ranks, threads, place) for v, place in places.items()}
        failed = {}
        try:
            for variant, group in groups.items():
                try:
                    group.await_ready()
                except RuntimeError as error:
                    failed[variant] = str(error)
            yield {v: g for v, g in groups.items() if v not in failed}, failed
        finally:
            for group in groups.values():
                group.kill()


def take_turns(
    groups: dict[str, Group], seconds: float, rounds: int, patience: float
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of a step of each variant, round by round; and of each turn, how many cores others took."""
    times: dict[str, list[float]] = {variant: [] for variant in groups}
    counts = {variant: max(1, round(TURN_SECONDS / group.steps(1))) for variant, group in groups.items()}
    order, begun, done, others = random.Random(0), time.monotonic(), 0, []
    while done < rounds or time.monotonic() - begun < seconds:
        for variant in order.sample([*groups], len(groups)):
            found, waited = [_turn(groups[variant], counts[variant])], time.monotonic()
            while found[-1][1] > DISTURBED and patience > 0.0:
                time.sleep(PAUSE_SECONDS)
                found.append(_turn(groups[variant], counts[variant]))
                patience, waited = patience - (time.monotonic() - waited), time.monotonic()
            least = min(found, key=lambda turn: turn[1])
            times[variant].append(least[0])
            others.append(least[1])
        done += 1
    return times, others


def _turn(group: Group, count: int) -> tuple[float, float]:
    """Seconds of a step over a turn, and cores that all other processes of the machine took meanwhile."""
    begun, busy, own = time.monotonic(), _busy_seconds(), group.cpu_seconds()
    seconds = group.steps(count)
    spent = _busy_seconds() - busy - (group.cpu_seconds() - own)
    return seconds, max(0.0, spent) / (time.monotonic() - begun)


def _busy_seconds() -> float:
    """CPU seconds of the machine since it was started, what other machines on it took included."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / TICKS


def over(times: dict[str, list[float]], one: str, other: str) -> dict[str, float] | None:
    """Seconds of `one` over those of `other` in the same round: median and quartiles."""
    if not times.get(one) or not times.get(other):
        return None
    ratios = [a / b for a, b in zip(times[one], times[other], strict=True)]
    low, _, high = (
        statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else (ratios[0],) * 3
    )
    return {"median": statistics.median(ratios), "low": low, "high": high}


def measure(model: str, variants: list[str], ranks: int, threads: int, options: Any) -> dict[str, Any]:
    """One model: what is compared, then pieces, then what is slow."""
    result: dict[str, Any] = {"batch": WORKLOADS[model].batch, "parameters": _parameters(model), "failed": {}}
    result["cores_of_others"] = {}
    # A gradient of each row.
    needed = 4 * result["batch"] * result["parameters"]
    if SLOW in variants and needed > MOST_BYTES:
        variants = [v for v in variants if v != SLOW]
        result["failed"][SLOW] = f"{SLOW}: not run, per-row gradients would need {needed / 1e9:.0f} GB"
    rounds = {
        "compared": ([v for v in variants if v in COMPARED and v != SLOW], options.seconds, options.rounds),
        "pieces": (
            [*(v for v in WHOLES if v in variants), *(v for v in variants if v in PIECES)],
            options.seconds / 3,
            options.rounds,
        ),
        "slow": ([DDP, *(v for v in variants if v == SLOW)], 0.0, SLOW_ROUNDS),
    }
    for part, (names, seconds, count) in rounds.items():
        if not names or (part != "compared" and names[-1] in COMPARED and names[-1] != SLOW):
            continue
        with started(model, names, ranks, threads) as (groups, failed):
            times, others = take_turns(groups, seconds, count, options.patience)
            told = {variant: group.end() for variant, group in groups.items()}
        result["failed"] |= failed
        result[part] = {v: _row(times[v], told[v]) for v in times}
        result["cores_of_others"][part] = {
            "median": round(statistics.median(others), 3),
            "turns_disturbed": round(sum(share > DISTURBED for share in others) / len(others), 3),
        }
        if part == "compared":
            result["ratios"] = ratios_of(times)
        if part == "slow":
            result["ratios"][f"{SLOW} / {DDP}"] = over(times, SLOW, DDP)
    result["goals"] = goals_of(model, result["ratios"])
    return result


def _row(times: list[float], told: list[dict[str, Any]]) -> dict[str, Any]:
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else (times[0],) * 3
    row = {"seconds": statistics.median(times), "low": low, "high": high, "rounds": len(times)}
    row["peak_mb_of_ranks"] = [round(rank["peak_bytes"] / 1e6, 1) for rank in told]
    for name in ("pass_seconds", "apply_seconds"):
        if name in told[0]:
            row[name] = max(rank[name] for rank in told)
    return row


def ratios_of(times: dict[str, list[float]]) -> dict[str, Any]:
    """What the issue asks for, of the seconds of a step."""
    pairs = [(ALONE, REPLICAS), (ALONE, PLAIN), (REPLICAS, DDP), (SHARDED, PLAIN_SHARDED), (PLAIN, DDP)]
    pairs += [(v, DDP) for v in times if v.startswith("opacus")]
    pairs += [(ALONE, v) for v in times if v.startswith(ALONE) and v not in (ALONE, REPLICAS)]
    found = {f"{one} / {other}": over(times, one, other) for one, other in pairs}
    return {name: ratio for name, ratio in found.items() if ratio}


def goals_of(model: str, ratios: dict[str, Any]) -> dict[str, Any]:
    """Goals, and whether they are met."""
    goals = {}
    throughput, private = ratios.get(f"{ALONE} / {REPLICAS}"), ratios.get(f"{REPLICAS} / {DDP}")
    if throughput:
        goals["throughput of ranks over one process"] = _goal(throughput["median"], THROUGHPUT_GOAL, 1)
    if private and model in RATIO_GOALS:
        goals["private over plain DDP"] = _goal(private["median"], RATIO_GOALS[model] + SLACK, -1)
    return goals


def _goal(found: float, goal: float, sign: int) -> dict[str, Any]:
    return {"goal": goal, "found": found, "is_met": sign * found >= sign * goal}


def _parameters(model: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in WORKLOADS[model].build().parameters())


def collectives(ranks: int, threads: int) -> dict[str, Any]:
    """Seconds of each collective by elements of the whole tensor, of the slowest rank, over loopback."""
    with started("mlp", [COLLECTIVES], ranks, threads) as (groups, failed):
        if failed:
            raise RuntimeError(failed[COLLECTIVES])
        told = groups[COLLECTIVES].end()
    return {
        name: {size: max(rank[name][size] for rank in told) for size in told[0][name]}
        for name in ("reduce_scatter", "all_gather", "all_reduce")
    }


def table(model: str, result: dict[str, Any]) -> str:
    """A line per variant, then the ratios and goals."""
    lines = [
        f"{model:4} {'variant':38} {'ms':>9} {'(quartiles)':>19} {'pass':>8} {'apply':>8}  peak MB of ranks"
    ]
    for part in ("compared", "pieces", "slow"):
        for variant, row in result.get(part, {}).items():
            halves = [
                f"{1e3 * row[k]:8.1f}" if k in row else " " * 8 for k in ("pass_seconds", "apply_seconds")
            ]
            spread = f"({1e3 * row['low']:.1f} to {1e3 * row['high']:.1f})"
            peaks = ", ".join(f"{peak:.0f}" for peak in row["peak_mb_of_ranks"])
            lines.append(
                f"{model:4} {variant:38} {1e3 * row['seconds']:9.1f} {spread:>19} {halves[0]} {halves[1]}  {peaks}"
            )
    for name, ratio in result["ratios"].items():
        lines.append(
            f"{model:4} ratio {name}: {ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
        )
    for name, goal in result["goals"].items():
        met = "met" if goal["is_met"] else "missed"
        lines.append(f"{model:4} goal {name}: {goal['found']:.3f}, goal {goal['goal']:.2f}: {met}")
    lines += [f"{model:4} failed {why}" for why in result["failed"].values()]
    for part, others in result["cores_of_others"].items():
        disturbed = f"{others['turns_disturbed']:.0%} of turns disturbed"
        lines.append(f"{model:4} {part}: others took {others['median']} cores (median), {disturbed}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", default="gpt,mlp")
    parser.add_argument("--variants", default=";".join(VARIANTS), help="separated by semicolons")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=25.0, help="for each model, at least")
    parser.add_argument("--rounds", type=int, default=9, help="at least")
    parser.add_argument("--patience", type=float, default=20.0, help="seconds to wait for an idle machine")
    parser.add_argument("--dry", action="store_true", help="print only")
    options = parser.parse_args()
    variants = options.variants.split(";")
    threads = max(1, (os.cpu_count() or 1) // options.ranks)
    for count in (threads, threads * options.ranks):
        # Measured before anybody else works, then read from a file.
        torch.set_num_threads(count)
        measured_rates(torch.device("cpu"))
    result: dict[str, Any] = {"ranks": options.ranks, "threads_of_a_rank": threads, "models": {}}
    result |= {
        key: value for key, value in read_part("distributed").items() if key in ("models", "collectives")
    }
    for model in options.models.split(","):
        found = measure(model, variants, options.ranks, threads, options)
        result["models"][model] = {"command": command(), "machine": describe(), **found}
        print(table(model, found), flush=True)
    if COLLECTIVES in variants:
        result["collectives"] = collectives(options.ranks, threads)
        for name, rates in result["collectives"].items():
            print(name, {int(n): f"{1e3 * s:.2f} ms" for n, s in rates.items()}, flush=True)
    if not options.dry:
        print(write_part("distributed", result))


if __name__ == "__main__":
    main()
