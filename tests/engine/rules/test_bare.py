"""Bare parameters in broadcast operations, and repeated for each row, against the float64 loop over units."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from synthward.engine.errors import UnsupportedOperationError
from synthward.engine.layout import Layout
from tests.engine.nets import accumulate, assert_clipped_sum, make_trainer, oracle, released, row_losses
from tests.oracles import clipped_sum, flat_parameters, per_unit_gradients

TIMES, WIDTH = 3, 4


class Net(nn.Module):
    """One operation between two layers: the first one's norm shows the operation's input gradient."""

    def __init__(self, operation, **shapes) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        generator = torch.Generator().manual_seed(3)
        for name, shape in shapes.items():
            value = torch.rand(shape, generator=generator) + 0.5
            setattr(self, name, nn.Parameter(value))
        self.operation = operation

    def forward(self, x):
        return self.head(torch.tanh(self.operation(self, 1.0 * torch.tanh(self.stem(x)))))


def _add_in_place(net, h):
    h += net.p
    return h


def _subtract_in_place(net, h):
    h = 2 * h
    h -= net.p
    return h


def _multiply_in_place(net, h):
    h *= net.p
    return h


def _divide_in_place(net, h):
    h /= net.p
    return h


def _residual_in_place(net, h):
    h += net.p * torch.tanh(h)
    return h.add_(net.q, alpha=0.5)


D, TD = (WIDTH,), (TIMES, WIDTH)
# The operation, and the shapes of its parameters.
CASES = {
    "positions with a batch axis": (lambda net, h: h + net.p, {"p": (1, *TD)}),
    "positions": (lambda net, h: h + net.p, {"p": TD}),
    "positions in front": (lambda net, h: net.p + h, {"p": TD}),
    "positions cut": (lambda net, h: h + net.p[:TIMES], {"p": (TIMES + 2, WIDTH)}),
    "positions cut behind the batch axis": (
        lambda net, h: h + net.p[:, :TIMES],
        {"p": (1, TIMES + 2, WIDTH)},
    ),
    "a value for each time": (lambda net, h: h + net.p, {"p": (TIMES, 1)}),
    "data that is broadcast": (lambda net, h: h.mean(1, keepdim=True) + net.p, {"p": TD}),
    "add with alpha": (lambda net, h: torch.add(net.p, h, alpha=-2), {"p": D}),
    "add alpha parameters": (lambda net, h: torch.add(h, net.p, alpha=-2), {"p": D}),
    "difference": (lambda net, h: h - net.p, {"p": TD}),
    "difference in front": (lambda net, h: net.p - h, {"p": TD}),
    "difference with alpha": (lambda net, h: torch.sub(net.p, h, alpha=3), {"p": TD}),
    "reverse difference": (lambda net, h: torch.rsub(h, net.p, alpha=3), {"p": TD}),
    "reverse difference of parameters": (lambda net, h: torch.rsub(net.p, h, alpha=3), {"p": TD}),
    "layer scale": (lambda net, h: h + net.p * h, {"p": D}),
    "temperature": (lambda net, h: h * net.p, {"p": ()}),
    "temperature of one axis": (lambda net, h: h / net.p, {"p": (1,)}),
    "exponential of a temperature": (lambda net, h: h * net.p.exp(), {"p": ()}),
    "numerator": (lambda net, h: net.p / h.exp(), {"p": TD}),
    "denominator": (lambda net, h: torch.div(h, net.p), {"p": (1, 1, WIDTH)}),
    "reciprocal": (lambda net, h: h * (1.0 / net.p), {"p": D}),
    "one plus": (lambda net, h: h * (1.0 + net.p) + net.q, {"p": D, "q": D}),
    "power": (lambda net, h: (h.square() + 0.1) ** net.p, {"p": D}),
    "addcmul, two parameters": (lambda net, h: torch.addcmul(net.p, h, net.q, value=2), {"p": D, "q": TD}),
    "where": (lambda net, h: torch.where(h > 0, h, net.p), {"p": D}),
    "where of two parameters": (lambda net, h: torch.where(h > 0, net.p, net.q * h), {"p": D, "q": ()}),
    "lerp": (lambda net, h: torch.lerp(h, net.p, 0.3) + h.lerp(net.q, net.p), {"p": D, "q": TD}),
    "maximum": (lambda net, h: torch.maximum(h, net.p - 1), {"p": D}),
    "the same parameter twice": (lambda net, h: (h + net.p) * net.p, {"p": TD}),
    "added in place": (_add_in_place, {"p": TD}),
    "subtracted in place": (_subtract_in_place, {"p": TD}),
    "multiplied in place": (_multiply_in_place, {"p": TD}),
    "divided in place": (_divide_in_place, {"p": D}),
    "residual in place": (_residual_in_place, {"p": D, "q": D}),
    "class token": (
        lambda net, h: torch.cat([net.p.expand(len(h), -1, -1), h], 1) + net.q,
        {"p": (1, 1, WIDTH), "q": (1, TIMES + 1, WIDTH)},
    ),
    "class token of one axis": (
        lambda net, h: torch.cat([torch.broadcast_to(net.p, (h.shape[0], 2, WIDTH)), h], 1),
        {"p": D},
    ),
    "repeated tokens": (lambda net, h: torch.cat([net.p.repeat(len(h), 2, 1), h], 1), {"p": (1, 2, WIDTH)}),
    "tiled tokens": (lambda net, h: torch.cat([torch.tile(net.p, (len(h), 1, 2)), h], 1), {"p": (2, 2)}),
    "expanded as data": (lambda net, h: torch.cat([net.p.expand_as(h), h], 1), {"p": (TIMES, 1)}),
    "tokens cut": (
        lambda net, h: torch.cat([net.p[:1].unsqueeze(0).expand(len(h), -1, -1), h], 1),
        {"p": (3, WIDTH)},
    ),
    "stacked tokens": (
        lambda net, h: torch.stack([net.p.expand(len(h), -1, -1), h], 2),
        {"p": TD},
    ),
    "computed tokens": (
        lambda net, h: torch.cat([(net.p * net.q).expand(len(h), 1, -1), h], 1),
        {"p": D, "q": D},
    ),
    "repeated behind the engine's back": (
        lambda net, h: torch.cat([net.p.unsqueeze(0)[[0] * len(h)], h], 1),
        {"p": TD},
    ),
    "zeros of the batch's shape": (lambda net, h: h + (net.p + torch.zeros(len(h), 1, 1)), {"p": D}),
    "a table looked up by an index": (lambda net, h: h + net.p[h.argmax(-1)], {"p": (WIDTH, WIDTH)}),
    "a table looked up by index_select": (
        lambda net, h: h + torch.index_select(net.p, 0, h[:, 0].argmax(-1)).unsqueeze(1),
        {"p": (WIDTH, WIDTH)},
    ),
}


def records(rows: int, *, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, TIMES, WIDTH, generator=torch.Generator().manual_seed(seed))


def assert_exact(net: nn.Module, x: torch.Tensor, counts: list[int], bound: float) -> None:
    expected = oracle(copy.deepcopy(net), x, counts, bound)
    np.testing.assert_allclose(released(net, x, counts, bound), expected, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("counts", [[1] * TIMES, [1], [2, 0, 3, 1]], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_each_operation_is_exact(name, counts):
    """As many rows as times, one row, and ragged units."""
    torch.manual_seed(0)
    operation, shapes = CASES[name]
    assert_exact(Net(operation, **shapes), records(sum(counts)), counts, 0.1)


@pytest.mark.parametrize("name", CASES)
def test_a_bound_that_clips_nothing_gives_the_plain_gradient(name):
    """What is released is then the gradient of the whole batch, to all digits of a difference of parameters."""
    torch.manual_seed(0)
    operation, shapes = CASES[name]
    assert_exact(Net(operation, **shapes), records(5), [2, 3], 1e4)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_broadcast_is_exact(data):
    draw = data.draw
    axes = draw(st.lists(st.integers(1, 3), min_size=0, max_size=3))
    kept = draw(st.integers(0, len(axes)))
    shape = [1 if draw(st.booleans()) else n for n in axes[len(axes) - kept :]]
    if kept == len(axes) and draw(st.booleans()):
        shape = [1, *shape]
    counts = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    function = draw(st.sampled_from([torch.add, torch.sub, torch.mul, torch.div, torch.maximum]))
    is_first = draw(st.booleans())

    class Broadcast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.rand(shape) + 0.5)
            self.scale = nn.Parameter(torch.rand(()))

        def forward(self, x):
            x = x.exp() * self.scale
            return torch.sin(function(self.p, x) if is_first else function(x, self.p)).unsqueeze(1)

    torch.manual_seed(draw(st.integers(0, 99)))
    module = Broadcast()
    x, bound = torch.randn(sum(counts), *axes), draw(st.sampled_from([1e-2, 1.0, 1e3]))
    parts = [part for part in torch.split(x, counts) if len(part)]
    gradients = per_unit_gradients(module, lambda net, part: row_losses(net, part).sum(), parts)
    assert_clipped_sum(released(module, x, counts, bound), gradients, bound)


def test_rows_of_units_in_any_order():
    torch.manual_seed(0)
    ids, x = torch.tensor([5, 2, 5, 9, 2, 5]), records(6)
    net = Net(CASES["residual in place"][0], p=D, q=TD)
    units = [x[ids == unit] for unit in (2, 5, 9)]
    expected = clipped_sum(per_unit_gradients(net, lambda n, part: row_losses(n, part).sum(), units), 0.1)
    trainer, before = make_trainer(net, max_grad_norm=0.1), flat_parameters(net)
    trainer._layout = lambda *_: Layout.from_ids(ids)
    with trainer.capture():
        losses = torch.zeros(3).index_add(0, torch.unique(ids, return_inverse=True)[1], row_losses(net, x))
    trainer.backward(losses)
    trainer.apply()
    np.testing.assert_allclose(before - flat_parameters(net), expected, rtol=2e-4, atol=2e-6)


def test_a_unit_that_is_not_finite_adds_nothing():
    torch.manual_seed(0)
    net, x = Net(CASES["layer scale"][0], p=D), records(4)
    x[2, 1, 0] = torch.nan
    twin = copy.deepcopy(net)
    expected = oracle(twin, x[[0, 1, 3]], [1] * 3, 0.1)
    np.testing.assert_allclose(released(net, x, [1] * 4, 0.1), expected, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("name", ["positions", "layer scale", "denominator", "class token", "added in place"])
def test_autocast(name):
    torch.manual_seed(0)
    operation, shapes = CASES[name]
    net, x = Net(operation, **shapes), records(4)
    expected = oracle(copy.deepcopy(net), x, [2, 2], 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        found = released(net, x, [2, 2], 0.1)
    assert np.linalg.norm(found - expected) <= 2e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", ["positions", "layer scale", "denominator", "where of two parameters"])
@pytest.mark.parametrize("frozen", ["p", "stem", "head"])
def test_what_is_frozen_changes_nothing_else(name, frozen):
    torch.manual_seed(0)
    operation, shapes = CASES[name]
    net, x = Net(operation, **shapes), records(4)
    part = getattr(net, frozen)
    part.requires_grad_(False)
    expected = oracle(copy.deepcopy(net), x, [3, 1], 0.1)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0)
    trainer, before = make_trainer(net, optimizer, max_grad_norm=0.1), flat_parameters(net)
    accumulate(trainer, net, x, [3, 1])
    trainer.apply()
    np.testing.assert_allclose(before - flat_parameters(net), expected, rtol=2e-4, atol=2e-6)


REFUSED = {
    "a value for each row": (lambda net, h: h + net.p, {"p": (4, 1, 1)}, r"'p' in operation 'add'.*place in"),
    "a factor for each row": (
        lambda net, h: net.p[:4] * h,
        {"p": (6, 1, 1)},
        r"'p' in operation 'mul'.*place",
    ),
    "a transposed table": (lambda net, h: h[:, 0] + net.p.t(), {"p": (WIDTH, 4)}, r"'p' in operation 'add'"),
    "columns of a table": (
        lambda net, h: h[:, 0] + net.p[:4, :WIDTH],
        {"p": (6, WIDTH + 1)},
        r"'p' in operation 'add'.*place in",
    ),
    "no batch axis in the data": (lambda net, h: h + (h.sum((0, 1)) + net.p), {"p": (1, 1, 1)}, "'p' in"),
    "written": (lambda net, h: h + net.p.add_(h.mean(0)), {"p": TD}, "'p' in .*writes into"),
    "out": (lambda net, h: torch.mul(h, net.p, out=torch.empty(0)), {"p": TD}, "'p' in .*out="),
    "tokens along the batch": (
        lambda net, h: torch.cat([h, net.p + h[:1] * 0, net.p]),
        {"p": (1, *TD)},
        "'p'.*'cat'",
    ),
    "a mask": (lambda net, h: h + net.p[(h > 0)[0]].sum(), {"p": TD}, "'p' in operation 'getitem'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_parameter_and_operation(name):
    operation, shapes, message = REFUSED[name]
    with pytest.raises(UnsupportedOperationError, match=message):
        released(Net(operation, **shapes), records(4), [1] * 4, 0.1)


@pytest.mark.parametrize("rows", [TIMES, 2, 6])
@pytest.mark.parametrize(
    "operation", [lambda p, h: h + p, lambda p, h: h * p, lambda p, h: h / p], ids=["add", "mul", "div"]
)
def test_time_first_layouts_are_refused_whatever_the_lengths(operation, rows):
    """As many times as rows, another number, and one that divides: rows of other units show a gradient."""

    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p, self.head = nn.Parameter(torch.ones(WIDTH)), nn.Linear(WIDTH, 2)

        def forward(self, x):
            return self.head(torch.tanh(operation(self.p, x.transpose(0, 1).exp()).transpose(0, 1)))

    times = 6 if rows == 2 else TIMES
    x = torch.randn(rows, times, WIDTH, generator=torch.Generator().manual_seed(1))
    with pytest.raises(UnsupportedOperationError, match="'p' in"):
        released(TimeFirst(), x, [1] * rows, 0.1)


def test_a_tensor_of_the_caller_is_written_only_where_the_module_writes_it():
    """An in-place sum on the records themselves writes them, as in plain PyTorch; nothing else does."""

    class Writes(nn.Module):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            self.p, self.in_place = nn.Parameter(torch.ones(WIDTH)), in_place

        def forward(self, x):
            return x.mul_(self.p).add_(self.p) if self.in_place else x * self.p + self.p

    for in_place in (True, False):
        x, before = records(3), records(3)
        released(Writes(in_place), x, [1] * 3, 0.1)
        assert torch.equal(x.detach(), before + 1 if in_place else before)


def test_a_vision_transformers_stem():
    """Patches, a class token, positions, and blocks with layer scale and residual adds in place."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mix = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
            self.gamma = nn.Parameter(0.3 * torch.ones(WIDTH))

        def forward(self, x):
            x = x + self.gamma * torch.tanh(self.mix(self.norm(x)))
            x += self.gamma
            return x

    class Vision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(1, WIDTH, 2, 2)
            self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
            self.positions = nn.Parameter(torch.randn(1, 5, WIDTH))
            self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(WIDTH, 2)

        def forward(self, x):
            x = self.patches(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
            return self.head(self.blocks(x + self.positions)[:, 0])

    torch.manual_seed(0)
    x = torch.randn(5, 1, 4, 4)
    assert_exact(Vision(), x, [2, 1, 2], 0.1)
