"""Private training in the user's own loop: hooks on the module, one backward pass, a private optimizer.

The session turns ``criterion(module(x), y).backward(); optimizer.step()`` into logical steps: each backward
pass is one physical batch, `step` ends the logical one.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from synthward.engine.capture import Batch, current_task
from synthward.engine.compilers import check_uncompiled
from synthward.engine.distributed.agreement import check_apart
from synthward.engine.errors import BudgetExceededError, ConfigError, PrivacyError
from synthward.engine.layout import Layout
from synthward.engine.loader import Draw, PoissonLoader
from synthward.engine.rows import OutputReader, count_rows, no_rows, row_weights
from synthward.engine.spec import REDUCTIONS
from synthward.engine.step import DPStep, probe_of

logger = logging.getLogger("synthward")
# Steps after which a loss scale would grow.
_NEVER = 2**31 - 1

# What each call of a module runs.
_CALL = nn.Module._call_impl.__code__
_sessions: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


@dataclass
class _Forward:
    """What a forward pass was: rows of its batch, the ids of their units if given, and whether its outputs were
    looked at and show them."""

    rows: int
    unit_ids: Tensor | None
    is_shown: bool = False


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
        self._probe, self._outputs = probe_of(step), OutputReader()
        self._unit_ids: Tensor | None = None
        self._open: AbstractContextManager[None] | None = None
        # Calls of the module inside its own forward pass.
        self._depth = 0
        self._has_warned = False
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
        # Whether rows without ids took part.
        self._has_nameless = False

    def _install(self) -> None:
        # Functions, not bound methods: a deep copy of the module (an EMA, say) must not copy the session.
        session = weakref.ref(self)

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            owner = session()
            if owner is not None and module is owner.core.module:
                check_uncompiled()
                with owner.core.passing():
                    owner._enter(args, kwargs)

        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            owner = session()
            if owner is not None and module is owner.core.module:
                with owner.core.passing():
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
        self._close_interrupted(calls=2)
        if self._open is not None:
            self._depth += 1
            return
        if not torch.is_grad_enabled() or not any(span.parameter.requires_grad for span in self.core.flat):
            return
        draw = self._loader.draw if self._loader is not None else None
        ids = self._unit_ids
        rows = count_rows(
            args, kwargs, None if ids is None else len(ids), None if draw is None else draw.rows
        )
        context = self.core.capture()
        context.__enter__()
        self._open = context
        forward = _Forward(rows, ids)
        self._forwards[self.core.state.forward] = forward
        scale = float(rows) if self._is_mean else 1.0
        if self.grad_scaler is not None:
            scale /= self.grad_scaler.get_scale()
        self.core.state.batches[self.core.state.forward] = Batch(self._layout(forward), scale)

    def _leave(self, output: Any) -> None:
        if self._open is None:
            return
        if self._depth:
            self._depth -= 1
            return
        context, self._open = self._open, None
        state = self.core.state
        # torch calls this hook from where it has caught what the forward pass raised.
        self.core.is_broken |= output is None and sys.exc_info()[1] is not None
        forward, layout = self._forwards[state.forward], state.batches[state.forward].layout
        try:
            context.__exit__(None, None, None)
            outputs = self._outputs.read(output, forward.rows)
            if outputs.rows:
                self._probe.check(
                    outputs.rows,
                    lambda unit: row_weights(outputs.rows, layout.row_units == unit),
                    layout,
                    outputs.others,
                )
                forward.is_shown = True
        finally:
            state.forget_calls()

    def _close_interrupted(self, calls: int) -> None:
        """Close what a forward pass left open that Ctrl-C ended: torch runs no hook then. It is under way if the
        module has that many calls on the stack."""
        if self._open is None or _count_calls(self.core.module) >= calls:
            return
        context, self._open, self._depth = self._open, None, 0
        _exit_below(context, self.core.state.mode)
        index = self.core.state.forward
        self._forwards.pop(index, None)
        self.core.state.batches.pop(index, None)
        self.core.state.consume([index])
        self.core.state.forget_calls()
        self._fail()
        logger.warning(
            "a forward pass was interrupted; what this step had accumulated is dropped, and it begins afresh"
        )

    def _finish(self) -> None:
        """At the end of a real backward pass (not of torch.autograd.grad): clip and add."""
        found = self.core.state.take(current_task())
        try:
            if found is None:
                return
            self._check_draw(self._check_forwards(found.forwards))
            self.core.finish(found)
        except BaseException:
            self._fail()
            raise

    def _check_forwards(self, forwards: set[int]) -> _Forward:
        if not forwards <= self._forwards.keys():
            raise PrivacyError(
                "backward through a forward pass from before the last optimizer.step(); run it again first"
            )
        infos = [self._forwards[index] for index in sorted(forwards)]
        first = infos[0]
        if not all(info.is_shown for info in infos):
            raise no_rows("a loss came from it past its outputs")
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
        if self._forwards_seen and self._loader is None and first.unit_ids is None and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "several backward passes in one step, without Poisson sampling or unit ids: a row that takes part in "
                "two of them counts twice: max_grad_norm bounds each of its contributions, not their sum. Give ids "
                "(`with engine.units(ids):`) to have that refused"
            )
        self._forwards_seen |= forwards
        self._has_nameless |= first.unit_ids is None and any(info.rows for info in infos)
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
        if self._loader.sampling.period > 1 and draw.index > self._last_draw + 1 and self._last_draw >= 0:
            raise PrivacyError(
                "a batch of the private loader was left out: units that take turns (period > 1) would come back too "
                "early. Take one optimizer.step() for every batch, or leave the loop at the end of a pass only"
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
        device = self.core.flat.device
        if forward.unit_ids is None:
            return Layout.uniform(forward.rows, 1, device)
        return Layout.from_ids(forward.unit_ids.to(device))

    def _check_whole_draw(self) -> None:
        """All rows of a draw of rows went through backward, or none did.

        Fewer are no proof of rows left out: of a sequence-first batch each time step counts as a row, everybody is
        in all of them, and there may be fewer steps than people. A draw of units is another matter: ids say whose
        each row is, and they were compared with the draw's; of those, units may be left out.
        """
        draw = self._draw
        if draw is not None and draw.unit_ids is None and 0 < self._rows_seen < draw.rows:
            raise PrivacyError(
                f"{self._rows_seen} rows went through backward where the loader drew {draw.rows}: the first axis of "
                "the module's batch may not be that of the records. Put all of them through before "
                "optimizer.step(); multiply the losses of those to leave out by zero"
            )

    def _number_of_draw(self) -> int:
        """Of the draw that the loop is at, whether it had rows for this rank or not."""
        draw = self._draw or (None if self._loader is None else self._loader.draw)
        return -1 if draw is None else draw.index

    def step(self) -> None:
        """End the logical step: charge, then noise and update.

        A step that fails after it was charged is taken: it counts, its draw is used, and its sum is dropped.

        Raises:
            BudgetExceededError: the budget is used up. PrivacyError: a parameter is not covered, or rows of the
                draw are missing. Nothing moved.
        """
        self._close_interrupted(calls=1)
        if self.max_steps is not None and self.steps_done >= self.max_steps:
            raise BudgetExceededError(
                f"the target epsilon pays for {self.max_steps} steps and all of them are taken; training "
                "stops here"
            )
        self.core.check_coverage()
        self._check_whole_draw()
        # Of a loader that is each rank's own nothing but ids tells whose rows are where.
        if self._loader is None:
            check_apart(self.core.ranks, self._units_seen, has_nameless=self._has_nameless)
        self._charge(self.steps_done)
        # Before the release: if it fails half way, parameters may have moved.
        self.steps_done += 1
        if self._draw is not None:
            self._last_draw = self._draw.index
        try:
            self.core.release(step=self.steps_done, draw=self._number_of_draw())
        except BaseException:
            self.core.restart()
            raise
        finally:
            self._forwards.clear()
            self.core.state.batches.clear()
            self.core.state.reset()
            self._reset_step()

    def discard(self) -> None:
        """Drop what was accumulated in the step under way (as `zero_grad` does)."""
        # Not found by the next forward pass, which would be one of a step that has failed.
        self._close_interrupted(calls=1)
        self.core.discard(is_between=True)
        self._forget_seen()

    def _fail(self) -> None:
        """A pass failed: what this rank has of the step is dropped, and all others have to drop theirs."""
        self.core.is_broken = True
        self.core.drop()
        self._forget_seen()

    def _forget_seen(self) -> None:
        self._rows_seen, self._has_nameless = 0, False
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
        found = torch.zeros((), device=self.session.core.flat.device)
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


def _count_calls(module: nn.Module) -> int:
    """Calls of a module that are under way, in any thread."""
    count = 0
    for top in sys._current_frames().values():
        frame: FrameType | None = top
        while frame is not None:
            count += frame.f_code is _CALL and frame.f_locals.get("self") is module
            frame = frame.f_back
    return count


def _exit_below(context: AbstractContextManager[None], mode: TorchFunctionMode | None) -> None:
    """Leave a context that has `mode` on this thread's stack, whatever was put above it since."""
    above: list[Any] = []
    if mode in _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
        while (top := _pop_mode()) is not mode:  # type: ignore[no-untyped-call]
            above.append(top)
    _push_mode(mode)  # type: ignore[no-untyped-call]
    context.__exit__(InterruptedError, InterruptedError(), None)
    for other in reversed(above):
        _push_mode(other)  # type: ignore[no-untyped-call]
