"""Products of data with bare parameters against the float64 loop over units."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from synthward.engine.capture import CaptureState
from synthward.engine.contributions import Contributions
from synthward.engine.errors import UnsupportedOperationError
from synthward.engine.provenance import Derived, Span
from synthward.engine.rules.matmul import SwappedBlockUse, SwappedOuterUse, _classify, _use
from synthward.engine.rules.uses import BlockOuterUse, DiagonalRows, OuterUse, Weights
from tests.engine.nets import (
    accumulate,
    assert_clipped_sum,
    make_trainer,
    oracle,
    released,
    row_losses,
)
from tests.oracles import flat_parameters, per_unit_gradients

TIMES, WIDTH, OUT = 3, 4, 5


class Net(nn.Module):
    """One operation between two layers: the first one's norm shows the operation's input gradient."""

    def __init__(self, operation, **shapes) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(1, 2)
        generator = torch.Generator().manual_seed(3)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator)))
        self.operation = operation

    def forward(self, x):
        made = torch.tanh(self.operation(self, torch.tanh(self.stem(x))))
        return self.head(torch.sin(made.reshape(len(x), -1)).sum(1, keepdim=True))


W = {"w": (WIDTH, OUT)}
CASES = {
    "matmul": (lambda net, h: h @ net.w, W),
    "matmul of a first axis": (lambda net, h: h[:, 0] @ net.w, W),
    "mm": (lambda net, h: torch.mm(h[:, 0], net.w), W),
    "Tensor.mm": (lambda net, h: h[:, 0].mm(net.w), W),
    "reversed": (lambda net, h: torch.Tensor.__rmatmul__(net.w, h), W),
    "keyword": (lambda net, h: torch.matmul(input=h, other=net.w), W),
    "of a transpose": (lambda net, h: h @ net.w.t(), {"w": (OUT, WIDTH)}),
    "of mT": (lambda net, h: h @ net.w.mT, {"w": (OUT, WIDTH)}),
    "of some rows": (lambda net, h: h @ net.w[2:6], {"w": (9, OUT)}),
    "of some columns": (lambda net, h: h @ net.w[:, 2:5], {"w": (WIDTH, 6)}),
    "a scaled weight": (lambda net, h: h @ (0.3 * net.w), W),
    "four axes": (lambda net, h: h.unsqueeze(1) @ net.w, W),
    "weight in front": (lambda net, h: net.w @ h, {"w": (OUT, TIMES)}),
    "weight in front, four axes": (lambda net, h: net.w @ h.unsqueeze(1), {"w": (OUT, TIMES)}),
    "vector behind": (lambda net, h: h @ net.w, {"w": (WIDTH,)}),
    "vector in front": (lambda net, h: net.w @ h, {"w": (TIMES,)}),
    "mv": (lambda net, h: torch.mv(h[:, 0], net.w), {"w": (WIDTH,)}),
    "heads": (lambda net, h: h.unsqueeze(1) @ net.w, {"w": (2, WIDTH, OUT)}),
    "heads of data and weight": (
        lambda net, h: torch.stack([h, h.sin()], 1) @ net.w,
        {"w": (2, WIDTH, OUT)},
    ),
    "heads in front": (lambda net, h: net.w @ h.unsqueeze(1), {"w": (2, OUT, TIMES)}),
    "a batch axis of one": (lambda net, h: h @ net.w, {"w": (1, WIDTH, OUT)}),
    "bmm with a stack of one": (lambda net, h: torch.matmul(h, net.w.expand(1, -1, -1)), W),
    "addmm": (lambda net, h: torch.addmm(net.b, h[:, 0], net.w), W | {"b": (OUT,)}),
    "addmm of factors": (
        lambda net, h: torch.addmm(net.b, h[:, 0], net.w, beta=0.5, alpha=2),
        W | {"b": (1, OUT)},
    ),
    "addmm of data": (lambda net, h: torch.addmm(h[:, 1], h[:, 0], net.w), {"w": (WIDTH, WIDTH)}),
    "addmm, bias alone": (lambda net, h: torch.addmm(net.b, h[:, 0], h.new_ones(WIDTH, OUT)), {"b": (OUT,)}),
    "baddbmm, bias alone": (lambda net, h: torch.baddbmm(net.b, h, h.mT), {"b": (TIMES, TIMES)}),
    "einsum": (lambda net, h: torch.einsum("btd,dp->btp", h, net.w), W),
    "einsum, weight first": (lambda net, h: torch.einsum("pd,btd->bpt", net.w, h), {"w": (OUT, WIDTH)}),
    "einsum of a list": (lambda net, h: torch.einsum("b t d, d p -> b t p", [h, net.w]), W),
    "einsum with an ellipsis": (lambda net, h: torch.einsum("...d,dp->...p", h, net.w), W),
    "einsum with an ellipsis on both": (
        lambda net, h: torch.einsum("...d,...d->...d", h, net.w),
        {"w": (WIDTH,)},
    ),
    "einsum without arrow": (lambda net, h: torch.einsum("atd,dz", h, net.w), W),
    "einsum by sublists": (lambda net, h: torch.einsum(h, [0, 1, 2], net.w, [2, 3], [0, 1, 3]), W),
    "einsum to heads": (lambda net, h: torch.einsum("btd,dhk->bthk", h, net.w), {"w": (WIDTH, 2, 3)}),
    "einsum to heads in between": (
        lambda net, h: torch.einsum("btd,hdk->bhtk", h, net.w),
        {"w": (2, WIDTH, 3)},
    ),
    "einsum of heads at the end": (
        lambda net, h: torch.einsum("btd,kdh->bhtk", h, net.w),
        {"w": (2, WIDTH, 3)},
    ),
    "einsum from heads": (
        lambda net, h: torch.einsum("bhtd,hdp->btp", torch.stack([h, h.sin()], 1), net.w),
        {"w": (2, WIDTH, OUT)},
    ),
    "einsum from heads in between": (
        lambda net, h: torch.einsum("bhtd,hpd->btp", torch.stack([h, h.sin()], 1), net.w),
        {"w": (2, OUT, WIDTH)},
    ),
    "einsum from scattered indices": (
        lambda net, h: torch.einsum("bhtd,hpd->btp", torch.stack([h, h.sin()], 1), net.w.permute(2, 1, 0)),
        {"w": (WIDTH, OUT, 2)},
    ),
    "einsum of a factor": (lambda net, h: torch.einsum("btd,d->btd", h, net.w), {"w": (WIDTH,)}),
    "einsum of a factor, summed": (
        lambda net, h: torch.einsum("btd,td->bd", h, net.w),
        {"w": (TIMES, WIDTH)},
    ),
    "einsum, all contracted": (lambda net, h: torch.einsum("btd,td->b", h, net.w), {"w": (TIMES, WIDTH)}),
    "einsum, a sum over data": (lambda net, h: torch.einsum("btd,p->bp", h, net.w), {"w": (OUT,)}),
    "einsum, a number": (lambda net, h: torch.einsum("btd,->btd", h, net.w), {"w": ()}),
    "einsum, depthwise": (lambda net, h: torch.einsum("btd,dk->btdk", h, net.w), {"w": (WIDTH, 40)}),
    "einsum, batch behind in the output": (
        lambda net, h: torch.einsum("btd,dp->ptb", h, net.w).mT.transpose(0, 1),
        W,
    ),
    "tensordot": (lambda net, h: torch.tensordot(h, net.w, 1), W),
    "tensordot of two axes": (
        lambda net, h: torch.tensordot(h, net.w, dims=([1, 2], [1, 0])),
        {"w": (WIDTH, TIMES, 2)},
    ),
    "tensordot, weight first": (
        lambda net, h: torch.tensordot(net.w, h, ([1], [2])).transpose(0, 1),
        {"w": (OUT, WIDTH)},
    ),
    "inner": (lambda net, h: torch.inner(h, net.w), {"w": (OUT, WIDTH)}),
    "outer": (lambda net, h: torch.outer(h[:, 0, 0], net.w), {"w": (OUT,)}),
    "used twice": (lambda net, h: torch.tanh(h @ net.w) @ net.w, {"w": (WIDTH, WIDTH)}),
    "used twice, once transposed": (lambda net, h: torch.tanh(h @ net.w) @ net.w.t(), W),
    "of a table that is also added": (lambda net, h: h @ net.w + net.w[:TIMES], {"w": (WIDTH, OUT)}),
    "one-hot": (lambda net, h: F.one_hot(h.argmax(-1), WIDTH).to(h) @ net.w, W),
}


def records(rows: int, *, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, TIMES, WIDTH, generator=torch.Generator().manual_seed(seed))


def assert_exact(net: nn.Module, x: torch.Tensor, counts: list[int], bound: float) -> None:
    expected = oracle(copy.deepcopy(net), x, counts, bound)
    np.testing.assert_allclose(released(net, x, counts, bound), expected, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("counts", [[1] * TIMES, [1], [2, 0, 3, 1]], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_each_product_is_exact(name, counts):
    """As many rows as times, one row, and ragged units."""
    torch.manual_seed(0)
    operation, shapes = CASES[name]
    assert_exact(Net(operation, **shapes), records(sum(counts)), counts, 0.1)


@pytest.mark.parametrize("name", CASES)
def test_a_bound_that_clips_nothing_gives_the_plain_gradient(name):
    torch.manual_seed(0)
    operation, shapes = CASES[name]
    assert_exact(Net(operation, **shapes), records(5), [2, 3], 1e4)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_einsum_of_two_operands_is_exact(data):
    """Each index but the batch's is in any two of data, parameter and output, in all three, or in the data alone."""
    draw = data.draw
    roles = draw(st.lists(st.sampled_from(["xo", "xw", "wo", "xwo", "x"]), min_size=1, max_size=5))
    letters = {"cdefg"[i]: role for i, role in enumerate(roles)}
    sizes = {i: draw(st.integers(1, 5)) for i in letters}
    terms = {
        operand: draw(st.permutations([i for i, role in letters.items() if operand in role]))
        for operand in "xwo"
    }
    equation = f"b{''.join(terms['x'])},{''.join(terms['w'])}->b{''.join(terms['o'])}"

    class Einsum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn([sizes[i] for i in terms["w"]]))
            self.scale = nn.Parameter(torch.rand(()))

        def forward(self, x):
            made = torch.einsum(equation, torch.tanh(x * self.scale), self.w)
            return torch.sin(made).unsqueeze(1).flatten(1)

    counts = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    torch.manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(sum(counts), *(sizes[i] for i in terms["x"]))
    net, bound = Einsum(), draw(st.sampled_from([1e-2, 1.0, 1e3]))
    parts = [part for part in torch.split(x, counts) if len(part)]
    gradients = per_unit_gradients(net, lambda module, part: row_losses(module, part).sum(), parts)
    assert_clipped_sum(released(net, x, counts, bound), gradients, bound)


