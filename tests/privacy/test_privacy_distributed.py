"""On several ranks a step is as private as on one: noise once, one key, one plan, one bound on a unit, one ledger.

Replicas ("replicas") and sharded modules ("whole"), on two ranks and on four.
"""

from __future__ import annotations

import math
import re
import time
from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.distributed.launch import started
from tests.distributed.together import Asked, Lost, Outcomes, wanted_on_ranks
from tests.oracles import clip_vector, clipped_sum, per_unit_gradients
from tests.privacy import rank_scenes as scenes
from tests.privacy.stats import assert_gaussian, assert_uncorrelated

STD = scenes.SIGMA * scenes.CLIP / scenes.EXPECTED
HOWS = ("replicas", "whole")
CLIPPINGS = ("flat", "per-layer", "automatic")
NOISES = [
    (how, batches, optimizer)
    for how in HOWS
    for batches, optimizer in ((1, "SGD"), (3, "SGD"), (1, "RMSprop"))
]
DIFFERENCES = [
    "keys: of their own",
    "keys: of other seeds",
    *(f"plan: {name}" for name in scenes.PLANS),
    *(f"module: {name}" for name in scenes.MODULES),
    *(f"optimizer: {name}" for name in scenes.OPTIMIZERS),
]
# What the refusal has to name.
NAMED = {"keys": "key", "module": "module|network|parameter", "optimizer": "optimizer"}
FAILURES = ("no lease", "the budget is too small", "the disk is full")


def gradients() -> list[np.ndarray]:
    """Of each of the eight units, alone, in float64."""
    return per_unit_gradients(
        scenes.network("replicas"),
        lambda module, x: scenes.loss_of(module, x).sum(),
        [row.unsqueeze(0) for row in scenes.records(8)],
    )


def needles(size: int) -> dict[str, np.ndarray]:
    """The first coordinates of the clipped sum of all ranks and of each."""
    units = gradients()
    found = {"all": clipped_sum(units, scenes.CLIP)}
    found |= {f"rank {rank}": clipped_sum(units[rank::size], scenes.CLIP) for rank in range(size)}
    return {name: value[:12] for name, value in found.items()}


def work_for(size: int, folder: Any) -> dict[str, tuple[str, tuple[Any, ...]]]:
    calls: dict[str, tuple[Any, ...]] = {}
    for how, batches, optimizer in NOISES:
        calls[f"noise {how} {batches} {optimizer}"] = ("noise", how, batches, optimizer)
    for how in HOWS:
        for name in ("noise_of_steps", "noise_after_seeds", "noise_under_seeds", "places_of_noise"):
            calls[f"{name} {how}"] = (name, how)
        for clipping in CLIPPINGS:
            calls[f"neighbours {how} {clipping}"] = ("neighbours", how, clipping)
            for bad in (math.nan, math.inf):
                calls[f"bad {how} {clipping} {bad}"] = ("bad_unit", how, bad, clipping)
        calls[f"moved {how}"] = ("moved_between_ranks", how)
        calls[f"left {how} float"] = ("left_behind", how, "float", needles(size))
        for failure in FAILURES:
            place = folder / f"{how} {failure}"
            place.mkdir()
            calls[f"unpaid {how} {failure}"] = ("unpaid", how, str(place), failure)
    calls["left replicas discrete"] = ("left_behind", "replicas", "discrete", needles(size))
    for what in DIFFERENCES:
        calls[f"refused {what}"] = ("refused", what)
    calls["refused ledger"] = ("refused", f"ledger: {folder}")
    calls["first values"] = ("first_values",)
    for how in ("trainer", "engine"):
        calls[f"ddp {how}"] = ("wrapped_by_ddp", how)
    return {name: (f"tests.privacy.rank_scenes:{call[0]}", call[1:]) for name, call in calls.items()}


@pytest.fixture(scope="module")
def groups(request, tmp_path_factory):
    """All scenes on so many ranks, in one group; unless a few tests alone were asked for."""

    @cache
    def of(size: int) -> Outcomes | Lost | Asked:
        work = work_for(size, tmp_path_factory.mktemp(f"ranks{size}"))
        return wanted_on_ranks(request, size, work, timeout=240.0)

    return of


