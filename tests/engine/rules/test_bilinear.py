"""Bilinear layers: values against torch's own, clipped sums against the float64 loop over units."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from synthward.engine import PerfSpec
from synthward.engine.errors import UnsupportedOperationError
from synthward.engine.layout import Layout
from synthward.engine.rules import bilinear
from synthward.engine.rules.bilinear import BilinearUse
from synthward.engine.rules.uses import Norms, Weights
from tests.engine.nets import accumulate, make_trainer, oracle
from tests.oracles import flat_parameters

TIMES, LEFT, RIGHT, OUT = 3, 4, 5, 2


class Net(nn.Module):
    """A bilinear layer of two other layers' outputs; the loss sees times at once."""

    def __init__(self, *, bias: bool = True, run=lambda net, x, z: net.form(x, z)) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, LEFT), nn.Linear(3, RIGHT)
        self.form, self.head = nn.Bilinear(LEFT, RIGHT, OUT, bias=bias), nn.Linear(1, 2)
        self.run = run

    def forward(self, x):
        out = self.run(self, torch.tanh(self.left(x)), torch.tanh(self.right(x)))
        return self.head(torch.sin(2 * out).flatten(1).sum(1, keepdim=True))


def records(rows: int, *times: int) -> torch.Tensor:
    return torch.randn(rows, *times, 3, generator=torch.Generator().manual_seed(1))


def trained(net: nn.Module, x: torch.Tensor, counts: list[int], bound: float, perf=None) -> np.ndarray:
    """The released sum, where some parameters may be frozen."""
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0)
    trainer, before = make_trainer(net, optimizer, max_grad_norm=bound, perf=perf), flat_parameters(net)
    accumulate(trainer, net, x, counts)
    trainer.apply()
    return before - flat_parameters(net)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    # What is released is read off parameters of order one.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=max(1e-6, 1e-5 * np.abs(expected).max()))


def assert_exact(net: nn.Module, x: torch.Tensor, counts: list[int], bounds=(0.1, 1e4)) -> None:
    """Both clipped, and with a bound that clips nothing."""
    for bound in bounds:
        assert_close(trained(copy.deepcopy(net), x, counts, bound), oracle(net, x, counts, bound))


@pytest.mark.parametrize("counts", [[1] * TIMES, [1], [2, 2], [2, 0, 3, 1]], ids=str)
@pytest.mark.parametrize("times", [(), (TIMES,), (2, 3), (40,)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_clipped_sums_are_exact(bias, times, counts):
    """One row a unit, as many rows as times, equal and ragged units, and more rows than a gradient has entries."""
    torch.manual_seed(0)
    assert_exact(Net(bias=bias), records(sum(counts), *times), counts)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_shape_is_exact(data):
    draw = data.draw
    counts = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any))
    times = draw(st.sampled_from([(), (1,), (3,), (2, 4)]))
    torch.manual_seed(draw(st.integers(0, 99)))
    sizes = [draw(st.integers(1, 6)) for _ in range(3)]
    net = Net()
    net.left, net.right = nn.Linear(3, sizes[0]), nn.Linear(3, sizes[1])
    net.form = nn.Bilinear(*sizes, bias=draw(st.booleans()))
    x = torch.randn(sum(counts), *times, 3)
    assert_exact(net, x, counts, (draw(st.sampled_from([1e-2, 1.0, 1e3])),))


