"""`PrivacyEngine.make_private` on several ranks: the loop of one process, started by torchrun."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from synthward import PrivacyEngine
from synthward.engine import KeySchedule, Ledger
from synthward.engine.accounting.matrix import Strategy
from synthward.engine.distributed.ledger import SharedLedger
from synthward.engine.distributed.ranks import Ranks
from synthward.engine.errors import BudgetExceededError
from tests.distributed.cases import spread, whole
from tests.distributed.together import Lost, Outcomes, on_ranks

ROWS, SEED, DELTA = 60, 11, 1e-5
CRITERION = {"mean": nn.CrossEntropyLoss(), "sum": nn.CrossEntropyLoss(reduction="sum")}
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
}
# What is given to make_private; batch: of the user's loader.
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "adamw": {"optimizer": "adamw"},
    "adagrad": {"optimizer": "adagrad"},
    "sum": {"loss_reduction": "sum"},
    "small": {"batch": 1},
    "per-layer": {"clipping": "per-layer"},
    "adaptive": {"clipping": "adaptive", "noise_multiplier": 0.5},
    "banded": {"strategy": Strategy("banded", (1.0, 0.5, 0.25)), "period": 4, "sample_rate": 0.5},
    "capped": {"max_batch_size": 30, "max_units": 100},
    "discrete": {"arithmetic": "discrete"},
    "patients": {"units": True},
    "sharded": {"spread": "whole"},
    "sharded adamw": {"spread": "whole", "optimizer": "adamw"},
    "sharded small": {"spread": "whole", "batch": 1},
}


def data() -> TensorDataset:
    """Row numbers are in the first column, so that a batch says which rows it has."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 5, generator=generator)
    x[:, 0] = torch.arange(ROWS) / ROWS
    return TensorDataset(x, torch.randint(0, 3, (ROWS,), generator=generator))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3))


def make(name: str, **engine_settings: Any) -> tuple[Any, ...]:
    """(engine, module, optimizer, loader) of a setting."""
    given = SETTINGS[name]
    module = network()
    spread(module, given.get("spread", "replicas"))
    settings: dict[str, Any] = {"noise_multiplier": 1.0, "max_grad_norm": 0.5}
    own = ("batch", "optimizer", "spread", "units")
    settings |= {key: value for key, value in given.items() if key not in own}
    if given.get("units"):
        settings |= {"unit_ids": torch.arange(ROWS) // 3, "sample_rate": 0.2, "expected_batch_size": 4.0}
    engine = PrivacyEngine(**({"seed": SEED} | engine_settings))
    made = engine.make_private(
        module=module,
        optimizer=OPTIMIZERS[given.get("optimizer", "sgd")](module.parameters()),
        data_loader=DataLoader(data(), batch_size=given.get("batch", 8), shuffle=True),
        **settings,
    )
    return (engine, *made)


def loop(made: tuple[Any, ...], steps: int, name: str = "plain") -> Iterator[list[int]]:
    """The user's loop, for so many steps; gives the rows of each batch."""
    engine, module, optimizer, loader = made
    criterion = CRITERION[SETTINGS[name].get("loss_reduction", "mean")]
    done = 0
    while done < steps:
        for x, y in loader:
            optimizer.zero_grad()
            if SETTINGS[name].get("units"):
                with engine.units():
                    criterion(module(x), y).backward()
            else:
                criterion(module(x), y).backward()
            optimizer.step()
            yield (x[:, 0] * ROWS).round().long().tolist()
            done += 1
            if done == steps:
                return


def trained(name: str) -> dict[str, Any]:
    """Twenty steps by keys of a seed."""
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 99)
    made = make(name)
    rows = list(loop(made, 20, name))
    return {
        "rows": rows,
        "parameters": {key: whole(p) for key, p in made[1].named_parameters()},
        "epsilon": made[0].get_epsilon(DELTA),
        "length": len(made[3]),
    }


def secret() -> dict[str, Any]:
    """Without a seed: ranks have one key all the same, and another run has another."""
    found = []
    for _ in range(2):
        made = make("plain", seed=None)
        rows = list(loop(made, 5))
        found.append((rows, {key: whole(p) for key, p in made[1].named_parameters()}))
    return {"runs": found}


def until_the_budget_is_spent() -> dict[str, Any]:
    """`make_private_with_epsilon`: what each rank is told, after how many steps."""
    module = network()
    engine = PrivacyEngine(accountant="rdp")
    made = engine.make_private_with_epsilon(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(data(), batch_size=10),
        target_epsilon=4.0,
        target_delta=DELTA,
        epochs=2,
        max_grad_norm=1.0,
    )
    steps = 0
    try:
        for _ in loop((engine, *made), 100):
            steps += 1
    except BudgetExceededError as error:
        return {"steps": steps, "told": str(error), "epsilon": engine.get_epsilon(DELTA)}
    return {"steps": steps, "told": "", "epsilon": engine.get_epsilon(DELTA)}


def with_a_ledger(folder: str) -> dict[str, Any]:
    ranks = Ranks.current()
    kept = None
    if ranks.is_main:
        key_id = KeySchedule.reproducible(SEED).key_id
        path = Path(folder) / "ledger.jsonl"
        kept = Ledger.create(path, run_id="r", unit="row", delta=DELTA, key_id=key_id, private=False)
    ledger = SharedLedger(ranks, kept)
    made = make("plain", ledger=ledger)
    list(loop(made, 12))
    made[0].close()
    found = {"epsilon": made[0].get_epsilon(DELTA), "ledger's": ledger.epsilon(), "events": ledger.events()}
    if kept is not None:
        kept.close()
    return found