@pytest.fixture(params=[2, 4])
def found(request, groups):
    return groups(request.param)


# noise


@pytest.mark.parametrize(("how", "batches", "optimizer"), NOISES)
def test_noise_is_exact_and_once_whatever_the_number_of_ranks(found, how, batches, optimizer):
    """A million coordinates against the normal law, at a rate of false alarms of 1e-9."""
    assert_gaussian(found[f"noise {how} {batches} {optimizer}"][0].ravel(), STD)


@pytest.mark.parametrize("how", HOWS)
def test_every_rank_s_coordinates_carry_the_whole_noise(found, how):
    """Not one rank's alone: row by row of the matrix."""
    rows = found[f"noise {how} 1 SGD"][0].reshape(1000, 1000) / STD
    # Of 1,000 means of 1,000 squares, each within 6.9 standard deviations (1e-9 over all).
    assert np.abs((rows**2).mean(1) - 1.0).max() < 7.5 * math.sqrt(2 / 1000)


@pytest.mark.parametrize("how", HOWS)
def test_steps_and_networks_do_not_share_noise(found, how):
    by_rank = found[f"noise_of_steps {how}"]
    assert all(
        np.array_equal(mine, first)
        for ranks in by_rank[1:]
        for mine, first in zip(ranks, by_rank[0], strict=True)
    )
    for i, one in enumerate(by_rank[0]):
        for other in by_rank[0][:i]:
            assert_uncorrelated(one, other)
    # The rows of one rank are not those of another.
    half = len(by_rank[0][0]) // 2
    assert_uncorrelated(by_rank[0][0][:half], by_rank[0][0][half : 2 * half])


@pytest.mark.parametrize("how", HOWS)
def test_global_seeds_do_not_fix_the_noise(found, how):
    assert_uncorrelated(*found[f"noise_after_seeds {how}"][0])


@pytest.mark.parametrize("how", HOWS)
def test_global_seeds_do_not_change_reproducible_noise(found, how):
    by_rank = found[f"noise_under_seeds {how}"]
    assert len({release.tobytes() for ranks in by_rank for release in ranks}) == 1
    assert by_rank[0][0].any()


@pytest.mark.parametrize("how", HOWS)
def test_no_noise_is_made_twice(found, how):
    """Nor after a step back or forward: of all (step, coordinate), each by one rank once."""
    made: dict[tuple[int, int], int] = {}
    for places in found[f"places_of_noise {how}"]:
        for step, start, end in places:
            for index in range(start, end):
                made[step, index] = made.get((step, index), 0) + 1
    assert set(made.values()) == {1}
    whole = [sum(1 for s, index in made if s == step and index < 400) for step in {step for step, _ in made}]
    assert whole == [400] * 5


# refusals


@pytest.mark.parametrize("what", DIFFERENCES)
def test_a_rank_that_differs_is_refused_by_all_and_named(found, what):
    kind, _, name = what.partition(": ")
    word = f"plan|{name}" if kind == "plan" else NAMED[kind]
    for error, text in found[f"refused {what}"]:
        assert error in ("PrivacyError", "ConfigError"), (error, text)
        assert re.search(word, text, re.IGNORECASE), text


def test_a_ledger_of_each_rank_s_own_is_refused(found):
    for error, text in found["refused ledger"]:
        assert error in ("PrivacyError", "ConfigError", "LedgerError") and "ledger" in text


def test_ranks_begin_with_the_same_weights(found):
    """Rank 0's, as under DDP; else each would have noised another network."""
    by_rank = found["first values"]
    for values in by_rank[1:]:
        assert all(np.array_equal(mine, first) for mine, first in zip(values, by_rank[0], strict=True))


@pytest.mark.parametrize("how", ["trainer", "engine"])
def test_a_module_whose_gradients_torch_adds_up_is_refused(found, how):
    for text in found[f"ddp {how}"]:
        assert "DistributedDataParallel" in text


