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

from synthward.engine.errors import UnsupportedOperationError
from tests.engine.nets import accumulate, make_trainer, oracle, released
from tests.oracles import flat_parameters

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
