"""What goes wrong on one rank alone is refused by all of them, at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.launch import run_ranks, started
from tests.distributed.together import Asked, Lost, Outcomes, wanted_on_ranks

HOWS = ("replicas", "whole")
# Calls that one rank makes wrongly, and what all are told.
MADE = {
    "seed": "seed",
    "seed of all": "seed",
    "accountant": "abacus",
    "ledger elsewhere": "ledger: give it on rank 0",
    "shared ledger": "ledger: give it on rank 0",
    "plain ledger": "SharedLedger",
    "layer": "BatchNorm1d",
    "clipping": "upwards",
    "reduction": "median",
    "ids": "unit_ids",
    "batch": "expected_batch_size",
}
# Rank 0 is right to give a ledger.
RIGHT = {("ledger elsewhere", 0), ("shared ledger", 0)}


def work(folder: Path) -> dict[str, tuple[str, tuple[Any, ...]]]:
    calls: dict[str, tuple[Any, ...]] = {}
    for how in HOWS:
        for rank in (0, 1):
            calls[f"ids {how} {rank}"] = ("ids_on_one_rank", how, rank)
        calls[f"nobody {how}"] = ("ids_beside_nobody", how)
        calls[f"untrained {how}"] = ("untrained_values", how)
        calls[f"buffers {how}"] = ("buffers_that_differ", how)
    for where in ("forward", "backward", "units mix", "arguments"):
        calls[f"trainer {where}"] = ("swallowed_by_a_trainer", where)
    for where in ("forward", "backward"):
        calls[f"loop {where}"] = ("swallowed_by_a_loop", where)
    for what in MADE:
        for rank in (0, 1):
            calls[f"made {what} {rank}"] = ("made_wrong_on_one", str(folder), what, rank)
    calls |= {
        "all": ("swallowed_by_all",),
        "unequal": ("unequal_batches",),
        "order": ("mesh_in_another_order",),
    }
    return {name: (f"tests.privacy.rank_errors:{call[0]}", call[1:]) for name, call in calls.items()}


@pytest.fixture(scope="module")
def found(request, tmp_path_factory) -> Outcomes | Lost | Asked:
    return wanted_on_ranks(request, 2, work(tmp_path_factory.mktemp("ranks")))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", HOWS)
def test_ids_on_one_rank_alone_are_refused(found, how, rank):
    """A row without an id may be of a unit that the other rank has."""
    for seen in found[f"ids {how} {rank}"]:
        assert seen["kind"] == "PrivacyError" and "others have none" in seen["text"]
        assert seen["moved"] == 0.0


@pytest.mark.parametrize("how", HOWS)
def test_a_rank_without_rows_needs_no_ids(found, how):
    for seen in found[f"nobody {how}"]:
        assert seen["kind"] == "" and seen["moved"] > 0.0


@pytest.mark.parametrize("where", ["forward", "backward", "units mix", "arguments"])
def test_a_batch_that_a_trainer_s_loop_lost_ends_the_step_of_all(found, where):
    """Else one unit, whose rows raise, would take those of its whole batch out of the sum."""
    for first, then in found[f"trainer {where}"]:
        assert first["kind"] == "PrivacyError" and "failed passes" in first["text"]
        assert first["moved"] == 0.0
        assert then["kind"] == "" and then["moved"] > 0.0


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_batch_that_a_user_s_loop_lost_ends_the_step_of_all(found, where):
    for first, then in found[f"loop {where}"]:
        assert first["kind"] == "PrivacyError" and "forward passes" in first["text"]
        assert first["moved"] == 0.0
        assert then["kind"] == "" and then["moved"] > 0.0


def test_a_batch_that_all_ranks_lost_ends_the_step_too(found):
    for seen in found["all"]:
        assert seen["kind"] == "PrivacyError" and "begin it afresh" in seen["text"]
        assert seen["moved"] == 0.0


@pytest.mark.parametrize("where", ["forward", "units mix", "arguments"])
def test_a_rank_that_others_wait_for_in_a_lost_pass_ends(tmp_path, where):
    """Not after the time limit of the group."""
    begun = time.monotonic()
    call = "tests.privacy.rank_errors:swallowed_while_sharded"
    with started(2, call, str(tmp_path), where, join=False, timeout=100.0) as group:
        assert all(status not in (0, None) for status in group.wait(60.0))
        assert "a pass failed and the loop went on" in group.stderr(1)
    assert not (tmp_path / "went on").exists()
    assert time.monotonic() - begun < 60.0


def test_ranks_may_have_other_numbers_of_batches(found):
    """As many on all ranks is what `physical_batches` gives; replicas that have more memory may take fewer."""
    for equal, other in found["unequal"]:
        np.testing.assert_allclose(other, equal, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("what", MADE)
def test_an_error_of_one_rank_is_raised_on_all(found, what, rank):
    mine, theirs = found[f"made {what} {rank}"]
    assert mine == theirs
    assert mine == "" if (what, rank) in RIGHT else MADE[what] in mine


@pytest.mark.parametrize("how", HOWS)
def test_what_is_not_trained_is_rank_0_s_on_all_ranks(found, how):
    """Buffers of every type, and frozen parameters that are whole."""
    mine, theirs = found[f"untrained {how}"]
    assert len(mine) == 4 and all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("how", HOWS)
def test_ranks_with_other_buffers_are_refused(found, how):
    for text in found[f"buffers {how}"]:
        assert text.startswith("PrivacyError") and "its buffers" in text


def test_a_mesh_in_another_order_is_refused(found):
    """Its ranks would each add up, noise and update another one's rows."""
    for kind, text in found["order"]:
        assert kind == "UnsupportedOperationError" and "'weight'" in text and "[1, 0]" in text


def test_a_group_of_some_processes_trains_its_own_modules():
    by_rank = run_ranks(4, "tests.privacy.rank_errors:pairs_of_four", False)
    assert [text for text, _ in by_rank] == [""] * 4
    for _, parameters in by_rank:
        assert all(np.array_equal(a, b) for a, b in zip(parameters, by_rank[0][1], strict=True))


def test_a_module_that_is_sharded_over_others_is_refused():
    for text, _ in run_ranks(4, "tests.privacy.rank_errors:pairs_of_four", True):
        assert text.startswith("UnsupportedOperationError: parameter '0.weight'") and "processes [" in text
