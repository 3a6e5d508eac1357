"""Any number of ranks releases what one process does, which is what the float64 loop over units does.

Replicas and shards, any physical batch, every clipping rule, optimizer and kind of noise: the same parameters up to the
order of sums, the same bits of noise, the same ledger.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.distributed.cases import STEPS, Case, Run, train
from tests.distributed.reference import ALIGN, reference
from tests.distributed.together import Lost, Outcomes, on_ranks

# Relative to each parameter's norm, after all steps.
TOLERANCE = 1e-5
# The loop has no bound on the rounding of norms, by which the engine clips a little more.
LOOP_TOLERANCE = 2e-5

SHARDS = ("whole", "blocks")


def _cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for spread in ("replicas", *SHARDS):
        base = Case(spread=spread)
        if spread != "replicas":
            # A layer that is called twice is sharded with the rest.
            base = replace(base, network="conv" if spread == "blocks" else "mixed")
        for physical in (1, 3, 7, 64):
            found[f"{spread}-{physical}"] = replace(base, physical=physical)
        for network in ("conv", "few", "mlp"):
            found[f"{spread}-{network}"] = replace(base, network=network, groups=2, optimizer="adam")
        for clipping in ("per-layer", "automatic", "adaptive", "grouped"):
            found[f"{spread}-{clipping}"] = replace(base, clipping=clipping)
        found[f"{spread}-ragged"] = replace(base, rows="ragged", physical=7)
        found[f"{spread}-sparse"] = replace(base, rate=0.04, optimizer="adamw")
    for spread in ("replicas", "whole"):
        base = Case(spread=spread)
        found[f"{spread}-tied"] = replace(base, network="tied")
        found[f"{spread}-tied-adagrad"] = replace(base, network="tied", optimizer="adagrad", rows="ragged")
        for optimizer in ("momentum", "adam", "adamw", "adam_bc", "adagrad", "rmsprop"):
            found[f"{spread}-{optimizer}"] = replace(base, optimizer=optimizer, groups=2, physical=7)
        for noise in ("banded", "blt", "banded_inverse"):
            found[f"{spread}-{noise}"] = replace(base, noise=noise, rate=0.9)
        found[f"{spread}-blt-adam_bc"] = replace(base, noise="blt", rate=0.9, optimizer="adam_bc")
        found[f"{spread}-banded-rmsprop"] = replace(
            base, noise="banded", rate=0.9, optimizer="rmsprop", groups=2
        )
        found[f"{spread}-no-noise"] = replace(base, noise="none", physical=1)
        found[f"{spread}-recompute"] = replace(base, keep="recompute")
        found[f"{spread}-untold"] = replace(base, last="untold", physical=1)
        found[f"{spread}-per-layer-untold"] = replace(base, last="untold", clipping="per-layer", physical=1)
        found[f"{spread}-ledger"] = replace(base, has_ledger=True, rate=0.1)
    for clipping in ("flat", "per-layer", "grouped"):
        base = Case(clipping=clipping, network="conv" if clipping != "grouped" else "mixed")
        found[f"replicas-{clipping}-told"] = replace(base, physical=1)
        found[f"replicas-{clipping}-told-by-some"] = replace(base, last="by some", physical=7)
    for clipping in ("flat", "per-layer"):
        base = Case(network="wide", clipping=clipping, optimizer="adam", groups=2)
        found[f"replicas-wide-{clipping}"] = base
        found[f"replicas-wide-{clipping}-told-by-some"] = replace(base, last="by some", physical=1)
        exchanged = replace(base, is_exchanged=True)
        found[f"exchanged-wide-{clipping}"] = exchanged
        found[f"exchanged-wide-{clipping}-told-by-some"] = replace(exchanged, last="by some", physical=1)
    base = Case(is_exchanged=True, physical=7)
    found["exchanged-7"] = base
    for clipping in ("per-layer", "adaptive", "grouped"):
        found[f"exchanged-{clipping}"] = replace(base, clipping=clipping, physical=1)
    found["exchanged-few"] = replace(base, network="few", groups=2, optimizer="adam")
    found["exchanged-rmsprop"] = replace(base, optimizer="rmsprop", groups=2, last="untold")
    found["exchanged-blt"] = replace(base, noise="blt", rate=0.9, optimizer="adam_bc")
    found["exchanged-discrete"] = replace(base, noise="discrete", groups=2, optimizer="momentum")
    found["whole-wide"] = Case(network="wide", spread="whole", optimizer="momentum")
    for optimizer in ("sgd", "adam"):
        found[f"replicas-discrete-{optimizer}"] = Case(noise="discrete", optimizer=optimizer, groups=2)
    found["replicas-discrete-per-layer"] = Case(noise="discrete", clipping="per-layer", physical=1)
    return found


def _silent() -> dict[str, Case]:
    """Losses times zero: what is released is the noise alone."""
    found: dict[str, Case] = {}
    for spread in ("replicas", *SHARDS):
        base = Case(spread=spread, is_silent=True, network="conv" if spread == "blocks" else "mixed")
        for physical in (1, 7):
            found[f"{spread}-{physical}"] = replace(base, physical=physical)
        found[f"{spread}-few"] = replace(base, network="few", groups=2)
        found[f"{spread}-per-layer"] = replace(base, clipping="per-layer")
        found[f"{spread}-adaptive"] = replace(base, clipping="adaptive")
        found[f"{spread}-adam"] = replace(base, optimizer="adam", groups=2)
        found[f"{spread}-rmsprop"] = replace(base, optimizer="rmsprop", groups=2)
        for noise in ("banded", "blt", "banded_inverse"):
            found[f"{spread}-{noise}"] = replace(base, noise=noise, optimizer="adam_bc")
    for name in ("1", "few", "adam", "blt"):
        found[f"exchanged-{name}"] = replace(found[f"replicas-{name}"], is_exchanged=True)
    found["replicas-discrete"] = Case(is_silent=True, noise="discrete", groups=2)
    return found


CASES = _cases()
SILENT = _silent()
ALL = CASES | {f"silent-{name}": case for name, case in SILENT.items()}

# What the fast tests run on two ranks and on four; all of it, and some on three, is slow.
TWO = (
    "replicas: 1 7 few ragged per-layer adaptive grouped tied-adagrad adam_bc rmsprop blt-adam_bc ledger "
    "discrete-adam whole: 1 7 few ragged per-layer adaptive tied adagrad blt ledger blocks: 3 ragged "
    "exchanged: 7 wide-flat-told-by-some discrete silent-replicas: 1 few adaptive blt discrete "
    "silent-exchanged: 1 silent-whole: 7 few banded silent-blocks: 1"
)
FOUR = "replicas: 7 wide-flat whole: 7 few blocks: 3 silent-replicas: 1 silent-whole: 7"
ONE = "whole: 7 few blocks: 3 silent-whole: 7"


def named(text: str) -> set[str]:
    """The names of cases in a list that says each spread once."""
    found, spread = set(), ""
    for word in text.split():
        if word.endswith(":"):
            spread = word[:-1]
        else:
            found.add(f"{spread}-{word}")
    assert found <= ALL.keys(), found - ALL.keys()
    return found


def spread_over(names: dict[str, Case]) -> list[Any]:
    """Cases on one rank, two, three and four."""
    quick = {1: named(ONE), 2: named(TWO), 3: set(), 4: named(FOUR)}
    every = {1: named(ONE), 2: set(ALL), 3: named(FOUR), 4: set(ALL)}
    found = []
    for world_size, chosen in every.items():
        for name in names:
            full = f"silent-{name}" if names is SILENT else name
            if full in chosen:
                marks = [] if full in quick[world_size] else [pytest.mark.slow]
                found.append(pytest.param(world_size, full, marks=marks, id=f"{world_size}-{full}"))
    return found


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int, str], list[Run]]:
    """A case's run on so many ranks, by rank. One group of processes for all cases that are asked for."""
    asked: dict[int, set[str]] = {}
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.path == request.path and hasattr(item, "callspec"):
            asked.setdefault(item.callspec.params["world_size"], set()).add(item.callspec.params["name"])

    @cache
    def group(world_size: int) -> Outcomes | Lost:
        work = {}
        for name, case in ALL.items():
            if name in asked[world_size]:
                folder = tmp_path_factory.mktemp("run")
                work[name] = ("tests.distributed.cases:train", (case, str(folder)))
        return on_ranks(world_size, work, timeout=120.0 + 4.0 * len(work))

    return lambda world_size, name: group(world_size)[name]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Run]:
    """A case in this process."""

    @cache
    def found(case: Case) -> Run:
        return train(case.alone, str(tmp_path_factory.mktemp("alone")))

    return found


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        off, norm = np.linalg.norm(found[name] - value), np.linalg.norm(value)
        assert off <= tolerance * norm, f"{name}: off by {off / norm:.1e}"


