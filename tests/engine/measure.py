"""What the engine measured and summed in one noiseless pass, read before anything is released."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from synthward.engine import KeySchedule, PerfSpec, PrivacyPlan, PrivateTrainer
from tests.engine.nets import row_losses, unit_losses
from tests.oracles import clip_vector, per_unit_gradients

# The loss of each unit, [U], of a network, its rows and how many of them each unit owns.
UnitLosses = Callable[[nn.Module, Tensor, Sequence[int]], Tensor]


@dataclass(frozen=True)
class Reading:
    """One pass over one physical batch; a clipping group a row.

    ``sums`` [P] are in the order of ``module.parameters()``, ``group_of`` [P] is each coordinate's clipping group,
    ``bounds`` [G] the groups' own bounds. ``sq_norms``, ``upper`` and ``factors`` [G, U] are the squared norms as
    measured, the norms after the bound on their rounding, and the clip factors.
    """

    sums: np.ndarray
    group_of: np.ndarray
    bounds: list[float]
    sq_norms: np.ndarray
    upper: np.ndarray
    factors: np.ndarray


def read_pass(
    module: nn.Module,
    x: Tensor,
    counts: Sequence[int],
    bound: float,
    *,
    clipping: str = "flat",
    autocast: torch.dtype | None = None,
    uniform: bool = False,
    unit_mask: Tensor | None = None,
    perf: PerfSpec | None = None,
    losses_of: UnitLosses = unit_losses,
) -> Reading:
    """A pass over a copy of `module`; `uniform` gives the layout by rows per unit instead of by offsets."""
    module = copy.deepcopy(module)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
    plan = PrivacyPlan(0.1, 0.0, bound, 10, 1.0, clipping)
    trainer = PrivateTrainer(module, optimizer, plan, keys=KeySchedule.from_os(), perf=perf)
    core, passes, upper = trainer._step, [], {}
    start = core.state.start_pass

    def observed(*args, **kwargs):
        made = start(*args, **kwargs)
        made._observe = lambda index, norms, counted: upper.update({index: norms})
        passes.append(made)
        return made

    core.state.start_pass = observed
    with nullcontext() if autocast is None else torch.autocast("cpu", autocast), trainer.capture():
        losses = losses_of(module, x, counts)
    where = {"rows_per_unit": counts[0]} if uniform else {"offsets": torch.tensor([0, *counts]).cumsum(0)}
    trainer.backward(losses, unit_mask=unit_mask, **where)
    groups, units = core.groups, len(counts)
    width = [span.parameter.numel() for span in core.flat]
    sums = torch.cat([total.flatten() for total in core.flat.sums]).double().numpy().copy()
    if not passes:
        # No row, and so no backward pass.
        empty = np.zeros((len(groups.bounds), units))
        return Reading(sums, np.repeat(groups.of_position, width), groups.bounds, empty, empty, empty)
    (found,) = passes
    return Reading(
        sums=sums,
        group_of=np.repeat(groups.of_position, width),
        bounds=groups.bounds,
        sq_norms=torch.stack([group.sq_norms for group in found._states]).double().numpy(),
        upper=torch.stack([upper[index] for index in range(len(groups.bounds))]).double().numpy(),
        factors=torch.stack([found._found[index][0] for index in range(len(groups.bounds))]).double().numpy(),
    )


def unit_gradients(module: nn.Module, x: Tensor, counts: Sequence[int]) -> np.ndarray:
    """The float64 loop: the gradient of each unit's own loss, [U, P]; zeros for a unit without rows."""
    parts = [part for part in torch.split(x, list(counts)) if len(part)]
    found = per_unit_gradients(module, lambda net, part: row_losses(net, part).sum(), parts)
    return _with_empty(found, module, counts)


def plain_gradients(
    module: nn.Module, x: Tensor, counts: Sequence[int], autocast: torch.dtype | None = None
) -> np.ndarray:
    """The same by plain autograd, one unit at a time, in fp32 or under autocast."""
    twin, found = copy.deepcopy(module), []
    trainable = [p for p in twin.parameters() if p.requires_grad]
    for part in torch.split(x, list(counts)):
        if len(part):
            with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
                loss = row_losses(twin, part).sum()
            grads = torch.autograd.grad(loss, trainable, materialize_grads=True)
            found.append(torch.cat([grad.double().flatten() for grad in grads]).numpy())
    return _with_empty(found, module, counts)


def _with_empty(found: list[np.ndarray], module: nn.Module, counts: Sequence[int]) -> np.ndarray:
    """Gradients [U, P], with zeros for the units without rows."""
    width = sum(p.numel() for p in module.parameters() if p.requires_grad)
    gradients = np.zeros((len(counts), width))
    for unit, gradient in zip(np.flatnonzero(counts), found, strict=True):
        gradients[unit] = gradient
    return gradients


def group_norms(gradients: np.ndarray, group_of: np.ndarray) -> np.ndarray:
    """Norms [G, U] of gradients [U, P], group by group."""
    return np.stack([np.linalg.norm(gradients[:, group_of == g], axis=1) for g in range(group_of.max() + 1)])


def clipped_by_group(gradients: np.ndarray, group_of: np.ndarray, bounds: Sequence[float]) -> np.ndarray:
    """Gradients [U, P] that are clipped group by group."""
    clipped = np.zeros_like(gradients)
    for index, bound in enumerate(bounds):
        of_group = group_of == index
        for unit, gradient in enumerate(gradients):
            clipped[unit, of_group] = clip_vector(gradient[of_group], bound)
    return clipped


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """L2 error, relative to the expectation where it is not zero."""
    return float(np.linalg.norm(found - expected) / (np.linalg.norm(expected) or 1.0))
