"""One logical step: capture, norms, clip, weighted sums into one flat buffer, then noise and update."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from synthward.engine.capture import Batch, CaptureMode, CaptureState
from synthward.engine.compilers import as_written, take_out
from synthward.engine.contributions import Contributions, Groups
from synthward.engine.distributed.agreement import check_agreement, check_in_step, processes
from synthward.engine.distributed.exchange import sum_over
from synthward.engine.distributed.ranks import Ranks
from synthward.engine.distributed.sharded import ShardedParameters
from synthward.engine.errors import ConfigError, PrivacyError
from synthward.engine.flat import wrap_parameters
from synthward.engine.independence import IndependenceProbe
from synthward.engine.keys import KeySchedule
from synthward.engine.memory import keep_freed_memory
from synthward.engine.noise import DiscreteSums, NoiseSource
from synthward.engine.optim import make_updater
from synthward.engine.planner import Planner
from synthward.engine.products import Products
from synthward.engine.replay import tap
from synthward.engine.rules.registry import CHECKS, HANDLERS, HINTS, check_modules
from synthward.engine.spec import ClipSpec, NoiseSpec, PerfSpec


class DPStep:
    """The private step of one module and optimizer.

    Guarantees: what `release` adds to the parameters is a function of the sum over units of contributions of
    norm at most C, plus the noise of its `NoiseSpec` (one N(0, (sigma C)^2) per coordinate and step, or one of a
    correlated sequence), whatever the number of physical batches; noise is drawn at a (stream, step) that is never
    used again.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip: ClipSpec,
        noise: NoiseSpec,
        expected_batch_size: float,
        keys: KeySchedule,
        perf: PerfSpec | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = Ranks.current() if ranks is None else ranks
        with self.ranks.as_one():
            check_modules(module)
            take_out(module)
            noise.check(clip)
        keep_freed_memory()
        self._processes = processes()
        check_agreement(self.ranks, module, optimizer, keys, clip, noise, expected_batch_size)
        self.module, self.optimizer, self.clip, self.noise = module, optimizer, clip, noise
        self.flat = wrap_parameters(module, optimizer, self.ranks)
        self.updater = make_updater(self.flat, optimizer)
        names = [span.name for span in self.flat]
        self.planner = Planner(perf or PerfSpec(), names)
        self.groups = make_groups(clip, names)
        self.quantile = Quantile(clip, noise, expected_batch_size) if clip.clipping == "adaptive" else None
        products = Products(self.planner.perf.products)
        self.state = CaptureState([span.parameter for span in self.flat], names, products)
        self.state.start_pass = self.start_pass
        self.state.mode = CaptureMode(self.state, HANDLERS, CHECKS, HINTS)
        self.flat.watch(self.state)
        self.has_sum = self.is_last_pass = False
        #: Whether a pass of this step failed, so that units of it are missing here.
        self.is_broken = False
        #: Forward passes in training that no backward pass has ended.
        self.open: set[int] = set()
        # How often a step was begun afresh.
        self._dropped = 0
        self._grad_scale = 1.0 / expected_batch_size
        self.source = NoiseSource(noise, self.flat, keys)
        self.discrete = DiscreteSums(self.flat, clip) if noise.arithmetic == "discrete" else None
        self.sums = self.flat.sums if self.discrete is None else self.discrete.sums
        self._is_private = keys.is_private

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Forward passes inside are captured."""
        self._check_awaited()
        self.flat.check_unchanged(allow_frozen=True)
        check_modules(self.module)
        self.state.forward += 1
        if self.module.training and torch.is_grad_enabled():
            self.open.add(self.state.forward)
        self.state.rows_hint, self.state.forward_bytes, self.state.is_paused = None, 0, False
        self.state.provenance.begin(self.module)
        assert self.state.mode is not None
        try:
            # A compiled module would hide its calls from the capture: inside, it runs as it was written.
            with as_written(), self.state.mode:
                yield
        finally:
            self.state.provenance.clear()

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Around parts of a pass: if one fails, the step is refused until it was dropped, on all ranks."""
        try:
            yield
        except BaseException:
            self.is_broken = True
            raise

    def start_pass(
        self,
        batch: Batch,
        factors: list[tuple[Tensor, Tensor]] | None = None,
        *,
        measure_only: bool = False,
    ) -> Contributions:
        """The contributions of one backward pass over `batch`."""
        if self.quantile is not None:
            self.groups.bounds[0] = self.quantile.bound
        if not measure_only:
            self.sums.begin_pass(is_last=self.is_last_pass)
        return Contributions(
            self.state,
            batch,
            clip=self.clip,
            groups=self.groups,
            sums=self.sums,
            planner=self.planner,
            observe=None if self.quantile is None or factors is not None else self.quantile.observe,
            factors=factors,
            measure_only=measure_only,
        )

    def finish(self, contributions: Contributions | None) -> None:
        """Clip the units of one physical batch and add the weighted sums to the flat buffer."""
        self.has_sum = True
        if contributions is None:
            self.sums.begin_pass(is_last=self.is_last_pass)
            self.open.clear()
        else:
            self.open -= contributions.forwards
            with torch.no_grad():
                contributions.finish()
            contributions.check_finished()
            if self.discrete is not None:
                self.discrete.count(contributions.num_units, contributions.most_rows)
            self.state.consume(contributions.forwards)
        self.sums.end_pass()

    def release(self, *, step: int = 0, draw: int = -1) -> None:
        """Add noise, update the parameters, and leave the sum at zero. All ranks take part.

        Args:
            step: the logical step, as the caller counts them.
            draw: the number of the draw whose units were added up, where the caller knows it.

        Raises:
            PrivacyError: a parameter was added, frozen or moved, or has a gradient that came past the engine; ranks
                are not at the same step, draw or noise, or a pass failed on one of them.
        """
        self.check_coverage()
        if self.ranks.world_size == 1 and processes() > self._processes:
            raise PrivacyError(
                "torch.distributed was initialized after this trainer was made: each process would train and spend "
                "apart from the others. Make trainers and engines after it"
            )
        bound = self._sensitivity()
        std = bound * (self.noise if self.quantile is None else self.quantile).noise_multiplier
        stream, place = self.source.place
        marks: dict[str, int | float] = {
            "draw": draw,
            "step": step,
            "noise (stream)": stream,
            "noise (step)": place,
        }
        marks |= {"clipping bound": bound, "noise (standard deviation)": std}
        self.sums.complete(lambda: self._agree(marks))
        if self.quantile is not None:
            self.quantile.complete(self.ranks, self.flat.device)
            self.quantile.tap(is_private=self._is_private)
        tap("step", self.sums.flat, sensitivity=bound, is_private=self._is_private, noise_std=std)
        noise = self.source.next(std)
        with torch.no_grad():
            if self.quantile is not None:
                # The first index behind the parameters: no coordinate of theirs has it.
                self.quantile.release(self.source.scalar(noise, self.flat.size))
            if self.discrete is not None:
                self.discrete.release(noise)
                noise = replace(noise, std=0.0, variance=noise.std**2)
            self.updater.update(noise, self._grad_scale)
            if self.discrete is not None:
                self.discrete.finish()
        self.source.close()
        torch.autograd.graph.increment_version([span.parameter for span in self.flat])
        self.has_sum = self.is_broken = False
        self.open.clear()

    def _agree(self, marks: Mapping[str, int | float]) -> None:
        """All ranks are at the same marks, and none has lost a pass of this step: what its loop left out because of one
        unit's rows would be other units' contributions."""
        lost = {
            "number of failed passes": int(self.is_broken),
            "number of forward passes in training without a backward pass": len(self.open),
            "number of dropped steps": self._dropped,
        }
        check_in_step(self.ranks, {**marks, **lost})
        self._check_whole()

    def _check_whole(self) -> None:
        """What failed because of one unit's rows would leave out other units."""
        if self.is_broken:
            raise PrivacyError(
                "a pass of this step failed and the loop went on; drop the step, on all ranks where there are several "
                "(PrivateTrainer.discard, zero_grad of the private optimizer), and begin it afresh"
            )

    @property
    def _is_exchanged(self) -> bool:
        """Whether ranks wait for each other in each pass."""
        return isinstance(self.flat, ShardedParameters) and self.ranks.world_size > 1

    def _check_awaited(self) -> None:
        """A rank that others wait for in a pass that failed here ends, so that they notice."""
        if self.is_broken and self._is_exchanged:
            raise PrivacyError(
                "a pass failed and the loop went on, while other ranks wait for this one in theirs (sharded parameters "
                "are exchanged in each pass); end all processes and resume from the last checkpoint"
            )

    def _sensitivity(self) -> float:
        """L2 change of the sum when one unit is added or removed, rounding to a grid included."""
        if self.quantile is not None:
            return self.quantile.bound
        return self.clip.sensitivity() if self.discrete is None else self.discrete.sensitivity

    def adapt(self, noise: NoiseSpec, expected_batch_size: float) -> None:
        """Other noise and another public batch size from the next step on.

        Raises:
            ConfigError: with a strategy or adaptive clipping, whose noise is of all steps together.
        """
        if noise.strategy is not None or self.quantile is not None:
            raise ConfigError(
                "adapt: correlated noise and adaptive clipping are fixed for a run; use fresh noise and flat clipping"
            )
        self.noise, self._grad_scale = noise, 1.0 / expected_batch_size

    def check_coverage(self) -> None:
        """Every trainable parameter is tracked, in place, and has no gradient of its own; nobody waits for this, and on
        one process no pass of the step has failed."""
        self._check_awaited()
        if self.ranks.world_size == 1:
            self._check_whole()
        self.state.check_unspoilt()
        self.flat.check_unchanged(allow_frozen=False)
        self.flat.check_in_place()

    def discard(self, *, is_between: bool = False) -> None:
        """Begin the logical step afresh; where ranks train together, all of them. `is_between`: the backward pass of
        the last forward pass may be still to come."""
        to_come = self.open & {self.state.forward} if is_between else set()
        is_new = self.has_sum or self.is_broken or self.open != to_come
        self.drop()
        # Not where that is refused.
        self.open, self._dropped = to_come, self._dropped + is_new
        self.is_broken = self.is_broken and self._is_exchanged

    def restart(self) -> None:
        """Begin the logical step afresh where all ranks do, since its release was refused on all of them."""
        self.drop()
        self.is_broken, self._dropped = self.is_broken and self._is_exchanged, 0
        self.open.clear()

    def drop(self) -> None:
        """Forget what was accumulated since the last release."""
        is_spoilt = self.state.abandon()
        if self.quantile is not None:
            self.quantile.discard()
        if self.discrete is not None:
            self.discrete.discard()
        if self.has_sum or is_spoilt:
            self.flat.sums.drop()
            self.has_sum = False


