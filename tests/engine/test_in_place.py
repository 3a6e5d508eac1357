"""Operations that write into what a layer gave: activations, residual sums, scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.engine.measure import clipped_by_group, distance, group_norms, read_pass, unit_gradients
from tests.engine.nets import released

TIMES, WIDTH = 3, 6
LAYOUTS = [[1] * 4, [3, 3], [2, 0, 3, 1]]


class Scaled(nn.Module):
    """An operation of the input and a bare parameter."""

    def __init__(self, operation, *shape: int) -> None:
        super().__init__()
        self.p, self.operation = nn.Parameter(torch.rand(shape) + 0.5), operation

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(x, self.p)


class First(nn.Module):
    """The first of what a layer gives: a recurrent layer's output without its states."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Ids(nn.Module):
    """Numbers to ids and into a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.table((2 * x.detach().abs()[..., 0]).long().clamp_max(4))


# What a layer gives for rows [TIMES, WIDTH] is written over as it comes.
LAYERS = {
    "linear without bias": lambda: nn.Linear(WIDTH, 4, bias=False),
    "linear of vectors": lambda: nn.Sequential(nn.Flatten(), nn.Linear(TIMES * WIDTH, 4)),
    "conv1d": lambda: nn.Conv1d(TIMES, 4, 3),
    "conv1d of one place": lambda: nn.Conv1d(TIMES, 4, 1, bias=False),
    "conv2d": lambda: nn.Sequential(nn.Unflatten(1, (1, TIMES)), nn.Conv2d(1, 3, 2)),
    "conv3d": lambda: nn.Sequential(nn.Unflatten(1, (1, 1, TIMES)), nn.Conv3d(1, 3, (1, 2, 2))),
    "transposed conv1d": lambda: nn.ConvTranspose1d(TIMES, 4, 3),
    "embedding": Ids,
    "layer_norm": lambda: nn.LayerNorm(WIDTH),
    "rms_norm": lambda: nn.RMSNorm(WIDTH, eps=1e-5),
    "gru, both ways": lambda: First(nn.GRU(WIDTH, 3, batch_first=True, bidirectional=True)),
    "add": lambda: Scaled(torch.add, TIMES, WIDTH),
    "multiply": lambda: Scaled(torch.mul, WIDTH),
    "divide": lambda: Scaled(torch.div, WIDTH),
    "matmul": lambda: Scaled(torch.matmul, WIDTH, 4),
    "matmul, parameter first": lambda: Scaled(lambda x, p: p @ x, 4, TIMES),
    "tokens": lambda: Scaled(lambda x, p: torch.cat([p.expand(len(x), -1, -1), x], 1), 1, 2, WIDTH),
}


class Net(nn.Module):
    """A linear layer of two axes, whose norm shows the input gradient, the layer, then the operation on its output."""

    def __init__(self, layer: nn.Module, operation) -> None:
        super().__init__()
        self.stem, self.layer = nn.Linear(TIMES * WIDTH, TIMES * WIDTH), layer
        self.scale, self.operation = nn.Parameter(torch.rand(()) + 0.5), operation

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(self, self.layer(self.stem(x.flatten(1)).view(-1, TIMES, WIDTH)))


def _residual(net: Net, h: Tensor) -> Tensor:
    h += torch.sin(2 * h.detach())
    return h


OPERATIONS = {
    "relu": lambda net, h: nn.ReLU(inplace=True)(h),
    "silu": lambda net, h: F.silu(1.5 * h, inplace=True) + F.leaky_relu(h, 0.3, inplace=True),
    "residual": _residual,
    "mul_ of a parameter": lambda net, h: torch.sin(h.mul_(net.scale)),
    "add_ of a parameter": lambda net, h: torch.sin(h.add_(net.scale, alpha=2)),
    "a slice": lambda net, h: (h[:, :1].mul_(2.0), torch.sin(h))[1],
}


def records(rows: int) -> Tensor:
    return torch.randn(rows, TIMES, WIDTH, generator=torch.Generator().manual_seed(1))


def assert_exact(net: nn.Module, x: Tensor, counts: list[int]) -> None:
    """Norms and unclipped sums to 1e-5 of the loop, clipped sums to a little more: the factors cover the rounding of
    the norms."""
    gradients = unit_gradients(net, x, counts)
    for bound, tolerance in ((1e4, 1e-5), (float(np.median(np.linalg.norm(gradients, axis=1))) / 2, 1e-4)):
        found = read_pass(net, x, counts, bound)
        norms = group_norms(gradients, found.group_of)
        np.testing.assert_allclose(np.sqrt(found.sq_norms), norms, rtol=1e-5, atol=1e-9)
        clipped = clipped_by_group(gradients, found.group_of, found.bounds).sum(0)
        assert distance(found.sums, clipped) <= tolerance


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_what_a_layer_gave_is_written_over(layer, operation):
    torch.manual_seed(0)
    net = Net(LAYERS[layer](), OPERATIONS[operation])
    if "parameter" not in operation:
        net.scale.requires_grad_(False)
    assert_exact(net, records(6), [2, 0, 3, 1])


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrence_that_is_written_over_is_exact_or_an_error(kind, operation):
    """Its backward pass reads its own output: sums of what was written over in the meantime would be wrong."""
    torch.manual_seed(0)
    net, x = Net(First(kind(WIDTH, 3, batch_first=True)), OPERATIONS[operation]), records(6)
    try:
        found = read_pass(net, x, [2, 0, 3, 1], 1e4)
    except RuntimeError as error:
        assert "modified" in str(error) and "inplace" in str(error)
        return
    assert distance(found.sums, unit_gradients(net, x, [2, 0, 3, 1]).sum(0)) <= 1e-5


class Block(nn.Module):
    """Residual blocks as they are written in place."""

    def __init__(self, operation) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.conv, self.norm = nn.Conv1d(TIMES, TIMES, 3, padding=1), nn.LayerNorm(WIDTH)
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.operation(self, x))


def _of_input(net: Block, x: Tensor) -> Tensor:
    h = net.conv(net.first(x))
    h += x
    return net.norm(h)


def _scaled_branch(net: Block, x: Tensor) -> Tensor:
    branch = net.scale * torch.tanh(net.norm(net.first(x)))
    branch += net.conv(torch.tanh(x))
    return branch.add_(net.first(x), alpha=0.5)


def _several(net: Block, x: Tensor) -> Tensor:
    h = net.conv(net.first(x)).mul_(net.scale).add_(net.scale, alpha=0.5)
    h += torch.tanh(x)
    return F.leaky_relu(net.norm(h), 0.2, inplace=True)


BLOCKS = {
    "a sum with the input": _of_input,
    "a scaled branch": _scaled_branch,
    "several": _several,
    "a stack of activations": lambda net, x: F.hardtanh_(net.norm(F.relu_(net.conv(net.first(x))))),
    "dropout of nothing": lambda net, x: F.dropout(
        net.scale * net.norm(net.conv(net.first(x))), 0.0, inplace=True
    ),
}


@pytest.mark.parametrize("counts", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_residual_blocks(name, counts):
    torch.manual_seed(0)
    assert_exact(Block(BLOCKS[name]), records(sum(counts)), counts)


@pytest.mark.parametrize(
    "layer", ["linear without bias", "conv1d", "layer_norm", "gru, both ways", "multiply", "matmul"]
)
def test_what_a_layer_has_read_must_not_be_written(layer):
    """As in plain autograd: its input is needed as it was, and torch says so; nothing is released."""

    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.layer = nn.Linear(WIDTH, WIDTH), LAYERS[layer]()

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.stem(x))
            out = self.layer(h)
            h.mul_(2.0)
            return out + h.mean()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        released(Overwrites(), records(3), [3], 0.1)
