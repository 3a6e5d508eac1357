"""Private training in the user's own loop: hooks on the module, one backward pass, a private optimizer.

The session turns ``criterion(module(x), y).backward(); optimizer.step()`` into logical steps: each backward
pass is one physical batch, `step` ends the logical one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from synthward.engine.capture import Batch, current_task
from synthward.engine.errors import BudgetExceededError, ConfigError, PrivacyError
from synthward.engine.independence import IndependenceProbe
from synthward.engine.layout import Layout
from synthward.engine.loader import Draw, PoissonLoader
from synthward.engine.spec import REDUCTIONS
from synthward.engine.step import DPStep

# Steps after which a loss scale would grow.
_NEVER = 2**31 - 1

_sessions: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Forward:
    """What a forward pass was: rows of its batch, and the ids of their units if given."""

    rows: int
    unit_ids: Tensor | None


class PrivateSession:
    """One module under private training.

    Args:
        step: the private step of the module.
        loss_reduction: what the user's criterion does over the rows present: "mean" (undone before the
            clip) or "sum".
        loader: the Poisson loader whose draws the batches must be, or None (then nothing is claimed of
            sampling).
        units_required: the loader draws units of several rows, so that `units` must say which row is whose.
        charge: called with the number of the step before anything of it is released.
        max_steps: steps that a budget pays for, or None.
        grad_scaler: what the user multiplies losses by (fp16); undone before the clip. Its scale is kept as it is:
            one that follows overflows would make one unit's gradient depend on the others'.
    """

    def __init__(
        self,
        step: DPStep,
        *,
        loss_reduction: str,
        loader: PoissonLoader | None,
        units_required: bool,
        charge: Callable[[int], None],
        max_steps: int | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        if loss_reduction not in REDUCTIONS:
            raise ConfigError(
                f"loss_reduction: got {loss_reduction!r}; choose one of {', '.join(REDUCTIONS)}"
            )
        if step.module in _sessions:
            raise ConfigError("the module was made private already; build a fresh one")
        _sessions[step.module] = True
        self.core, self.steps_done, self.max_steps = step, 0, max_steps
        self._is_mean, self._loader, self._units_required = loss_reduction == "mean", loader, units_required
        self._charge, self.grad_scaler = charge, grad_scaler
        if grad_scaler is not None:
            grad_scaler.set_growth_interval(_NEVER)
        self._probe = IndependenceProbe(step.state)
        self._unit_ids: Tensor | None = None
        self._open: AbstractContextManager[None] | None = None
        self._forwards: dict[int, _Forward] = {}
        self._last_draw = -1
        self._reset_step()
        self._install()

    def _reset_step(self) -> None:
        """What has taken part in the logical step under way."""
        self._draw: Draw | None = None
        self._rows_seen = 0
        self._forwards_seen: set[int] = set()
        self._units_seen: set[int] = set()

    def _install(self) -> None:
        # Functions, not bound methods: a deep copy of the module (an EMA, say) must not copy the session.
        session = weakref.ref(self)

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            owner = session()
            if owner is not None and module is owner.core.module:
                owner._enter(args, kwargs)

        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            owner = session()
            if owner is not None and module is owner.core.module:
                owner._leave(output)

        def finish(anchor: Tensor) -> None:
            owner = session()
            if owner is not None:
                owner._finish()

        self.core.module.register_forward_pre_hook(enter, with_kwargs=True)
        self.core.module.register_forward_hook(leave, with_kwargs=True, always_call=True)
        self.core.state.anchor.register_post_accumulate_grad_hook(finish)  # type: ignore[no-untyped-call]

    @contextmanager
    def units(self, ids: Tensor | None) -> Iterator[None]:
        """Rows of equal id are one unit in forward passes inside; None takes the ids of the loader's draw."""
        if self._loader is not None and not self._units_required:
            raise PrivacyError(
                "the loader draws rows, so a unit of several rows would be drawn more often than "
                "accounted; give unit_ids (one per row of the data set) to make_private, so that it draws "
                "units"
            )
        if ids is None:
            draw = self._loader.draw if self._loader is not None else None
            if draw is None or draw.unit_ids is None:
                raise ConfigError("units: give one integer id per row of the batch")
            ids = torch.from_numpy(draw.unit_ids)
        before, self._unit_ids = self._unit_ids, ids
        try:
            yield
        finally:
            self._unit_ids = before

    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._open is not None or not torch.is_grad_enabled():
            return
        if not any(span.parameter.requires_grad for span in self.core.flat):
            return
        first = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() > 0), None)
        if first is None:
            raise ConfigError(
                "the module's forward takes no tensor with a batch axis; the engine can not count its rows"
            )
        rows = first.shape[0]
        if self._unit_ids is not None and len(self._unit_ids) != rows:
            raise ConfigError(f"units: {len(self._unit_ids)} ids for a batch of {rows} rows")
        context = self.core.capture()
        context.__enter__()
        self._open = context
        forward = _Forward(rows, self._unit_ids)
        self._forwards[self.core.state.forward] = forward
        scale = float(rows) if self._is_mean else 1.0
        if self.grad_scaler is not None:
            scale /= self.grad_scaler.get_scale()
        self.core.state.batches[self.core.state.forward] = Batch(self._layout(forward), scale)

    def _leave(self, output: Any) -> None:
        if self._open is None:
            return
        context, self._open = self._open, None
        context.__exit__(None, None, None)
        forward = self._forwards[self.core.state.forward]
        found = _first_tensor(output)
        if found is not None and found.requires_grad and found.dim() > 0 and len(found) == forward.rows:
            self._probe_rows(found, self.core.state.batches[self.core.state.forward].layout)
        self.core.state.forget_calls()

    def _probe_rows(self, output: Tensor, layout: Layout) -> None:
        def weights(unit: int) -> Tensor:
            is_own = (layout.row_units == unit).view(-1, *[1] * (output.dim() - 1)).to(output)
            # Unequal ones: a plain sum is constant after a softmax or a norm, and would show nothing.
            return torch.linspace(0.5, 1.5, output.numel()).view(output.shape).to(output) * is_own

        self._probe.check(output, weights, layout)

    def _finish(self) -> None:
        """At the end of a real backward pass (not of torch.autograd.grad): clip and add."""
        found = self.core.state.take(current_task())
        try:
            if found is None:
                return
            self._check_draw(self._check_forwards(found.forwards))
            self.core.finish(found)
        except BaseException:
            self.discard()
            raise

    def _check_forwards(self, forwards: set[int]) -> _Forward:
        if not forwards <= self._forwards.keys():
            raise PrivacyError(
                "backward through a forward pass from before the last optimizer.step(); run it again first"
            )
        infos = [self._forwards[index] for index in sorted(forwards)]
        first = infos[0]
        if len(infos) > 1 and (
            first.unit_ids is None or any(info.unit_ids is not first.unit_ids for info in infos[1:])
        ):
            raise PrivacyError(
                "one backward pass over several forward passes of the module: which rows are one unit is "
                "unknown. Put them under one `with engine.units(ids):` (the same ids), or call backward "
                "for each"
            )
        if forwards & self._forwards_seen:
            raise PrivacyError(
                "a second backward pass through the same forward pass in one step: its units would be "
                "clipped apart and count twice. Add the losses and call backward once"
            )
        self._forwards_seen |= forwards
        if self._units_required and first.unit_ids is None:
            raise PrivacyError(
                "the loader draws units of several rows; run forward and backward under `with "
                "engine.units():`"
            )
        if first.unit_ids is not None:
            present = set(first.unit_ids.tolist())
            if present & self._units_seen:
                raise PrivacyError(
                    "a unit takes part in two physical batches of one step; put all its rows into one"
                )
            self._units_seen |= present
        return first

    def _check_draw(self, forward: _Forward) -> None:
        """Poisson amplification holds for one fresh draw a step, each drawn row used once."""
        if self._loader is None:
            return
        draw = self._loader.draw
        if draw is None or draw.index <= self._last_draw:
            raise PrivacyError(
                "this backward pass is not on a fresh batch of the private loader, so the sampling that "
                "is accounted did not happen; iterate over the loader that make_private returned, one "
                "optimizer.step() a batch, or set poisson_sampling=False"
            )
        if self._draw is not None and draw.index != self._draw.index:
            raise PrivacyError(
                "two draws of the loader in one step: a unit could take part twice. Call optimizer.step() "
                "after each batch; for larger batches, raise the loader's batch_size and split what it "
                "yields"
            )
        self._draw = draw
        self._rows_seen += forward.rows
        if self._rows_seen > draw.rows:
            raise PrivacyError(
                f"more rows went through backward ({self._rows_seen}) than the loader drew for this step"
            )
        if draw.unit_ids is not None and forward.unit_ids is not None:
            given = np.unique(forward.unit_ids.cpu().numpy(), return_counts=True)
            drawn = dict(zip(*np.unique(draw.unit_ids, return_counts=True), strict=True))
            if any(drawn.get(unit) != count for unit, count in zip(*given, strict=True)):
                raise PrivacyError(
                    "units: the ids are not those of the rows that the loader drew; use `engine.units()`"
                )

    def _layout(self, forward: _Forward) -> Layout:
        device = self.core.flat.data.device
        if forward.unit_ids is None:
            return Layout.uniform(forward.rows, 1, device)
        return Layout.from_ids(forward.unit_ids.to(device))

    def step(self) -> None:
        """End the logical step: charge, then noise and update.

        Raises:
            BudgetExceededError: the budget is used up. PrivacyError: a parameter is not covered. Nothing
                moved.
        """
        if self.max_steps is not None and self.steps_done >= self.max_steps:
            raise BudgetExceededError(
                f"the target epsilon pays for {self.max_steps} steps and all of them are taken; training "
                "stops here"
            )
        self.core.check_coverage()
        self._charge(self.steps_done)
        self.core.release()
        self.steps_done += 1
        if self._draw is not None:
            self._last_draw = self._draw.index
        self._forwards.clear()
        self.core.state.batches.clear()
        self.core.state.reset()
        self._reset_step()

    def discard(self) -> None:
        """Drop what was accumulated in the step under way (as `zero_grad` does)."""
        self.core.discard()
        self._rows_seen = 0
        self._forwards_seen.clear()
        self._units_seen.clear()


