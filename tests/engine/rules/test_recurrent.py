"""LSTM, GRU, RNN and their cells: values against torch's own, clipped sums against the float64 loop over units."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from synthward import PrivacyEngine
from synthward.engine.capture import CaptureMode, CaptureState
from synthward.engine.rules.registry import CHECKS, HANDLERS, HINTS
from tests.engine.nets import accumulate, make_trainer, oracle, released, row_losses, unit_losses
from tests.oracles import flat_parameters

TIMES, WIDTH, HIDDEN = 4, 3, 5
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
KINDS = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn_tanh": nn.RNN,
    "rnn_relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}
OPTIONS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "both ways": {"bidirectional": True},
    "two layers, both ways": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}
CASES = {f"{kind}, {name}": (kind, options) for kind in KINDS for name, options in OPTIONS.items()}
CASES |= {
    "lstm, projected": ("lstm", {"proj_size": 2}),
    "lstm, projected, two layers": (
        "lstm",
        {"proj_size": 2, "num_layers": 2, "bidirectional": True, "bias": False},
    ),
}


def states_of(found):
    return found if isinstance(found, tuple) else (found,)


class Net(nn.Module):
    """A recurrent layer between two others; `read` picks what the loss sees of output and final states, all
    batch-first; `start` gives initial states of (net, batch)."""

    def __init__(self, rnn: nn.Module, read=lambda out, *states: (out, *states), start=None) -> None:
        super().__init__()
        self.stem, self.rnn, self.head = nn.Linear(WIDTH, WIDTH), rnn, nn.Linear(1, 2)
        self.read, self.start = read, start

    def forward(self, x):
        h = torch.tanh(self.stem(x))
        h = h if self.rnn.batch_first else h.transpose(0, 1)
        out, states = self.rnn(h, None if self.start is None else self.start(self, x))
        out = out if self.rnn.batch_first else out.transpose(0, 1)
        found = self.read(out, *(state.transpose(0, 1) for state in states_of(states)))
        return self.head(sum(torch.sin(2 * part).flatten(1).sum(1, keepdim=True) for part in found))


def build(case: str, **changes) -> Net:
    kind, options = CASES[case]
    torch.manual_seed(0)
    return Net(KINDS[kind](WIDTH, HIDDEN, **options), **changes)


def records(rows: int, times: int = TIMES) -> torch.Tensor:
    return torch.randn(rows, times, WIDTH, generator=torch.Generator().manual_seed(1))


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    # What is released is read off parameters of order one.
    atol = max(1e-6, 1e-5 * np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=atol)


def trained(net: nn.Module, x: torch.Tensor, counts: list[int], bound: float) -> np.ndarray:
    """The released sum, where some parameters may be frozen."""
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0)
    trainer, before = make_trainer(net, optimizer, max_grad_norm=bound), flat_parameters(net)
    accumulate(trainer, net, x, counts)
    trainer.apply()
    return before - flat_parameters(net)


def assert_exact(net: nn.Module, x: torch.Tensor, counts: list[int], bounds=(0.05, 1e4)) -> None:
    for bound in bounds:
        assert_close(trained(copy.deepcopy(net), x, counts, bound), oracle(net, x, counts, bound))


# values


def captured(module: nn.Module) -> CaptureState:
    named = list(module.named_parameters())
    state = CaptureState([p for _, p in named], [name for name, _ in named])
    state.mode = CaptureMode(state, HANDLERS, CHECKS, HINTS)
    return state


def values(rnn: nn.Module, inputs: list[torch.Tensor], state: CaptureState | None) -> list[torch.Tensor]:
    """Output, final states and gradients of all inputs; seeds dropout."""
    inputs = [value.clone().requires_grad_() for value in inputs]
    torch.manual_seed(5)
    x, *initial = inputs
    hx = None if not initial else tuple(initial) if len(initial) == 2 else initial[0]
    if state is None:
        out, states = rnn(x, hx)
    else:
        with state.mode:
            out, states = rnn(x, hx)
    found = [out, *states_of(states)]
    total = sum(
        (value * torch.linspace(0.5, 1.5, value.numel()).view_as(value).to(value)).sum() for value in found
    )
    return [*found, *torch.autograd.grad(total, inputs)]


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "given"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_values_and_input_gradients_are_those_of_torch(case, dtype, given):
    rnn = build(case).rnn.to(dtype)
    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn(6, TIMES, WIDTH, dtype=dtype, generator=generator)]
    sweeps, rows = rnn.num_layers * (1 + rnn.bidirectional), 6 if rnn.batch_first else TIMES
    if given:
        inputs.append(torch.randn(sweeps, rows, rnn.proj_size or HIDDEN, dtype=dtype, generator=generator))
        if isinstance(rnn, nn.LSTM):
            inputs.append(torch.randn(sweeps, rows, HIDDEN, dtype=dtype, generator=generator))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    state = captured(rnn)
    for found, expected in zip(values(rnn, inputs, state), values(rnn, inputs, None), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert [call[0] for call in state.calls] == [case.partition(",")[0]] * sweeps


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_drawn_as_torch_draws_it(kind, batch_first):
    torch.manual_seed(0)
    options = {"num_layers": 3, "bidirectional": True, "dropout": 0.4, "batch_first": batch_first}
    rnn, x = KINDS[kind](WIDTH, HIDDEN, **options), records(6)
    found, expected = values(rnn, [x], captured(rnn)), values(rnn, [x], None)
    torch.testing.assert_close(found, expected)
    rnn.eval()
    still = values(rnn, [x], captured(rnn))
    torch.testing.assert_close(still, values(rnn, [x], None))
    assert not torch.allclose(still[0], found[0])


# per-unit gradients


@pytest.mark.parametrize("counts", [[1] * 5, [2, 0, 3, 1]], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_clipped_sums_are_exact(case, counts):
    assert_exact(build(case), records(sum(counts)), counts)


@pytest.mark.parametrize("counts", [[1] * 3, [2, 1]], ids=str)
@pytest.mark.parametrize("times", [1, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_one_time_and_many(kind, times, counts):
    assert_exact(build(f"{kind}, both ways"), records(3, times), counts)


READS = {
    "output": lambda out, *states: (out,),
    "last time": lambda out, *states: (out[:, -1],),
    "first time": lambda out, *states: (out[:, 0],),
    "last hidden state": lambda out, *states: (states[0],),
    "last state": lambda out, *states: (states[-1],),
    "last state of one direction": lambda out, *states: (states[-1][:, :1],),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("case", ["lstm, projected", *(f"{kind}, both ways" for kind in KINDS)])
def test_losses_that_see_a_part(case, read):
    assert_exact(build(case, read=READS[read]), records(4), [1, 3])


def test_dropout_between_layers_is_exact():
    torch.manual_seed(0)
    net, x = Net(nn.LSTM(WIDTH, HIDDEN, 2, dropout=0.5)), records(4)
    torch.manual_seed(3)
    unit_losses(net, x, [1, 3]).sum().backward()
    expected = np.concatenate([p.grad.double().flatten().numpy() for p in net.parameters()])
    net.zero_grad()
    torch.manual_seed(3)
    assert_close(released(net, x, [1, 3], 1e4), expected)


def from_data(net, x):
    made = torch.stack([torch.tanh(net.stem(x[:, 0]))] * 2).repeat(1, 1, 2)[..., :HIDDEN]
    return (made, 2 * made) if isinstance(net.rnn, nn.LSTM) else made


def learned(net, x):
    made = [torch.tanh(part).expand(-1, len(x), -1) for part in net.initial]
    return tuple(made) if len(made) == 2 else made[0]


def repeated(net, x):
    made = [part.repeat(1, len(x), 1) for part in net.initial]
    return tuple(made) if len(made) == 2 else made[0]


@pytest.mark.parametrize("counts", [[1] * 4, [3, 1], [1]], ids=str)
@pytest.mark.parametrize("start", [from_data, learned, repeated])
@pytest.mark.parametrize("kind", KINDS)
def test_initial_states(kind, start, counts):
    net = build(f"{kind}, both ways", start=start)
    if start is not from_data:
        parts = 2 if kind == "lstm" else 1
        net.initial = nn.ParameterList([torch.randn(2, 1, HIDDEN) for _ in range(parts)])
    assert_exact(net, records(sum(counts)), counts)
    net.rnn.requires_grad_(False)
    assert_exact(net, records(sum(counts)), counts)


@pytest.mark.parametrize("frozen", ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "l0", "l1"])
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_tanh"])
def test_what_is_frozen_changes_nothing_else(kind, frozen):
    torch.manual_seed(0)
    options = {"proj_size": 2} if kind == "lstm" else {}
    net = Net(KINDS[kind](WIDTH, HIDDEN, num_layers=2, **options))
    for name, parameter in net.rnn.named_parameters():
        parameter.requires_grad_(frozen not in name)
    assert_exact(net, records(4), [3, 1])


@pytest.mark.parametrize("counts", [[1] * 4, [3, 1]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_computed_weights(kind, counts):
    net = build(f"{kind}, both ways")
    for name in ("weight_ih_l0", "weight_hh_l0_reverse"):
        weight_norm(net.rnn, name)
    assert_exact(net, records(4), counts)


class Packed(nn.Module):
    """All weights of an LSTM in one parameter, or with rows of a larger one as its recurrent weight."""

    batch_first, whole = True, 4 * HIDDEN * (WIDTH + HIDDEN + 2)

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.rows = (
            nn.Parameter(torch.randn(self.whole) / 3),
            nn.Parameter(torch.randn(30, HIDDEN)),
        )

    def forward(self, x, hx):
        sizes = [4 * HIDDEN * n for n in (WIDTH, HIDDEN, 1, 1)]
        w_ih, w_hh, b_ih, b_hh = torch.split(self.flat, sizes)
        hx = (x.new_zeros(2, len(x), HIDDEN),) * 2
        first = [w_ih.view(-1, WIDTH), w_hh.view(-1, HIDDEN), b_ih, b_hh]
        second = [self.rows[3 : 3 + 4 * HIDDEN], w_hh.view(-1, HIDDEN), b_hh, b_ih]
        out, *states = torch.lstm(x, hx, [*first, *second], True, 2, 0.0, True, False, True)
        return out, tuple(states)


@pytest.mark.parametrize("counts", [[1] * 4, [3, 1]], ids=str)
def test_slices_and_weights_used_twice(counts):
    torch.manual_seed(0)
    assert_exact(Net(Packed()), records(4), counts)


@pytest.mark.parametrize("counts", [[1] * 4, [3, 1]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_tied_over_layers(kind, counts):
    torch.manual_seed(0)
    rnn = KINDS[kind](WIDTH, HIDDEN, num_layers=2)
    rnn.weight_hh_l1, rnn.bias_hh_l1 = rnn.weight_hh_l0, rnn.bias_hh_l0
    assert_exact(Net(rnn), records(4), counts)


class Twice(nn.Module):
    """A layer over its own output, from the state it ended with."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.inner, self.batch_first = rnn, rnn.batch_first

    def forward(self, x, hx):
        out, states = self.inner(x, hx)
        return self.inner(torch.sin(3 * out), states)


