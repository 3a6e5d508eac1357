"""Convolutions of all kinds against the float64 loop over units."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from synthward.engine import KeySchedule, PerfSpec, PrivacyPlan, PrivateTrainer
from synthward.engine.errors import UnsupportedOperationError
from synthward.engine.layout import Layout
from synthward.engine.rules import conv as rule
from synthward.engine.rules.conv import ConvUse
from synthward.engine.rules.uses import Norms
from synthward.kernels import ConvShape
from tests.engine.nets import accumulate, assert_clipped_sum, make_trainer, oracle, released, row_losses
from tests.oracles import flat_parameters, per_unit_gradients

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSES = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class Net(nn.Module):
    """The layer under test between a 1x1 convolution (whose norm shows its input gradient) and a mean."""

    def __init__(self, layer: nn.Module, inputs: int, axes: int) -> None:
        super().__init__()
        self.mix, self.layer = CONVS[axes](inputs, inputs, 1), layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(torch.sin(self.mix(x))))


def released_by(net: nn.Module, x: torch.Tensor, counts: list[int], bound: float, method: str) -> np.ndarray:
    """The released sum of one noiseless step with one way to the norms."""
    plan = PrivacyPlan(0.1, 0.0, bound, 1000, 1.0)
    perf = PerfSpec(method=method, materialise_bytes=1 << 30)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    trainer = PrivateTrainer(net, optimizer, plan, keys=KeySchedule.from_os(), perf=perf)
    before = flat_parameters(net)
    accumulate(trainer, net, x, counts)
    trainer.apply()
    return before - flat_parameters(net)


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_convolution_is_exact(data):
    draw = data.draw
    axes = draw(st.sampled_from([1, 1, 2, 2, 2, 3]))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inputs, outputs = groups * draw(st.integers(1, 5)), groups * draw(st.integers(1, 9))
    kernel = [draw(st.integers(1, 4 if axes < 3 else 2)) for _ in range(axes)]
    settings_ = {
        "stride": [draw(st.integers(1, 3)) for _ in range(axes)],
        "padding": [draw(st.integers(0, 2)) for _ in range(axes)],
        "dilation": [draw(st.integers(1, 2)) for _ in range(axes)],
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    transposed = draw(st.booleans())
    if transposed:  # pad the output by less than a stride or a dilation
        extra = [
            draw(st.integers(0, max(s, d) - 1))
            for s, d in zip(settings_["stride"], settings_["dilation"], strict=True)
        ]
        settings_["output_padding"] = extra
    seed = draw(st.integers(0, 10**6))
    torch.manual_seed(seed)
    size = [draw(st.integers(7, 9 if axes == 3 else 12)) for _ in range(axes)]
    layer = (TRANSPOSES if transposed else CONVS)[axes](inputs, outputs, kernel, **settings_)
    counts = draw(st.sampled_from([[1, 1, 1], [2, 0, 1], [3, 3]]))
    x = torch.randn(sum(counts), inputs, *size)
    net = Net(layer, inputs, axes)
    bound = draw(st.sampled_from([0.05, 1.0, 1e3]))
    method = draw(st.sampled_from(["auto", "tile", "gram", "materialise"]))
    parts = [part for part in torch.split(x, counts) if len(part)]
    gradients = per_unit_gradients(net, lambda module, part: row_losses(module, part).sum(), parts)
    found = released_by(net, x, counts, bound, method)
    assert_clipped_sum(found, gradients, bound)
    if bound == 1e3 and all(np.linalg.norm(gradient) < 0.9 * bound for gradient in gradients):
        assert_close(found, np.sum(gradients, axis=0), 1e-5)


@pytest.mark.filterwarnings("ignore:Using padding=.same.")  # torch, of its own copy
@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("padding", [1, "same"])
def test_padding_modes(mode, padding):
    torch.manual_seed(1)
    net = Net(nn.Conv2d(3, 4, (3, 2) if padding == "same" else 3, padding=padding, padding_mode=mode), 3, 2)
    x = torch.randn(4, 3, 6, 7)
    expected = oracle(net, x, [1] * 4, 0.2)
    assert_close(released(net, x, [1] * 4, 0.2), expected)


@pytest.mark.parametrize("method", ["tile", "materialise"])
def test_images_of_one_unit_in_any_order(method):
    torch.manual_seed(2)
    v = ConvShape(2, 3, 4, (1, 5, 6), (1, 3, 2), (1, 2, 1), (0, 1, 0), (1, 1, 2), (1, 3, 4))
    layout = Layout.from_ids(torch.tensor([5, 1, 5, 9, 1, 5]))
    use = ConvUse(torch.randn(6, v.image_numel), torch.randn(6, v.output_numel), v)
    each = torch.stack([use.unit_grads(Layout.uniform(6, 1), n, n + 1)[0] for n in range(6)]).double()
    expected = torch.stack([each[[1, 4]].sum(0), each[[0, 2, 5]].sum(0), each[3]]).square().sum(1)
    sq_norms, row_sums = torch.zeros(3), torch.zeros(3)
    measured = use.materialise(layout) if method == "materialise" else use
    at = layout.units if method == "materialise" else layout
    measured.add_norms(sq_norms, row_sums, at, Norms())
    torch.testing.assert_close(sq_norms.double(), expected, rtol=1e-5, atol=0.0)
    assert (row_sums.double() >= expected.sqrt() * (1 - 1e-6)).all()


def test_channels_last_and_strided_images():
    torch.manual_seed(3)
    net = Net(nn.Conv2d(4, 5, 3), 4, 2)
    x = torch.randn(3, 4, 8, 16)[..., ::2].contiguous(memory_format=torch.channels_last)
    net.to(memory_format=torch.channels_last)
    expected = oracle(net, x, [1] * 3, 0.2)
    assert_close(released(net, x, [1] * 3, 0.2), expected)


def test_a_unit_that_is_not_finite_is_left_out():
    torch.manual_seed(4)
    net, x = Net(nn.Conv2d(2, 3, 3), 2, 2), torch.randn(4, 2, 6, 6)
    expected = oracle(net, x[[0, 2, 3]], [1] * 3, 0.1)
    x[1, 0, 2, 2] = torch.nan
    for method in ("tile", "gram", "materialise"):
        before = [p.detach().clone() for p in net.parameters()]
        assert_close(released_by(net, x, [1] * 4, 0.1, method), expected)
        for parameter, value in zip(net.parameters(), before, strict=True):
            parameter.data.copy_(value)


def test_a_layer_called_twice():
    torch.manual_seed(5)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(torch.sin(self.conv(x)))

    net, x = Twice(), torch.randn(4, 3, 5, 5)
    expected = oracle(net, x, [1, 2, 1], 0.2)
    assert_close(released(net, x, [1, 2, 1], 0.2), expected)


def test_autocast():
    torch.manual_seed(6)
    net, x = Net(nn.Conv2d(4, 8, 3, padding=1), 4, 2), torch.randn(5, 4, 8, 8)
    expected = oracle(net, x, [1] * 5, 0.2)
    trainer, before = make_trainer(net, max_grad_norm=0.2), flat_parameters(net)
    with torch.autocast("cpu", dtype=torch.bfloat16), trainer.capture():
        out = net(x).float().flatten(1)
        losses = torch.sin(out).sum(1) + out.square().mean(1)
    trainer.backward(losses, rows_per_unit=1)
    trainer.apply()
    found = before - flat_parameters(net)
    assert np.linalg.norm(found - expected) <= 2e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counts", [[1] * 5, [2, 0, 3]])
@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_half_precision_as_on_a_gpu(dtype, counts, kernels, monkeypatch):
    """Operands stay as the network has them; who multiplies them is the plain reference, or Triton's interpreter with
    channels behind places."""
    if kernels == "triton":
        pytest.importorskip("triton", reason="the package triton cannot be imported here")
        from synthward.kernels._triton import INTERPRETED

        if not INTERPRETED:
            pytest.skip("Triton's interpreter is not in use: there is a GPU")
    seen = []

    def noted(run):
        def call(shape, images, output_grads, *args, **how):
            seen.append((images.dtype, output_grads.dtype, shape.channels_last))
            return run(shape, images, output_grads, *args, **how, backend=kernels)

        return call

    for name in ("conv_norms", "conv_sum", "conv_unit_grads"):
        monkeypatch.setattr(rule, name, noted(getattr(rule, name)))
    monkeypatch.setattr(rule, "measured_type", lambda grad: grad.dtype)
    monkeypatch.setattr(rule, "prefers_channels_last", lambda *_: kernels == "triton")
    torch.manual_seed(7)
    net, x = Net(nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), 4, 2), torch.randn(5, 4, 8, 8)
    expected = oracle(net, x, counts, 0.2)
    trainer, before = make_trainer(net, max_grad_norm=0.2), flat_parameters(net)
    with torch.autocast("cpu", dtype=dtype), trainer.capture():
        out = net(x).float().flatten(1)
        rows = torch.sin(out).sum(1) + out.square().mean(1)
        losses = torch.stack([part.sum() for part in rows.split(counts)])
    trainer.backward(losses, offsets=torch.tensor([0, *counts]).cumsum(0))
    trainer.apply()
    found = before - flat_parameters(net)
    assert np.linalg.norm(found - expected) <= 2e-2 * np.linalg.norm(expected)
    assert set(seen) == {(dtype, dtype, kernels == "triton")}


def test_an_image_without_a_batch_axis_is_refused():
    net, image = Net(nn.Conv2d(2, 3, 3), 2, 2), torch.randn(2, 6, 6)
    trainer = make_trainer(net)
    with pytest.raises(UnsupportedOperationError, match=r"mix\.weight.*conv2d.*batch"), trainer.capture():
        net(image)
