"""Layer, RMS, group and instance norm against the float64 loop over units."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from synthward.engine.errors import UnsupportedOperationError
from tests.engine.nets import make_trainer, oracle, released


class Net(nn.Module):
    """A norm between two layers; x [rows, *inner, features] or [rows, channels, ...]."""

    def __init__(self, norm: nn.Module, channels_first: bool, width: int) -> None:
        super().__init__()
        self.norm, self.channels_first = norm, channels_first
        self.first = nn.Linear(width, width)
        for parameter in norm.parameters():
            nn.init.normal_(parameter)

    def forward(self, x):
        h = self.first(x)
        if self.channels_first:
            h = h.movedim(-1, 1)
        return self.norm(h * 2 + 1)


WIDTH = 6
CASES = {
    "layer_norm": (lambda: nn.LayerNorm(WIDTH), False, (3,)),
    "layer_norm without an axis": (lambda: nn.LayerNorm(WIDTH), False, ()),
    "layer_norm over two axes": (lambda: nn.LayerNorm([3, WIDTH]), False, (3,)),
    "layer_norm without bias": (lambda: nn.LayerNorm(WIDTH, bias=False), False, (3,)),
    "rms_norm": (lambda: nn.RMSNorm(WIDTH), False, (3,)),
    "rms_norm eps": (lambda: nn.RMSNorm([3, WIDTH], eps=0.3), False, (3,)),
    "group_norm": (lambda: nn.GroupNorm(3, WIDTH), True, (4, 5)),
    "group_norm of one group": (lambda: nn.GroupNorm(1, WIDTH), True, (7,)),
    "group_norm without positions": (lambda: nn.GroupNorm(2, WIDTH), True, ()),
    "instance_norm": (lambda: nn.InstanceNorm2d(WIDTH, affine=True), True, (3, 3)),
    "instance_norm 1d": (lambda: nn.InstanceNorm1d(WIDTH, affine=True), True, (5,)),
    "instance_norm 3d": (lambda: nn.InstanceNorm3d(WIDTH, affine=True), True, (2, 1, 2)),
}


def build(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    make, channels_first, inner = CASES[name]
    torch.manual_seed(0)
    return Net(make(), channels_first, WIDTH), (*inner, WIDTH)


def assert_exact(module, x, counts, max_grad_norm, rtol=1e-5):
    expected = oracle(module, x, counts, max_grad_norm)
    actual = released(module, x, counts, max_grad_norm)
    # What is released is read off parameters of order one.
    atol = max(1e-6, rtol * np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("counts", [[1] * 5, [2, 0, 3], [1, 4]], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_clipped_sums_are_exact(name, counts):
    module, shape = build(name)
    x = torch.randn(sum(counts), *shape)
    for bound in (1e-2, 1e4):
        assert_exact(module, x, counts, bound)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(CASES)),
    counts=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    bound=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_any_layout(name, counts, bound, seed):
    module, shape = build(name)
    torch.manual_seed(seed)
    assert_exact(module, torch.randn(sum(counts), *shape), counts, bound)


@pytest.mark.parametrize("name", CASES)
def test_a_unit_that_is_not_finite_has_weight_zero(name):
    module, shape = build(name)
    x = torch.randn(6, *shape)
    spoilt = x.clone()
    spoilt[2] = float("nan")
    expected = oracle(module, torch.cat([x[:2], x[3:]]), [1] * 5, 0.1)
    actual = released(module, spoilt, [1] * 6, 0.1)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in CASES if "without bias" not in name and "rms" not in name])
def test_one_of_scale_and_bias_frozen(name):
    for frozen in ("weight", "bias"):
        module, shape = build(name)
        getattr(module.norm, frozen).requires_grad_(False)
        x = torch.randn(5, *shape)
        assert_exact(module, x, [2, 3], 0.1)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "group_norm", "instance_norm"])
def test_bf16_autocast(name):
    module, shape = build(name)
    x = torch.randn(6, *shape)
    expected = oracle(module, x, [1] * 6, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = released(module, x, [1] * 6, 1.0)
    assert np.linalg.norm(actual - expected) <= 2e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize(("name", "view"), [("group_norm", "channels_last"), ("layer_norm", "transposed")])
def test_inputs_that_are_not_contiguous(name, view):
    class Turned(Net):
        def forward(self, x):
            h = self.first(x)
            if view == "channels_last":
                return self.norm(h.movedim(-1, 1).contiguous(memory_format=torch.channels_last))
            return self.norm(h.transpose(1, 2).contiguous().transpose(1, 2)).transpose(1, 2)

    make, channels_first, inner = CASES[name]
    torch.manual_seed(0)
    module = Turned(make(), channels_first, WIDTH)
    assert_exact(module, torch.randn(5, *inner, WIDTH), [1, 2, 2], 0.1)


@pytest.mark.parametrize("function", ["layer_norm", "rms_norm"])
def test_no_batch_axis_is_refused(function):
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4, 3))

        def forward(self, x):
            return getattr(F, function)(x, [4, 3], self.scale)

    module = Whole()
    trainer, x = make_trainer(module), torch.randn(4, 3)
    with pytest.raises(UnsupportedOperationError, match=f"scale.*{function}.*batch"), trainer.capture():
        module(x)