@pytest.mark.parametrize(("world_size", "name"), spread_over(CASES))
def test_the_same_is_released(runs, alone, world_size, name):
    """As by one process with all units in one batch, and as by the loop."""
    case, by_rank = CASES[name], runs(world_size, name)
    first, expected = by_rank[0], alone(CASES[name])
    assert_close(first.own, expected.own, TOLERANCE)
    assert_close(first.own, reference(case.alone), LOOP_TOLERANCE)
    assert int(first.state["step"]) == STEPS
    for run in by_rank:
        for key, value in first.own.items():
            assert np.array_equal(run.own[key], value), f"{key} differs from rank to rank"
            assert np.array_equal(run.state[f"parameter.{key}"], value)


@pytest.mark.parametrize(("world_size", "name"), spread_over(CASES))
def test_the_same_is_kept(runs, alone, world_size, name):
    """Names, shapes and values of all that a checkpoint has, moments included."""
    expected = alone(CASES[name]).state
    for run in runs(world_size, name):
        assert {k: v.shape for k, v in run.state.items()} == {k: v.shape for k, v in expected.items()}
        assert {k: v.dtype for k, v in run.state.items()} == {k: v.dtype for k, v in expected.items()}
        assert_close(run.state, expected, 10 * TOLERANCE)


@pytest.mark.parametrize(("world_size", "name"), spread_over(SILENT))
def test_the_noise_has_the_same_bits(runs, alone, world_size, name):
    expected = alone(ALL[name])
    start = {key: p.detach().numpy() for key, p in ALL[name].module().named_parameters()}
    assert all((expected.own[key] != value).any() for key, value in start.items())
    for run in runs(world_size, name):
        for key, value in expected.state.items():
            assert run.state[key].tobytes() == value.tobytes(), key