def probe_of(step: DPStep) -> IndependenceProbe:
    """The probe of a step's passes; of sharded parameters all ranks take part in each."""
    flat = step.flat
    return IndependenceProbe(step.state, flat.any_rank if isinstance(flat, ShardedParameters) else None)


class Quantile:
    """The clipping bound that follows a quantile of the norms (Andrew et al. 2021, algorithm 1).

    In each step the sum over units of ``1[norm <= C] - 1/2`` (sensitivity 1/2) is released with noise of standard
    deviation `count_noise`; together with a sum at multiplier z' it is one Gaussian mechanism of multiplier z where
    ``z'^-2 + (2 count_noise)^-2 = z^-2``. So the step costs what a step at z costs, and the sum carries a little
    more noise.
    """

    def __init__(self, clip: ClipSpec, noise: NoiseSpec, expected_batch_size: float) -> None:
        self.bound, self._clip, self._expected = clip.max_grad_norm, clip, expected_batch_size
        self._count_noise = expected_batch_size / 20.0 if clip.count_noise is None else clip.count_noise
        z = noise.noise_multiplier
        if z == 0.0:
            self._count_noise = 0.0
            self.noise_multiplier = 0.0
        elif 2.0 * self._count_noise <= z:
            raise ConfigError(
                f"count_noise: {self._count_noise:g} units is too little beside a noise multiplier of {z:g}; give "
                f"more than {z / 2:g} (or a larger expected batch)"
            )
        else:
            self.noise_multiplier = (z**-2 - (2.0 * self._count_noise) ** -2) ** -0.5
        self._total: Tensor | None = None

    def observe(self, index: int, norms: Tensor, counts: Tensor) -> None:
        """Count the units of a physical batch: norms [U], and which of them count [U]."""
        below = (norms <= self.bound).float() - 0.5
        found = torch.where(counts, below, torch.zeros_like(below)).double().sum()
        self._total = found if self._total is None else self._total + found

    def complete(self, ranks: Ranks, device: torch.device) -> None:
        """Add up the counts of all ranks, on the device that all have theirs on."""
        if ranks.world_size > 1:
            total = (
                torch.zeros((), dtype=torch.float64, device=device) if self._total is None else self._total
            )
            self._total = sum_over(ranks, total)

    def tap(self, *, is_private: bool) -> None:
        """Show the count to a recording (`synthward.engine.replay`); it is released with the sum, after this."""
        total = torch.zeros((), dtype=torch.float64) if self._total is None else self._total
        self._total = tap("count of a step", total, sensitivity=0.5, is_private=is_private)

    def release(self, gaussian: float) -> None:
        """Move the bound by the noisy share; `gaussian` is one standard draw."""
        total = 0.0 if self._total is None else float(self._total)
        share = (total + self._count_noise * gaussian) / self._expected + 0.5
        moved = self.bound * math.exp(-self._clip.quantile_rate * (share - self._clip.target_quantile))
        self.bound = min(max(moved, 1e-12), 1e12)
        self._total = None

    def discard(self) -> None:
        self._total = None


def make_groups(clip: ClipSpec, names: list[str]) -> Groups:
    """The clipping groups of parameters with these names.

    Raises:
        ConfigError: a group without a parameter.
    """
    if clip.clipping == "per-layer":
        keys = [re.sub(r"\.?parametrizations\.\w+$", "", name.rpartition(".")[0]) for name in names]
    elif clip.clipping == "grouped":
        keys = [next((g for g in clip.groups if name.startswith(g)), "(the rest)") for name in names]
        for group in clip.groups:
            if group not in keys:
                raise ConfigError(f"groups: no trainable parameter's name starts with {group!r}")
    else:
        keys = ["all"] * len(names)
    distinct = list(dict.fromkeys(keys))
    bound = clip.max_grad_norm / math.sqrt(len(distinct))
    # Rounded down, so that the squares of the bounds never add up to more than that of the whole.
    bound = bound if len(distinct) == 1 else math.nextafter(bound, 0.0) * (1.0 - 2.0**-50)
    return Groups([distinct.index(key) for key in keys], [bound] * len(distinct), distinct)
