"""Private training in the user's own loop: a drop-in for Opacus' `PrivacyEngine`, with one backward pass.

The privacy unit is a row of the data set, or, with ids, whatever shares an id (a patient). Neighbouring
data sets differ by one unit added or removed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from synthward.engine.accounting import Accountant, Event, epsilon_of, event_from_dict
from synthward.engine.accounting.calibrate import calibrate_noise_of
from synthward.engine.accounting.events import StepsEvent
from synthward.engine.accounting.matrix import Strategy
from synthward.engine.checkpoint import load_checkpoint, restore_tensors, save_checkpoint, trainer_tensors
from synthward.engine.distributed.agreement import check_same
from synthward.engine.distributed.ledger import SharedLedger, share_ledger
from synthward.engine.distributed.ranks import Ranks
from synthward.engine.errors import CheckpointError, ConfigError, LedgerError
from synthward.engine.keys import KeySchedule
from synthward.engine.ledger import Ledger
from synthward.engine.loader import PoissonLoader, as_unit_ids, fingerprint, rows_of
from synthward.engine.planner import Explanation
from synthward.engine.session import PrivateOptimizer, PrivateSession
from synthward.engine.spec import ClipSpec, NoiseSpec, PerfSpec, SamplingSpec, check_positive
from synthward.engine.step import DPStep

logger = logging.getLogger("synthward")
# Steps that one line of the ledger pays for: a flush to disk per step would cost more than the step.
_LEASE_STEPS = 100


@dataclass
class _Lease:
    """What one module has leased of the ledger, and the steps it took of a mechanism that is charged as a whole."""

    part: str
    event: StepsEvent
    start: int = 0
    steps: int = 0
    taken: int = 0

    def close(self, ledger: Ledger | SharedLedger, step: int) -> None:
        """Give back what was not used by logical step `step`. A step before the lease (of a checkpoint loaded in
        between) has used nothing that the ledger does not know of."""
        if self.steps:
            ledger.close_lease(min(max(step - self.start, 0), self.steps), part=self.part)
            self.steps = 0


class PrivacyEngine:
    """Makes modules, optimizers and loaders private, and accounts for what they release.

    Args:
        accountant: "pld" (default), "rdp" or "prv".
        ledger: where each step is charged before it is released, or None (the accountant's memory alone). Several
            modules, of one engine or of several, may share one: `ledger.epsilon()` is then that of all of them. With
            several ranks: rank 0's, and None on the others.
        seed: None for keys from the operating system. A number makes noise and draws reproducible by
            anybody who knows it: for tests, not private.

    Where a process group of torch.distributed has been initialized, the processes train together: all call the same
    methods in the same order, each on its own part of every draw, and release what one process would (replicas, up to
    the order of sums). `save_checkpoint` and the optimizer's `state_dict` are calls of all of them, too.
    """

    def __init__(
        self, accountant: str = "pld", *, ledger: Ledger | None = None, seed: int | None = None
    ) -> None:
        self.ranks = Ranks.current()
        with self.ranks.as_one():
            if seed is not None and ledger is not None and ledger.is_private:
                raise ConfigError(
                    "seed: the ledger says that its keys are secret, and noise from a seed is not; leave the seed out, "
                    "or create the ledger with private=False"
                )
            self.accountant = Accountant(accountant)
        check_same(self.ranks, {"seed, or none": seed})
        self.ledger, self._seed = share_ledger(self.ranks, ledger), seed
        self._sessions: list[PrivateSession] = []
        self._leases: list[_Lease] = []
        self._epsilons: dict[tuple[object, float], float] = {}

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float,
        poisson_sampling: bool = True,
        clipping: str | ClipSpec = "flat",
        loss_reduction: str = "mean",
        sample_rate: float | None = None,
        expected_batch_size: float | None = None,
        unit_ids: Sequence[int] | Tensor | None = None,
        strategy: Strategy | None = None,
        period: int = 1,
        max_batch_size: int | None = None,
        max_units: int | None = None,
        arithmetic: str = "float",
        perf: PerfSpec | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> tuple[nn.Module, PrivateOptimizer, DataLoader[Any]]:
        """Make a training loop private; returns module (the same object), optimizer and loader.

        Args:
            module: its trainable parameters are found by capture; layers that mix rows are refused. The first axis
                of its arguments is that of the records, and an output that takes a gradient has it, too: rows are
                counted by it, and on outputs it is shown that records do not mix.
            optimizer: over exactly those parameters. Plain SGD, Adam and AdamW get the fused update.
            data_loader: with `poisson_sampling`, replaced by Poisson draws from its data set.
            noise_multiplier: noise standard deviation over `max_grad_norm`; 0 means epsilon = infinity.
            max_grad_norm: L2 bound of one unit's contribution to the summed gradient.
            poisson_sampling: False leaves the loader alone. No amplification is claimed then: every unit is
                charged as present in every step, and a removed unit is one whose rows stay in their batches
                at weight zero. Several backward passes in one step are then accepted, and a row that takes part in
                two of them counts twice, beyond `max_grad_norm`; under `engine.units(ids)` that is refused.
            clipping: the rule by name (`ClipSpec`: "flat", "per-layer", "automatic", "adaptive"), or a whole
                `ClipSpec`.
            loss_reduction: "mean" if the criterion averages over the rows present, "sum" if it adds them. It must
                be a sum or mean over rows of a loss of each row alone, inside the module or outside; the engine
                does not see a criterion. One that divides by a quantity of the batch breaks the bound:
                ``cross_entropy`` with ``weight=...``, or its mean over tokens with ``ignore_index``. Take
                ``reduction="none"``, average over each row's own tokens, and then take ``.mean()`` over rows.
            sample_rate: Poisson probability q. If None, the batch size over the number of units, which is
                thereby treated as public.
            expected_batch_size: public denominator of the mean gradient, in units; the loader's batch size
                if None. It is that of all ranks together; with `poisson_sampling=False`, where each rank has a loader
                of its own, the default is their sum.
            unit_ids: one integer id per row of the data set: the loader then draws whole units, and forward
                and backward run under `with engine.units():`.
            strategy: noise that is correlated over steps (`synthward.engine.correlation` makes strategies). Needs
                Poisson sampling, and every batch of the loader in turn.
            period: units fall into so many groups that take turns; no unit comes twice within `period` steps. The
                batch is then ``sample_rate`` of one group.
            max_batch_size, max_units: a draw of more units is cut to the first at random, for static shapes; the cost
                follows from the second, a public bound on the number of units.
            arithmetic: "discrete" releases integers on a grid, without any trace of floating-point sums (`NoiseSpec`).
            perf: how the step is computed: memory for norms, their method, what is kept and how (`PerfSpec`).
            grad_scaler: the scaler whose `scale(loss).backward()` and `step(optimizer)` the loop uses (fp16). Its
                scale stays as it is: give it an `init_scale` at which gradients neither vanish nor overflow. A
                unit that overflows is left out of the step.

        Raises:
            ConfigError: an argument that does not fit. UnsupportedOperationError: a layer that mixes rows.
        """
        with self.ranks.as_one():
            sampling = self._sampling(
                data_loader, poisson_sampling, sample_rate, expected_batch_size, unit_ids
            )
            sampling = _grouped(sampling, poisson_sampling, strategy, period, max_batch_size, max_units)
            noise = NoiseSpec(noise_multiplier, strategy, arithmetic)
            clip = _clip(max_grad_norm, clipping)
        core = self._core(module, optimizer, clip, noise, sampling, perf)
        return self._open(
            core, data_loader, loss_reduction, sampling, poisson_sampling, unit_ids, None, grad_scaler
        )

    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        max_grad_norm: float,
        poisson_sampling: bool = True,
        clipping: str | ClipSpec = "flat",
        loss_reduction: str = "mean",
        sample_rate: float | None = None,
        expected_batch_size: float | None = None,
        unit_ids: Sequence[int] | Tensor | None = None,
        strategy: Strategy | None = None,
        period: int = 1,
        max_batch_size: int | None = None,
        max_units: int | None = None,
        arithmetic: str = "float",
        perf: PerfSpec | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> tuple[nn.Module, PrivateOptimizer, DataLoader[Any]]:
        """As `make_private`, with the least noise that keeps `epochs` passes within the target.

        One pass is ``round(period / q)`` steps. The step after the last one raises `BudgetExceededError`.
        """
        with self.ranks.as_one():
            if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
                raise ConfigError(f"epochs: got {epochs!r}; give a whole number of at least 1")
            sampling = self._sampling(
                data_loader, poisson_sampling, sample_rate, expected_batch_size, unit_ids
            )
            sampling = _grouped(sampling, poisson_sampling, strategy, period, max_batch_size, max_units)
            per_epoch = max(1, round(period / sampling.sample_rate)) if poisson_sampling else len(data_loader)
            steps = epochs * per_epoch
            multiplier = calibrate_noise_of(
                lambda z: sampling.event(NoiseSpec(z, strategy, arithmetic), steps),
                target_epsilon,
                target_delta,
                self.accountant.kind,
                other_events=self._spent(),
            )
            noise = NoiseSpec(multiplier, strategy, arithmetic)
            clip = _clip(max_grad_norm, clipping)
        core = self._core(module, optimizer, clip, noise, sampling, perf)
        return self._open(
            core, data_loader, loss_reduction, sampling, poisson_sampling, unit_ids, steps, grad_scaler
        )

    def units(self, ids: Tensor | Sequence[int] | None = None) -> AbstractContextManager[None]:
        """Around forward and backward: rows of equal id are one privacy unit.

        Args:
            ids: one integer per row of the batch, in any order; None takes them from the loader's own draw.
        """
        if not self._sessions:
            raise ConfigError("units: call make_private first")
        return self._sessions[-1].units(None if ids is None else torch.as_tensor(ids))

    def explain(self) -> Explanation:
        """How the norm of each parameter was taken in the last step of the module made private last: method,
        floating-point operations, bytes moved, extra memory. Printed as a table."""
        return self._session().core.planner.explain()

    def get_epsilon(self, delta: float) -> float:
        """Epsilon spent so far at `delta`; infinite without noise. Reading it changes nothing."""
        events = self._spent()
        key = (tuple(events), delta)
        if key not in self._epsilons:
            self._epsilons = {key: epsilon_of(events, delta, self.accountant.kind)}
        return self._epsilons[key]

    def _spent(self) -> list[Event]:
        """What all modules took so far. Steps of one mechanism are no sum: they are one event for each module."""
        whole = [lease.event.with_steps(lease.taken) for lease in self._leases if lease.taken]
        return [*self.accountant.events, *whole]

    def save_checkpoint(self, path: Path | str) -> None:
        """Parameters, moments, step counter and spent budget of the module made private last, to one
        safetensors file.

        Raises:
            CheckpointError: in the middle of a step, or the file can not be written.
        """
        session = self._session()
        if session.core.has_sum:
            raise CheckpointError("a step is under way; call optimizer.step() before save_checkpoint()")
        info = {"events": [event.to_dict() for event in self._spent()], "kind": self.accountant.kind}
        if self.ledger is not None:
            info["ledger_head"] = self.ledger.head
        tensors = trainer_tensors(session.core, session.steps_done)
        self.ranks.lead(lambda: save_checkpoint(path, tensors, info))

    def load_checkpoint(self, path: Path | str) -> None:
        """Continue from `save_checkpoint`: the spent budget is added to this engine's own; keys are fresh
        ones.

        Raises:
            CheckpointError: the file is damaged, or of another network.
            LedgerError: this engine's ledger is not the one that the checkpoint was saved under, or is an older copy.
        """
        session = self._session()
        tensors, info = load_checkpoint(path)
        if not isinstance(info.get("events"), list):
            raise CheckpointError(f"{path}: holds no spent budget")
        head = info.get("ledger_head")
        if head is not None and self.ledger is not None and not self.ledger.holds(head):
            raise LedgerError(
                f"{self.ledger.path}: does not hold the head that {path} names; lines were cut off, or it is another "
                "ledger"
            )
        events = [event_from_dict(event) for event in info["events"]]
        session.core.source.check_may_go_back()
        session.discard()
        session.steps_done = restore_tensors(session.core, tensors)
        for event in events:
            self.accountant.compose(event)

    def close(self) -> None:
        """Give back what the ledger's last leases did not use; without it they stay charged whole."""
        if self.ledger is not None:
            for lease, session in zip(self._leases, self._sessions, strict=True):
                lease.close(self.ledger, session.steps_done)

    def _session(self) -> PrivateSession:
        if not self._sessions:
            raise ConfigError("call make_private first")
        return self._sessions[-1]

    def _charge(self, event: StepsEvent, step: int, max_steps: int | None, lease: _Lease) -> None:
        """Write the step down before anything of it is released."""
        if self.ledger is not None and not self.ledger.covers(step, event, part=lease.part):
            lease.close(self.ledger, step)
            count = _LEASE_STEPS if max_steps is None else min(_LEASE_STEPS, max_steps - step)
            self.ledger.lease(event, step, count, part=lease.part)
            lease.start, lease.steps = step, count
            # Counts this step as taken: a checkpoint loaded now may ask for it again.
            self.ledger.covers(step, event, part=lease.part)
        if event.is_one_mechanism:
            lease.taken += 1
        else:
            self.accountant.compose(event)

    def _sampling(
        self,
        loader: DataLoader[Any],
        poisson: bool,
        sample_rate: float | None,
        expected: float | None,
        unit_ids: Sequence[int] | Tensor | None,
    ) -> SamplingSpec:
        """Rate and public batch size. Without Poisson sampling q is 1: no amplification is claimed."""
        if expected is None:
            if loader.batch_size is None:
                raise ConfigError("expected_batch_size: give it, the loader has no batch_size")
            expected = loader.batch_size
            if not poisson:
                # Each rank has a loader of its own, and a step is of all their batches.
                expected *= self.ranks.world_size
        check_positive(expected, "expected_batch_size")
        if not poisson:
            if sample_rate is not None:
                raise ConfigError("sample_rate: means nothing with poisson_sampling=False; leave it out")
            return SamplingSpec(1.0, expected)
        if sample_rate is None:
            units = rows_of(loader) if unit_ids is None else len(set(torch.as_tensor(unit_ids).tolist()))
            if units == 0:
                raise ConfigError("data_loader: its data set is empty")
            sample_rate = min(1.0, expected / units)
            if self.ranks.is_main:
                logger.warning(
                    "make_private: sample_rate was not given and is the batch size over the number of units; "
                    "that number is thereby treated as public"
                )
        return SamplingSpec(sample_rate, expected)

    def _core(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        clip: ClipSpec,
        noise: NoiseSpec,
        sampling: SamplingSpec,
        perf: PerfSpec | None,
    ) -> DPStep:
        with self.ranks.as_one():
            if perf is not None and perf.keep == "recompute":
                raise ConfigError(
                    "perf: keep='recompute' needs PrivateTrainer, which runs the second backward pass"
                )
            if isinstance(optimizer, PrivateOptimizer):
                raise ConfigError("optimizer: is private already; give the original torch optimizer")
        # Each module has its own keys: two noise streams or two samplers never share words.
        if Ranks.current().world_size != self.ranks.world_size:
            raise ConfigError(
                "torch.distributed was initialized after PrivacyEngine was made; make it after that"
            )
        keys = (
            KeySchedule.shared(self.ranks)
            if self._seed is None
            else KeySchedule.reproducible(self._seed + len(self._sessions))
        )
        self._keys = keys
        return DPStep(
            module,
            optimizer,
            clip=clip,
            noise=noise,
            expected_batch_size=sampling.expected_batch_size,
            keys=keys,
            perf=perf,
            ranks=self.ranks,
        )

    def _open(
        self,
        core: DPStep,
        loader: DataLoader[Any],
        loss_reduction: str,
        sampling: SamplingSpec,
        poisson: bool,
        unit_ids: Sequence[int] | Tensor | None,
        max_steps: int | None,
        grad_scaler: torch.amp.GradScaler | None,
    ) -> tuple[nn.Module, PrivateOptimizer, DataLoader[Any]]:
        private_loader, records = None, ""
        with self.ranks.as_one():
            if poisson:
                ids = None if unit_ids is None else as_unit_ids(unit_ids, rows_of(loader))
                records = fingerprint(loader.dataset, ids) if self.ranks.world_size > 1 else ""
                private_loader = PoissonLoader(loader, sampling, self._keys.key("sampler"), ids, self.ranks)
        check_same(
            self.ranks,
            {
                "sampling": repr(sampling),
                "number of rows of the data set, or units of it": None
                if private_loader is None
                else private_loader.units,
                "records (each has the whole data set, in one order; the loader gives it its part of a draw)": records,
                "number of steps": max_steps,
            },
        )
        event = sampling.event(core.noise, 1)
        lease = _Lease("" if self.ledger is None else self.ledger.new_part(), event)
        if self.ledger is not None:
            self.ledger.add_key(self._keys.key_id, private=self._keys.is_private, part=lease.part)
        with self.ranks.as_one():
            session = PrivateSession(
                core,
                loss_reduction=loss_reduction,
                loader=private_loader,
                units_required=unit_ids is not None,
                charge=lambda step: self._charge(event, step, max_steps, lease),
                max_steps=max_steps,
                grad_scaler=grad_scaler,
            )
        self._sessions.append(session)
        self._leases.append(lease)
        return (
            core.module,
            PrivateOptimizer(session, core.optimizer),
            loader if private_loader is None else private_loader,
        )


def _grouped(
    sampling: SamplingSpec,
    poisson: bool,
    strategy: Strategy | None,
    period: int,
    max_batch_size: int | None,
    max_units: int | None,
) -> SamplingSpec:
    """The sampling with its groups and cap, which only the engine's own loader can keep to."""
    if not poisson and (strategy is not None or period != 1 or max_batch_size is not None):
        raise ConfigError(
            "poisson_sampling: strategy, period and max_batch_size need the engine's own draws; leave them out, or "
            "poisson_sampling as it is"
        )
    return replace(sampling, period=period, max_batch_size=max_batch_size, max_units=max_units)


def _clip(max_grad_norm: float, clipping: str | ClipSpec) -> ClipSpec:
    if isinstance(clipping, ClipSpec):
        if clipping.max_grad_norm != max_grad_norm:
            raise ConfigError("clipping: its max_grad_norm differs from max_grad_norm; give the same to both")
        return clipping
    return ClipSpec(max_grad_norm, clipping)
