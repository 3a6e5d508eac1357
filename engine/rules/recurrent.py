"""Recurrent layers as whole functions: outer families for both weights, diagonal ones for both biases.

Each layer and direction is one captured call that runs the recurrence itself. Its backward pass gives the gradients
with respect to the affine maps of all steps, [B, T, kH]: with the inputs x they are the use of W_ih, with the hidden
states before each step the use of W_hh, and their rows are those of the biases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from synthward.engine.capture import CaptureState, Kept
from synthward.engine.provenance import Target
from synthward.engine.rules._cells import GRU, LSTM, RELU, TANH, Cell, StepGrads, Weights, shifted
from synthward.engine.rules.bare import as_data
from synthward.engine.rules.uses import DiagonalRows, OuterUse, Use, diagonal_use


@dataclass(frozen=True)
class _Kind:
    """A function of torch's: its name, its recurrence, and whether it has a cell state."""

    operation: str
    cell: Cell
    has_cell_state: bool


class _Sweep(torch.autograd.Function):
    """One layer in one direction: hidden states [B, T, P] and the last cell state."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        weights: Weights,
        kind: _Kind,
        order: Sequence[int],
        anchor: Tensor | None,
        state: CaptureState,
        call: Any,
    ) -> tuple[Tensor, Tensor | None]:
        # What the layers around it gave is float32 by now; weights are whatever the module has.
        dtype = x.dtype if torch.is_autocast_enabled(x.device.type) else None
        with torch.autocast(x.device.type, enabled=False):
            w = _cast(weights, dtype)
            bias = w.b_ih
            if kind.cell.folds_bias() and w.b_ih is not None and w.b_hh is not None:
                bias = w.b_ih + w.b_hh
            gates = F.linear(x, w.w_ih, bias).contiguous()
            swept = kind.cell.forward(gates, h0, c0, w, order)
        ctx.save_for_backward(x, h0, c0, *weights, swept.out, *swept.saved)
        ctx.set_materialize_grads(False)
        ctx.kind, ctx.order, ctx.dtype, ctx.state, ctx.call = kind, order, dtype, state, call
        return swept.out, swept.last_cell

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_cell: Tensor | None) -> tuple[Tensor | None, ...]:
        kind: _Kind = ctx.kind
        ctx.state.refuse_double(kind.operation)
        # Asked for once: activation checkpointing computes them anew and hands them out a single time.
        x, h0, c0, *rest = ctx.saved_tensors
        weights = Weights(*rest[:5])
        out, *saved = rest[5:]
        with torch.autocast(x.device.type, enabled=False):
            w = _cast(weights, ctx.dtype)
            grad = torch.zeros_like(out) if grad is None else grad
            found = kind.cell.backward(grad, grad_cell, out, h0, c0, tuple(saved), w, ctx.order)
            grad_x = found.inputs @ w.w_ih if ctx.needs_input_grad[0] else None
            before = shifted(out, h0, ctx.order)
        leading, forward = ctx.call[-2:]
        uses = _uses(ctx.state, ctx.call, x.detach(), before, found)
        if uses:
            ctx.state.keep(Kept(kind.operation, leading, forward, uses))
        anchor_grad = ctx.state.anchor_grad if uses else None
        return grad_x, found.h0, found.c0, None, None, None, anchor_grad, None, None


def _cast(weights: Weights, dtype: torch.dtype | None) -> Weights:
    return Weights(*(None if w is None else w.detach().to(dtype) for w in weights))  # type: ignore[arg-type]


def _uses(
    state: CaptureState, call: Any, x: Tensor, before: Tensor, found: StepGrads
) -> list[tuple[Target, Use | DiagonalRows]]:
    """The uses of the tracked weights of one sweep."""
    *targets, leading, forward = call
    rows = {id(value): _rows(value) for value in (x, before, found.inputs, found.hidden)}
    uses: list[tuple[Target, Use | DiagonalRows]] = []
    for target, a, g in ((targets[0], x, found.inputs), (targets[1], before, found.hidden)):
        if target is not None:
            uses.append((target, OuterUse(rows[id(a)], rows[id(g)])))
    biases: dict[int, Use | DiagonalRows] = {}
    for target, g in ((targets[2], found.inputs), (targets[3], found.hidden)):
        if target is not None:
            if id(g) not in biases:
                biases[id(g)] = diagonal_use(state, rows[id(g)], leading, forward)
            uses.append((target, biases[id(g)]))
    if targets[4] is not None and found.projection is not None:
        inputs, grads = found.projection
        uses.append((targets[4], OuterUse(_rows(inputs), _rows(grads))))
    return uses


def _rows(value: Tensor) -> Tensor:
    return value.reshape(-1, value.shape[-1]).float().contiguous()


def _sweep(
    state: CaptureState,
    kind: _Kind,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Weights,
    *,
    is_reversed: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, and the last hidden and cell state, of one layer and direction."""
    targets = tuple(state.target(w) for w in weights)
    is_tracked = any(target is not None for target in targets)
    if torch.is_autocast_enabled(x.device.type):
        x, h0, c0 = x.float(), h0.float(), None if c0 is None else c0.float()
    times = x.shape[1]
    order = range(times - 1, -1, -1) if is_reversed else range(times)
    # A frozen layer between others only passes gradients on.
    call = state.call(kind.operation, targets, len(x)) if is_tracked else (*targets, len(x), state.forward)
    anchor = state.anchor if is_tracked else None
    apply: Callable[..., tuple[Tensor, Tensor | None]] = _Sweep.apply
    out, cell = apply(x.contiguous(), h0, c0, weights, kind, order, anchor, state, call)
    state.forward_bytes += out.nbytes
    return out, out[:, order[-1]], cell


