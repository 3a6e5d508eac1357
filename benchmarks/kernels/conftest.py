"""Measurements of single kernels, one thread: `OMP_NUM_THREADS=1 pytest benchmarks/kernels`.

Each benchmark asserts the result of what it has timed, and writes shape, rates and the time over its floor beside the
time. `python -m benchmarks.kernel_table` runs them all and makes the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.kernels.rates import Rates, seconds
from benchmarks.machine import describe
from synthward.kernels import available_isas, force_isa

MOST_ROUNDS, FEWEST_ROUNDS, SECONDS = 30, 7, 0.6
RATES = pytest.StashKey[Rates]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        action="store_true",
        help="the first shape of each benchmark, timed once: whether they run, no figures",
    )


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


@pytest.fixture(scope="session")
def rates(pytestconfig: pytest.Config) -> Rates:
    """The machine's own, of one thread; they are written into the result too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = pytestconfig.stash[RATES] = Rates()
    torch.set_num_threads(before)
    return found


@pytest.fixture
def measure(benchmark: Any, rates: Rates, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Times `call` and writes rates per second of whatever amounts are named (elements, bytes, flops), and the time
    over the floor: the longest of bytes and flops at the machine's own rates (`Rates`).

    30 rounds, fewer of what takes long. What `call` adds up in the tensors `clear` is set to zero for one last call,
    so that they hold one result. Returns what `call` returned.
    """

    def run(call: Callable[[], Any], *, clear: Sequence[Tensor] = (), **amounts: int) -> Any:
        is_quick = benchmark.disabled or request.config.getoption("--quick", False)
        rounds = 1 if is_quick else _rounds(call)
        result = benchmark.pedantic(call, rounds=rounds, iterations=1, warmup_rounds=1)
        if not benchmark.disabled:
            parameters = dict(request.node.callspec.params)
            benchmark.extra_info["kernel"] = request.node.originalname.removeprefix("test_")
            benchmark.extra_info["executor"] = parameters.pop("executor")
            benchmark.extra_info["shape"] = parameters
            benchmark.extra_info.update(_figures(benchmark.stats.stats.median, amounts, rates))
        for tensor in clear:
            tensor.zero_()
        return call() if clear else result

    return run


def _figures(median: float, amounts: dict[str, int], rates: Rates) -> dict[str, Any]:
    figures: dict[str, Any] = {f"G{name}/s": round(n / median / 1e9, 3) for name, n in amounts.items()}
    floors = rates.floors(amounts)
    if floors:
        binding = max(floors, key=lambda name: floors[name])
        figures["floor"] = binding
        figures["floor_ms"] = 1e3 * floors[binding]
        figures["over_floor"] = median / floors[binding]
    return figures


def _rounds(call: Callable[[], Any]) -> int:
    call()
    return min(MOST_ROUNDS, max(FEWEST_ROUNDS, int(SECONDS / seconds(call))))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The executors of one shape one after the other: what is compared is measured within the same seconds."""
    shapes: dict[str, list[Any]] = {}

    def place(item: pytest.Item) -> tuple[int, int]:
        """Which benchmark, and which of its shapes, in the order in which they are first seen."""
        name = item.nodeid.split("[")[0]
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        shape = {key: value for key, value in parameters.items() if key != "executor"}
        seen = shapes.setdefault(name, [])
        if shape not in seen:
            seen.append(shape)
        return list(shapes).index(name), seen.index(shape)

    places = {item.nodeid: place(item) for item in items}
    items.sort(key=lambda item: places[item.nodeid])
    if config.getoption("--quick", False):
        config.hook.pytest_deselected(items=[item for item in items if places[item.nodeid][1] > 0])
        items[:] = [item for item in items if places[item.nodeid][1] == 0]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What is known without names of machines or people, in place of the plugin's own findings."""
    machine_info.clear()
    machine_info.update(describe())


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    """The rates that the floors come from."""
    rates = config.stash.get(RATES, None)
    if rates is not None:
        output_json["rates"] = {"flops": rates.flops, "bytes_by_size": dict(sorted(rates.bytes.items()))}
