"""All ranks train the same network by the same mechanism under the same key, or none of them begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

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
        (name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in module.named_parameters()
    ]
    mine = {
        "key (draw it by KeySchedule.shared)": (keys.key_id, keys.is_private),
        "clipping": repr(clip),
        "noise": repr(noise),
        "expected batch size": expected_batch_size,
        "network (names, shapes and kinds of its parameters)": parameters,
        "optimizer (class, settings, order of its parameters)": _settings(module, optimizer),
    }
    check_same(ranks, mine)


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
