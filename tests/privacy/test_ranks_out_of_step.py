"""Ranks that are not at the same step, draw, noise or records release nothing together."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.together import Asked, Lost, Outcomes, on_ranks

HOWS = ("replicas", "whole")


def work() -> dict[str, tuple[str, tuple[Any, ...]]]:
    calls: dict[str, tuple[Any, ...]] = {}
    for how in HOWS:
        for name in ("skips_empty_batches", "noise_of_another_stream"):
            calls[f"{name} {how}"] = (name, how)
        for rank in (0, 1):
            calls[f"counts_a_step_more {how} {rank}"] = ("counts_a_step_more", how, rank)
    calls["skips_empty_batches exchanged"] = ("skips_empty_batches", "exchanged")
    return {name: (f"tests.privacy.rank_faults:{call[0]}", call[1:]) for name, call in calls.items()}


@pytest.fixture(scope="module")
def found(request) -> Outcomes | Lost | Asked:
    """All of it on two ranks, in one group, unless a few tests alone were asked for."""
    here = [item for item in request.session.items if item.path == request.path]
    return Asked(2, work()) if len(here) <= 3 else on_ranks(2, work())


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
