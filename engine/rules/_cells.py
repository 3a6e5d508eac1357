"""The arithmetic of recurrent layers over a whole sequence, forward and back; no parameters, no capture.

Formulas: the documentation of ``torch.nn.LSTM``, ``GRU`` and ``RNN``. All tensors are batch-first, so that rows of
one record are next to each other; `k` gates of width H lie side by side, in torch's order. Backward gives the
gradients with respect to both affine maps of each step; products with weights over all steps are the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Weights(NamedTuple):
    """Parameters of one layer and direction: [kH, d], [kH, P], [kH], [kH], [P, H]; P is H without a projection."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None


@dataclass(frozen=True)
class Swept:
    """A forward sweep: hidden states [B, T, P], the last cell state [B, H] if there are any, and what backward
    needs."""

    out: Tensor
    last_cell: Tensor | None
    saved: tuple[Tensor, ...]


@dataclass(frozen=True)
class StepGrads:
    """Gradients with respect to ``x W_ih^T + b_ih`` and ``h W_hh^T + b_hh`` [B, T, kH] (the same tensor where they
    are equal) and to the initial states; of a projection, its input and output gradients [B, T, H], [B, T, P]."""

    inputs: Tensor
    hidden: Tensor
    h0: Tensor
    c0: Tensor | None = None
    projection: tuple[Tensor, Tensor] | None = None


class Cell(Protocol):
    """One kind of recurrence."""

    def folds_bias(self) -> bool:
        """Whether ``b_hh`` may be added to the inputs' affine map."""

    def forward(
        self, gates: Tensor, h0: Tensor, c0: Tensor | None, w: Weights, order: Sequence[int]
    ) -> Swept:
        """`gates` [B, T, kH], the inputs' affine map, is overwritten; steps are taken in `order`."""

    def backward(
        self,
        grad: Tensor,
        grad_cell: Tensor | None,
        out: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        saved: tuple[Tensor, ...],
        w: Weights,
        order: Sequence[int],
    ) -> StepGrads:
        """From gradients of `out` [B, T, P] and of the last cell state; `order` is that of forward."""


def shifted(states: Tensor, first: Tensor, order: Sequence[int]) -> Tensor:
    """The state [B, T, P] that each step began with, of the states it ended with and the initial one."""
    before = torch.empty_like(states)
    if order[0] == 0:
        before[:, 0], before[:, 1:] = first, states[:, :-1]
    else:
        before[:, -1], before[:, :-1] = first, states[:, 1:]
    return before


def _blocks(gates: Tensor, count: int) -> tuple[Tensor, ...]:
    """The `count` gates [B, T, H] of [B, T, count * H]."""
    return gates.chunk(count, -1)


def _sigmoid_slope(factor: Tensor, value: Tensor, out: Tensor) -> Tensor:
    """``factor * value * (1 - value)`` in one pass."""
    torch.ops.aten.sigmoid_backward.grad_input(factor, value, grad_input=out)
    return out


def _tanh_slope(factor: Tensor, value: Tensor, out: Tensor) -> Tensor:
    """``factor * (1 - value^2)`` in one pass."""
    torch.ops.aten.tanh_backward.grad_input(factor, value, grad_input=out)
    return out


class LSTMCell:
    """i, f, o = sigmoid, g = tanh; c' = f c + i g; h' = o tanh(c'), projected by W_hr if there is one."""

    def folds_bias(self) -> bool:
        return True

    def forward(
        self, gates: Tensor, h0: Tensor, c0: Tensor | None, w: Weights, order: Sequence[int]
    ) -> Swept:
        assert c0 is not None
        batch, times, _ = gates.shape
        hidden = c0.shape[1]
        cells = gates.new_empty(batch, times, hidden)
        out = gates.new_empty(batch, times, h0.shape[1])
        w_hh, h, c = w.w_hh.t(), h0, c0
        w_hr = None if w.w_hr is None else w.w_hr.t()
        steps, states, ends = gates.unbind(1), cells.unbind(1), out.unbind(1)
        opening = gates[..., : 2 * hidden].unbind(1)
        i, f, g, o = (part.unbind(1) for part in _blocks(gates, 4))
        for t in order:
            steps[t].addmm_(h, w_hh)
            opening[t].sigmoid_()
            g[t].tanh_()
            o[t].sigmoid_()
            c = torch.mul(f[t], c, out=states[t]).addcmul_(i[t], g[t])
            squashed = c.tanh()
            at = ends[t]
            h = torch.mul(o[t], squashed, out=at) if w_hr is None else torch.mm(o[t] * squashed, w_hr, out=at)
        return Swept(out, c.clone(), (gates, cells))

    def backward(
        self,
        grad: Tensor,
        grad_cell: Tensor | None,
        out: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        saved: tuple[Tensor, ...],
        w: Weights,
        order: Sequence[int],
    ) -> StepGrads:
        assert c0 is not None
        gates, cells = saved
        i, f, g, o = _blocks(gates, 4)
        squashed = cells.tanh()
        # Slopes of c' and h' in what goes into each gate; the loop turns them into gradients.
        d = torch.empty_like(gates)
        d_i, d_f, d_g, d_o = _blocks(d, 4)
        _sigmoid_slope(g, i, d_i)
        _sigmoid_slope(shifted(cells, c0, order), f, d_f)
        _tanh_slope(i, g, d_g)
        _sigmoid_slope(squashed, o, d_o)
        through = _tanh_slope(o, squashed, torch.empty_like(squashed)).unbind(1)
        steps, forget, d_outs, grads = d.unbind(1), f.unbind(1), d_o.unbind(1), grad.unbind(1)
        first_three = d.view(*d.shape[:2], 4, c0.shape[1])[:, :, :3].unbind(1)
        dh_all = None if w.w_hr is None else torch.empty_like(grad)
        dc = torch.zeros_like(c0) if grad_cell is None else grad_cell
        later: Tensor | None = None
        for t in reversed(order):
            dh = grads[t] if later is None else torch.addmm(grads[t], later, w.w_hh)
            if w.w_hr is not None and dh_all is not None:
                dh_all[:, t] = dh
                dh = dh @ w.w_hr
            dc = torch.addcmul(dc, dh, through[t])
            first_three[t].mul_(dc.unsqueeze(1))
            d_outs[t].mul_(dh)
            dc = dc * forget[t]
            later = steps[t]
        assert later is not None
        projection = None if dh_all is None else (o * squashed, dh_all)
        return StepGrads(d, d, later @ w.w_hh, dc, projection)


