"""Sums whose operands are rounded to bfloat16: a unit moves the released sum by at most C all the same.

Rows that cancel are the hard case: what is left of them is small, what rounding takes from each is not.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from synthward.engine import PerfSpec
from synthward.engine.errors import ConfigError
from synthward.engine.layout import Layout
from synthward.engine.rules import linear, uses
from synthward.kernels import planned_device
from tests.engine.nets import make_trainer

# fp32: sums and the reading of them.
ROUNDING = 1e-6


def released(
    a: Tensor, g: Tensor, bound: float, half_sums: str, method: str = "gram", keep: str = "full"
) -> Tensor:
    """The clipped sum of one layer over units of rows a [U, T, d] and output gradients g [U, T, p]."""
    module = nn.Linear(a.shape[2], g.shape[2], bias=False)
    perf = PerfSpec(half_sums=half_sums, keep=keep, method=method)
    trainer = make_trainer(module, max_grad_norm=bound, perf=perf)
    with torch.autocast("cpu", dtype=torch.bfloat16), trainer.capture():
        losses = (module(a).float() * g).sum((1, 2))
    trainer.backward(losses, rows_per_unit=1)
    return trainer._step.sums.flat[: module.weight.numel()].clone()


@pytest.fixture(autouse=True)
def operands_as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(linear, "measured_type", lambda grads: grads.dtype)


def cancelling(rows: int, step: int) -> tuple[Tensor, Tensor]:
    """One unit: half of its rows are of one bfloat16 number, and half of the next one, negative."""
    one = 1.0 + step * 2.0**-7
    g = torch.tensor([one] * rows + [-(one + 2.0**-7)] * rows).view(1, 2 * rows, 1)
    return torch.ones_like(g), g


BOUNDS = [0.05 * 1.031**k for k in range(40)]


def longest(half_sums: str, method: str) -> float:
    """The longest contribution of one unit, of several that cancel, over C."""
    worst = 0.0
    for bound in BOUNDS:
        for step in (0, 40):
            a, g = cancelling(32, step)
            worst = max(worst, float(released(a, g, bound, half_sums, method).norm()) / bound)
    return worst


@pytest.mark.parametrize("method", ["gram", "tile"])
@pytest.mark.parametrize("half_sums", ["exact", "rounded"])
def test_a_unit_whose_rows_cancel_adds_at_most_c(half_sums, method):
    assert longest(half_sums, method) <= 1.0 + ROUNDING


@pytest.mark.parametrize("method", ["gram", "tile"])
def test_without_its_term_the_rounding_would_show(monkeypatch, method):
    """So the case is hard enough."""
    monkeypatch.setattr(uses, "rounding_of", lambda terms: 0.0)
    assert longest("exact", method) <= 1.0 + ROUNDING
    assert longest("rounded", method) > 1.2


@pytest.mark.parametrize("half_sums", ["auto", "exact", "rounded"])
@pytest.mark.parametrize(("rows", "units"), [(1, 12), (5, 6), (70, 3)])
def test_sums_are_near_those_that_round_nothing(half_sums, rows, units):
    """A norm grows by 2^-8 of the norms of its rows at most, and the sum is off by as much."""
    a, g = torch.randn(units, rows, 9).bfloat16().float(), torch.randn(units, rows, 7).bfloat16().float()
    for bound in (0.5, 1e6):
        exact = torch.zeros(7, 9, dtype=torch.float64)
        for x, y in zip(a.double(), g.double(), strict=True):
            gradient = y.T @ x
            exact += gradient * min(1.0, bound / float(gradient.norm()))
        found = released(a, g, bound, half_sums).view(7, 9).double()
        spread = float((a.norm(dim=2) * g.norm(dim=2)).sum(1).max() / (g.mT @ a).flatten(1).norm(dim=1).min())
        allowed = (2.0**-8 if half_sums == "rounded" else 2.0**-17) * 2.0 * spread
        assert (found - exact).norm() <= (allowed + 1e-4) * exact.norm() * units**0.5
        if half_sums != "rounded" and bound > 1.0:
            torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-4)


def test_rows_that_are_kept_in_bf16_are_summed_in_fp32_on_a_cpu():
    a, g = cancelling(32, 0)
    found = [released(a, g, 0.1, half_sums, keep="bf16") for half_sums in ("exact", "rounded")]
    assert torch.equal(*found)


def test_how_much_a_choice_widens_a_norm():
    """On a GPU; said of shapes, without one."""
    rows = torch.zeros(64, 4, dtype=torch.bfloat16)
    single, many = Layout.uniform(64, 1), Layout.uniform(4, 16)
    plain = uses.OuterUse(rows, rows)
    token = planned_device.set("cuda")
    try:
        with FakeTensorMode() as mode:
            shapes = uses.OuterUse(mode.from_tensor(rows), mode.from_tensor(rows))
            for choice, of_single, of_many in (("auto", 1, 2), ("rounded", 1, 1), ("exact", 3, 3)):
                assert shapes.summed(choice, single).terms == of_single
                assert shapes.summed(choice, many).terms == of_many
    finally:
        planned_device.reset(token)
    assert plain.summed("auto", single) is plain, "a CPU multiplies fp32"
    half = uses.OuterUse(rows.half(), rows.half())
    assert half.summed("rounded", single) is half, "fp16 has too few exponents"
    assert plain.released_chain(many) == 2 * 16, "tensor cores cut off what does not fit"
    assert plain.summed("rounded", many).released_chain(many) >= 16 + 2**16
    assert plain.summed("rounded", many).chain(many) == plain.chain(many), "norms are not rounded"


def test_a_choice_that_is_none():
    with pytest.raises(ConfigError, match="half_sums: got 'half'"):
        PerfSpec(half_sums="half")


def test_norms_of_few_rows_are_bounded_as_what_takes_them_is():
    """In fp64 on a CPU; on a GPU in fp32, as those of many rows."""
    rows, few, many = torch.zeros(64, 40), Layout.uniform(8, 8), Layout.uniform(1, 64)
    use = uses.OuterUse(rows, rows)
    assert use.chain(few) == 1
    token = planned_device.set("cuda")
    try:
        with FakeTensorMode() as mode:
            shapes = uses.OuterUse(mode.from_tensor(rows), mode.from_tensor(rows))
            assert shapes.chain(few) == shapes.chain(many) == 44
            assert replace(shapes, method="tile").chain(few) == 44
            assert replace(shapes, method="tile").chain(many) == 64
    finally:
        planned_device.reset(token)


@pytest.mark.parametrize("method", ["gram", "tile"])
@pytest.mark.parametrize("half_sums", ["exact", "rounded"])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_gradients_that_bfloat16_hardly_holds_beside_huge_activations(rows, half_sums, method):
    """What is lost of a scaled row below 2^-126 would be as large as C after the product: such units do not count."""
    for step in range(1, 9):
        a = torch.full((1, rows, 3), 1.5 * 2.0**120)
        g = torch.full((1, rows, 2), step * 2.0**-133)
        true = float((g[0].double().T @ a[0].double()).norm())
        for part in (0.3, 0.51, 0.999):
            found = released(a, g, part * true, half_sums, method)
            assert found.double().norm() <= part * true * (1.0 + ROUNDING)


def test_large_activations_count_as_long_as_nothing_is_lost():
    a, g = torch.full((1, 3, 2), 2.0**62), torch.full((1, 3, 2), 2.0**-60)
    found = released(a, g, 0.5, "rounded")
    assert 0.49 <= float(found.norm()) <= 0.5 * (1.0 + ROUNDING)
