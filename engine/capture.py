"""Capture of parametric calls as functions, whatever module made them.

A `TorchFunctionMode` sees each torch function of the forward pass. Calls with a rule become autograd
functions that compute input gradients only and hand (activation, output gradient) pairs to the pass under way; an
operation on parameters and constants alone gives a computed weight; any other operation on a tracked parameter
that would carry a gradient is refused by name. Nothing is stored on tensors or modules.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from synthward.engine.errors import PrivacyError, UnsupportedOperationError
from synthward.engine.picking import picks_rows
from synthward.engine.products import Products
from synthward.engine.provenance import Derived, Provenance, Target, tensors_in
from synthward.engine.writes import written

if TYPE_CHECKING:
    from synthward.engine.contributions import Contributions
    from synthward.engine.layout import Layout
    from synthward.engine.rules.uses import DiagonalRows, Use


@dataclass(frozen=True)
class Kept:
    """What one captured call kept in the backward pass: length of its first axis, which forward pass it was
    made in, and a use per parameter."""

    operation: str
    leading: int
    forward: int
    uses: list[tuple[Target, Use | DiagonalRows]]


@dataclass(frozen=True)
class Batch:
    """Rows of one physical batch: whose they are, what gradients are multiplied by before the clip, and which
    units (bool [U]) are there at all."""

    layout: Layout
    scale: float = 1.0
    unit_mask: Tensor | None = None


class CaptureState:
    """All that is kept between forward and the end of backward; owned by one engine, freed in one place.

    Args:
        parameters: the tracked parameters; the index of each is its position.
        names: their names, for messages.
        products: who multiplies matrices.
    """

    def __init__(
        self, parameters: list[nn.Parameter], names: list[str], products: Products | None = None
    ) -> None:
        self.parameters, self.names = parameters, names
        self.products = products or Products()
        self._positions = {id(parameter): i for i, parameter in enumerate(parameters)}
        # What stands for a sharded parameter while its layer runs; held, so that an id is never another one's.
        self._stand_ins: dict[int, nn.Parameter] = {}
        # In the hooks of the sharding engine, which move parameters and compute nothing with them.
        self.is_paused = False
        device = parameters[0].device
        # Each captured call takes the anchor as an input, so that it is in the graph even if its data is
        # not, and so that a real backward pass can be told from torch.autograd.grad, which leaves the
        # anchor alone.
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.anchor_grad = torch.zeros((), device=device)
        self.provenance = Provenance()
        self.forward = 0
        # The batch of the backward pass to come, if known by then: of every forward pass, or of one.
        self.batch: Batch | None = None
        self.batches: dict[int, Batch] = {}
        # (operation, positions, length of the first axis) of each captured call since the last probe.
        self.calls: list[tuple[str, tuple[int, ...], int]] = []
        # What else ran in the forward passes since the last probe, as one number.
        self.trace = 0
        # Whether rows were picked by what the data say, and whether a captured call came after that: the next batch
        # may then be arranged in another way.
        self.has_picked = self.is_arranged = False
        # Uses of each parameter that forward passes without a backward pass so far will give.
        self._expected: dict[int, Counter[int]] = {}
        self.mode: CaptureMode | None = None
        # Length of the first axis of the first data seen in this forward pass: most likely the batch's.
        self.rows_hint: int | None = None
        # Bytes that the captured calls of this forward pass gave: a lower bound of what a plain step keeps.
        self.forward_bytes = 0
        self.start_pass: Callable[[Batch], Contributions] | None = None
        self._pass: Contributions | None = None
        self._probed: Callable[[Kept], None] | None = None
        self._is_recomputing = False
        # Whether a forward pass had activation checkpoints.
        self.has_checkpoint = False
        self._is_spoilt = False
        self._task = -1

    def keep(self, kept: Kept) -> None:
        """Called in backward by a captured call."""
        if self._probed is not None:
            self._probed(kept)
            return
        task = current_task()
        if task != self._task:
            self._drop()
            self._task = task
        batch = self.batches.get(kept.forward, self.batch)
        if self.start_pass is None or batch is None:
            return  # not a pass of this engine's: coverage is checked before anything is released
        if self._pass is None:
            self._pass = self.start_pass(batch)
        self._pass.receive(kept, batch)

    def _drop(self) -> None:
        """Forget a pass that never came to its end; what it has added to the sum already spoils the step."""
        self._is_spoilt = self._is_spoilt or (self._pass is not None and self._pass.has_summed)
        self._pass, self._task = None, -1

    def take(self, task: int | None = None) -> Contributions | None:
        """The pass of the last backward pass (of graph task `task` only, if given); nothing stays here."""
        if task is not None and task != self._task:
            self._drop()
        found, self._pass = self._pass, None
        self._task = -1
        self.anchor.grad = None
        return found

    def abandon(self) -> bool:
        """Forget the pass under way; whether it has added to the sum, which the caller then zeroes."""
        self._drop()
        was_spoilt, self._is_spoilt = self._is_spoilt, False
        self.anchor.grad = None
        return was_spoilt

    def check_unspoilt(self) -> None:
        """`PrivacyError` when torch.autograd.grad has put clipped gradients into the sum."""
        self._drop()
        if self._is_spoilt:
            raise PrivacyError(
                "torch.autograd.grad ran through the module in this step, and clipping that finishes each layer "
                "inside the backward pass can not tell it from a loss; use clipping='flat', or call it under "
                "another forward pass of a copy"
            )

    @contextmanager
    def probe(self, look: Callable[[Kept], None]) -> Iterator[None]:
        """Backward passes inside show what they would keep to `look`, and leave it nowhere."""
        self._probed = look
        try:
            yield
        finally:
            self._probed = None

    @contextmanager
    def recomputation(self, forward: int) -> Iterator[None]:
        """A forward pass that is run again for its saved tensors alone."""
        before = self._is_recomputing, self.forward
        self._is_recomputing, self.forward = True, forward
        try:
            with self.provenance.again():
                yield
        finally:
            self._is_recomputing, self.forward = before

    def call_layout(self, rows: int, leading: int, forward: int) -> Layout | None:
        """Layout of a call with that many rows; None where the units are not known yet."""
        batch = self.batches.get(forward, self.batch)
        layout = None if batch is None else batch.layout
        if layout is None or layout.num_rows == 0 or leading % layout.num_rows:
            return None
        return layout.expand(rows // layout.num_rows)

    def expected(self, position: int) -> int:
        """How many uses of a parameter the backward pass may still bring, those it has brought included."""
        return sum(counter[position] for counter in self._expected.values())

    def consume(self, forwards: Iterable[int]) -> None:
        """These forward passes have had their backward pass."""
        for forward in forwards:
            self._expected.pop(forward, None)

    def forget_calls(self) -> None:
        """They were probed."""
        self.calls.clear()
        self.trace = 0
        self.has_picked = self.is_arranged = False

    def reset(self) -> None:
        """No forward pass is waiting for its backward pass."""
        self.forget_calls()
        self._expected.clear()

    def refuse_double(self, operation: str) -> None:
        """Called in backward: a gradient that is to be differentiated again is not supported."""
        if torch.is_grad_enabled():
            raise UnsupportedOperationError(
                f"operation {operation!r}: its gradient is to be differentiated again (create_graph=True, "
                "as for a gradient penalty); the engine computes first derivatives only. For a critic, use "
                "torch.nn.utils.parametrizations.spectral_norm in place of the penalty"
            )

    def call(self, operation: str, targets: tuple[Target | None, ...], leading: int) -> tuple[Any, ...]:
        """Note a captured call; returns what its backward needs: targets, length of the first axis,
        forward pass."""
        if not self._is_recomputing:
            self.adopt_checkpoint()
            positions = tuple(p for target in targets for p in positions_of(target))
            self.calls.append((operation, positions, leading))
            self.is_arranged = self.is_arranged or self.has_picked
            self._expected.setdefault(self.forward, Counter()).update(positions)
        return (*targets, leading, self.forward)

    def adopt_checkpoint(self) -> None:
        """Inside torch.utils.checkpoint (not re-entrant), make its recomputation run under the capture too: it
        must save the tensors that the forward pass saved."""
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        pack = None if hooks is None else hooks[0]
        if "_checkpoint_hook" not in getattr(pack, "__qualname__", "") or self.mode is None:
            return
        frame = inspect.getclosurevars(pack).nonlocals.get("frame")
        original = getattr(frame, "recompute_fn", None)
        self.has_checkpoint = True
        if frame is None or not callable(original):
            raise UnsupportedOperationError(
                "activation checkpointing: this version of torch is not known to the engine; switch it off"
            )
        if getattr(original, "captured_by", None) is self:
            return
        forward, mode = self.forward, self.mode

        def recompute(*args: Any, **kwargs: Any) -> Any:
            with self.recomputation(forward), mode:
                return original(*args, **kwargs)

        recompute.captured_by = self  # type: ignore[attr-defined]
        frame.recompute_fn = recompute

    def stand_in(self, position: int, parameter: nn.Parameter) -> None:
        """`parameter` is a tracked one, whole, while a layer runs."""
        if parameter is not self.parameters[position]:
            self._stand_ins[id(parameter)] = parameter
            self._positions[id(parameter)] = position
        self.provenance.note_parameter(parameter)

    def position(self, value: object) -> int | None:
        """Index of a tracked parameter that takes a gradient, else None."""
        if isinstance(value, nn.Parameter) and value.requires_grad:
            return self._positions.get(id(value))
        return None

    def target(self, value: object) -> Target | None:
        """A tracked parameter's index, what is computed from parameters alone, else None."""
        position = self.position(value)
        return self.provenance.target(value) if position is None else position

    def name(self, target: Target) -> str:
        return ", ".join(self.names[position] for position in positions_of(target))

    def refuse(self, parameter: object, operation: str, why: str) -> NoReturn:
        """Raise for a tracked parameter, or a weight computed from some."""
        target = self.target(parameter)
        name = "?" if target is None else self.name(target)
        raise UnsupportedOperationError(f"parameter {name!r} in operation {operation!r}: {why}")

    def refuse_tracked(self, value: object, operation: str) -> None:
        """A parameter where data is expected."""
        if self.target(value) is not None:
            self.refuse(value, operation, "a parameter as the input has no per-unit gradient rule")

    def refuse_computed(self, value: object, target: Target | None, other: object, operation: str) -> None:
        """A weight that is computed from data beside one that is tracked."""
        if (
            target is None
            and isinstance(value, Tensor)
            and value.requires_grad
            and self.target(other) is not None
        ):
            self.refuse(
                other, operation, "the other weight of the call is computed from data, not a parameter"
            )