def _pair(kind: _Kind, hx: Any) -> list[Tensor]:
    """The initial hidden state, and the initial cell state where there is one."""
    return list(hx) if kind.has_cell_state else [hx]


def _initial(state: CaptureState, hx: Tensor, rows: int, operation: str) -> list[Tensor]:
    """Initial states [rows, P] of each layer and direction; learned ones as data whose gradient is captured."""
    if state.target(hx) is None:
        return list(hx.unbind(0))
    assert state.mode is not None
    with state.mode:
        parts = [hx[i] for i in range(len(hx))]
    return [as_data(state, part, rows, operation) for part in parts]


def _split(params: Sequence[Tensor], has_biases: bool, count: int) -> list[Weights]:
    """The weights of each layer and direction, in torch's order: a projection comes last."""
    each = len(params) // count
    found = []
    for first in range(0, len(params), each):
        group = list(params[first : first + each])
        biases = group[2:4] if has_biases else [None, None]
        rest = group[4 if has_biases else 2 :]
        found.append(Weights(group[0], group[1], *biases, *rest))
    return found


def _check(
    state: CaptureState,
    kind: _Kind,
    input: Tensor,
    axes: int,
    hx: Any,
    where: tuple[int, ...],
    weights: Sequence[Any],
) -> None:
    """Refuse what has no rule, and shapes that torch would read past. `input` has that many `axes`, initial states
    begin with the axes `where`."""
    operation = kind.operation
    initial = _pair(kind, hx)
    state.refuse_tracked(input, operation)
    tracked = next((t for t in (*weights, *initial) if state.target(t) is not None), None)
    if input.dim() != axes or (axes == 3 and input.shape[1] == 0):
        state.refuse(tracked, operation, f"its input {list(input.shape)} is no batch of sequences")
    for value in initial:
        if value.dim() != len(where) + 1 or tuple(value.shape[:-1]) != where:
            state.refuse(tracked, operation, f"an initial state {list(value.shape)} is not {[*where, 'H']}")
    if any(state.target(w) is not None for w in weights):
        for weight in weights:
            state.refuse_computed(weight, state.target(weight), tracked, operation)


def _dropout(x: Tensor, dropout: float) -> Tensor:
    """Factors of dropout [B, T, d], drawn in the order in which torch draws them (time first)."""
    ones = torch.ones(x.shape[1], x.shape[0], x.shape[2], dtype=x.dtype, device=x.device)
    return F.dropout(ones, dropout).transpose(0, 1)