@pytest.mark.parametrize("counts", [[1] * 4, [3, 1]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_called_twice(kind, counts):
    torch.manual_seed(0)
    assert_exact(Net(Twice(KINDS[kind](WIDTH, WIDTH, num_layers=2))), records(4), counts)


class Recomputed(Twice):
    def forward(self, x, hx):
        return checkpoint(self.inner, x, use_reentrant=False)


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing(kind):
    torch.manual_seed(0)
    assert_exact(Net(Recomputed(KINDS[kind](WIDTH, HIDDEN, batch_first=True))), records(4), [3, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_units_of_shuffled_rows(kind):
    net = build(f"{kind}, two layers, both ways")
    x, ids = records(7), torch.tensor([4, 0, 4, 2, 0, 4, 7])
    counts, before = torch.unique(ids, return_counts=True)[1].tolist(), flat_parameters(net)
    expected = oracle(net, x[torch.argsort(ids, stable=True)], counts, 0.05)
    engine = PrivacyEngine()
    module, optimizer, _ = engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=1.0),
        data_loader=DataLoader(TensorDataset(x), batch_size=7),
        noise_multiplier=0.0,
        max_grad_norm=0.05,
        poisson_sampling=False,
        loss_reduction="sum",
    )
    with engine.units(ids):
        row_losses(module, x).sum().backward()
    optimizer.step()
    assert_close((before - flat_parameters(net)) * 7, expected)


@pytest.mark.parametrize("case", [f"{kind}, two layers, both ways" for kind in KINDS])
def test_a_unit_that_is_not_finite_adds_nothing(case):
    net, x = build(case), records(4)
    for value in (torch.nan, torch.inf):
        x[2, 1, 0] = value
        expected = oracle(net, x[[0, 1, 3]], [1] * 3, 0.05)
        assert_close(released(copy.deepcopy(net), x, [1] * 4, 0.05), expected)


def test_an_empty_batch():
    net = build("lstm, both ways")
    with torch.no_grad():
        assert net(records(0)).shape == (0, 2)
    trainer, before = make_trainer(net), flat_parameters(net)
    accumulate(trainer, net, records(0), [0, 0])
    trainer.apply()
    np.testing.assert_array_equal(flat_parameters(net), before)


@pytest.mark.parametrize("case", [f"{kind}, two layers, both ways" for kind in KINDS])
def test_autocast(case):
    net, x = build(case), records(4)
    expected = oracle(net, x, [2, 2], 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        found = released(net, x, [2, 2], 0.1)
    assert np.linalg.norm(found - expected) <= 1e-2 * np.linalg.norm(expected)


# cells

CELLS = {
    "lstm_cell": nn.LSTMCell,
    "gru_cell": nn.GRUCell,
    "rnn_tanh_cell": nn.RNNCell,
    "rnn_relu_cell": lambda *sizes, **options: nn.RNNCell(*sizes, nonlinearity="relu", **options),
}


class Loop(nn.Module):
    """A cell in a loop over time, and a second one on top."""

    def __init__(self, kind: str, *, start=None, bias: bool = True) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(HIDDEN, 2)
        self.rnn, self.top = CELLS[kind](WIDTH, HIDDEN, bias=bias), CELLS[kind](HIDDEN, HIDDEN, bias=bias)
        self.start = start

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        low, high = None if self.start is None else self.start(self, x), None
        for now in x.unbind(1):
            low = self.rnn(now, low)
            high = self.top(states_of(low)[0], high)
        return self.head(sum(states_of(high)))


def start_of_cell(net, x):
    made = [part.expand(len(x), -1) for part in net.initial]
    return tuple(made) if len(made) == 2 else made[0]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", CELLS)
def test_cells_give_what_torch_gives(kind, dtype, bias):
    torch.manual_seed(0)
    net, x = Loop(kind, bias=bias).to(dtype), records(3).to(dtype).requires_grad_()
    expected = net(x)
    state = captured(net)
    with state.mode:
        found = net(x)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (found, expected)]
    torch.testing.assert_close(*grads, rtol=tolerance, atol=tolerance)
    assert [call[0] for call in state.calls].count(kind) == 2 * TIMES


@pytest.mark.parametrize("counts", [[1] * 4, [3, 0, 2], [1]], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", CELLS)
def test_cells_in_a_loop_are_exact(kind, bias, counts):
    torch.manual_seed(0)
    assert_exact(Loop(kind, bias=bias), records(sum(counts)), counts)


@pytest.mark.parametrize("kind", CELLS)
def test_cells_from_a_learned_state(kind):
    torch.manual_seed(0)
    net = Loop(kind, start=start_of_cell)
    net.initial = nn.ParameterList([torch.randn(1, HIDDEN) for _ in range(2 if kind == "lstm_cell" else 1)])
    assert_exact(net, records(4), [3, 1])
    net.rnn.requires_grad_(False)
    assert_exact(net, records(4), [3, 1])


@pytest.mark.parametrize("kind", CELLS)
def test_cells_under_autocast(kind):
    torch.manual_seed(0)
    net, x = Loop(kind), records(4)
    expected = oracle(net, x, [2, 2], 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        found = released(net, x, [2, 2], 0.1)
    assert np.linalg.norm(found - expected) <= 1e-2 * np.linalg.norm(expected)
