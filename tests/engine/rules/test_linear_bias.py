"""A bias whose norm is taken with its weight's: products of pairs of rows where each activation ends in a one."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from synthward.engine import PerfSpec
from tests.engine.nets import accumulate, make_trainer, oracle
from tests.oracles import flat_parameters

TIMES, WIDTH = 24, 40


class Net(nn.Module):
    """Biases that matter: activations are small, so that most of a layer's gradient is its bias'."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.second(0.05 * torch.tanh(self.first(0.05 * x)))


@pytest.mark.parametrize("counts", [[1] * 4, [2, 0, 3]], ids=str)
@pytest.mark.parametrize("clipping", ["flat", "per-layer"])
@pytest.mark.parametrize("method", ["auto", "gram", "tile", "materialise"])
def test_the_sum_is_exact_by_any_method(method, clipping, counts):
    torch.manual_seed(0)
    net, x = Net(), torch.randn(sum(counts), TIMES, WIDTH)
    reference, before = copy.deepcopy(net), flat_parameters(net)
    perf = PerfSpec(method=method, materialise_bytes=1 << 20)
    trainer = make_trainer(net, perf=perf, max_grad_norm=0.05, clipping=clipping)
    accumulate(trainer, net, x, counts)
    methods = {choice.parameter: choice.method for choice in trainer.explain()}
    trainer.apply()
    actual = before - flat_parameters(net)
    if method != "auto":
        assert methods["first.weight"] == method
        assert (methods["first.bias"] == "with its weight") == (method == "gram")
    if clipping == "flat":
        expected = oracle(reference, x, counts, 0.05)
    else:
        expected = np.concatenate(
            [
                only(reference, layer, x, counts, 0.05 / np.sqrt(2.0))
                for layer in (reference.first, reference.second)
            ]
        )
    np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=1e-7)


def only(net: Net, layer: nn.Linear, x: torch.Tensor, counts: list[int], bound: float) -> np.ndarray:
    """The clipped sum of one layer's gradients, each unit's clipped to `bound`."""
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    for parameter in layer.parameters():
        parameter.requires_grad_(True)
    return oracle(net, x, counts, bound)