@pytest.mark.parametrize("rows", [3, 60])
@pytest.mark.parametrize("chunk", [1, 1 << 20])
@pytest.mark.parametrize("counts", [[1], [1, 1, 1], [2, 2], [3, 0, 1]], ids=str)
def test_norm_sum_and_gradients_of_a_use_agree(counts, chunk, rows, monkeypatch):
    """By the products of pairs and by the gradients themselves, all at once and unit by unit."""
    monkeypatch.setattr(bilinear, "_CHUNK_BYTES", chunk)
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(sum(counts) * rows, n, generator=generator) for n in (LEFT, RIGHT, OUT)]
    layout = Layout.ragged(torch.tensor([0, *counts]).cumsum(0)).expand(rows)
    use, units = BilinearUse(*factors), len(counts)
    found, row_sums = torch.zeros(units), torch.zeros(units)
    use.add_norms(found, row_sums, layout, Norms())
    each = torch.einsum("np,nd,ne->npde", factors[2], factors[0], factors[1]).double().flatten(1)
    grads = torch.zeros(units, each.shape[1], dtype=torch.float64).index_add_(0, layout.row_units, each)
    lengths = torch.zeros(units, dtype=torch.float64).index_add_(0, layout.row_units, each.norm(dim=1))
    torch.testing.assert_close(found.double(), grads.square().sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(row_sums.double(), lengths, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(use.unit_grads(layout, 0, units).double(), grads, rtol=1e-4, atol=1e-4)
    weights, total = torch.rand(units, generator=generator), torch.zeros(OUT, LEFT, RIGHT)
    use.add_weighted_sum(Weights(layout.to_rows(weights)), total)
    torch.testing.assert_close(total.flatten().double(), weights.double() @ grads, rtol=1e-4, atol=1e-4)


def test_what_overflows_in_the_sum_is_not_there():
    """The norm is finite: in double precision nothing overflows."""
    use = BilinearUse(torch.full((2, 1), 1e20), torch.full((2, 1), 1e20), torch.full((2, 1), 1e-25))
    for layout in (Layout.uniform(2, 1), Layout.uniform(1, 2)):
        sq_norms, row_sums = torch.zeros(layout.num_units), torch.zeros(layout.num_units)
        use.add_norms(sq_norms, row_sums, layout, Norms())
        assert not torch.isfinite(sq_norms + row_sums).any()


@pytest.mark.parametrize("frozen", ["form.weight", "form.bias", "left", "right", "form"])
def test_what_is_frozen_changes_nothing_else(frozen):
    torch.manual_seed(0)
    net = Net()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    assert_exact(net, records(4, TIMES), [3, 1])


@pytest.mark.parametrize("times", [(), (TIMES,)], ids=str)
@pytest.mark.parametrize("counts", [[1] * 4, [1, 3]], ids=str)
def test_a_unit_that_is_not_finite_adds_nothing(counts, times):
    torch.manual_seed(0)
    net, x = Net(), records(4, *times)
    last = x[1:] if counts == [1, 3] else x[[1, 2, 3]]
    for value in (torch.nan, torch.inf):
        x[0].view(-1)[0] = value
        expected = oracle(net, last, counts[1:], 0.1)
        assert_close(trained(copy.deepcopy(net), x, counts, 0.1), expected)


def outer(net, x, z):
    """One input is the records' own, the other a view of an activation."""
    return net.form(x, x.repeat_interleave(2, -1)[..., :RIGHT])


OTHERS = {
    "one tensor twice": outer,
    "used twice": lambda net, x, z: net.form(torch.sin(net.form(x, z)).repeat_interleave(2, -1), z),
    "a slice": lambda net, x, z: F.bilinear(x, z, net.form.weight[1:], net.form.bias[:1]),
    "transposed": lambda net, x, z: F.bilinear(z, x, net.form.weight.mT),
    "a scaled weight": lambda net, x, z: F.bilinear(x, z, 0.5 * net.form.weight, net.form.bias),
    "also added": lambda net, x, z: net.form(x, z) + net.form.weight[:, 0, 0],
}


@pytest.mark.parametrize("counts", [[1] * 4, [2, 0, 3, 1]], ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_other_uses_are_exact(name, counts):
    torch.manual_seed(0)
    assert_exact(Net(run=OTHERS[name]), records(sum(counts), TIMES), counts)


@pytest.mark.parametrize("counts", [[1] * 4, [3, 1]], ids=str)
def test_computed_weights(counts):
    torch.manual_seed(0)
    net = Net()
    weight_norm(net.form, "weight")
    assert_exact(net, records(4, TIMES), counts)


@pytest.mark.parametrize("counts", [[1] * 4, [3, 1]], ids=str)
def test_kept_in_half_precision(counts):
    torch.manual_seed(0)
    net, x = Net(), records(4, TIMES)
    found, expected = (
        trained(copy.deepcopy(net), x, counts, 0.1, PerfSpec(keep="bf16")),
        oracle(net, x, counts, 0.1),
    )
    assert 0 < np.linalg.norm(found - expected) <= 2e-2 * np.linalg.norm(expected)


def test_autocast():
    """torch's own refuses operands of several types, so they are cast back."""
    torch.manual_seed(0)
    net, x = (
        Net(run=lambda net, x, z: net.form(x.to(net.form.bias.dtype), z.to(net.form.bias.dtype))),
        records(4, TIMES),
    )
    expected = oracle(net, x, [2, 2], 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        found = trained(net, x, [2, 2], 0.1)
    assert 0 < np.linalg.norm(found - expected) <= 3e-2 * np.linalg.norm(expected)


def test_values_and_input_gradients_are_those_of_torch():
    torch.manual_seed(0)
    net, inputs = Net(), [torch.randn(4, TIMES, n, requires_grad=True) for n in (LEFT, RIGHT)]
    expected = net.form(*inputs)
    trainer = make_trainer(net)
    with trainer.capture():
        found = net.form(*inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    grads = [torch.autograd.grad(torch.sin(out).sum(), inputs) for out in (found, expected)]
    torch.testing.assert_close(*grads)


def test_an_empty_batch():
    for times in ((), (TIMES,)):
        np.testing.assert_array_equal(trained(Net(), records(0, *times), [0, 0], 0.1), 0.0)


WHERE = r"'form\.weight' in operation 'bilinear': "
REFUSED = {
    "no batch axis": (lambda net, x, z: net.form(x[0, 0], z[0, 0]), f"{WHERE}its input has no batch axis"),
    "a parameter as the first input": (
        lambda net, x, z: net.form(net.left.weight[:, :1].mT.expand(TIMES, -1), z[0]),
        r"'left\.weight' in operation 'bilinear': a parameter as the input",
    ),
    "a parameter as the second input": (
        lambda net, x, z: net.form(x[0], net.right.weight[:, :1].mT.expand(TIMES, -1)),
        r"'right\.weight' in operation 'bilinear': a parameter as the input",
    ),
    "a weight computed from records": (
        lambda net, x, z: F.bilinear(
            x, z, net.head(x[..., :1]).mean((0, 1))[:, None, None].expand(2, 4, 5), net.form.bias
        ),
        r"'form\.bias' in operation 'bilinear': the other weight of the call is computed",
    ),
    "a bias computed from records": (
        lambda net, x, z: F.bilinear(x, z, net.form.weight, net.head(x[..., :1]).mean((0, 1))),
        f"{WHERE}the other weight of the call is computed",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_parameter_and_operation(name):
    torch.manual_seed(0)
    operation, message = REFUSED[name]
    net = Net(run=lambda net, x, z: operation(net, x, z).reshape(-1, 1).sum() + x)
    with pytest.raises(UnsupportedOperationError, match=message):
        trained(net, records(4, TIMES), [1] * 4, 0.1)


@pytest.mark.parametrize("rows", [TIMES, 2, 6])
def test_time_first_is_refused_whatever_the_lengths(rows):
    torch.manual_seed(0)
    net = Net(run=lambda net, x, z: net.form(x.transpose(0, 1), z.transpose(0, 1)).transpose(0, 1))
    with pytest.raises(UnsupportedOperationError, match=r"'form\.(weight|bias)' in operation 'bilinear': "):
        trained(net, records(rows, 6 if rows == 2 else TIMES), [1] * rows, 0.1)


def test_a_second_derivative_is_refused():
    net, x, z = Net(), torch.randn(4, LEFT, requires_grad=True), torch.randn(4, RIGHT)
    trainer = make_trainer(net)
    with trainer.capture(), pytest.raises(UnsupportedOperationError, match=r"bilinear.*differentiated again"):
        torch.autograd.grad(torch.sin(net.form(x, z)).sum(), x, create_graph=True)
