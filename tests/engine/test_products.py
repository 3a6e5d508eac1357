"""Who multiplies changes nothing but the time."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from synthward.engine import PerfSpec
from synthward.engine import products as products_module
from synthward.engine.products import Products
from synthward.engine.rates import Rates
from tests.engine.nets import Mixed, accumulate, make_trainer, mixed_inputs, oracle
from tests.oracles import flat_parameters


@pytest.mark.parametrize("who", ["own", "library", "auto"])
@pytest.mark.parametrize("counts", [[1, 1, 1], [2, 0, 3]], ids=str)
def test_the_sum_is_exact(who, counts):
    torch.manual_seed(0)
    module, x = Mixed(), mixed_inputs(sum(counts), 3)
    expected = oracle(copy.deepcopy(module), x, counts, 0.3)
    trainer, before = (
        make_trainer(module, max_grad_norm=0.3, perf=PerfSpec(products=who)),
        flat_parameters(module),
    )
    accumulate(trainer, module, x, counts)
    trainer.apply()
    np.testing.assert_allclose(before - flat_parameters(module), expected, rtol=2e-4, atol=2e-6)


@pytest.fixture
def calls(monkeypatch):
    """Shapes that the compiled kernel was asked for."""
    made: list[tuple[int, ...]] = []
    real = products_module.product

    def product(x, weight, *rest, **named):
        made.append((len(x), *weight.shape))
        return real(x, weight, *rest, **named)

    monkeypatch.setattr(products_module, "product", product)
    return made


@pytest.mark.parametrize(("own", "taken"), [(3e11, True), (1.05e11, False), (0.0, False)])
def test_the_faster_one_is_taken(monkeypatch, calls, own, taken):
    rates = Rates(1e11, 1e11, 1e10, product=own, library=1e11)
    monkeypatch.setattr(products_module, "measured_rates", lambda device: rates)
    x, layer = torch.randn(4, 128, 128), nn.Linear(128, 256)
    torch.testing.assert_close(Products().linear(x, layer.weight, layer.bias), layer(x))
    grad = torch.randn(4, 128, 256)
    torch.testing.assert_close(
        Products().input_grad(grad, layer.weight), grad @ layer.weight, rtol=1e-4, atol=1e-5
    )
    assert bool(calls) == taken
    assert len(calls) in (0, 2)


def test_small_products_and_other_types_are_the_library_s(monkeypatch, calls):
    rates = Rates(1e11, 1e11, 1e10, product=1e12, library=1e11)
    monkeypatch.setattr(products_module, "measured_rates", lambda device: rates)
    products, weight = Products(), torch.randn(256, 128)
    products.linear(torch.randn(2, 128), weight, None)
    products.linear(torch.randn(4096, 128), torch.randn(1, 128), None)
    products.linear(torch.randn(512, 128).double(), weight.double(), None)
    products.linear(torch.randn(512, 128).bfloat16(), weight.bfloat16(), None)
    products.linear(torch.randn(128, 512).mT, weight, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert products.linear(torch.randn(512, 128), weight, None).dtype == torch.bfloat16
    assert not calls
    products.linear(torch.randn(512, 128), weight, None)
    assert len(calls) == 1
