"""Backward passes of normalisations at shapes of gpt, ehr and unet, against aten's own.

Aten's give the sums of scale and bias over all rows, the kernels' those of every unit, which is more.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.cases import assert_near, best_executors, offsets_of
from synthward.kernels import group_norm_backward, layer_norm_backward

pytestmark = best_executors

GROUPS = 8


def input_gradient(x: Tensor, g: Tensor, groups: int, weight: Tensor) -> Tensor:
    """Of rows [N, C, L] normalised by groups of channels, by autograd in float64."""
    x = x.double().requires_grad_()
    F.group_norm(x, groups, weight.double()).backward(g.double())
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize(("units", "rows", "width"), [(32, 128, 384), (64, 64, 256)])
def test_layer_norm_backward(measure, executor, units, rows, width):
    x, g, weight = torch.randn(units * rows, width), torch.randn(units * rows, width), torch.rand(width)
    bias, offsets, dx = torch.zeros(width), offsets_of(units, rows), torch.empty_like(x)
    _, mean, rstd = torch.native_layer_norm(x, [width], weight, bias, 1e-5)
    scales, biases = torch.empty(units, width), torch.empty(units, width)
    flat = (mean.flatten(), rstd.flatten())

    def by_torch() -> tuple[Tensor, Tensor, Tensor]:
        wanted = [True, True, True]
        return torch.ops.aten.native_layer_norm_backward(g, x, [width], mean, rstd, weight, bias, wanted)

    def kernel() -> tuple[Tensor, Tensor, Tensor]:
        layer_norm_backward(x, g, *flat, weight, offsets, dx=dx, scale=scales, bias=biases)
        return dx, scales, biases

    # Those of every unit, or all units' sum.
    sums = 8 * width * (1 if executor == "torch" else units)
    found = measure(by_torch if executor == "torch" else kernel, bytes=3 * x.nbytes + 2 * mean.nbytes + sums)
    normalised = F.layer_norm(x.double(), [width])
    exact = [(g * normalised).view(units, rows, width).sum(1), g.double().view(units, rows, width).sum(1)]
    if executor == "torch":
        exact = [e.sum(0) for e in exact]
    assert_near(found[0], input_gradient(x.unsqueeze(2), g.unsqueeze(2), 1, weight).squeeze(2))
    assert_near(found[1], exact[0])
    assert_near(found[2], exact[1])


@pytest.mark.parametrize(("units", "channels", "places"), [(64, 32, 784), (64, 64, 196), (64, 128, 49)])
def test_group_norm_backward(measure, executor, units, channels, places):
    x, g = torch.randn(units, channels, places), torch.randn(units, channels, places)
    weight, dx, sizes = torch.rand(channels), torch.empty_like(x), (units, channels, places, GROUPS)
    _, mean, rstd = torch.native_group_norm(x, weight, None, *sizes, 1e-5)
    scales, biases = torch.empty(units, channels), torch.empty(units, channels)

    def by_torch() -> tuple[Tensor, Tensor, Tensor]:
        wanted = [True, True, True]
        return torch.ops.aten.native_group_norm_backward(g, x, mean, rstd, weight, *sizes, wanted)

    def kernel() -> tuple[Tensor, Tensor, Tensor]:
        group_norm_backward(x, g, mean, rstd, weight, scale=scales, bias=biases, dx=dx)
        return dx, scales, biases

    sums = 8 * channels * (1 if executor == "torch" else units)
    found = measure(by_torch if executor == "torch" else kernel, bytes=3 * x.nbytes + 2 * mean.nbytes + sums)
    exact = [(g * F.group_norm(x.double(), GROUPS)).sum(2), g.double().sum(2)]
    if executor == "torch":
        exact = [e.sum(0) for e in exact]
    assert_near(found[0], input_gradient(x, g, GROUPS, weight))
    assert_near(found[1], exact[0])
    assert_near(found[2], exact[1])
