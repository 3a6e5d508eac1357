"""Ranks that are not at the same step, draw, noise or records release nothing together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.launch import run_ranks
from tests.distributed.together import Asked, Lost, Outcomes, wanted_on_ranks

HOWS = ("replicas", "whole")


RECORDS = ("tensors", "subset", "ids")


def work(folder: Path) -> dict[str, tuple[str, tuple[Any, ...]]]:
    calls: dict[str, tuple[Any, ...]] = {}
    for how in HOWS:
        for name in ("skips_empty_batches", "noise_of_another_stream"):
            calls[f"{name} {how}"] = (name, how)
        for rank in (0, 1):
            calls[f"counts_a_step_more {how} {rank}"] = ("counts_a_step_more", how, rank)
        for is_apart in (False, True):
            calls[f"unit_on_two_ranks {how} {is_apart}"] = ("unit_on_two_ranks", how, is_apart)
    for how in (*HOWS, "blocks"):
        calls[f"arranges {how}"] = ("arranges_in_the_third_batch", how)
        calls[f"hook {how}"] = ("parameter_in_a_hook", how)
    for kind in RECORDS:
        calls[f"records {kind}"] = ("has_a_part_of_the_records", kind)
    for what in ("plan", "lease"):
        calls[f"other {what}"] = ("other_plan_or_lease", str(folder), what)
    calls["frozen"] = ("frozen_values",)
    calls["skips_empty_batches exchanged"] = ("skips_empty_batches", "exchanged")
    return {name: (f"tests.privacy.rank_faults:{call[0]}", call[1:]) for name, call in calls.items()}


@pytest.fixture(scope="module")
def found(request, tmp_path_factory) -> Outcomes | Lost | Asked:
    return wanted_on_ranks(request, 2, work(tmp_path_factory.mktemp("ranks")))


@pytest.mark.parametrize("how", [*HOWS, "exchanged"])
def test_a_rank_that_skips_an_empty_batch_ends_the_step(found, how):
    """Else unit 1 would take part on rank 0 by the first draw, on rank 1 by the second, and count twice."""
    ranks = found[f"skips_empty_batches {how}"]
    assert [seen["draws"] for seen in ranks] == [[0], [1]]
    for seen in ranks:
        assert seen["kind"] == "PrivacyError" and "same draw" in seen["text"]
        assert seen["moved"] == 0.0


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", HOWS)
def test_a_rank_that_counts_a_step_more_ends_all(found, how, rank):
    for seen in found[f"counts_a_step_more {how} {rank}"]:
        assert seen["kind"] == "PrivacyError" and "same step" in seen["text"]
        assert seen["moved"] == 0.0


@pytest.mark.parametrize("how", HOWS)
def test_a_rank_whose_noise_would_be_of_another_stream_ends_all(found, how):
    for seen in found[f"noise_of_another_stream {how}"]:
        assert seen["kind"] == "PrivacyError" and "same noise (stream)" in seen["text"]
        assert seen["moved"] == 0.0


@pytest.mark.parametrize("kind", RECORDS)
def test_ranks_with_other_records_are_refused(found, kind):
    """A draw is of numbers: whoever has half of the records would be drawn by where the others' units stand, and one
    unit less would move others from rank to rank, where other records have their numbers."""
    for text in found[f"records {kind}"]:
        assert text.startswith("PrivacyError") and "same records" in text


@pytest.mark.parametrize("how", HOWS)
def test_a_unit_on_two_ranks_is_refused_where_ids_tell(found, how):
    for seen in found[f"unit_on_two_ranks {how} False"]:
        assert seen["kind"] == "PrivacyError" and "two ranks" in seen["text"]
        assert seen["moved"] == 0.0
    for seen in found[f"unit_on_two_ranks {how} True"]:
        assert seen["kind"] == "" and seen["moved"] > 0.0


@pytest.mark.parametrize("what", ["plan", "lease"])
def test_a_plan_or_lease_that_is_not_that_of_all_is_refused_before_it_is_charged(found, what):
    for text, charged in found[f"other {what}"]:
        assert text.startswith("PrivacyError") and f"same {what}" in text
        assert charged == 0


def test_what_is_not_trained_is_the_same_on_all_ranks(found):
    mine, theirs = found["frozen"]
    assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("how", [*HOWS, "blocks"])
def test_a_hook_that_arranges_rows_by_the_data_is_seen_when_it_does(found, how):
    """Beside the hooks of FSDP, too, which the capture does not look at."""
    for step, text in found[f"arranges {how}"]:
        assert step == 2 and "units mix" in text


@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_a_parameter_in_a_hook_is_clipped_as_in_replicas(found, how):
    expected = found["hook replicas"][0]
    for parameters in found[f"hook {how}"]:
        np.testing.assert_allclose(parameters, expected, atol=1e-6)


def test_a_trainer_from_before_the_group_takes_no_step():
    """Its ranks would each spend apart, and only one would tell of it."""
    for text, moved in run_ranks(2, "tests.privacy.rank_faults:joined_late", join=False):
        assert "initialized after" in text and moved == 0.0