KINDS = {
    "btd,dp->btp": OuterUse,
    "btd,pd->btp": OuterUse,
    "btd,dhk->bthk": OuterUse,
    "bhtd,hdp->bhtp": SwappedBlockUse,
    "bhtd,hpd->bhtp": BlockOuterUse,
    "bhtd,hdp->btp": SwappedOuterUse,
    "btd,hdk->bthk": SwappedBlockUse,
    "btd,d->btd": DiagonalRows,
}


@pytest.mark.parametrize("equation", KINDS)
def test_the_family_of_each_product(equation):
    """What is kept is no larger than data and output gradient, but for repetition without a copy."""
    sizes = {"b": 2, "h": 2, "t": 3, "d": 12, "p": 11, "k": 10}
    x_terms, w_terms = equation.partition("->")[0].split(",")
    how = _classify(x_terms, w_terms, equation.partition("->")[2])
    x, g = torch.randn([sizes[i] for i in x_terms]), torch.randn([sizes[i] for i in how.out])
    parameter = nn.Parameter(torch.randn([sizes[i] for i in w_terms]))
    state = CaptureState([parameter], ["w"])
    target = 0 if equation != "bhtd,hdp->btp" else Span(0, 0, parameter.numel())
    found_target, use = _use(state, how, x, g, target, 2, 1)
    assert type(use) is KINDS[equation]
    kept = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in vars(use).values()
        if torch.is_tensor(t)
    }
    assert sum(kept.values()) <= x.nbytes + g.nbytes
    expected = torch.autograd.grad(torch.einsum(equation, x, parameter), parameter, g)[0]
    if isinstance(found_target, Derived):
        found_target, use, _ = Contributions._simplify(None, found_target, use, None)
    if not isinstance(use, DiagonalRows):
        total = torch.zeros_like(parameter)
        use.add_weighted_sum(Weights(torch.ones(use.rows)), total)
        torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("counts", [[1] * 6, [2, 0, 3, 1]], ids=str)
