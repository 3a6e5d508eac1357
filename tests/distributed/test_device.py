"""Processes on devices, without one: a group that has an exchange for each kind of tensor, and refusals told once."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from synthward.engine.distributed.ranks import Ranks
from tests.distributed.launch import run_ranks
from tests.distributed.test_fit import TOLERANCE, assert_same, fit, lead, lines
from tests.tinydata import write_tiny

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def fit_in_mixed_group(folder: Path) -> list[Any]:
    """Runs in a group as one with NCCL is: what exchanges a tensor is asked for by its device."""
    dist.init_process_group("cpu:gloo,cuda:gloo")
    ranks = Ranks.current()
    found: list[Any] = [
        ranks.backend,
        ranks.backend_of(torch.device("cpu")),
        ranks.backend_of(torch.device("meta")),
    ]
    for parallel in ("replicate", "shard"):
        found.append(fit(folder, parallel, "diffusion", parallel))
    dist.barrier()
    return found


def test_a_group_with_an_exchange_for_each_kind_of_tensor(tmp_path):
    write_tiny(tmp_path)
    lead(tmp_path, "alone", "diffusion", physical_batch_size=4096)
    found = run_ranks(2, fit_in_mixed_group, tmp_path, join=False, timeout=170.0)
    assert found == [["cpu:gloo,cuda:gloo", "gloo", None, "", ""]] * 2
    for parallel in ("replicate", "shard"):
        assert_same(tmp_path / parallel, tmp_path / "alone", TOLERANCE["diffusion"])
        assert lines(tmp_path / parallel) == lines(tmp_path / "alone")


def command(*arguments: str) -> tuple[int, str]:
    """Exit code and lines of a command on this process."""
    from synthward.cli import main

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(list(arguments))
    return code, said.getvalue()


@pytest.mark.parametrize("name", ["fit", "sample"])
def test_a_device_that_no_process_has_is_told_once(tmp_path, name):
    write_tiny(tmp_path)
    data, schema, out = (str(tmp_path / part) for part in ("data.csv", "schema.toml", "out"))
    words = [name, data, "--schema", schema, "--epsilon", "3", "--delta", "1e-5", "--out", out]
    if name == "sample":
        words = [name, str(tmp_path), "--out", out]
    found = run_ranks(2, command, *words, "--device", "cuda", join=False, environment=NO_GPU)
    assert [code for code, _ in found] == [2, 2]
    told = [text for _, text in found if text]
    assert len(told) == 1 and told[0].count("\n") == 1 and "device: got 'cuda'" in told[0], found
    assert not Path(out).exists() and not Path(out + ".parts").exists()