# units


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("how", HOWS)
def test_a_unit_that_is_not_finite_goes_and_nothing_else(found, how, clipping, bad):
    released, *others = found[f"bad {how} {clipping} {bad}"]
    assert all(np.array_equal(released, other) for other in others)
    # Unit 1, masked on its rank.
    expected = found[f"neighbours {how} {clipping}"][0][2]
    assert np.isfinite(released).all()
    np.testing.assert_allclose(released, expected, atol=1e-6)


@pytest.mark.parametrize("how", HOWS)
def test_the_sum_is_that_of_the_loop(found, how):
    expected = clipped_sum(gradients(), scenes.CLIP)
    for sums in found[f"neighbours {how} flat"]:
        np.testing.assert_allclose(sums[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("how", HOWS)
def test_one_unit_moves_the_sum_by_its_own_part_and_at_most_c(found, how, clipping):
    """Whichever rank has it."""
    whole, *less = found[f"neighbours {how} {clipping}"][0]
    read_back = 1e-6
    for unit, without in zip(gradients(), less, strict=True):
        moved = whole - without
        assert 0.0 < np.linalg.norm(moved) <= scenes.CLIP + read_back
        if clipping == "flat":
            np.testing.assert_allclose(moved, clip_vector(unit, scenes.CLIP), atol=2e-6)


@pytest.mark.parametrize("how", HOWS)
def test_it_does_not_matter_which_rank_has_a_unit(found, how):
    for sums in found[f"moved {how}"]:
        for other in sums[1:]:
            np.testing.assert_allclose(sums[0], other, atol=1e-6)


# the ledger


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("how", HOWS)
def test_what_rank_0_can_not_pay_for_moves_nothing_anywhere(found, how, failure):
    """And all ranks go on together once it is paid for."""
    lease_fails = failure != "no lease"
    for seen in found[f"unpaid {how} {failure}"]:
        kinds = [kind for kind, _ in seen["errors"]]
        expected = {"the budget is too small": "BudgetExceededError"}.get(failure, "LedgerError")
        assert kinds == [expected, "LedgerError"] if lease_fails else kinds == ["LedgerError"], seen["errors"]
        assert seen["moved"] == 0.0 and seen["steps"] == 0
        assert seen["moved then"] > 0.0 and seen["charged"] == 1


def test_a_rank_that_refuses_a_batch_ends_all_before_anything_moves(tmp_path):
    """Rank 1 stops in the middle of a step; the other says so, within a bounded time."""
    begun = time.monotonic()
    with started(2, scenes.one_refuses, str(tmp_path), join=False, timeout=100.0) as group:
        statuses = group.wait(60.0)
        assert statuses[1] not in (0, None) and "UnsupportedOperationError" in group.stderr(1)
        assert statuses[0] == 0, group.stderr(0)
        text, moved = group.result(0)
    assert "another process" in text and moved == 0.0
    assert not (tmp_path / "went on").exists()
    assert time.monotonic() - begun < 60.0


# what is left behind


@pytest.mark.parametrize(
    ("how", "arithmetic"), [("replicas", "float"), ("replicas", "discrete"), ("whole", "float")]
)
def test_no_sum_without_noise_is_left_behind(found, how, arithmetic):
    """Not in gradients, moments or a checkpoint during the step, and in no tensor at all after it."""
    for seen in found[f"left {how} {arithmetic}"]:
        assert seen["gradients"] == [] and seen["moments"] == [] and seen["gradients then"] == []
        kind, text = seen["refused"]
        assert kind == "CheckpointError" and "under way" in text
        assert all(name == "step" or name.startswith(("parameter.", "optimizer.")) for name in seen["names"])
        assert seen["held then"] == []


def test_the_search_for_sums_finds_them(found):
    """The test of the test: in the middle of a step they are there."""
    for rank, seen in enumerate(found["left replicas float"]):
        assert f"rank {rank}" in seen["held"]
