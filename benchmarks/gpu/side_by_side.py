"""Steps of one model side by side: memory of each alone, then times in turns, as ratios to one of them round by round.

Where a step that must run does not fit the device, the batch is halved for all of them, and the row says so.
"""

from __future__ import annotations

import contextlib
import gc
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.clock import interleaved, spread, timed
from benchmarks.gpu.models import losses_of, parameter_counts, shape_text
from benchmarks.gpu.worker import one_line
from benchmarks.models import Workload
from benchmarks.steps import CLIP, LEARNING_RATE, NOISE

PLAIN, PRIVATE = "plain", "private"
# A turn is of so many steps that it lasts longer than what waiting for the device costs.
_TURN_SECONDS, _MOST_STEPS = 0.03, 20
_ROUNDS, _SECONDS = 30, 3.0
NO_ROOM = "out of memory"
# Of the device's memory, what networks that wait for their turn and the one that runs may take together.
_ROOM = 0.85

MakeOptimizer = Callable[[list[nn.Parameter], bool], torch.optim.Optimizer]


def adam(parameters: list[nn.Parameter], fused: bool) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=fused)


@dataclass(frozen=True)
class Setup:
    """What all variants of a step have in common: the network's first weights, the batch, the optimizer.

    bf16 is autocast over fp32 weights; `noise` (over the bound) and `clip` (the bound) are those of private steps.
    """

    work: Workload
    batch: int
    dtype: torch.dtype
    device: str
    optimizer: MakeOptimizer = adam
    noise: float = NOISE
    clip: float = CLIP

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        with torch.device(self.device):
            return self.work.build()

    def data(self) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        with torch.device(self.device):
            return self.work.data(self.batch)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device, self.dtype)

    def losses(self, network: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        with self.precision():
            return losses_of(self.work, network, batch)

    def optimizer_of(self, network: nn.Module, *, fused: bool) -> torch.optim.Optimizer:
        """Over what is trained; `fused` where the device has such a one."""
        trained = [p for p in network.parameters() if p.requires_grad]
        return self.optimizer(trained, fused and self.device == "cuda")


@dataclass(frozen=True)
class Made:
    """A step that can be taken, the network that it trains, and how it says it works, if it does."""

    step: Callable[[], object]
    network: nn.Module
    explain: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Variant:
    """A way to take a step. `warm_up` steps are taken before any is timed; `limit`: seconds for all of that."""

    make: Callable[[Setup, tuple[Tensor, ...]], Made]
    warm_up: int = 3
    limit: float = math.inf


@dataclass
class Alone:
    """A variant by itself: bytes that it holds between steps, most of its tensors, most that it has reserved (None
    where there is no device), seconds of a step, and what it says of itself."""

    held: int | None
    peak: int | None
    reserved: int | None
    seconds: float
    said: Any = None


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError where what is inside takes longer; of the main thread alone."""
    if not math.isfinite(seconds):
        yield
        return

    def ring(*_: object) -> None:
        raise TimeoutError(f"longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def free() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if timed():
        torch.cuda.empty_cache()


def begin(variant: Variant, setup: Setup, batch: tuple[Tensor, ...]) -> Made:
    """The step, made and warmed up within its time."""
    begun = time.monotonic()
    try:
        with time_limit(variant.limit):
            made = variant.make(setup, batch)
            for _ in range(variant.warm_up):
                made.step()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # What compiles may hide what ended it.
        if time.monotonic() - begun >= variant.limit:
            raise TimeoutError(f"not compiled within {variant.limit:.0f} s") from error
        raise
    return made


def measure_alone(variant: Variant, setup: Setup, batch: tuple[Tensor, ...]) -> Alone:
    """Memory and about the time of a step, with nothing else on the device but the batch."""
    free()
    if not timed():
        made = begin(variant, setup, batch)
        return Alone(None, None, None, 0.0, made.explain() if made.explain else None)
    _fill_workspaces(setup)
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    # The peak is over all of it: what a recorded graph needs shows only while it is recorded.
    made = begin(variant, setup, batch)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    made.step()
    torch.cuda.synchronize()
    return Alone(
        torch.cuda.memory_allocated() - allocated,
        torch.cuda.max_memory_allocated() - allocated,
        torch.cuda.max_memory_reserved() - reserved,
        time.perf_counter() - begun,
        made.explain() if made.explain else None,
    )


def _fill_workspaces(setup: Setup) -> None:
    """The library of products keeps memory of its own from its first call on, which is nobody's."""
    for dtype in (torch.float32, setup.dtype):
        one = torch.ones(64, 64, device=setup.device, dtype=dtype, requires_grad=True)
        (one @ one).sum().backward()
    torch.cuda.synchronize()
    free()


def in_groups(
    alone: dict[str, Alone], base: Sequence[str], room: float | None = None
) -> list[dict[str, Alone]]:
    """Variants that fit the device together, `base` among each of them; all of them where memory is not measured."""
    if room is None:
        room = _ROOM * torch.cuda.get_device_properties(0).total_memory if timed() else math.inf
    first = {name: alone[name] for name in base if name in alone}
    groups: list[dict[str, Alone]] = []
    for name, found in alone.items():
        if name in first:
            continue
        if groups and _together({**groups[-1], name: found}) <= room:
            groups[-1][name] = found
        else:
            groups.append({**first, name: found})
    return groups or [first]


def _together(group: dict[str, Alone]) -> float:
    held = sum(found.held or 0 for found in group.values())
    return held + max((found.reserved or 0) - (found.held or 0) for found in group.values())


def take_turns(
    variants: dict[str, Variant], alone: dict[str, Alone], setup: Setup, batch: tuple[Tensor, ...]
) -> dict[str, list[float]]:
    """Seconds of a step by variant, turn by turn; a turn is some steps from an idle device to an idle device."""
    free()
    steps = {name: begin(variants[name], setup, batch).step for name in alone}
    slowest = max(found.seconds for found in alone.values())
    count = min(_MOST_STEPS, max(1, math.ceil(_TURN_SECONDS / slowest))) if slowest else 1
    turns = {name: lambda step=step: _turn(step, count) for name, step in steps.items()}
    taken = interleaved(turns, _ROUNDS, _SECONDS, flush=False)
    return {name: [seconds / count for seconds in own] for name, own in taken.items()}


def _turn(step: Callable[[], object], count: int) -> None:
    if timed():
        torch.cuda.synchronize()
    for _ in range(count):
        step()
    if timed():
        torch.cuda.synchronize()


NO_CLIP = 1e6


def disagreement(
    variant: Variant, reference: Variant, setup: Setup, *, clip: float = NO_CLIP, steps: int = 3
) -> float:
    """How far apart two variants are after some steps of plain gradient descent without noise, over how far the
    reference went. What trains the same thing gives rounding."""
    setup = replace(setup, optimizer=_descent, noise=0.0, clip=clip)
    begun, there, here = (
        _after(made, setup, count) for made, count in ((reference, 0), (reference, steps), (variant, steps))
    )
    return float((here - there).norm() / (there - begun).norm())


def _descent(parameters: list[nn.Parameter], fused: bool) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def _after(variant: Variant, setup: Setup, steps: int) -> Tensor:
    """Trained parameters after so many steps, float64."""
    made = variant.make(setup, setup.data())
    for _ in range(steps):
        made.step()
    trained = [p.detach().flatten() for p in made.network.parameters() if p.requires_grad]
    return torch.cat(trained).double()


def compare(
    setup: Setup, variants: dict[str, Variant], *, base: Sequence[str], must: Sequence[str]
) -> dict[str, Any]:
    """All that was found of the variants.

    Args:
        base: what others are compared with, first of all; their ratios are to `base`, round by round.
        must: those for which the batch is halved if they run out of memory.

    Raises:
        The error of the first of `base`, without which nothing can be compared.
    """
    halved: list[dict[str, Any]] = []
    while True:
        batch = setup.data()
        alone, failed = _each_alone(setup, variants, batch, must)
        too_large = [name for name in must if failed.get(name) == NO_ROOM]
        if not too_large or setup.batch == 1:
            break
        halved.append({"batch": setup.batch, "out_of_memory": too_large[0]})
        setup = replace(setup, batch=setup.batch // 2)
    if base[0] not in alone:
        raise RuntimeError(f"{base[0]}: {failed[base[0]]}")
    taken: list[dict[str, list[float]]] = []
    for group in in_groups(alone, base) if timed() else []:
        try:
            taken.append(take_turns(variants, group, setup, batch))
        except torch.AcceleratorError:
            raise
        except Exception as error:
            why = NO_ROOM if isinstance(error, torch.OutOfMemoryError) else one_line(error)
            failed |= {name: f"in turns: {why}" for name in group if name not in base}
    trained, parameters = parameter_counts(setup.work)
    return {
        "dtype": str(setup.dtype).removeprefix("torch."),
        "batch": setup.batch,
        "halved": halved,
        "shape": shape_text(setup.work, setup.batch),
        "parameters": parameters,
        "trained": trained,
        "variants": {
            **{name: _found(name, alone, taken, base) for name in alone if name not in failed},
            **{name: {"failed": why} for name, why in failed.items()},
        },
    }


def _each_alone(
    setup: Setup, variants: dict[str, Variant], batch: tuple[Tensor, ...], must: Sequence[str]
) -> tuple[dict[str, Alone], dict[str, str]]:
    """What was found of each variant, or why it can not run; ends where the batch has to be halved."""
    alone: dict[str, Alone] = {}
    failed: dict[str, str] = {}
    for name, variant in variants.items():
        try:
            alone[name] = measure_alone(variant, setup, batch)
        except torch.OutOfMemoryError:
            failed[name] = NO_ROOM
        except torch.AcceleratorError:  # a fault in a kernel: the device answers no more
            raise
        except Exception as error:
            failed[name] = one_line(error)
        if name in must and failed.get(name) == NO_ROOM and setup.batch > 1:
            break
    return alone, failed


def _found(
    name: str, alone: dict[str, Alone], taken: list[dict[str, list[float]]], base: Sequence[str]
) -> dict[str, Any]:
    own = alone[name]
    row: dict[str, Any] = {"peak_bytes": own.peak, "held_bytes": own.held, "reserved_bytes": own.reserved}
    row |= {} if own.said is None else {"methods": own.said}
    turns = next((group for group in taken if group.get(name)), None)
    if turns is None:
        return row
    row |= spread(turns[name])
    for other in base:
        if other == name or other not in turns:
            continue
        ratios = sorted(mine / theirs for mine, theirs in zip(turns[name], turns[other], strict=True))
        key = "ratio" if other == base[0] else f"over {other}"
        row[key] = statistics.median(ratios)
        row[f"{key}, p20_p80"] = [ratios[round((len(ratios) - 1) * share)] for share in (0.2, 0.8)]
    first = alone[base[0]].peak
    if own.peak is not None and first:
        row["peak_ratio"] = own.peak / first
    return row