class GRUCell:
    """r, z = sigmoid; n = tanh(W_in x + b_in + r (W_hn h + b_hn)); h' = (1 - z) n + z h."""

    def folds_bias(self) -> bool:
        return False

    def forward(
        self, gates: Tensor, h0: Tensor, c0: Tensor | None, w: Weights, order: Sequence[int]
    ) -> Swept:
        batch, times, hidden = *gates.shape[:2], h0.shape[1]
        split = 2 * hidden
        opening = gates[..., :split]
        # What r multiplies: W_hn h + b_hn.
        recurrent, out = gates.new_zeros(batch, times, hidden), gates.new_empty(batch, times, hidden)
        if w.b_hh is not None:
            opening += w.b_hh[:split]
            recurrent += w.b_hh[split:]
        w_open, w_n, h = w.w_hh[:split].t(), w.w_hh[split:].t(), h0
        r, z, n = (part.unbind(1) for part in _blocks(gates, 3))
        opened, added, ends = opening.unbind(1), recurrent.unbind(1), out.unbind(1)
        for t in order:
            opened[t].addmm_(h, w_open).sigmoid_()
            n[t].addcmul_(r[t], added[t].addmm_(h, w_n)).tanh_()
            h = torch.lerp(n[t], h, z[t], out=ends[t])
        return Swept(out, None, (gates, recurrent))

    def backward(
        self,
        grad: Tensor,
        grad_cell: Tensor | None,
        out: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        saved: tuple[Tensor, ...],
        w: Weights,
        order: Sequence[int],
    ) -> StepGrads:
        gates, recurrent = saved
        r, z, n = _blocks(gates, 3)
        # Slopes of h' in what goes into each gate; n's own differ from the hidden side's by the factor r.
        d = torch.empty_like(gates)
        d_r, d_z, d_n = _blocks(d, 3)
        slope_n = _tanh_slope(1 - z, n, torch.empty_like(out))
        _sigmoid_slope(slope_n * recurrent, r, d_r)
        _sigmoid_slope(shifted(out, h0, order) - n, z, d_z)
        torch.mul(slope_n, r, out=d_n)
        dh_all = torch.empty_like(out)
        gradients, kept, ends = d.view(*d.shape[:2], 3, h0.shape[1]).unbind(1), z.unbind(1), dh_all.unbind(1)
        steps, grads = d.unbind(1), grad.unbind(1)
        carried: Tensor | None = None
        for t in reversed(order):
            dh = ends[t].copy_(grads[t]) if carried is None else torch.add(grads[t], carried, out=ends[t])
            gradients[t].mul_(dh.unsqueeze(1))
            carried = torch.addmm(dh * kept[t], steps[t], w.w_hh)
        assert carried is not None
        inputs = d.clone()
        torch.mul(slope_n, dh_all, out=_blocks(inputs, 3)[2])
        return StepGrads(inputs, d, carried)


class SimpleCell:
    """h' = tanh(...) or relu(...) of the sum of both affine maps."""

    def __init__(self, *, is_tanh: bool) -> None:
        self._is_tanh = is_tanh

    def folds_bias(self) -> bool:
        return True

    def forward(
        self, gates: Tensor, h0: Tensor, c0: Tensor | None, w: Weights, order: Sequence[int]
    ) -> Swept:
        steps, w_hh, h = gates.unbind(1), w.w_hh.t(), h0
        for t in order:
            h = steps[t].addmm_(h, w_hh)
            h = h.tanh_() if self._is_tanh else h.relu_()
        return Swept(gates, None, ())

    def backward(
        self,
        grad: Tensor,
        grad_cell: Tensor | None,
        out: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        saved: tuple[Tensor, ...],
        w: Weights,
        order: Sequence[int],
    ) -> StepGrads:
        d = torch.empty_like(out)
        steps, states, grads = d.unbind(1), out.unbind(1), grad.unbind(1)
        later: Tensor | None = None
        for t in reversed(order):
            dh = grads[t] if later is None else torch.addmm(grads[t], later, w.w_hh)
            if self._is_tanh:
                later = _tanh_slope(dh, states[t], steps[t])
            else:
                later = torch.ops.aten.threshold_backward.grad_input(dh, states[t], 0, grad_input=steps[t])
        assert later is not None
        return StepGrads(d, d, later @ w.w_hh)


LSTM, GRU = LSTMCell(), GRUCell()
TANH, RELU = SimpleCell(is_tanh=True), SimpleCell(is_tanh=False)
