"""One draw for all ranks: each takes its part, in the same number of batches, and an empty part is a part."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from synthward.engine import KeySchedule, PrivacyPlan, PrivateTrainer
from synthward.engine.distributed.ranks import Ranks
from synthward.engine.sampling import physical_batches
from tests.distributed.cases import spread, whole
from tests.distributed.together import Lost, Outcomes, on_ranks

DRAWS = st.sets(st.integers(0, 10**6), max_size=60).map(lambda found: np.array(sorted(found), dtype=np.int64))
SIZES = st.sampled_from([1, 2, 3, 7, 64])
WORLDS = st.integers(1, 8)


def parts(draw: np.ndarray, size: int, world_size: int, at_least: int = 1) -> list[list[np.ndarray]]:
    return [
        list(physical_batches(draw, size, at_least=at_least, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]


@settings(max_examples=300, deadline=None)
@given(draw=DRAWS, size=SIZES, world_size=WORLDS, at_least=st.integers(1, 4))
def test_the_ranks_parts_are_a_partition_of_the_draw(draw, size, world_size, at_least):
    """Each is contiguous, so that the order of units is the order of ranks."""
    by_rank = parts(draw, size, world_size, at_least)
    rows = np.concatenate([np.concatenate(batches) for batches in by_rank])
    assert np.array_equal(rows[rows >= 0], draw)
    assert set(rows[rows < 0]) <= {-1}


@settings(max_examples=300, deadline=None)
@given(draw=DRAWS, size=SIZES, world_size=WORLDS, at_least=st.integers(1, 4))
def test_all_ranks_have_as_many_batches_of_one_shape(draw, size, world_size, at_least):
    """And no more than the draw needs, or the public number asks for."""
    by_rank = parts(draw, size, world_size, at_least)
    needed = -(-len(draw) // (size * world_size))
    assert {len(batches) for batches in by_rank} == {max(1, at_least, needed)}
    for batches in by_rank:
        for batch in batches:
            assert batch.shape == (size,) and batch.dtype == np.int64


@settings(max_examples=100, deadline=None)
@given(draw=DRAWS, size=SIZES)
def test_one_rank_takes_all(draw, size):
    [alone] = parts(draw, size, 1)
    assert np.array_equal(alone, physical_batches(draw, size))


@pytest.mark.parametrize(("rank", "world_size"), [(-1, 2), (2, 2), (0, 0)])
def test_a_rank_that_there_is_not(rank, world_size):
    with pytest.raises(ValueError, match=r"rank|world_size"):
        physical_batches(np.arange(4), 2, rank=rank, world_size=world_size)


# Trained


def _plan(sampler: str, steps: int) -> PrivacyPlan:
    fields: dict[str, Any] = {
        "poisson": {},
        "cyclic": {"period": 3},
        "truncated": {"max_batch_size": 5, "max_units": 40},
    }[sampler]
    return PrivacyPlan(
        sample_rate=0.2,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        steps=steps,
        expected_batch_size=4.0,
        **fields,
    )


def draws() -> dict[str, list[list[int]]]:
    """The first draws of each sampler by keys from the operating system that all ranks share."""
    keys = KeySchedule.shared(Ranks.current())
    found = {}
    for name in ("poisson", "cyclic", "truncated"):
        sampler = _plan(name, 1).sampler(30, keys.key("sampler"))
        found[name] = [sampler.draw(step).tolist() for step in range(10)]
    return found


# Units that take part in each step, by number.
STEPS = {
    "one unit": [[3], [], [5]],
    "fewer than ranks": [[0, 1, 2], [7, 8, 9]],
    "nobody, ever": [[], [], []],
    "many and none": [list(range(9)), [], [1]],
}


def take(how: str, given: list[list[int]], calls_backward: str) -> tuple[list[np.ndarray], int]:
    """Steps over given draws; the parameter after each, and the steps done."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    spread(module, how)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    trainer = PrivateTrainer(
        module, optimizer, _plan("poisson", len(given)), keys=KeySchedule.reproducible(1)
    )
    ranks, found = Ranks.current(), []
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    for units in given:
        drawn = np.array(units, dtype=np.int64)
        for chosen in physical_batches(drawn, 2, rank=ranks.rank, world_size=ranks.world_size):
            mask = torch.from_numpy(chosen >= 0)
            if calls_backward == "where there are units":
                chosen, mask = chosen[chosen >= 0], None
                if not len(chosen):
                    continue
            elif calls_backward == "without rows":
                chosen, mask = chosen[chosen >= 0], None
            with trainer.capture():
                losses = module(x[torch.from_numpy(chosen).clamp_min(0)]).square().sum(1)
            trainer.backward(losses, rows_per_unit=1, unit_mask=mask)
        trainer.apply()
        found.append(np.concatenate([whole(p).ravel() for p in module.parameters()]))
    return found, trainer.steps_done


# A shard's forward pass is an exchange, so that every rank has to take part in it.
TAKEN = [
    (how, name, calls)
    for how, ways in (
        ("replicas", ("padded", "without rows", "where there are units")),
        ("whole", ("padded", "without rows")),
        ("blocks", ("padded", "without rows")),
    )
    for name in STEPS
    for calls in ways
]


@pytest.fixture(scope="module", params=[2, 4])
def found(request: pytest.FixtureRequest) -> Outcomes | Lost:
    here = "tests.distributed.test_sampling_global:"
    work: dict[str, tuple[str, tuple[Any, ...]]] = {"draws": (here + "draws", ())}
    work |= {" ".join(case): (here + "take", (case[0], STEPS[case[1]], case[2])) for case in TAKEN}
    return on_ranks(request.param, work)


def test_all_ranks_make_the_same_draws(found):
    first, *others = found["draws"]
    assert all(other == first for other in others)
    assert any(drawn for steps in first.values() for drawn in steps)


@pytest.mark.parametrize(("how", "name", "calls"), TAKEN)
def test_an_empty_part_and_an_empty_draw_train_and_count(found, how, name, calls):
    """As one process does, whether a rank without units runs a padded batch, one of no rows, or none."""
    expected, steps = take("replicas", STEPS[name], "padded")
    assert steps == len(STEPS[name])
    for weights, count in found[f"{how} {name} {calls}"]:
        assert count == steps
        for weight, like in zip(weights, expected, strict=True):
            assert np.linalg.norm(weight - like) <= 1e-5 * np.linalg.norm(like)


@pytest.mark.parametrize("how", ["replicas", "whole", "blocks"])
def test_an_empty_draw_is_noised(found, how):
    """Bit by bit as by one process."""
    expected, _ = take("replicas", STEPS["nobody, ever"], "padded")
    for weights, _ in found[f"{how} nobody, ever padded"]:
        assert all(a.tobytes() == b.tobytes() for a, b in zip(weights, expected, strict=True))
    moved = np.diff(np.stack(expected), axis=0)
    assert (moved != 0).all(), "no coordinate stays where it is"
