"""Capture of parametric calls as functions, whatever module made them.

A `TorchFunctionMode` sees each torch function of the forward pass. Calls with a rule become autograd
functions that compute input gradients only and keep (activation, output gradient) pairs; any other
operation on a tracked parameter that would carry a gradient is refused by name. Nothing is stored on
tensors or modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from synthward.engine.errors import UnsupportedOperationError
from synthward.engine.scratch import Workspace

if TYPE_CHECKING:
    from synthward.engine.layout import Layout
    from synthward.engine.rules.families import KeptUse


@dataclass(frozen=True)
class Kept:
    """What one captured call kept in the backward pass: length of its first axis, which forward pass it was
    made
    in, and a use per parameter."""

    operation: str
    leading: int
    forward: int
    uses: list[tuple[int, KeptUse]]


class CaptureState:
    """All that is kept between forward and the end of backward; owned by one engine, freed in one place.

    Args:
        positions: index of each tracked parameter by its id.
        names: their names, for messages.
        device: where they lie.
    """

    def __init__(self, positions: dict[int, int], names: list[str], device: torch.device) -> None:
        self._positions, self._names = positions, names
        # Each captured call takes the anchor as an input, so that it is in the graph even if its data is
        # not, and so that a real backward pass can be told from torch.autograd.grad, which leaves the
        # anchor alone.
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.anchor_grad = torch.zeros((), device=device)
        self.workspace = Workspace(device)
        self.forward = 0
        # Rows of the backward pass to come, if known by then: of every forward pass, or of one.
        self.layout: Layout | None = None
        self.layouts: dict[int, Layout] = {}
        # (operation, positions, length of the first axis) of each captured call since the last backward pass.
        self.calls: list[tuple[str, tuple[int | None, ...], int]] = []
        self._kept: list[Kept] = []
        self._task = -1

    def keep(self, kept: Kept) -> None:
        """Called in backward by a captured call."""
        task = current_task()
        if task != self._task:
            self._task, self._kept = task, []
        self._kept.append(kept)

    def call_layout(self, rows: int, leading: int, forward: int) -> Layout | None:
        """Layout of a call with that many rows; None where the units are not known yet."""
        layout = self.layouts.get(forward, self.layout)
        if layout is None or layout.num_rows == 0 or leading % layout.num_rows:
            return None
        return layout.expand(rows // layout.num_rows)

    def refuse_double(self, operation: str) -> None:
        """Called in backward: a gradient that is to be differentiated again is not supported."""
        if torch.is_grad_enabled():
            raise UnsupportedOperationError(
                f"operation {operation!r}: its gradient is to be differentiated again (create_graph=True, "
                "as for a "
                "gradient penalty); the engine computes first derivatives only"
            )

    def take(self, task: int | None = None) -> list[Kept]:
        """What the last backward pass kept (that of graph task `task` only, if given); nothing stays here."""
        if task is not None and task != self._task:
            self._kept = []
        kept, self._kept, self._task = self._kept, [], -1
        self.anchor.grad = None
        return kept

    def call(self, operation: str, positions: tuple[int | None, ...], leading: int) -> tuple[int | None, ...]:
        """Note a captured call; returns what its backward needs: positions, length of the first axis,
        forward pass."""
        self.calls.append((operation, positions, leading))
        return (*positions, leading, self.forward)

    def position(self, value: object) -> int | None:
        """Index of a tracked parameter that takes a gradient, else None."""
        if isinstance(value, nn.Parameter) and value.requires_grad:
            return self._positions.get(id(value))
        return None

    def name(self, position: int) -> str:
        return self._names[position]

    def refuse(self, parameter: object, operation: str, why: str) -> NoReturn:
        """Raise for a tracked parameter."""
        position = self.position(parameter)
        name = "?" if position is None else self._names[position]
        raise UnsupportedOperationError(f"parameter {name!r} in operation {operation!r}: {why}")

    def refuse_tracked(self, value: object, operation: str) -> None:
        """A parameter where data is expected."""
        if self.position(value) is not None:
            self.refuse(value, operation, "a parameter as the input has no per-unit gradient rule")

    def refuse_computed(self, value: object, position: int | None, other: object, operation: str) -> None:
        """A weight that is computed (not a parameter) beside one that is tracked."""
        if (
            position is None
            and isinstance(value, Tensor)
            and value.requires_grad
            and self.position(other) is not None
        ):
            self.refuse(
                other, operation, "the other weight of the call is computed, not a parameter of the module"
            )


def current_task() -> int:
    """Number of the backward pass under way, -1 outside of one."""
    return int(torch._C._current_graph_task_id())


class CaptureMode(TorchFunctionMode):
    """Active during forward. `handlers` by function; `checks` may refuse a call by its arguments."""

    def __init__(
        self,
        state: CaptureState,
        handlers: dict[Any, Callable[..., Tensor]],
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
        handler = self._handlers.get(func)
        if handler is not None and torch.is_grad_enabled():
            return handler(self._state, *args, **kwargs)
        check = self._checks.get(func)
        if check is not None:
            check(*args, **kwargs)
        touched = self._touched(args)
        if touched is None and kwargs:
            touched = self._touched(kwargs.values())
        out = func(*args, **kwargs)
        if touched is not None and torch.is_grad_enabled() and _carries_gradient(func, out):
            name = getattr(func, "__name__", str(func)).strip("_")
            hint = self._hints.get(
                name, "its per-unit gradients are not computed; use nn.Linear, nn.LayerNorm or nn.Embedding"
            )
            self._state.refuse(touched, name, hint)
        return out

    def _touched(self, values: Iterable[Any]) -> nn.Parameter | None:
        for value in values:
            if isinstance(value, nn.Parameter):
                if self._state.position(value) is not None:
                    return value
            elif isinstance(value, list | tuple):
                found = self._touched(value)
                if found is not None:
                    return found
        return None


def _carries_gradient(func: Any, out: Any) -> bool:
    if isinstance(out, Tensor):
        # Reading a property of a parameter gives the parameter itself now and then; that is no operation.
        return out.requires_grad and not isinstance(out, nn.Parameter)
    if isinstance(out, list | tuple):
        return any(_carries_gradient(func, item) for item in out)
    return func is Tensor.__setitem__