def positions_of(target: Target | None) -> tuple[int, ...]:
    """The parameters behind a target."""
    if target is None:
        return ()
    if isinstance(target, int):
        return (target,)
    return tuple(sorted(target.positions)) if isinstance(target, Derived) else (target.position,)


def current_task() -> int:
    """Number of the backward pass under way, -1 outside of one."""
    return int(torch._C._current_graph_task_id())


class CaptureMode(TorchFunctionMode):
    """Active during forward. `handlers` by function; `checks` may refuse a call by its arguments."""

    def __init__(
        self,
        state: CaptureState,
        handlers: dict[Any, Callable[..., Any]],
        checks: dict[Any, Callable[..., None]],
        hints: dict[str, str],
    ) -> None:
        super().__init__()
        self._state, self._handlers, self._checks, self._hints = state, handlers, checks, hints

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._state.is_paused:
            return func(*args, **kwargs)
        check = self._checks.get(func)
        if check is not None:
            check(*args, **kwargs)
        state, known = self._state, self._state.provenance
        tensors = [*tensors_in(args), *tensors_in(kwargs)] if kwargs else list(tensors_in(args))
        tracked = [t for t in tensors if state.target(t) is not None]
        is_fixed = all(known.is_constant(t) or state.target(t) is not None for t in tensors)
        if not is_fixed or known.has_read:
            self._check_writes(func, args, kwargs, is_fixed)
        if torch.is_grad_enabled():
            out = self._run(func, args, kwargs, tensors, tracked, is_fixed)
        else:
            out = func(*args, **kwargs)
            if is_fixed:
                known.note_constant(func, out, tensors)
        if not is_fixed:
            known.note_read(func, args)
            for tensor in tensors:
                # Written into without the name saying so.
                if known.is_stale(tensor):
                    self._note_write(tensor, func, _KEEPS_RECORDS)
        return out

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        if error[0] is None:
            where = self._state.provenance.written()
            if where is not None:
                raise UnsupportedOperationError(f"{where}: {_KEEPS_RECORDS}")

    def _check_writes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], is_fixed: bool) -> None:
        """Refuse a call that writes data (or numbers that were read from data, if `is_fixed`) into what the module
        keeps."""
        if is_fixed and not any(isinstance(value, float) for value in (*args, *kwargs.values())):
            return
        for tensor in written(func, args, kwargs):
            self._note_write(tensor, func, _KEEPS_NUMBERS if is_fixed else _KEEPS_RECORDS)

    def _note_write(self, tensor: Tensor, func: Any, why: str) -> None:
        """Data is written into `tensor`, which must not be what the module keeps, nor a weight computed from it."""
        state = self._state
        where = state.provenance.holder(tensor)
        if where is None and state.target(tensor) is not None:
            where = f"parameter {state.name(state.target(tensor))!r}"  # type: ignore[arg-type]
        if where is not None:
            state.provenance.is_watching = False
            name = getattr(func, "__name__", func)
            raise UnsupportedOperationError(f"{where} in operation {name!r}: {why}")
        state.provenance.forget(tensor)

    def _run(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        tracked: list[Tensor],
        is_fixed: bool,
    ) -> Any:
        """A call that may take part in a gradient; `is_fixed`: all its tensors are parameters' or constants."""
        state, known = self._state, self._state.provenance
        if not tracked:
            out = func(*args, **kwargs)
            if is_fixed:
                known.note_constant(func, out, tensors)
                return out
            state.trace = hash((state.trace, func))
            if picks_rows(func, args, kwargs, known.is_constant):
                state.has_picked = True
            if state.rows_hint is None:
                state.rows_hint = next(
                    (len(t) for t in tensors if t.dim() and not known.is_constant(t)), None
                )
            return out
        if is_fixed and not self._is_expansion(func, args, kwargs):
            return self._compute_weight(func, args, kwargs, tracked)
        handler = self._handlers.get(func)
        if handler is not None:
            if any(t.is_complex() for t in tensors):
                state.refuse(
                    next((t for t in tracked if t.is_complex()), tracked[0]),
                    _name(func),
                    "complex numbers have no per-unit gradient rule; compute with their real and imaginary parts",
                )
            out = handler(state, *args, **kwargs)
            if isinstance(out, Tensor) and not state._is_recomputing:
                state.forward_bytes += out.nbytes
            return out
        out = func(*args, **kwargs)
        if _carries_gradient(func, out) or any(known.target(t) is not None for t in tracked):
            name = _name(func)
            hint = self._hints.get(
                name, "its per-unit gradients are not computed; use a layer of torch.nn, matmul or einsum"
            )
            state.refuse(tracked[0], name, hint)
        return out

    def _is_expansion(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a parameter is repeated for each row of the batch (a class token, say)."""
        if func not in _EXPANSIONS or func not in self._handlers or self._state.rows_hint is None:
            return False
        shape = func(args[0].detach(), *args[1:], **kwargs).shape
        before = args[0].shape[0] if args[0].dim() == len(shape) and len(shape) else 1
        return len(shape) > 1 and before == 1 and shape[0] == self._state.rows_hint

    def _compute_weight(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tracked: list[Tensor]
    ) -> Any:
        """An operation on parameters and constants alone."""
        state, known = self._state, self._state.provenance
        out = func(*known.graphs(args), **known.graphs(kwargs))
        if not _carries_gradient(func, out):
            known.note_constant(func, out, [*tensors_in(args), *tensors_in(kwargs)])
            return out
        if next(written(func, args, kwargs), None) is not None:
            state.refuse(
                tracked[0], _name(func), "writes into a parameter, or into a weight computed from some"
            )
        parameters: dict[int, Tensor] = {}
        for tensor in tracked:
            target = state.target(tensor)
            for position in positions_of(target):
                parameters[position] = state.parameters[position]
        return known.leaves(func, args, out, parameters, tracked)


_KEEPS_RECORDS = (
    "the forward pass writes into it what was computed from records, so that a statistic of them would be kept "
    "without noise; leave the running statistic out or freeze it (eval mode, observers off), or give it constants"
)
_KEEPS_NUMBERS = (
    "the forward pass writes a number into it after one was read from records (item, tolist or float), so that a "
    "statistic of them may be kept without noise; do one of both outside of the forward pass"
)
_EXPANSIONS = frozenset({Tensor.expand, Tensor.repeat, Tensor.broadcast_to, torch.broadcast_to, torch.tile})


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func)).strip("_")


def _carries_gradient(func: Any, out: Any) -> bool:
    if isinstance(out, Tensor):
        # Reading a property of a parameter gives the parameter itself now and then; that is no operation.
        return out.requires_grad and not isinstance(out, nn.Parameter)
    if isinstance(out, list | tuple):
        return any(_carries_gradient(func, item) for item in out)
    return func is Tensor.__setitem__
