"""The private trainer: capture, clip, sum; then ledger, noise and update, once per logical step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from synthward.engine.buffers import FlatBuffers
from synthward.engine.capture import CaptureMode, CaptureState, check_module
from synthward.engine.clipping import Segments, accumulate_clipped
from synthward.engine.errors import BudgetExceededError, CheckpointError, PrivacyError
from synthward.engine.keys import KeySchedule
from synthward.engine.ledger import Ledger
from synthward.engine.optim import Updater
from synthward.engine.plan import PrivacyPlan


class PrivateTrainer:
    """Trains the parameters of ``module`` by DP-SGD as ``plan`` says.

    A logical step is any number of ``with trainer.capture(): losses = ...`` and ``trainer.backward(losses, ...)``
    (physical batches), then one ``trainer.apply()``.

    Guarantees:
        - a unit moves the sum by at most ``plan.max_grad_norm``, NaN and Inf units by nothing;
        - every coordinate gets exactly one Gaussian of std ``plan.noise_std`` per logical step, an empty one
          included, from ``keys`` alone (torch's generator has no part in it);
        - the sum is divided by ``plan.expected_batch_size``;
        - with a ledger, no step is applied that an open lease of this process does not cover;
        - no more than ``plan.steps`` steps are applied.
    """

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, plan: PrivacyPlan, *, keys: KeySchedule, ledger: Ledger | None
    ) -> None:
        check_module(module)
        self.module, self.plan, self._ledger = module, plan, ledger
        names = {id(p): n for n, p in module.named_parameters()}
        ordered = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        _check_same_parameters(module, ordered, names)
        self._buffers = FlatBuffers([(names[id(p)], p) for p in ordered])
        self._updater = Updater(optimizer, self._buffers)
        self._state = CaptureState(names={id(p): names[id(p)] for p in ordered})
        self._key = keys.key("noise")
        self._pending = False
        self.logical_step = 0

    @property
    def is_fused(self) -> bool:
        """Whether noise and update run in one kernel (SGD, Adam, AdamW) or noise is added before the update."""
        return self._updater.is_fused

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Run forward passes inside; their parametric calls are kept for the next `backward`."""
        self._check_cover()
        self._state.take()
        with CaptureMode(self._state):
            yield

    def backward(
        self,
        losses: Tensor,
        *,
        rows_per_unit: int | None = None,
        offsets: Tensor | None = None,
        unit_mask: Tensor | None = None,
    ) -> None:
        """One backward pass over per-unit ``losses`` [U]; clip every unit and add it to the sum.

        Args:
            losses: one scalar per unit, [U].
            rows_per_unit: leading rows of each unit in every captured call (default 1), or
            offsets: int64 [U + 1] of ragged units.
            unit_mask: bool [U]; False marks padding, which weighs zero.
        """
        if losses.ndim != 1:
            raise ValueError(f"losses: has shape {list(losses.shape)}, expected one scalar per unit, [U]")
        if rows_per_unit is not None and offsets is not None:
            raise ValueError("give rows_per_unit or offsets, not both")
        rows_per_unit = 1 if rows_per_unit is None and offsets is None else rows_per_unit
        if unit_mask is not None and unit_mask.shape != losses.shape:
            raise ValueError(f"unit_mask: has shape {list(unit_mask.shape)}, expected {list(losses.shape)}")
        if offsets is not None and len(offsets) != len(losses) + 1:
            raise ValueError(f"offsets: has length {len(offsets)}, expected {len(losses) + 1}")
        losses.sum().backward()
        self.accumulate(Segments(len(losses), rows_per_unit, offsets), unit_mask=unit_mask)

    def accumulate(self, segments: Segments, *, unit_mask: Tensor | None = None, scale: float = 1.0) -> None:
        """Clip and add what a backward pass left; `backward` calls it, a drop-in engine may."""
        self._check_no_leak()
        rows = self._state.rows
        uses = self._state.take()
        if uses and rows != segments.rows:
            raise PrivacyError(f"units: they own {segments.rows} rows, but the captured batch has {rows}")
        self._pending = True
        with torch.no_grad():
            accumulate_clipped(
                uses,
                self._state.names,
                self._buffers.sums,
                segments,
                max_grad_norm=self.plan.max_grad_norm,
                unit_mask=unit_mask,
                scale=scale,
            )

    def apply(self) -> None:
        """End the logical step: noise, division by the public batch size, update.

        Raises:
            BudgetExceededError: the planned steps are done.
            PrivacyError: no open lease of the ledger covers this step.
        """
        self.check_may_apply()
        self._check_no_leak()
        self._updater.apply(
            key=self._key,
            step=self.logical_step,
            noise_std=self.plan.noise_std,
            grad_scale=1.0 / self.plan.expected_batch_size,
        )
        self._pending = False
        self.logical_step += 1

    def check_may_apply(self) -> None:
        """Raise if the next step is not paid for."""
        if self.plan.steps is not None and self.logical_step >= self.plan.steps:
            raise BudgetExceededError(f"all {self.plan.steps} planned steps are done; the budget is spent")
        if self._ledger is not None and not self._ledger.covers(self.logical_step, self.plan.step_event()):
            raise PrivacyError(f"step {self.logical_step}: no open lease of the ledger pays for it; nothing was applied")

    def advance_to(self, logical_step: int) -> None:
        """Skip steps that were charged but lost with their process; never back."""
        if logical_step < self.logical_step:
            raise PrivacyError(f"step {logical_step} was taken already; a step is never taken twice")
        self.logical_step = logical_step

    def discard(self) -> None:
        """Forget the unfinished logical step: its sum is zeroed, nothing of it is released."""
        self._state.take()
        self._buffers.summed.zero_()
        self._pending = False

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters, moments and counters; `CheckpointError` inside a logical step, whose sum has no noise yet."""
        if self._pending:
            raise CheckpointError("a checkpoint inside a logical step would hold an un-noised sum; apply() first")
        return {**self._updater.state(), "logical_step": torch.tensor(self.logical_step)}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Restore a `state_dict`; the noise key stays this process's own."""
        if self._pending:
            raise CheckpointError("a checkpoint can not be loaded inside a logical step; apply() first")
        size = tensors["parameters"].numel()
        if size != self._buffers.parameters.numel():
            raise CheckpointError(f"checkpoint: holds {size} parameters, the model has {self._buffers.parameters.numel()}")
        self._updater.load(tensors)
        self.logical_step = int(tensors["logical_step"])

    @property
    def capture_state(self) -> CaptureState:
        """The state that `CaptureMode` fills, for engines that enter the mode themselves."""
        return self._state

    def _check_cover(self) -> None:
        """Every trainable parameter is ours and where we put it, before anything is captured."""
        check_module(self.module)
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad and id(parameter) not in self._state.names:
                raise PrivacyError(
                    f"parameter {name!r} became trainable after the engine was made, so it is outside the clip and "
                    "the noise; freeze it or wrap the model again"
                )
        moved = self._buffers.is_intact()
        if moved is not None:
            raise PrivacyError(f"parameter {moved!r} was moved or replaced after the engine was made; wrap the model again")

    def _check_no_leak(self) -> None:
        for name, parameter in self._buffers.named:
            if parameter.grad is not None:
                parameter.grad = None
                self.discard()
                raise PrivacyError(
                    f"parameter {name!r} got a gradient outside the capture, which is neither clipped nor noised; "
                    "run its forward pass through the wrapped model"
                )


def _check_same_parameters(module: nn.Module, ordered: list[nn.Parameter], names: dict[int, str]) -> None:
    if not ordered:
        raise PrivacyError("optimizer: holds no trainable parameter")
    held = {id(p) for p in ordered}
    if len(held) != len(ordered):
        raise PrivacyError("optimizer: holds a parameter twice")
    for parameter in ordered:
        if id(parameter) not in names:
            raise PrivacyError(f"optimizer: holds a parameter of shape {list(parameter.shape)} that is not the module's")
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and id(parameter) not in held:
            raise PrivacyError(f"parameter {name!r} is trainable but not in the optimizer; add it, or freeze it")
