"""The device that a run is asked to use, and copies to it that nobody waits for."""

from __future__ import annotations

import os
import re

import torch
from torch import Tensor

from synthward.engine.errors import ConfigError

CPU = torch.device("cpu")
_ASKED = re.compile(r"auto|cpu|cuda(?::(\d{1,4}))?")


def choose_device(asked: str = "auto", *, one_each: bool = False) -> torch.device:
    """The device of this process.

    Args:
        asked: "auto" (a GPU where torch sees one, else the CPU), "cpu", "cuda" (the current one) or "cuda:N".
        one_each: whether this is one of several processes, each of which has a GPU of its own: that of its number on
            this machine (`torchrun` puts it into LOCAL_RANK).

    Raises:
        ConfigError: it is no such word, torch does not see that GPU, or there are more processes than GPUs.
    """
    found = _ASKED.fullmatch(asked)
    if found is None:
        raise ConfigError(f"device: got {asked!r}; give auto, cpu, cuda or cuda:N (the GPU of number N)")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "cpu" or (asked == "auto" and not count):
        return CPU
    if not count:
        raise ConfigError(f"device: got {asked!r}, but {_why_none()}; give cpu, or auto")
    if one_each:
        if found[1] is not None:
            raise ConfigError(f"device: got {asked!r} for several processes; with cuda each has its own GPU")
        return torch.device("cuda", _number_on_machine(count))
    number = torch.cuda.current_device() if found[1] is None else int(found[1])
    if number >= count:
        raise ConfigError(f"device: got {asked!r}, but torch sees {count}, numbered from 0")
    return torch.device("cuda", number)


def use_device(device: torch.device) -> None:
    """Make a GPU the current one of this thread: what names no device (a recording, a library's handle) goes there."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def describe(device: torch.device) -> str:
    """The device in words: "cpu", or "cuda:0 (NVIDIA H200)"."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor in CPU memory on a device; by pinned memory to a GPU, without waiting for it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _why_none() -> str:
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        return f"this torch ({torch.__version__}) was built without CUDA"
    return "torch sees no GPU here"


def _number_on_machine(count: int) -> int:
    number = int(os.environ.get("LOCAL_RANK") or torch.cuda.current_device())
    processes = max(number + 1, int(os.environ.get("LOCAL_WORLD_SIZE") or 0))
    if processes > count:
        raise ConfigError(
            f"device: {processes} processes for {count} GPUs on this machine; start at most one for each "
            "(torchrun --nproc-per-node), or give cpu"
        )
    return number
