"""The physical batch that fits, and what a training with it needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

from synthward.engine.estimate.cost import Estimate, memory_of, methods_of, step_of
from synthward.engine.estimate.rehearsal import Rehearsal, rehearse, shape_of
from synthward.engine.estimate.setting import Device, Setting, Workload

# Draws of the sampler that one pass over static batches is made for, in standard deviations over the mean.
_REACH = 2.5
# Sizes that are rehearsed for the memory of one unit more.
_FEW, _MORE = 2, 6


def estimate(workload: Workload, setting: Setting, device: Device) -> Estimate:
    """Memory, operations and time of a training; allocates next to nothing.

    Raises:
        UnsupportedOperationError: an operation that the engine has no rule for.
    """
    shape = shape_of(workload)
    # A rank has so many units in most steps.
    units = math.ceil((setting.batch + _REACH * math.sqrt(setting.batch) + 1.0) / setting.ranks)

    @cache
    def rehearsed(size: int) -> Rehearsal:
        return rehearse(workload, size, setting, device)

    def total(size: int) -> int:
        return memory_of(shape, setting, device, rehearsed(size)).total

    most = _largest(total, device.memory, units)
    found = rehearsed(static_size(units, setting.physical_batch_size or max(most, 1)))
    memory = memory_of(shape, setting, device, found)
    batches = math.ceil(units / found.units)
    step = step_of(shape, setting, device, found, batches)
    return Estimate(
        parameters=shape.total,
        physical_batch_size=found.units,
        physical_batches=batches,
        largest_physical_batch_size=most,
        fits=memory.total <= device.memory,
        memory=memory,
        methods=methods_of(shape, found.choices),
        step=step,
        days=setting.steps * step.seconds / 86400.0,
        assumptions=(*workload.assumptions, *_assumptions(setting, device)),
    )


def static_size(units: int, largest: int) -> int:
    """Units of each of the fewest batches of at most `largest` that hold `units`."""
    return math.ceil(units / math.ceil(units / largest))


def _largest(total: Callable[[int], int], memory: float, units: int) -> int:
    """The largest physical batch of at most `units` whose `total` is within `memory`, 0 if there is none."""
    few, more = total(_FEW), total(_MORE)
    each = max((more - few) / (_MORE - _FEW), 1.0)
    size = max(0, min(units, math.floor((memory - few) / each) + _FEW))
    while size > 0:
        needed = total(size)
        if needed <= memory:
            break
        # Memory grows with the size, and not much more slowly than it does.
        size = min(size - 1, math.floor(size - (needed - memory) / each))
    return max(size, 0)


def _assumptions(setting: Setting, device: Device) -> list[str]:
    own = "norms and sums" if device.kind == "cpu" else "norms and sums of fp32 operands"
    told = [
        f"products at {device.flops / 1e12:.3g} TFLOP/s ({own}: {device.exact_flops / 1e12:.3g}), other "
        f"operations at {device.bandwidth / 1e9:.3g} GB/s of memory traffic, one after the other",
        "Adam; noise in float arithmetic, fresh in each step",
        "a step of average size and a few more; loading and checkpoints take no time",
        "memory of the process before the network is built (Python, libraries) is not counted",
    ]
    if device.kind == "cpu":
        told.append("convolutions work on copies of their operands")
    else:
        told.append("working memory of the device's libraries is not counted; attention is of the flash kind")
    if setting.ranks > 1:
        told.append(
            f"ranks exchange at {device.link / 1e9:.3g} GB/s each, and nothing of it is hidden behind computing"
        )
    if setting.precision == "bf16":
        told.append(_half_precision(setting, device))
    if setting.offload:
        told.append(
            f"parameters, sums and moments are on the host (CPUOffloadPolicy), which is reached at "
            f"{device.link / 1e9:.3g} GB/s"
        )
    return told


def _half_precision(setting: Setting, device: Device) -> str:
    if setting.perf.keep == "bf16":
        kept = "in bf16"
    elif device.kind == "cpu":
        kept = "in fp32, as a CPU measures it, unless keep is bf16"
    else:
        kept = "in bf16 where the network multiplies in it, else in fp32 (keep bf16: all of it)"
    told = f"bf16 by autocast; what waits for the clip is {kept}"
    if device.kind == "cpu":
        return told
    return f"{told}; what a GPU's autocast copies to fp32 and a CPU's does not (losses, norms) is not counted"