class PrivateOptimizer(torch.optim.Optimizer):
    """The optimizer that `make_private` returns: parameter groups and state are the original's own.

    `step` takes a logical step; `zero_grad` drops gradients accumulated since the last one, as in torch.
    """

    def __init__(self, session: PrivateSession, original: torch.optim.Optimizer) -> None:
        self._is_sealed = False
        super().__init__(original.param_groups, original.defaults)
        self.session, self.original_optimizer = session, original
        self._share()
        self._is_sealed = True

    def _share(self) -> None:
        # The same list and dictionaries: what a scheduler edits here is what the update reads.
        self.param_groups, self.state = self.original_optimizer.param_groups, self.original_optimizer.state

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler then leaves scales to this class: gradients are unscaled before they are clipped.
        return True

    def _note_scaler(self) -> None:
        """Tell the scaler of this step that nothing overflowed: a unit that did was left out, not the step."""
        scaler = self.session.grad_scaler
        if scaler is None:
            raise PrivacyError(
                "GradScaler: the losses were scaled and make_private does not know by what; give it "
                "grad_scaler=scaler"
            )
        found = torch.zeros((), device=self.session.core.flat.data.device)
        scaler._per_optimizer_states[id(self)]["found_inf_per_device"] = {found.device: found}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One logical step; a closure is evaluated once, before it."""
        if hasattr(self, "grad_scale"):
            self._note_scaler()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.session.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop accumulated gradients."""
        self.session.discard()
        self.original_optimizer.zero_grad(set_to_none=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: a new parameter has neither clipping nor noise."""
        if self._is_sealed:
            raise PrivacyError(
                "parameters can not be added after make_private; build the optimizer with all of them"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The original optimizer's state dictionary, moments included; no sum without noise is in it."""
        self.session.core.updater.export_state()
        return self.original_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load moments and settings; noise goes on with counters that were never used."""
        self.original_optimizer.load_state_dict(state_dict)
        self._share()
        self.session.core.updater.import_state()


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return next((found for found in map(_first_tensor, items) if found is not None), None)
