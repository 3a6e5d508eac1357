"""The trainer that generators use: per-unit losses in, private updates out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from synthward.engine.capture import Batch
from synthward.engine.checkpoint import restore_tensors, trainer_tensors
from synthward.engine.compiled import CompiledPass, Given
from synthward.engine.distributed.agreement import check_same
from synthward.engine.distributed.ledger import SharedLedger, check_ledger
from synthward.engine.distributed.ranks import Ranks
from synthward.engine.distributed.sharded import ShardedParameters
from synthward.engine.errors import (
    BudgetExceededError,
    CheckpointError,
    ConfigError,
    LedgerError,
    PrivacyError,
    UnsupportedOperationError,
)
from synthward.engine.keys import KeySchedule
from synthward.engine.layout import Layout
from synthward.engine.ledger import Ledger
from synthward.engine.plan import PrivacyPlan
from synthward.engine.planner import Explanation
from synthward.engine.spec import PerfSpec, check_positive
from synthward.engine.step import DPStep, probe_of


class PrivateTrainer:
    """Trains one module by DP-SGD as its plan says.

    A logical step is any number of physical batches (`capture` the forward pass, then `backward`), then
    `apply`::

        with trainer.capture():
            losses = loss_of_each_unit(module, batch)        # [U]
        trainer.backward(losses, rows_per_unit=4, unit_mask=mask)
        trainer.apply()

    Args:
        module: its parameters become views of one flat buffer; they keep their names and shapes.
        optimizer: over exactly the trainable parameters; learning rates may be edited between steps.
        plan: the mechanism, and the number of steps that may be taken.
        keys: source of the noise key.
        ledger: where steps are paid for, or None (then nothing is recorded: tests, or a caller that
            accounts).
        perf: how the step is computed (memory against time).
        ranks: the processes that train together, each on whole units of its own; None: those of torch's default group,
            if there is one. A module on which `fully_shard` was called stays sharded.

    Guarantees:
        - one unit moves the sum that is released by at most ``plan.max_grad_norm`` (L2);
        - exactly one Gaussian draw per coordinate and logical step, empty batches included;
        - the sum is divided by ``plan.expected_batch_size``, never by the number of units present;
        - the same noise, and the same release up to the order of sums, for any number of ranks;
        - no step beyond ``plan.steps``, and none that no lease of the ledger covers.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        plan: PrivacyPlan,
        *,
        keys: KeySchedule,
        ledger: Ledger | SharedLedger | None = None,
        perf: PerfSpec | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.plan, self.ledger, self.perf = plan, ledger, perf or PerfSpec()
        self.ranks = Ranks.current() if ranks is None else ranks
        check_ledger(self.ranks, ledger)
        check_same(self.ranks, {"plan": repr(plan), "way to compute a step (PerfSpec)": repr(self.perf)})
        self._step = DPStep(
            module,
            optimizer,
            clip=plan.clip,
            noise=plan.noise,
            expected_batch_size=plan.expected_batch_size,
            keys=keys,
            perf=self.perf,
            ranks=self.ranks,
        )
        self._probe = probe_of(self._step)
        self._layouts: dict[tuple[int, int], Layout] = {}
        self._steps_done = 0

    @property
    def steps_done(self) -> int:
        """Logical steps applied so far, those before a checkpoint included."""
        return self._steps_done

    def explain(self) -> Explanation:
        """How the norm of each parameter was taken in the last step: method, floating-point operations, bytes
        moved, extra memory. Printed as a table."""
        return self._step.planner.explain()

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Forward passes of the module inside this context are captured."""
        with self._step.passing(), self._step.capture():
            yield

    def backward(
        self,
        losses: Tensor,
        *,
        rows_per_unit: int | None = None,
        offsets: Tensor | None = None,
        unit_mask: Tensor | None = None,
        loss_scale: float = 1.0,
        is_last: bool = False,
    ) -> None:
        """One backward pass over a physical batch; each unit is clipped and added to the step's sum.

        Args:
            losses: [U], the loss of each unit, of a forward pass under `capture`.
            rows_per_unit: the first axis of every captured call holds this many rows for each unit, unit by
                unit.
            offsets: or int64 [U + 1]: unit u owns rows ``offsets[u]:offsets[u + 1]``. In CPU memory, also if the losses
                are on a GPU, which would have to be waited for.
            unit_mask: bool [U]; a unit with False (padding) weighs nothing.
            loss_scale: the losses are multiplied by it for the backward pass, and gradients are divided by it
                before they are clipped (fp16; a power of two). A constant, never a function of the records.
            is_last: no other physical batch follows in this step on this rank: sums are on their way to other ranks
                while later ones form. It changes nothing else.

        Raises:
            UnsupportedOperationError: units mix, or rows do not fit the units.
            PrivacyError: the losses do not depend on a captured parameter.
        """
        self._pass(losses, rows_per_unit, offsets, unit_mask, loss_scale, is_last)

    def compile(
        self,
        losses_of: Callable[..., Tensor],
        *,
        rows_per_unit: int | None = 1,
        loss_scale: float = 1.0,
        fuse: bool = False,
        fixed: Sequence[Tensor] = (),
    ) -> CompiledPass:
        """Record passes over batches of static shape and run them without Python: on a GPU as CUDA graphs.

        ::

            run = trainer.compile(lambda x, y: loss_of_each_unit(module(x), y))
            losses = run(x, y, unit_mask=mask)                   # in place of capture and backward
            trainer.apply()

        The first passes, and ever more rarely later ones, run as they are; see `CompiledPass`. Noise and update are not
        recorded: a replay would repeat the noise.

        Args:
            losses_of: of a batch of tensors gives the loss of each unit [U]. It reads the batch and the module alone.
            rows_per_unit: as of `backward`; None: each call is given the offsets of its units.
            loss_scale: as of `backward`.
            fuse: let `torch.compile` fuse what lies between the kernels. Rounding may differ from that of a pass as it
                is, by what fused arithmetic rounds less often.
            fixed: tensors beside the module's own that the losses read, the same ones in each call, and no records.
                What is in them is read anew in each replay.

        Raises:
            ConfigError: adaptive clipping, keep="recompute" or sharded parameters, which have to look at numbers or
                exchange some in each pass.
        """
        if self._step.quantile is not None:
            raise ConfigError("compile: the bound of adaptive clipping moves; use flat or per-layer clipping")
        if self.perf.keep == "recompute":
            raise ConfigError("compile: keep='recompute' compares two passes in each step; use keep='full'")
        if isinstance(self._step.flat, ShardedParameters):
            raise ConfigError("compile: sharded parameters are exchanged in each pass; use replicas")

        def as_it_is(given: Given) -> Tensor:
            with self.capture():
                losses = losses_of(*given.batch)
            if self._step.state.is_arranged:
                raise UnsupportedOperationError(
                    "compile: rows are picked by what the data say, so that each pass has to be looked at for units "
                    "that mix; use capture and backward"
                )
            where = (rows_per_unit, given.offsets, given.unit_mask)
            self._pass(losses, *where, loss_scale, given.is_last, is_due=True)
            return losses.detach()

        return CompiledPass(
            *(self._step, losses_of, as_it_is),
            rows_per_unit=rows_per_unit,
            loss_scale=loss_scale,
            fuse=fuse,
            fixed=fixed,
        )

    def _pass(
        self,
        losses: Tensor,
        rows_per_unit: int | None,
        offsets: Tensor | None,
        unit_mask: Tensor | None,
        loss_scale: float,
        is_last: bool,
        *,
        is_due: bool = False,
    ) -> None:
        """One backward pass; `is_due`: it is looked at for units that mix, whatever came before."""
        with self._step.passing():
            state = self._step.state
            layout = self._layout(losses, rows_per_unit, offsets)
            if unit_mask is not None and (unit_mask.dtype != torch.bool or unit_mask.shape != losses.shape):
                raise ConfigError(f"unit_mask: expected bool [{len(losses)}]")
            check_positive(loss_scale, "loss_scale")
            self._step.is_last_pass = is_last
            try:
                if layout.num_units and not losses.requires_grad:
                    raise PrivacyError(
                        "the losses do not depend on any parameter through captured calls; run the forward "
                        "pass under `with trainer.capture():`"
                    )
                if layout.num_units or isinstance(self._step.flat, ShardedParameters):
                    # What torch.autograd.grad left behind in the forward pass is no part of this one.
                    state.abandon()
                    state.batch = Batch(layout, 1.0 / loss_scale, unit_mask)
                    self._probe.check(losses, _unit_weights(losses), layout, is_due=is_due)
                    self._backward(losses, loss_scale)
                else:
                    self._step.finish(None)
            except BaseException:
                self._step.drop()
                raise
            finally:
                state.take()
                state.batch = None
                state.reset()

    def _backward(self, losses: Tensor, loss_scale: float) -> None:
        step, state, ones = self._step, self._step.state, torch.full_like(losses, loss_scale)
        if self.perf.keep != "recompute":
            torch.autograd.backward(losses, ones)
            step.finish(state.take())
            return
        state.start_pass = lambda batch: step.start_pass(batch, measure_only=True)
        try:
            torch.autograd.backward(losses, ones, retain_graph=True)
            measured = state.take()
            if measured is None:
                step.finish(None)
                return
            with torch.no_grad():
                measured.finish()
            factors = measured.factors()
            state.start_pass = lambda batch: step.start_pass(batch, factors)
            torch.autograd.backward(losses, ones)
            step.finish(state.take())
        finally:
            state.start_pass = step.start_pass

    def apply(self) -> None:
        """End the logical step: noise, update, step counter.

        Raises:
            BudgetExceededError: the plan's steps are used up.
            LedgerError: no open lease of the ledger covers this step with this plan's event.
            PrivacyError: a parameter is not covered. Nothing moved in any of these cases.
        """
        if self._steps_done >= self.plan.steps:
            raise BudgetExceededError(f"the plan pays for {self.plan.steps} steps and all of them are taken")
        self._step.check_coverage()
        self._check_ledger()
        self._step.release(step=self._steps_done)
        self._steps_done += 1

    def discard(self) -> None:
        """Drop the logical step under way, which then begins afresh: after a pass that failed, `apply` is refused until
        this was called, on all ranks where there are several."""
        self._step.discard()

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters, moments and step counter as a flat dictionary of tensors (copies); no key, no sum. With several
        ranks all of them take part: replicas have whole tensors, sharded parameters give DTensors.

        Raises:
            CheckpointError: in the middle of a logical step, where a sum without noise is held.
        """
        if self._step.has_sum:
            raise CheckpointError("a logical step is under way; call apply() before state_dict()")
        return trainer_tensors(self._step, self._steps_done)

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `state_dict`; noise goes on with keys and counters that were never used."""
        self._step.source.check_may_go_back()
        self._step.discard()
        self._steps_done = restore_tensors(self._step, tensors)

    def advance_to(self, step: int) -> None:
        """Count steps as taken that were charged but died with their process; the budget does not pay for
        them twice."""
        if step < self._steps_done:
            raise PrivacyError(
                f"advance_to: step {step} lies before step {self._steps_done}, which was taken already"
            )
        self._steps_done = step

    def adapt(self, plan: PrivacyPlan) -> None:
        """Go on by another plan: other noise, rate, number of steps or public batch size, chosen from what was released
        so far (an adaptive schedule).

        What is composed then is no longer known in advance, so that only a ledger with an adaptive (RDP) filter can
        account for it (Feldman and Zrnic 2021); each plan's steps need leases of their own event.

        Raises:
            PrivacyError: no ledger, one without such a filter, or in the middle of a step.
            ConfigError: clipping, strategy, arithmetic or sampler change, which are fixed for a run.
        """
        if self.ledger is None or not self.ledger.is_adaptive:
            raise PrivacyError(
                "adapt: a schedule that follows what was released needs a ledger with an adaptive filter; create it "
                "with Ledger.create(..., adaptive=True)"
            )
        if self._step.has_sum:
            raise PrivacyError("adapt: a logical step is under way; call apply() first")
        check_same(self.ranks, {"plan": repr(plan)})
        before = self.plan
        for name in ("clip", "strategy", "arithmetic", "period", "max_batch_size", "max_units"):
            if getattr(plan, name) != getattr(before, name):
                raise ConfigError(
                    f"adapt: {name} is fixed for a run; only noise, rate, steps and batch size may change"
                )
        self._step.adapt(plan.noise, plan.expected_batch_size)
        self.plan = plan

    def _layout(self, losses: Tensor, rows_per_unit: int | None, offsets: Tensor | None) -> Layout:
        if losses.dim() != 1:
            raise ConfigError(f"losses: expected one loss per unit [U], got shape {list(losses.shape)}")
        if (rows_per_unit is None) == (offsets is None):
            raise ConfigError("backward: give either rows_per_unit or offsets")
        if offsets is not None:
            layout = Layout.ragged(offsets, losses.device)
        else:
            assert rows_per_unit is not None
            key = (len(losses), rows_per_unit)
            if key not in self._layouts:
                # Physical batches are of one static size; a caller with many sizes must not fill the memory.
                if len(self._layouts) >= 16:
                    self._layouts.clear()
                self._layouts[key] = Layout.uniform(*key, losses.device)
            layout = self._layouts[key]
        if layout.num_units != len(losses):
            raise ConfigError(f"offsets: describe {layout.num_units} units, there are {len(losses)} losses")
        return layout

    def _check_ledger(self) -> None:
        if self.ledger is not None and not self.ledger.covers(self._steps_done, self.plan.event(1)):
            raise LedgerError(
                f"no open lease of the ledger covers step {self._steps_done} of this plan (rate "
                f"{self.plan.sample_rate:g}, noise {self.plan.noise_multiplier:g}); call ledger.lease "
                "with plan.event(1) first"
            )


def _unit_weights(losses: Tensor) -> Callable[[int], Tensor]:
    """The weights of all losses that pick one unit's."""
    return lambda unit: torch.nn.functional.one_hot(torch.tensor(unit), len(losses)).to(losses)
