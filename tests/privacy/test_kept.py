"""What was measured is what is released: in half precision, computed again, written to in between, added up."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from synthward.engine import PerfSpec
from synthward.engine.errors import PrivacyError
from tests.engine.nets import Mixed, accumulate, make_trainer, mixed_inputs
from tests.oracles import flat_parameters


def contribution(net: nn.Module, losses, *, keep: str = "full", bound: float = 1.0) -> float:
    """Norm of what one step without noise releases."""
    trainer = make_trainer(net, max_grad_norm=bound, perf=PerfSpec(keep=keep))
    before = flat_parameters(net)
    with trainer.capture():
        found = losses(net)
    trainer.backward(found, rows_per_unit=1)
    released = trainer._step.flat.summed_grad.double()
    norm = float(released.norm())
    trainer.apply()
    assert not np.array_equal(before, flat_parameters(net))
    return norm


class Table(nn.Module):
    def __init__(self, rows: int = 4, width: int = 3) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.randn(rows, width))


@pytest.mark.parametrize("slack", [2.0**-5, 2.0**-6, 2.0**-7])
@pytest.mark.parametrize("seed", range(6))
def test_a_tied_table_whose_terms_cancel_in_bf16(seed, slack):
    torch.manual_seed(seed)
    ids, h = torch.zeros(1, 1, dtype=torch.long), torch.randn(1, 1, 3).bfloat16().float()

    def losses(net):
        looked_up, multiplied = F.embedding(ids, net.t), F.linear(h, net.t)
        return 1e3 * multiplied[:, 0, 0] - 1e3 * (looked_up[:, 0] * h[:, 0]).sum(1) * (1.0 - slack)

    assert contribution(Table(), losses, keep="bf16") <= 1.0 + 1e-6


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("name", ["looked up", "computed", "difference", "bias twice"])
def test_one_unit_stays_within_c_in_bf16(name, seed):
    torch.manual_seed(seed)
    ids, weights = torch.randint(0, 4, (1, 3)), 3.0 * torch.randn(1, 3, 3)
    x, y = torch.randn(1, 20, 3), torch.randn(1, 20, 3)
    losses = {
        "looked up": lambda net: (F.embedding(ids, net.t) * weights).sum((1, 2)),
        "computed": lambda net: (F.linear(x, 3.0 * net.t) * 3.0).sum((1, 2)),
        "difference": lambda net: 9.0 * (F.linear(x, net.t * 1.5) - F.linear(y, net.t * 1.5)).sum((1, 2)),
        "bias twice": lambda net: (3.0 * (x[:, 0] + net.t[0]) * (y[:, 0] + 2.0 * net.t[0])).sum(1),
    }[name]
    assert contribution(Table(), losses, keep="bf16", bound=0.01) <= 0.01 * (1.0 + 1e-6)


class Dropping(nn.Module):
    """Its recomputation draws another mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(5, 64), nn.Linear(64, 1)

    def forward(self, x):
        made = checkpoint(
            lambda h: F.dropout(self.layer(h), 0.9), x, use_reentrant=False, preserve_rng_state=False
        )
        return self.head(made)


def test_a_second_pass_with_other_gradients_is_refused():
    torch.manual_seed(0)
    net, x = Dropping(), mixed_inputs(3)
    trainer = make_trainer(net, perf=PerfSpec(keep="recompute"))
    with pytest.raises(PrivacyError, match="other gradients"):
        accumulate(trainer, net, x, [1, 1, 1])
    assert float(trainer._step.flat.summed_grad.abs().max()) == 0.0


@pytest.mark.parametrize("clipping", ["flat", "automatic", "per-layer"])
def test_a_second_pass_that_repeats_the_first_releases_the_same(clipping):
    torch.manual_seed(0)
    net, x = Mixed(), mixed_inputs(6, 3)
    sums = []
    for keep in ("full", "recompute"):
        trainer = make_trainer(
            copy.deepcopy(net), perf=PerfSpec(keep=keep), clipping=clipping, max_grad_norm=0.3
        )
        accumulate(trainer, trainer._step.module, x, [2, 1, 3])
        sums.append(trainer._step.flat.summed_grad.clone())
    torch.testing.assert_close(sums[1], sums[0], rtol=4e-5, atol=1e-7)


class Placed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.place = nn.Linear(5, 5), nn.Parameter(torch.zeros(5))


def test_a_gradient_that_is_written_to_after_it_was_measured_is_refused():
    torch.manual_seed(0)
    net, x = Placed(), mixed_inputs(3)
    trainer = make_trainer(net)

    def enlarge(grad):
        grad *= -50.0  # on the memory that has been kept for `place`
        return grad

    with trainer.capture():
        h = net.first(x)
        h.register_hook(enlarge)
        losses = (h + net.place).square().sum(1)
    with pytest.raises(PrivacyError, match="written to after"):
        trainer.backward(losses, rows_per_unit=1)
    assert float(trainer._step.flat.summed_grad.abs().max()) == 0.0


def test_a_scattered_sum_of_many_rows_stays_within_c():
    """An id that a unit has a hundred thousand times is that many additions in the released sum."""
    torch.manual_seed(0)
    count = 100_000
    net, ids = Table(2, 1), torch.zeros(1, count, dtype=torch.long)
    assert contribution(net, lambda n: F.embedding(ids, n.t).mean(1).sum(1) * 3.0) <= 1.0


def test_rows_that_cancel_between_two_uses_of_a_bare_parameter():
    """Large gradients of two uses leave a small sum, which is released as it was measured."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return (x + self.p) * 2.0**24, (x * 1.0 + self.p) * (2.0**24 - 1.0)

    x = torch.randn(1, 3, generator=torch.Generator().manual_seed(0))

    def losses(net):
        a, b = net(x)
        return (a - b).sum(1) * 1.3

    assert contribution(Twice(), losses, bound=0.7) <= 0.7 * (1.0 + 1e-6)


class Rows(nn.Module):
    """x [rows, 2]: an id, and a factor on the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.wide, self.head = nn.Embedding(5, 40), nn.Linear(40, 60), nn.Linear(60, 1)

    def forward(self, x):
        hidden = torch.tanh(self.wide(torch.tanh(self.table(x[..., 0].long()))))
        return 5.0 * self.head(hidden) * x[..., 1:]


@pytest.mark.parametrize("rows", [2, 40, 700])
@pytest.mark.parametrize("each", [1, 3])
def test_a_unit_of_many_rows_does_not_move_the_factors_of_the_others(each, rows):
    """The bound on a unit's rounding, and the way its norm is taken, follow from its own rows."""
    torch.manual_seed(0)
    net = Rows()
    units = 300
    x = torch.randn(units * each, 2, generator=torch.Generator().manual_seed(1))
    x[:, 0] = torch.arange(len(x)) % 5
    extra = torch.tensor([[3.0, -1.0]]).expand(rows, -1)
    found = []
    for batch, counts in ((x, [each] * units), (torch.cat([x, extra]), [each] * units + [rows])):
        trainer = make_trainer(copy.deepcopy(net), max_grad_norm=0.1)
        accumulate(trainer, trainer._step.module, batch, counts)
        found.append(trainer._step.flat.summed_grad.double())
    assert float((found[1] - found[0]).norm()) <= 0.1 * (1.0 + 1e-4)
