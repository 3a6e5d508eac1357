"""The device that is asked for: what is chosen, what is refused, and that a refusal is one line. No GPU is needed."""

from __future__ import annotations

import pytest
import torch

from synthward.engine.device import CPU, choose_device, copy_to, describe, use_device
from synthward.engine.draws import Draws
from synthward.engine.errors import ConfigError


@pytest.fixture
def machine(monkeypatch):
    """Says how many GPUs torch sees, and which process this is."""
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def of(
        gpus: int, *, local_rank: int | None = None, processes: int | None = None, current: int = 0
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
        for name, value in (("LOCAL_RANK", local_rank), ("LOCAL_WORLD_SIZE", processes)):
            if value is not None:
                monkeypatch.setenv(name, str(value))

    return of


@pytest.mark.parametrize(
    ("gpus", "asked", "expected"),
    [
        (0, "auto", "cpu"),
        (0, "cpu", "cpu"),
        (2, "auto", "cuda:0"),
        (2, "cuda", "cuda:0"),
        (2, "cuda:1", "cuda:1"),
        (2, "cpu", "cpu"),
    ],
)
def test_one_process(machine, gpus, asked, expected):
    machine(gpus)
    assert choose_device(asked) == torch.device(expected)


def test_without_a_number_it_is_the_current_one(machine):
    machine(4, current=3)
    assert choose_device("cuda") == choose_device() == torch.device("cuda:3")


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_each_of_several_processes_has_the_one_of_its_number(machine, asked):
    machine(4, local_rank=2, processes=4)
    assert choose_device(asked, one_each=True) == torch.device("cuda:2")
    assert choose_device("cpu", one_each=True) == CPU


def test_processes_that_nobody_numbered_have_their_current_one(machine):
    machine(4, current=1)
    assert choose_device("cuda", one_each=True) == torch.device("cuda:1")


@pytest.mark.parametrize(
    ("gpus", "asked", "mention"),
    [
        (0, "cuda", "give cpu, or auto"),
        (0, "cuda:0", "give cpu, or auto"),
        (2, "cuda:2", "torch sees 2, numbered from 0"),
        (2, "cuda:-1", "auto, cpu, cuda or cuda:N"),
        (2, "CUDA", "auto, cpu, cuda or cuda:N"),
        (2, "gpu", "auto, cpu, cuda or cuda:N"),
        (2, "", "auto, cpu, cuda or cuda:N"),
        (2, "cuda:0 ", "auto, cpu, cuda or cuda:N"),
    ],
)
def test_what_is_not_there_is_refused_by_name(machine, gpus, asked, mention):
    machine(gpus)
    with pytest.raises(ConfigError, match=mention) as refused:
        choose_device(asked)
    assert repr(asked) in str(refused.value) and "\n" not in str(refused.value)


def test_why_there_is_none(machine, monkeypatch):
    machine(0)
    for is_built, mention in ((False, "built without CUDA"), (True, "torch sees no GPU here")):
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda is_built=is_built: is_built)
        with pytest.raises(ConfigError, match=mention):
            choose_device("cuda")


@pytest.mark.parametrize("rank", [0, 2])
def test_more_processes_than_gpus_are_refused_on_all(machine, rank):
    """Those that would have one, too: the others will never come."""
    machine(2, local_rank=rank, processes=3)
    with pytest.raises(ConfigError, match="3 processes for 2 GPUs"):
        choose_device("auto", one_each=True)


def test_several_processes_do_not_share_one_by_its_number(machine):
    machine(2, local_rank=0, processes=2)
    with pytest.raises(ConfigError, match="each has its own"):
        choose_device("cuda:0", one_each=True)


def test_the_current_one_is_that_which_is_used(monkeypatch):
    """A recording would be made on the current one, whatever its tensors are on."""
    made: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    for name in ("cpu", "cuda:1"):
        use_device(torch.device(name))
    assert made == [torch.device("cuda:1")]


def test_a_device_in_words(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"model {device.index}")
    assert describe(CPU) == "cpu" and describe(torch.device("cuda:1")) == "cuda:1 (model 1)"


def test_a_copy_to_a_gpu_is_by_pinned_memory_and_not_waited_for(monkeypatch):
    calls = []

    class Pinned:
        def to(self, device, *, non_blocking):
            calls.append((device, non_blocking))
            return self

    pinned = Pinned()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned)
    assert copy_to(torch.zeros(3), torch.device("cuda:1")) is pinned
    assert calls == [(torch.device("cuda:1"), True)]
    here = torch.zeros(3)
    assert copy_to(here, CPU) is here


def test_numbers_of_rows_go_on_where_they_are_put():
    """A call on another device is the next call all the same."""
    key = bytes(range(32))
    whole, parted = Draws(key, first=5), Draws(key, first=5)
    whole.uniform(4, 3)
    parted.to(torch.device("meta"))
    assert parted.uniform(4, 3).is_meta and parted.normal(4, 2).is_meta
    whole.normal(4, 2)
    assert torch.equal(parted.to(CPU).uniform(4, 3), whole.uniform(4, 3))
    assert torch.equal(parted.normal(4, 2), whole.normal(4, 2))
