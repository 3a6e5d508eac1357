"""Measurements of single kernels, one thread: `OMP_NUM_THREADS=1 pytest benchmarks/kernels`.

Each benchmark asserts the result of what it has timed, and writes shape, bytes or operations beside the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.machine import describe
from synthward.kernels import available_isas, force_isa


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[*available_isas(), "torch"])
def executor(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn, then the best that plain torch has for the same result."""
    if request.param != "torch":
        force_isa(request.param)
    yield request.param
    force_isa(None)


@pytest.fixture
def measure(benchmark: Any) -> Callable[..., Any]:
    """Times `call` and writes rates per second of whatever amounts are named (elements, bytes, flops)."""

    def run(call: Callable[[], Any], **amounts: int) -> Any:
        result = benchmark.pedantic(call, rounds=30, iterations=1, warmup_rounds=3)
        median = benchmark.stats.stats.median
        for name, amount in amounts.items():
            benchmark.extra_info[f"G{name}/s"] = round(amount / median / 1e9, 3)
        return result

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What is known without names of machines or people, in place of the plugin's own findings."""
    machine_info.clear()
    machine_info.update(describe())
