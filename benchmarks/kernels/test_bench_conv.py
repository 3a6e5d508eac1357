"""Convolutions of 3 x 3 at the three sizes of unet (benchmarks/models.py), an image a unit.

Torch forms the gradients of images from unfolded patches or by a convolution with a group for each image, whichever is
quicker. Its gradients have their channels first, the kernels' last: each in its own order.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.cases import assert_near, best_executors, fastest, offsets_of
from synthward.kernels import ConvShape, conv_norms, conv_sum, conv_unit_grads

pytestmark = best_executors

UNITS, TAPS = 64, 9
SIZES = [(32, 28), (64, 14), (128, 7)]
# Products of pairs of places are for small images.
METHODS = [("tile", *size) for size in SIZES] + [("gram", *size) for size in SIZES[1:]]


class Problem:
    """Images [units, channels, side, side] and output gradients of as many channels."""

    def __init__(self, channels: int, side: int) -> None:
        size, kernel, ones = (1, side, side), (1, 3, 3), (1, 1, 1)
        self.shape = ConvShape(1, channels, channels, size, kernel, ones, (0, 1, 1), ones, size)
        self.x = torch.randn(UNITS, channels, side, side)
        self.g = torch.randn(UNITS, channels, side, side)
        self.offsets = offsets_of(UNITS, 1)
        # What the padding would multiply is zero and is not counted.
        self.flops = 2 * UNITS * (3 * side - 2) ** 2 * channels**2
        self.bytes = 4 * (self.x.numel() + self.g.numel())

    @property
    def flat(self) -> tuple[Tensor, Tensor]:
        return self.x.flatten(1), self.g.flatten(1)

    def unfolded(self) -> Tensor:
        """Gradients of images [units, numel], channels first, as are those of `grouped`."""
        return torch.bmm(self.g.flatten(2), F.unfold(self.x, 3, padding=1).mT).flatten(1)

    def grouped(self) -> Tensor:
        x, g = self.x.flatten(0, 1).unsqueeze(0), self.g.flatten(0, 1).unsqueeze(0)
        weight = self.x.new_empty(g.shape[1], self.shape.channels, 3, 3)
        return weight_gradient(x, g, weight, groups=UNITS).view(UNITS, -1)

    def exact(self) -> Tensor:
        """Gradients of images in float64."""
        return torch.bmm(self.g.double().flatten(2), F.unfold(self.x.double(), 3, padding=1).mT).flatten(1)

    def channels_first(self, grads: Tensor) -> Tensor:
        """What the kernels formed, in torch's order."""
        return grads.view(-1, self.shape.outputs, TAPS, self.shape.channels).mT.flatten(1)


def weight_gradient(x: Tensor, g: Tensor, weight: Tensor, groups: int) -> Tensor:
    settings = ([1, 1], [1, 1], [1, 1], False, [0, 0], groups)
    return torch.ops.aten.convolution_backward(g, x, weight, None, *settings, [False, True, False])[1]


def lengths(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=-1)


@pytest.mark.parametrize(("method", "channels", "side"), METHODS)
def test_conv_norms(measure, executor, method, channels, side):
    problem = Problem(channels, side)
    images, grads = problem.flat
    sq_norms, row_sums = torch.zeros(UNITS), torch.zeros(UNITS)

    def torch_gram() -> None:
        patches, g = F.unfold(problem.x, 3, padding=1), problem.g.flatten(2)
        pairs = torch.bmm(patches.mT, patches).mul_(torch.bmm(g.mT, g))
        sq_norms.add_(pairs.sum((1, 2)))
        row_sums.add_(pairs.diagonal(dim1=1, dim2=2).sqrt().sum(1))

    def torch_tile() -> None:
        # Output by output: torch's norm of very many elements has few digits.
        sq_norms.add_(lengths(form().view(UNITS, channels, -1)).square().sum(1))
        row_sums.add_(TAPS**0.5 * lengths(images) * lengths(grads))

    def kernel() -> None:
        conv_norms(problem.shape, images, grads, problem.offsets, sq_norms, row_sums, method=method)

    form = fastest([problem.unfolded, problem.grouped]) if executor == "torch" else problem.unfolded
    # Upper triangles of the products of pixels and of output gradients; additions are not counted.
    gram = UNITS * side**2 * (side**2 + 1) * 2 * channels
    flops = gram if method == "gram" else problem.flops
    call = kernel if executor != "torch" else {"gram": torch_gram, "tile": torch_tile}[method]
    measure(call, clear=(sq_norms, row_sums), flops=flops, bytes=problem.bytes + 16 * UNITS)
    assert_near(sq_norms, problem.exact().square().sum(1))
    # A bound of the sum over places, at most the roots of both sums of squares.
    patches, g = F.unfold(problem.x.double(), 3, padding=1), problem.g.double().flatten(2)
    least = (patches.norm(dim=1) * g.norm(dim=1)).sum(1)
    most = TAPS**0.5 * lengths(images.double()) * lengths(grads.double())
    assert (least * (1 - 1e-6) <= row_sums).all() and (row_sums <= most * (1 + 1e-3)).all()


@pytest.mark.parametrize(("channels", "side"), SIZES)
def test_conv_unit_grads(measure, executor, channels, side):
    problem = Problem(channels, side)
    images, grads = problem.flat
    traffic = problem.bytes + 4 * UNITS * problem.shape.numel
    if executor == "torch":
        found = measure(fastest([problem.unfolded, problem.grouped]), flops=problem.flops, bytes=traffic)
    else:
        found = measure(
            lambda: conv_unit_grads(problem.shape, images, grads, problem.offsets),
            flops=problem.flops,
            bytes=traffic,
        )
        found = problem.channels_first(found)
    assert_near(found, problem.exact())


@pytest.mark.parametrize(("channels", "side"), SIZES)
def test_conv_sum(measure, executor, channels, side):
    problem = Problem(channels, side)
    images, grads = problem.flat
    weights, out = torch.rand(UNITS), torch.zeros(problem.shape.numel)

    def by_torch() -> None:
        shaped = out.view(channels, channels, 3, 3)
        shaped.add_(weight_gradient(problem.x, problem.g * weights.view(-1, 1, 1, 1), shaped, groups=1))

    def kernel() -> None:
        conv_sum(problem.shape, images, grads, weights, out=out)

    call = by_torch if executor == "torch" else kernel
    traffic = problem.bytes + 8 * out.numel() + 4 * UNITS
    measure(call, clear=(out,), flops=problem.flops, bytes=traffic)
    found = out if executor == "torch" else problem.channels_first(out).flatten()
    assert_near(found, weights.double() @ problem.exact())
