"""Tensors that have shapes and no numbers: every kernel of a step makes its outputs and computes nothing."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from synthward import kernels
from synthward.kernels._select import choose
from synthward.kernels.conv import ConvShape

N, D, P, U = 12, 5, 7, 4


@pytest.fixture
def shapes():
    with FakeTensorMode():
        yield


def rows(width: int) -> torch.Tensor:
    return torch.zeros(N, width)


def offsets() -> torch.Tensor:
    return torch.arange(0, N + 1, N // U)


def test_only_what_has_no_numbers_is_a_shape(shapes):
    made = torch.zeros(2)
    assert kernels.is_shape(made) and choose("auto", made) == choose("cpp", made) == "shapes"
    assert choose("reference", made) == "reference"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_real_tensor_is_none(device):
    real = torch.zeros(2, device=device)
    assert not kernels.is_shape(real) and choose("auto", real) != "shapes"


def test_norms_and_sums_of_products(shapes):
    a, g, norms, sums = rows(D), rows(P), torch.zeros(U), torch.zeros(U)
    assert kernels.outer_sq_norms(a, g, offsets()).shape == (U,)
    for method in ("gram", "tile"):
        kernels.outer_norms(a, g, offsets(), norms, sums, method=method, with_bias=method == "gram")
    assert kernels.rank1_norms(a, g, torch.zeros(N), torch.zeros(N)).shape == (N,)
    grads, squares, lengths = kernels.outer_unit_grads(a, g, offsets())
    assert (grads.shape, squares.shape, lengths.shape) == ((U, P * D), (U,), (U,))
    kernels.outer_sum(a, g, torch.zeros(N), out=torch.zeros(P, D), bias=torch.zeros(P))
    assert kernels.product(a, torch.zeros(P, D), torch.zeros(P), is_transposed=True).shape == (N, P)


def test_rows_and_tables(shapes):
    assert kernels.diagonal_sq_norms(rows(D), offsets()).shape == (U,)
    assert kernels.diagonal_weighted_sum(rows(D), torch.zeros(N), out=torch.zeros(D)).shape == (D,)
    ids = torch.zeros(N, dtype=torch.int64)
    assert kernels.scatter_sq_norms(ids, rows(D), offsets()).shape == (U,)
    table = torch.zeros(9, D)
    assert kernels.scatter_weighted_sum(ids, rows(D), torch.zeros(N), out=table) is table


def test_convolutions(shapes):
    shape = ConvShape(
        groups=1,
        channels=2,
        outputs=3,
        size=(1, 4, 4),
        kernel=(1, 3, 3),
        stride=(1, 1, 1),
        padding=(0, 1, 1),
        dilation=(1, 1, 1),
        out=(1, 4, 4),
    )
    x, g, each = torch.zeros(U, shape.image_numel), torch.zeros(U, shape.output_numel), torch.arange(U + 1)
    for method in ("gram", "tile"):
        kernels.conv_norms(shape, x, g, each, torch.zeros(U), torch.zeros(U), method=method)
    assert kernels.conv_unit_grads(shape, x, g, each).shape == (U, shape.numel)
    kernels.conv_sum(shape, x, g, torch.zeros(U), out=torch.zeros(shape.numel))


def test_normalisations(shapes):
    x, one = rows(D), torch.zeros(N)
    scale, bias = torch.zeros(U, D), torch.zeros(U, D)
    kernels.layer_norm_backward(x, x, one, one, None, offsets(), dx=rows(D), scale=scale, bias=bias)
    image, mean = torch.zeros(N, 4, 6), torch.zeros(N, 2)
    sums = torch.zeros(N, 4), torch.zeros(N, 4)
    kernels.group_norm_backward(image, image, mean, mean, None, scale=sums[0], bias=sums[1], dx=image.clone())


def test_shapes_are_checked_all_the_same(shapes):
    with pytest.raises(ValueError, match="output_grads"):
        kernels.outer_norms(
            rows(D), torch.zeros(N + 1, P), offsets(), torch.zeros(U), torch.zeros(U), method="gram"
        )