@pytest.mark.parametrize("equation", [key for key in KINDS if "h" in key])
def test_wide_blocks_are_exact(equation, counts):
    """Parameters too wide for per-row gradients."""
    sizes = {"h": 2, "t": 2, "d": 32, "p": 33, "k": 31}
    x_terms, w_terms = equation.partition("->")[0].split(",")

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(0.1 * torch.randn([sizes[i] for i in w_terms]))

        def forward(self, x):
            return torch.tanh(torch.einsum(equation, x, self.w)).flatten(1)

    torch.manual_seed(0)
    x = torch.randn(sum(counts), *(sizes[i] for i in x_terms[1:]))
    assert_exact(Wide(), x, counts, 0.1)


class LowRank(nn.Module):
    """A frozen layer with a low-rank update beside it, or merged into its weight."""

    def __init__(self, merged: bool) -> None:
        super().__init__()
        self.stem, self.base, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, OUT), nn.Linear(OUT, 2)
        self.a, self.b = nn.Parameter(torch.randn(2, WIDTH)), nn.Parameter(torch.randn(OUT, 2))
        self.base.requires_grad_(False)
        self.merged = merged

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        if self.merged:
            h = F.linear(x, self.base.weight + 0.5 * self.b @ self.a, self.base.bias)
        else:
            h = self.base(x) + 0.5 * (x @ self.a.t() @ self.b.t())
        return self.head(torch.tanh(h))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("counts", [[1] * 4, [2, 0, 3, 1]], ids=str)
