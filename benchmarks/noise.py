"""What noise costs: "noise" in benchmarks/results/<machine>.json.

    python -m benchmarks.noise [--rounds 31] [--small 65536] [--large 33554432] [--dry]

On one thread, with buffers that stay in the cache: cipher words, normals, integers and releases of each instruction
set, beside torch's own normals. On all of torch's threads, with buffers beyond any cache: noise and Adam in one pass,
the same loop without noise, releases, and torch's normals, addition and fused Adam one after the other. In each round
the calls take turns in an order of its own; a ratio is the median over rounds of ratios within one round. If a result
is wrong, there is no table.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import write_part
from synthward.kernels import (
    available_isas,
    chacha20_words,
    discrete_release_,
    force_isa,
    gaussian_noise,
    noisy_adam_,
    rounded_gaussian,
)

KEY = bytes(range(32))
GRID, NOISE_STD = 2.0**-20, 1.0

Call = Callable[[], Any]


def take_turns(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, after one round that is not counted."""
    names, order = list(calls), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds + 1):
        order.shuffle(names)
        for name in names:
            start = time.perf_counter()
            calls[name]()
            if index:
                seconds[name].append(time.perf_counter() - start)
    return seconds


class Places:
    """Each call a step of its own, as in training."""

    def __init__(self) -> None:
        self._step = 0

    def next(self) -> dict[str, Any]:
        self._step += 1
        return {"key": KEY, "stream": 1, "step": self._step}


def release_of(count: int, places: Places) -> Call:
    """The release of sums that are zero again after it: what it reads and writes is the same in each call."""
    sums, out = torch.zeros(count, dtype=torch.float64), torch.zeros(count)
    return lambda: discrete_release_(sums, out, **places.next(), grid=GRID, noise_std=NOISE_STD)


def with_isa(name: str, call: Call) -> Call:
    def run() -> Any:
        force_isa(name)
        try:
            return call()
        finally:
            force_isa(None)

    return run


def of_one_thread(count: int) -> dict[str, Call]:
    """Calls on buffers of `count` elements, named "what (who)"."""
    places, calls = Places(), {}
    kinds: dict[str, Call] = {
        "words": lambda: chacha20_words(**places.next(), start=0, count=count),
        "normals": lambda: gaussian_noise(count, **places.next()),
        "integers": lambda: rounded_gaussian(count, **places.next(), scale=NOISE_STD / GRID),
        "releases": release_of(count, places),
    }
    for isa in available_isas():
        calls |= {f"{kind} ({isa})": with_isa(isa, call) for kind, call in kinds.items()}
    return calls | {"normals (torch)": lambda: torch.empty(count).normal_()}


def adam_of(count: int, places: Places, noise_std: float) -> Call:
    param, summed, first, second = (torch.zeros(count) for _ in range(4))
    options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "adam_step": 10}

    def step() -> Tensor:
        noisy_adam_(
            *(param, summed, first, second),
            **places.next(),
            **options,
            noise_std=noise_std,
            grad_scale=0.1,
            decoupled=False,
        )
        return param

    return step


def torch_adam_of(count: int) -> Call:
    param, summed = torch.nn.Parameter(torch.zeros(count)), torch.zeros(count)
    optimizer, drawn = torch.optim.Adam([param], lr=1e-3, fused=True), torch.empty(count)

    def step() -> Tensor:
        summed.add_(drawn.normal_(), alpha=NOISE_STD)
        param.grad = summed.mul_(0.1)
        optimizer.step()
        summed.zero_()
        return param

    return step


def of_all_threads(count: int) -> dict[str, Call]:
    """Calls on buffers of `count` elements each."""
    places = Places()
    return {
        "Adam": adam_of(count, places, 0.0),
        "noise + Adam": adam_of(count, places, NOISE_STD),
        "torch: normals, add, fused Adam": torch_adam_of(count),
        "release": release_of(count, places),
    }


def check(small: int) -> None:
    """Noise of the standard deviation asked for, from every call; none from Adam alone."""
    slack = 6.0 / small**0.5
    for name, call in of_one_thread(small).items():
        drawn = torch.from_numpy(call()) if name.startswith("words") else call()
        scale = NOISE_STD / GRID if name.startswith("integers") else NOISE_STD
        if name.startswith("words"):
            scale = 2.0**32 / 12.0**0.5
        if abs(float(drawn.double().std()) / scale - 1.0) > slack:
            raise SystemExit(f"benchmarks.noise: {name} has another standard deviation")
    moved = {name: bool(call().detach().any()) for name, call in of_all_threads(small).items()}
    if moved != {name: name != "Adam" for name in moved}:
        raise SystemExit(
            f"benchmarks.noise: noise where there should be none, or none where there should be: {moved}"
        )


def rows_of(seconds: dict[str, list[float]], count: int) -> dict[str, dict[str, float]]:
    return {
        name: {
            "median_ms": 1e3 * statistics.median(times),
            "elements/s": count / statistics.median(times),
            "ns_per_element": 1e9 * statistics.median(times) / count,
        }
        for name, times in seconds.items()
    }


def over(seconds: dict[str, list[float]], one: str, other: str) -> dict[str, float]:
    """Rate of `one` over that of `other`, in the same round: the median and the range of the middle half."""
    ratios = sorted(b / a for a, b in zip(seconds[one], seconds[other], strict=True))
    quarter = len(ratios) // 4
    return {"median": statistics.median(ratios), "low": ratios[quarter], "high": ratios[-1 - quarter]}


def measure(small: int, large: int, rounds: int) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = take_turns(of_one_thread(small), rounds)
    finally:
        torch.set_num_threads(threads)
    every = take_turns(of_all_threads(large), rounds)
    return {
        "rounds": rounds,
        "one_thread": {"elements": small, "calls": rows_of(one, small)},
        "all_threads": {"elements": large, "threads": threads, "calls": rows_of(every, large)},
        "noise_and_adam_over_adam": over(every, "noise + Adam", "Adam"),
        "noise_and_adam_over_torch": over(every, "noise + Adam", "torch: normals, add, fused Adam"),
    }


def table(result: dict[str, Any]) -> str:
    lines = []
    for part in ("one_thread", "all_threads"):
        lines.append(f"{part.replace('_', ' ')}, {result[part]['elements']} elements")
        for name, row in result[part]["calls"].items():
            lines.append(
                f"  {name:34} {row['median_ms']:10.3f} ms {row['elements/s'] / 1e9:8.3f} G elements/s"
            )
    for name in ("noise_and_adam_over_adam", "noise_and_adam_over_torch"):
        ratio = result[name]
        lines.append(
            f"{name.replace('_', ' ')}: {ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--small", type=int, default=1 << 16)
    parser.add_argument("--large", type=int, default=1 << 25)
    parser.add_argument("--dry", action="store_true", help="print only")
    arguments = parser.parse_args()
    check(arguments.small)
    result = measure(arguments.small, arguments.large, arguments.rounds)
    print(table(result))
    if not arguments.dry:
        print(write_part("noise", result))


if __name__ == "__main__":
    main()
