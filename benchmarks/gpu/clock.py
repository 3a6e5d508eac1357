"""Times and memory on the device: by its own events, in turns, after a warm-up, past its cache.

Without a device (Triton's interpreter) whatever is given is run once and nothing is reported.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

WARM_UP, LEAST_ROUNDS = 3, 5
# Several times the second-level cache. Filling it takes the device long enough for the host to have launched what
# is timed after it.
FLUSHED_BYTES = 1 << 29
_flushed: list[torch.Tensor] = []


def timed() -> bool:
    """Whether times are taken: on a GPU, outside the interpreter."""
    return torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") in ("", "0")


def no_tf32() -> None:
    """Products of float32 in float32: no matrix unit may round its operands to 10 bits."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


def interleaved(
    variants: Mapping[str, Callable[[], object]], rounds: int, seconds: float, *, flush: bool = True
) -> dict[str, list[float]]:
    """Seconds of single calls by variant, in the order taken; variants take turns in another order each round.

    Ends after `rounds` rounds, or after the first round that ends later than `seconds`; not before LEAST_ROUNDS.
    `flush`: before each call the cache is filled with something else; then a call's launches are not timed unless they
    are longer than that. Without a device: each variant is run once, and its list is empty.
    """
    taken: dict[str, list[float]] = {name: [] for name in variants}
    if not timed():
        for run in variants.values():
            run()
        return taken
    for run in variants.values():
        for _ in range(WARM_UP):
            run()
    torch.cuda.synchronize()
    order, begun = random.Random(0), time.monotonic()
    marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
    for done in range(rounds):
        if done >= LEAST_ROUNDS and time.monotonic() - begun > seconds:
            break
        for name in order.sample([*variants], len(variants)):
            marks.append((name, *_marked(variants[name], flush)))
        # The host's clock must not run ahead of what the device still has to do.
        torch.cuda.synchronize()
    for name, begin, end in marks:
        taken[name].append(begin.elapsed_time(end) / 1e3)
    return taken


def _marked(run: Callable[[], object], flush: bool) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if flush:
        if not _flushed:
            _flushed.append(torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda"))
        _flushed[0].zero_()
    begin.record()
    run()
    end.record()
    return begin, end


def spread(taken: Sequence[float]) -> dict[str, Any]:
    """Median, 20 % and 80 % of times in seconds, and how many there were; empty where none were taken."""
    if not taken:
        return {}
    ranked = sorted(taken)
    return {
        "seconds": statistics.median(ranked),
        "p20_p80": [ranked[round((len(ranked) - 1) * share)] for share in (0.2, 0.8)],
        "rounds": len(ranked),
    }


def peak_bytes(run: Callable[[], object]) -> int | None:
    """Most memory that a call's tensors took over what was there before; None without a device."""
    if not timed():
        run()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