def test_low_rank_updates_of_a_frozen_layer(merged, counts):
    torch.manual_seed(0)
    net, x = LowRank(merged), records(sum(counts))
    expected = oracle(copy.deepcopy(net), x, counts, 0.1)
    assert_trains_as(net, x, counts, expected)


def assert_trains_as(net: nn.Module, x: torch.Tensor, counts: list[int], expected: np.ndarray) -> None:
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0)
    trainer, before = make_trainer(net, optimizer, max_grad_norm=0.1), flat_parameters(net)
    accumulate(trainer, net, x, counts)
    trainer.apply()
    np.testing.assert_allclose(before - flat_parameters(net), expected, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize(
    "name", ["matmul", "weight in front", "heads", "einsum to heads in between", "addmm"]
)
@pytest.mark.parametrize("frozen", ["w", "stem"])
def test_what_is_frozen_changes_nothing_else(name, frozen):
    torch.manual_seed(0)
    operation, shapes = CASES[name]
    net, x = Net(operation, **shapes), records(4)
    getattr(net, frozen).requires_grad_(False)
    assert_trains_as(net, x, [3, 1], oracle(copy.deepcopy(net), x, [3, 1], 0.1))


@pytest.mark.parametrize(
    "name", ["matmul", "weight in front", "heads", "einsum to heads in between", "addmm"]
)
def test_a_unit_that_is_not_finite_adds_nothing(name):
    torch.manual_seed(0)
    operation, shapes = CASES[name]
    net, x = Net(operation, **shapes), records(4)
    x[2, 0, 0] = torch.nan
    expected = oracle(copy.deepcopy(net), x[[0, 1, 3]], [1] * 3, 0.1)
    np.testing.assert_allclose(released(net, x, [1] * 4, 0.1), expected, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize(
    "name", ["matmul", "weight in front", "heads", "einsum to heads in between", "addmm"]
)
def test_autocast(name):
    torch.manual_seed(0)
    operation, shapes = CASES[name]
    net, x = Net(operation, **shapes), records(4)
    expected = oracle(copy.deepcopy(net), x, [2, 2], 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        found = released(net, x, [2, 2], 0.1)
    assert np.linalg.norm(found - expected) <= 3e-2 * np.linalg.norm(expected)


REFUSED = {
    "a weight for each row": (lambda net, h: h @ net.w, {"w": (4, WIDTH, OUT)}, "'w' in operation 'matmul'"),
    "bmm": (
        lambda net, h: torch.bmm(h, net.w),
        {"w": (4, WIDTH, OUT)},
        "'w' in operation 'matmul'.*first axis",
    ),
    "rows that mix": (lambda net, h: net.w @ h[:, 0], {"w": (4, 4)}, "'w' in operation 'matmul'"),
    "no batch axis": (lambda net, h: h[0, 0] @ net.w, W, "'w' in operation 'matmul'"),
    "three operands": (
        lambda net, h: torch.einsum("btd,btd,dp->btp", h, h, net.w),
        W,
        "'w' in operation 'einsum'.*two at a time",
    ),
    "a sum over the batch": (
        lambda net, h: torch.einsum("btd,dp->tp", h, net.w),
        W,
        "'w' in operation 'einsum'",
    ),
    "a diagonal": (
        lambda net, h: torch.einsum("btd,dd->bt", h, net.w),
        {"w": (WIDTH, WIDTH)},
        "'w' in.*repeated",
    ),
    "an index of the parameter alone": (
        lambda net, h: torch.einsum("btd,dp->bt", h, net.w),
        W,
        "'w' in.*its own",
    ),
    "a broadcast index": (
        lambda net, h: torch.einsum("btd,dp->btp", h, net.w),
        {"w": (1, OUT)},
        "'w' in.*length 1",
    ),
    "out": (lambda net, h: torch.mm(h[:, 0], net.w, out=torch.empty(0)), W, "'w' in.*out="),
    "outer in front": (
        lambda net, h: torch.outer(net.w, h[:, 0, 0]).t(),
        {"w": (OUT,)},
        "'w' in operation 'outer'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_parameter_and_operation(name):
    operation, shapes, message = REFUSED[name]
    with pytest.raises(UnsupportedOperationError, match=message):
        released(Net(operation, **shapes), records(4), [1] * 4, 0.1)


@pytest.mark.parametrize("rows", [TIMES, 2, 6])
@pytest.mark.parametrize(
    "operation",
    [lambda h, w: h @ w, lambda h, w: torch.einsum("btd,dhk->bthk", h, w.view(WIDTH, 1, OUT))],
    ids=["matmul", "einsum"],
)
def test_time_first_layouts_are_refused_whatever_the_lengths(operation, rows):
    """As many times as rows, another number, and one that divides: rows of other units show a gradient."""
    net = Net(lambda net, h: operation(h.transpose(0, 1), net.w).transpose(0, 1), **W)
    net.stem = nn.Tanh()
    x = torch.randn(rows, 6 if rows == 2 else TIMES, WIDTH, generator=torch.Generator().manual_seed(1))
    with pytest.raises(UnsupportedOperationError, match="'w' in"):
        released(net, x, [1] * rows, 0.1)
