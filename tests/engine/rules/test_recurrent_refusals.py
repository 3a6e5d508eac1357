"""What the rules of recurrent layers and cells refuse, by parameter and operation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from synthward.engine.errors import UnsupportedOperationError
from tests.engine.nets import make_trainer, released
from tests.engine.rules.test_recurrent import CELLS, HIDDEN, KINDS, TIMES, WIDTH, build, records, states_of


class Around(nn.Module):
    """An operation on a layer named `rnn` and the batch."""

    def __init__(self, rnn: nn.Module, operation) -> None:
        super().__init__()
        self.rnn, self.operation, self.stem = rnn, operation, nn.Linear(WIDTH, 1)
        self.w = nn.Parameter(torch.randn(TIMES, 1, WIDTH))

    def forward(self, x):
        return self.operation(self, x).reshape(len(x), -1)


def packed(net, x, enforce_sorted=True):
    """Lengths that are sorted already: even so the call does not tell."""
    lengths = torch.arange(len(x), 0, -1).clamp_max(TIMES)
    sequence = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=enforce_sorted)
    return states_of(net.rnn(sequence)[1])[0].transpose(0, 1)


def from_records(net, x):
    """Recurrent weights computed from the batch."""
    weights = list(net.rnn.parameters())
    weights[1] = net.rnn.weight_hh_l0.detach() * torch.sigmoid(net.stem(x).sum())
    return call(net, x, torch.zeros(1, len(x), HIDDEN), weights)


def call(net, x, initial, weights=None):
    """The function itself, past the checks of the layer."""
    mode = net.rnn.mode if isinstance(net.rnn, nn.RNN) else net.rnn.mode.lower()
    function = getattr(torch, mode.lower())
    initial = (initial, initial) if mode == "lstm" else initial
    return function(x, initial, weights or list(net.rnn.parameters()), True, 1, 0.0, True, False, True)[0]


REFUSED = {
    "packed": (
        packed,
        "'rnn.weight_ih_l0' in operation '{}': a packed .* pad the sequences and mask the loss",
    ),
    "packed, to be sorted": (
        lambda net, x: packed(net, x, False),
        "'rnn.weight_ih_l0' in operation '{}': a packed",
    ),
    "unbatched": (
        lambda net, x: net.rnn(x[:, 0])[0],
        "'rnn.weight_ih_l0' in operation '{}': its input has 1 rows",
    ),
    "times for rows": (
        lambda net, x: net.rnn(x.transpose(0, 1))[0].transpose(0, 1),
        "in operation '{}': units mix",
    ),
    "a parameter as the input": (
        lambda net, x: call(
            net, net.w.expand(-1, len(x), -1).transpose(0, 1), x.new_zeros(1, len(x), HIDDEN)
        ),
        "'w' in operation '{}': a parameter as the input",
    ),
    "weights computed from data": (
        from_records,
        "in operation '{}': the other weight of the call is computed",
    ),
    "one initial state for all rows": (
        lambda net, x: call(net, x, torch.zeros(1, 1, HIDDEN)),
        "'rnn.weight_ih_l0' in operation '{}': an initial state .1, 1, 5. is not",
    ),
    "an initial state for each place": (
        lambda net, x: call(net, x, net.rnn.weight_hh_l0[: len(x)].unsqueeze(0)),
        "'rnn.weight_hh_l0' in operation '{}': its first axis .* lies along the batch's",
    ),
    "no times": (
        lambda net, x: call(net, x[:, :0], x.new_zeros(1, len(x), HIDDEN)),
        "'rnn.weight_ih_l0' in operation '{}': its input .4, 0, 3. is no batch of sequences",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("kind", KINDS)
def test_refusals_name_parameter_and_operation(kind, name):
    torch.manual_seed(0)
    operation, message = REFUSED[name]
    net = Around(KINDS[kind](WIDTH, HIDDEN, batch_first=True), operation)
    with pytest.raises(UnsupportedOperationError, match=message.format(kind)):
        released(net, records(4), [1] * 4, 0.1)


@pytest.mark.parametrize("rows", [TIMES, 2, 2 * TIMES])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_axis_in_the_place_of_time_is_refused(kind, rows):
    """As many times as rows, a multiple, and a divisor."""
    torch.manual_seed(0)
    net = Around(KINDS[kind](WIDTH, HIDDEN), lambda net, x: net.rnn(x)[0])
    with pytest.raises(UnsupportedOperationError, match=f"'rnn.* in operation '{kind}'"):
        released(net, records(rows), [1] * rows, 0.1)


@pytest.mark.parametrize("kind", CELLS)
def test_refusals_of_cells(kind):
    torch.manual_seed(0)
    cell = CELLS[kind](WIDTH, HIDDEN)
    unbatched = Around(cell, lambda net, x: states_of(net.rnn(x[0, 0]))[0].expand(len(x), -1))
    with pytest.raises(
        UnsupportedOperationError, match=f"'rnn.* in operation '{kind}': its input has 1 rows"
    ):
        released(unbatched, records(4), [1] * 4, 0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_derivative_is_refused(kind):
    net, x = build(f"{kind}, plain"), records(4).requires_grad_()
    trainer = make_trainer(net)
    with trainer.capture(), pytest.raises(UnsupportedOperationError, match=f"{kind}.*differentiated again"):
        torch.autograd.grad(net.rnn(x)[0].sum(), x, create_graph=True)