@pytest.mark.parametrize(("world_size", "name"), spread_over(CASES))
def test_each_coordinate_s_noise_is_made_once(runs, world_size, name):
    """By one of the ranks, and by none for the whole."""
    case, by_rank = CASES[name], runs(world_size, name)
    if case.noise == "none":
        return
    places = where_parameters_lie(case)
    length = max(end for _, end in places)
    made = [np.zeros((STEPS, length), dtype=int) for _ in by_rank]
    for counts, run in zip(made, by_rank, strict=True):
        for step, start, end in run.places:
            counts[step, start : min(end, length)] += 1
    for start, end in places:
        assert (sum(made)[:, start:end] == 1).all()
    if world_size > 1:
        of_ranks = [sum(counts[0, start:end].sum() for start, end in places) for counts in made]
        assert max(of_ranks) <= 0.8 * sum(of_ranks)


def where_parameters_lie(case: Case) -> list[tuple[int, int]]:
    """First and last index, in the noise of a step, of each parameter."""
    found, start = [], 0
    for group in case.make_optimizer(case.module()).param_groups:
        for parameter in group["params"]:
            found.append((start, start + parameter.numel()))
            start += -(-parameter.numel() // ALIGN) * ALIGN
    return found


LEDGERS = {name: case for name, case in CASES.items() if case.has_ledger}
# What no two runs share.
OWN = ("hash", "prev", "time", "run_id", "key_id")


@pytest.mark.parametrize(("world_size", "name"), spread_over(LEDGERS))
def test_the_ledger_is_the_same(runs, alone, world_size, name):
    """Line by line; every rank reads the same epsilon, and rank 0 alone has the file."""
    expected, by_rank = alone(CASES[name]), runs(world_size, name)
    assert [_shared(line) for line in by_rank[0].lines] == [_shared(line) for line in expected.lines]
    assert sum(line["steps"] for line in by_rank[0].lines if line["kind"] == "lease") == STEPS
    assert {run.epsilon for run in by_rank} == {expected.epsilon} and expected.epsilon > 0.0
    assert not any(run.lines for run in by_rank[1:])


def _shared(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in OWN}
