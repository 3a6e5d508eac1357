"""All ranks train the same network by the same mechanism under the same key, step by step, or none of them goes on."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Set

import torch
import torch.distributed as dist
from torch import nn

from synthward.engine.distributed.exchange import sum_over
from synthward.engine.distributed.ranks import Ranks
from synthward.engine.errors import PrivacyError
from synthward.engine.keys import KeySchedule
from synthward.engine.spec import ClipSpec, NoiseSpec


def check_agreement(
    ranks: Ranks,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    keys: KeySchedule,
    clip: ClipSpec,
    noise: NoiseSpec,
    expected_batch_size: float,
) -> None:
    """`PrivacyError` that names what the ranks do not have in common. All ranks take part."""
    if ranks.world_size == 1:
        return
    parameters = [
        (name, tuple(p.shape), str(p.dtype), p.requires_grad, str(getattr(p, "placements", "whole")))
        for name, p in module.named_parameters()
    ]
    buffers = [(name, tuple(b.shape), str(b.dtype)) for name, b in module.named_buffers()]
    mine = {
        "key (draw it by KeySchedule.shared)": (keys.key_id, keys.is_private),
        "clipping": repr(clip),
        "noise": repr(noise),
        "expected batch size": expected_batch_size,
        "network (names, shapes and kinds of its parameters)": parameters,
        "network (names, shapes and types of its buffers)": buffers,
        "optimizer (class, settings, order of its parameters)": _settings(module, optimizer),
    }
    check_same(ranks, mine)


def processes() -> int:
    """Of torch's default group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def check_same(ranks: Ranks, mine: Mapping[str, object]) -> None:
    """`PrivacyError` that names the first entry that is not the same on all ranks. All ranks take part."""
    if ranks.world_size == 1:
        return
    everybody = ranks.gather(mine)
    for what in mine:
        if any(theirs[what] != everybody[0][what] for theirs in everybody):
            raise PrivacyError(
                f"the processes of this run do not have the same {what}; noise and sums would not fit together"
            )


def check_in_step(ranks: Ranks, marks: Mapping[str, int | float]) -> None:
    """`PrivacyError`, on all ranks, that names the first of the numbers that is not the same on all of them.

    A rank that has left out a batch or a step would add units of another draw to this one, where a unit that is in
    both counts twice. All ranks take part, and have met when it returns. Integers are below 2^63.
    """
    if ranks.world_size == 1:
        return
    mine = torch.tensor([_as_integer(mark) for mark in marks.values()], dtype=torch.int64)
    extremes = torch.cat([mine, -mine]).to(ranks.device)
    with ranks.exchanging():
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=ranks.group)
    highest, lowest = extremes.view(2, -1).tolist()
    for what, high, low in zip(marks, highest, lowest, strict=True):
        if high != -low:
            raise PrivacyError(
                f"the processes of this run are not at the same {what}: one of them has left out a batch or a step (a "
                "loop that skips empty batches, an exception that was caught). Every rank takes every batch and every "
                "step, without rows, too; end all processes and resume from the last checkpoint"
            )


def check_apart(ranks: Ranks, units: Set[int], *, has_nameless: bool) -> None:
    """`PrivacyError`, on all ranks, where a unit takes part in a step on two of them, or may. All ranks take part.

    Args:
        units: ids of this rank's units.
        has_nameless: whether rows without ids took part on this rank.
    """
    kinds = torch.tensor([float(bool(units)), float(has_nameless)], device=ranks.device)
    with_ids, without = sum_over(ranks, kinds).tolist()
    if not with_ids:
        return
    if without:
        raise PrivacyError(
            "units: some rows of this step have ids and others have none, so that a unit may be among both, and count "
            "twice. Run all passes of a step, on all ranks, under `with engine.units(ids):`, or none"
        )
    everybody = ranks.gather(units)
    if len(set().union(*everybody)) < sum(map(len, everybody)):
        raise PrivacyError(
            "a unit takes part on two ranks in one step: it is clipped on each, and counts twice. Give all rows of "
            "a unit to one rank"
        )


def _as_integer(mark: int | float) -> int:
    """A number of at least 0 by its bits, which are equal where it is."""
    if isinstance(mark, int):
        return mark
    (bits,) = struct.unpack("<q", struct.pack("<d", mark))
    return int(bits)


def _settings(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[object]:
    """Its class, the plain settings of its groups and the names of their parameters."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    plain: Callable[[object], bool] = lambda value: isinstance(value, bool | int | float | str | tuple)  # noqa: E731
    groups = [
        {key: value for key, value in group.items() if key != "params" and plain(value)}
        for group in optimizer.param_groups
    ]
    order = [[names.get(id(p), "?") for p in group["params"]] for group in optimizer.param_groups]
    return [type(optimizer).__qualname__, groups, order]