def without_sampling(rows: int) -> dict[str, np.ndarray]:
    """The user's own loader on each rank, of every second (fourth) row; the public batch is that of all ranks."""
    ranks, module = Ranks.current(), network()
    own = torch.utils.data.Subset(data(), range(ranks.rank, ROWS, ranks.world_size))
    engine = PrivacyEngine(seed=SEED)
    made = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.3),
        data_loader=DataLoader(own, batch_size=rows // ranks.world_size),
        noise_multiplier=1.0,
        max_grad_norm=0.5,
        poisson_sampling=False,
        expected_batch_size=float(rows),
    )
    list(loop((engine, *made), 10))
    return {key: whole(p) for key, p in module.named_parameters()}


def work_for(folder: Path) -> dict[str, tuple[str, tuple[Any, ...]]]:
    calls: dict[str, tuple[Any, ...]] = {name: ("trained", name) for name in SETTINGS}
    calls |= {"secret": ("secret",), "budget": ("until_the_budget_is_spent",)}
    calls |= {"ledger": ("with_a_ledger", str(folder)), "own loader": ("without_sampling", 12)}
    return {
        name: (f"tests.distributed.test_privacy_engine_ddp:{call[0]}", call[1:])
        for name, call in calls.items()
    }


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcomes | Lost:
    return on_ranks(request.param, work_for(tmp_path_factory.mktemp("ledger")))


@cache
def alone(name: str) -> dict[str, Any]:
    """The same setting in this process."""
    given, SETTINGS[name] = SETTINGS[name], {k: v for k, v in SETTINGS[name].items() if k != "spread"}
    try:
        return trained(name)
    finally:
        SETTINGS[name] = given


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, value in expected.items():
        off, norm = np.linalg.norm(found[name] - value), np.linalg.norm(value)
        assert off <= 1e-5 * norm, f"{name}: off by {off / norm:.1e}"


@pytest.mark.parametrize("name", SETTINGS)
def test_the_parameters_are_those_of_one_process(found, name):
    expected, by_rank = alone(name), found[name]
    start = {key: p.detach().numpy() for key, p in network().named_parameters()}
    assert all((expected["parameters"][key] != value).any() for key, value in start.items())
    for seen in by_rank:
        assert_close(seen["parameters"], expected["parameters"])
        for key, value in by_rank[0]["parameters"].items():
            assert np.array_equal(seen["parameters"][key], value), f"{key} differs from rank to rank"


@pytest.mark.parametrize("name", SETTINGS)
def test_the_loader_gives_each_rank_its_part_of_one_draw(found, name):
    """All parts together are the draw of one process, and no rank has more than its share."""
    expected, by_rank = alone(name), found[name]
    is_empty = False
    for step, drawn in enumerate(expected["rows"]):
        parts = [seen["rows"][step] for seen in by_rank]
        together = [row for part in parts for row in part]
        assert sorted(together) == sorted(drawn) and len(set(together)) == len(together)
        patients = {row // 3 for row in drawn} if SETTINGS[name].get("units") else drawn
        most = -(-len(patients) // len(by_rank)) * (3 if SETTINGS[name].get("units") else 1)
        assert max(len(part) for part in parts) <= most
        is_empty |= any(not part for part in parts)
    assert {seen["length"] for seen in by_rank} == {expected["length"]}
    if "small" in name:
        assert is_empty, "no rank was ever without rows"


@pytest.mark.parametrize("name", SETTINGS)
def test_epsilon_is_that_of_one_process_on_all_ranks(found, name):
    expected = alone(name)["epsilon"]
    assert [seen["epsilon"] for seen in found[name]] == [expected] * len(found)
    assert 0.0 < expected < float("inf")


def test_keys_from_the_operating_system_are_one_key_for_all(found):
    by_rank = [seen["runs"] for seen in found["secret"]]
    for runs in by_rank[1:]:
        for (_, mine), (_, first) in zip(runs, by_rank[0], strict=True):
            assert all(np.array_equal(mine[key], first[key]) for key in first)
    for step in zip(*(runs[0][0] for runs in by_rank), strict=True):
        rows = [row for part in step for row in part]
        assert len(rows) == len(set(rows)), "two ranks drew the same row"
    (_, once), (_, again) = by_rank[0]
    assert not any(np.array_equal(once[key], again[key]) for key in once)


def test_the_budget_ends_all_ranks_at_the_same_step(found):
    first = found["budget"][0]
    assert first["steps"] == 12 and first["told"] and first["epsilon"] <= 4.0
    assert all(seen == first for seen in found["budget"])


def test_steps_are_charged_once_for_all_ranks(found):
    for seen in found["ledger"]:
        assert sum(event.steps for event in seen["events"]) == 12
        assert seen["epsilon"] == pytest.approx(seen["ledger's"], rel=1e-9)
        assert seen["epsilon"] == found["ledger"][0]["epsilon"]


def test_batches_of_the_user_s_own(found):
    """Row by row dealt out to the ranks, they are the batches of one process."""
    expected = without_sampling(12)
    for parameters in found["own loader"]:
        assert_close(parameters, expected)