def _layers(
    state: CaptureState,
    kind: _Kind,
    input: Tensor,
    hx: Any,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """Handler of ``torch.lstm`` and its relatives on padded sequences [B, T, d] or [T, B, d]."""
    directions = 2 if bidirectional else 1
    x = input if batch_first or input.dim() != 3 else input.transpose(0, 1)
    _check(state, kind, x, 3, hx, (directions * num_layers, len(x)), params)
    states = [_initial(state, value, len(x), kind.operation) for value in _pair(kind, hx)]
    if all(state.target(p) is None for p in params):
        # Only the initial states are learned.
        stacked = [torch.stack(parts) for parts in states]
        run: Callable[..., tuple[Tensor, ...]] = getattr(torch, kind.operation)
        flags = (has_biases, num_layers, dropout, train, bidirectional, batch_first)
        return run(input, stacked if kind.has_cell_state else stacked[0], params, *flags)
    groups = _split(params, has_biases, directions * num_layers)
    lasts: list[tuple[Tensor, Tensor | None]] = []
    for layer in range(num_layers):
        if layer and train and dropout:
            x = x * _dropout(x, dropout)
        outs = []
        for direction in range(directions):
            at = layer * directions + direction
            c0 = states[1][at] if kind.has_cell_state else None
            out, h, c = _sweep(state, kind, x, states[0][at], c0, groups[at], is_reversed=direction == 1)
            outs.append(out)
            lasts.append((h, c))
        x = outs[0] if len(outs) == 1 else torch.cat(outs, -1)
    hidden, output = torch.stack([h for h, _ in lasts]), x if batch_first else x.transpose(0, 1)
    cells = [c for _, c in lasts if c is not None]
    return (output, hidden, torch.stack(cells)) if cells else (output, hidden)


def _sequences(kind: _Kind, state: CaptureState, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """Handler of ``torch.lstm`` and its relatives, padded or packed."""
    # The fourth argument is a flag, or the weights where sizes of packed batches come second.
    if "batch_sizes" in kwargs or (len(args) > 3 and not isinstance(args[3], bool)):
        params = kwargs["params"] if "params" in kwargs else args[3]
        tracked = next((p for p in params if state.target(p) is not None), params[0])
        state.refuse(
            tracked,
            kind.operation,
            "a packed sequence may have its rows in another order than the batch, and the call does not tell; pad "
            "the sequences and mask the loss",
        )
    return _layers(state, kind, *args, **kwargs)


def _cell(
    kind: _Kind,
    state: CaptureState,
    input: Tensor,
    hx: Any,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Any:
    """Handler of ``torch.lstm_cell`` and its relatives: one step; input [B, d]."""
    weights = Weights(w_ih, w_hh, b_ih, b_hh)
    rows = len(input)
    _check(state, kind, input, 2, hx, (rows,), weights)
    states = [
        value if state.target(value) is None else as_data(state, value, rows, kind.operation)
        for value in _pair(kind, hx)
    ]
    if all(state.target(w) is None for w in weights):
        return getattr(torch, kind.operation)(
            input, states if kind.has_cell_state else states[0], *weights[:4]
        )
    c0 = states[1] if kind.has_cell_state else None
    _, h, c = _sweep(state, kind, input.unsqueeze(1), states[0], c0, weights, is_reversed=False)
    return h if c is None else (h, c)


_KINDS = [
    _Kind("lstm", LSTM, True),
    _Kind("gru", GRU, False),
    _Kind("rnn_tanh", TANH, False),
    _Kind("rnn_relu", RELU, False),
]

HANDLERS: dict[Any, Callable[..., Any]] = {
    **{getattr(torch, kind.operation): partial(_sequences, kind) for kind in _KINDS},
    **{
        getattr(torch, f"{kind.operation}_cell"): partial(
            _cell, replace(kind, operation=f"{kind.operation}_cell")
        )
        for kind in _KINDS
    },
}
