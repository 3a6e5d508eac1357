"""Backward passes of normalisations: compiled kernels and reference against autograd in float64, unit by unit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from synthward.kernels import available_isas, force_isa, group_norm_backward, layer_norm_backward

BACKENDS = ["reference", "cpp"]
EPS = 1e-5


def close(actual, expected, rtol=3e-6):
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    np.testing.assert_allclose(actual.double(), expected, rtol=rtol, atol=rtol * scale + 1e-9)


def layer_norm_oracle(x, g, weight, offsets, order, *, is_rms):
    """(dx, scale [U, p], bias [U, p]) in float64, one unit after the other."""
    x, g = x.double().requires_grad_(), g.double()
    weight = None if weight is None else weight.double()
    width = x.shape[1]

    def norm(rows, scale):
        return (
            F.rms_norm(rows, [width], scale, EPS) if is_rms else F.layer_norm(rows, [width], scale, None, EPS)
        )

    (dx,) = torch.autograd.grad(norm(x, weight), x, g)
    scales, biases = [], []
    for first, last in itertools.pairwise(offsets):
        rows = order[first:last]
        scales.append((norm(x[rows].detach(), None) * g[rows]).sum(0))
        biases.append(g[rows].sum(0))
    return dx, torch.stack(scales), torch.stack(biases)


def statistics(x, *, is_rms):
    x = x.double()
    mean = torch.zeros(len(x)) if is_rms else x.mean(1)
    rstd = ((x - mean.unsqueeze(1)).square().mean(1) + EPS).rsqrt()
    return None if is_rms else mean.float(), rstd.float()


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 70), min_size=1, max_size=4),
    width=st.sampled_from([2, 3, 15, 16, 17, 31, 64, 127, 300]),
    is_rms=st.booleans(),
    weighted=st.booleans(),
    is_shuffled=st.booleans(),
    seed=st.integers(0, 99),
)
def test_layer_norm(backend, counts, width, is_rms, weighted, is_shuffled, seed):
    torch.manual_seed(seed)
    rows = sum(counts)
    x, g = torch.randn(rows, width) * 2 + 1, torch.randn(rows, width)
    weight = torch.randn(width) if weighted else None
    offsets = torch.tensor([0, *counts]).cumsum(0)
    order = torch.randperm(rows) if is_shuffled else torch.arange(rows)
    dx, scale, bias = (
        torch.empty(rows, width),
        torch.empty(len(counts), width),
        torch.empty(len(counts), width),
    )
    layer_norm_backward(
        x,
        g,
        *statistics(x, is_rms=is_rms),
        weight,
        offsets,
        order=order if is_shuffled else None,
        dx=dx,
        scale=scale,
        bias=bias,
        backend=backend,
    )
    expected = layer_norm_oracle(x, g, weight, offsets.tolist(), order, is_rms=is_rms)
    for actual, wanted in zip((scale, bias), expected[1:], strict=True):
        close(actual, wanted, 1e-5)
    if rows:
        # Over few columns the gradient nearly cancels: it is held to its terms.
        terms = (g if weight is None else g * weight) * statistics(x, is_rms=is_rms)[1].unsqueeze(1)
        assert float((dx - expected[0]).abs().max()) <= 1e-5 * float(terms.abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 5),
    groups=st.integers(1, 4),
    each=st.integers(1, 5),
    length=st.sampled_from([1, 2, 7, 15, 16, 17, 49, 100]),
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_group_norm(backend, rows, groups, each, length, weighted, seed):
    if each * length == 1:
        length = 2
    torch.manual_seed(seed)
    channels = groups * each
    x, g = torch.randn(rows, channels, length) * 2 + 1, torch.randn(rows, channels, length)
    weight = torch.randn(channels) if weighted else None
    flat = x.double().reshape(rows, groups, each * length)
    mean = flat.mean(2)
    rstd = ((flat - mean.unsqueeze(2)).square().mean(2) + EPS).rsqrt()
    dx, scale, bias = torch.empty_like(x), torch.empty(rows, channels), torch.empty(rows, channels)
    group_norm_backward(
        x, g, mean.float(), rstd.float(), weight, dx=dx, scale=scale, bias=bias, backend=backend
    )
    inputs = x.double().requires_grad_()
    normalised = F.group_norm(inputs, groups, None, None, EPS)
    factor = 1.0 if weight is None else weight.double().unsqueeze(1)
    # (The sum over no rows has a gradient too.)
    (expected,) = torch.autograd.grad((normalised * factor * g.double()).sum(), inputs)
    if x.numel():
        terms = g * factor * rstd.max()
        assert float((dx - expected).abs().max()) <= 1e-5 * float(terms.abs().max())
    close(scale, (normalised.detach() * g.double()).sum(2), 1e-5)
    close(bias, g.double().sum(2), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_offset_does_not_drown_the_scale(backend):
    """Values that float32 holds exactly, far from zero: sums of g * x and of g apart would cancel."""
    torch.manual_seed(0)
    x = 65536.0 + torch.randint(-64, 65, (4, 6, 50)) / 64.0
    g = torch.randn(4, 6, 50)
    flat = x.double().reshape(4, 2, 150)
    # The means are not representable; those of the kernel's arguments are.
    mean = flat.mean(2).float()
    rstd = ((flat - flat.mean(2, keepdim=True)).square().mean(2) + EPS).rsqrt().float()
    scale, bias = torch.empty(4, 6), torch.empty(4, 6)
    group_norm_backward(x, g, mean, rstd, scale=scale, bias=bias, backend=backend)
    deviation = x.double() - mean.double().repeat_interleave(3, dim=1).unsqueeze(2)
    close(scale, (deviation * rstd.double().repeat_interleave(3, 1).unsqueeze(2) * g).sum(2))
    scale, dx = torch.empty(4, 300), torch.empty(4, 300)
    rows, mean, rstd = x.reshape(4, 300), mean[:, 0].contiguous(), rstd[:, 0].contiguous()
    layer_norm_backward(rows, g.reshape(4, 300), mean, rstd, dx=dx, scale=scale, backend=backend)
    close(
        scale, (rows.double() - mean.double().unsqueeze(1)) * rstd.double().unsqueeze(1) * g.reshape(4, 300)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_own_unit(backend, bad):
    torch.manual_seed(0)
    x, g, weight = torch.randn(6, 20), torch.randn(6, 20), torch.randn(20)
    mean, rstd = statistics(x, is_rms=False)
    offsets = torch.tensor([0, 2, 4, 6])

    def run():
        dx, scale, bias = torch.empty(6, 20), torch.empty(3, 20), torch.empty(3, 20)
        layer_norm_backward(x, g, mean, rstd, weight, offsets, dx=dx, scale=scale, bias=bias, backend=backend)
        return dx, scale, bias

    clean = run()
    x[2, 3], g[3, 5], rstd[2] = bad, bad, bad
    spoilt = run()
    for i, (before, after) in enumerate(zip(clean, spoilt, strict=True)):
        own = [2, 3] if i == 0 else [1]
        others = [n for n in range(len(before)) if n not in own]
        assert torch.equal(before[others], after[others])
        assert not torch.isfinite(after[own]).all()


def test_every_instruction_set_gives_the_same_bits():
    torch.manual_seed(0)
    found = []
    x, g, weight = torch.randn(130, 77), torch.randn(130, 77), torch.randn(77)
    offsets = torch.tensor([0, 1, 64, 64, 130])
    mean, rstd = statistics(x, is_rms=False)
    images, grads = torch.randn(3, 8, 53), torch.randn(3, 8, 53)
    group_mean, group_rstd = torch.randn(3, 4), torch.rand(3, 4) + 0.5
    threads = torch.get_num_threads()
    try:
        for isa in available_isas():
            for count in (1, 2):
                force_isa(isa)
                torch.set_num_threads(count)
                dx, scale, bias = torch.empty(130, 77), torch.empty(4, 77), torch.empty(4, 77)
                layer_norm_backward(x, g, mean, rstd, weight, offsets, dx=dx, scale=scale, bias=bias)
                dy, s, b = torch.empty(3, 8, 53), torch.empty(3, 8), torch.empty(3, 8)
                group_norm_backward(images, grads, group_mean, group_rstd, dx=dy, scale=s, bias=b)
                found.append(torch.cat([t.flatten() for t in (dx, scale, bias, dy, s, b)]))
    finally:
        force_isa(None)
        torch.set_num_threads(threads)
    assert len(found) >= 2
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"output_grads": torch.zeros(4, 4)}, ValueError, "output_grads"),
        ({"mean": torch.zeros(3)}, ValueError, "mean"),
        ({"rstd": torch.zeros(4, dtype=torch.float64)}, TypeError, "rstd"),
        ({"weight": torch.zeros(4)}, ValueError, "weight"),
        ({"offsets": torch.tensor([0, 3])}, ValueError, "offsets"),
        ({"dx": torch.zeros(4, 4)}, ValueError, "dx"),
        ({"scale": torch.zeros(3, 5)}, ValueError, "scale"),
        ({"order": torch.tensor([0, 1, 2, 4])}, (ValueError, IndexError), "order|range"),
    ],
)
def test_bad_arguments(changes, error, match):
    arguments = {
        "x": torch.zeros(4, 5),
        "output_grads": torch.zeros(4, 5),
        "mean": torch.zeros(4),
        "rstd": torch.ones(4),
        "offsets": torch.tensor([0, 2, 4]),
        "scale": torch.zeros(2, 5),
    }
    with pytest.raises(error, match=match):
        layer_norm_backward(**(arguments | changes))


def test_groups_that_do_not_divide_the_channels():
    with pytest.raises(ValueError, match="groups"):
        group_norm_backward(
            torch.zeros(2, 5, 3),
            torch.zeros(2, 5, 3),
            torch.zeros(2, 2),
            torch.ones(2, 2),
            scale=torch.zeros(2, 5),
            bias=torch.zeros(2, 5),
        )
