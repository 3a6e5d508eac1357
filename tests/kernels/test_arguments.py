"""What is refused, and that the message names the argument."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from synthward import _C
from synthward.kernels import (
    add_gaussian_noise_,
    chacha20_words,
    cpu_isa,
    diagonal_sq_norms,
    diagonal_weighted_sum,
    discrete_release_,
    force_isa,
    gaussian_noise,
    noisy_adam_,
    noisy_sgd_,
    outer_sq_norms,
    outer_weighted_sum,
    rounded_gaussian,
    scale_rows,
    scatter_sq_norms,
    scatter_weighted_sum,
)

KEY = bytes(32)
X = torch.ones(4, 3)
W = torch.ones(4)
IDS = torch.zeros(4, dtype=torch.int64)
PLACE = {"key": KEY, "stream": 0, "step": 0}
UPDATE = {**PLACE, "noise_std": 1.0, "grad_scale": 1.0, "lr": 0.1, "weight_decay": 0.0}
ADAM = {**UPDATE, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "decoupled": False, "adam_step": 1}
RELEASE = {**PLACE, "grid": 0.25, "noise_std": 1.0}
SGD = {**UPDATE, "momentum": 0.9, "dampening": 0.0, "nesterov": False, "first_step": True}


def adam(**changes):
    return noisy_adam_(*(torch.zeros(5) for _ in range(4)), **{**ADAM, **changes})


def sgd(**changes):
    return noisy_sgd_(torch.zeros(5), torch.zeros(5), torch.zeros(5), **{**SGD, **changes})


def release(sums=None, out=None, **changes):
    sums = torch.zeros(5, dtype=torch.float64) if sums is None else sums
    return discrete_release_(sums, torch.zeros(5) if out is None else out, **{**RELEASE, **changes})


@pytest.mark.parametrize(
    ("error", "name", "call"),
    [
        (ValueError, "output_grads", lambda: outer_sq_norms(X, torch.ones(3, 3))),
        (ValueError, "activations", lambda: outer_sq_norms(W, X)),
        (TypeError, "activations", lambda: outer_sq_norms(X.long(), X)),
        (ValueError, "out", lambda: outer_sq_norms(X, X, out=torch.zeros(3))),
        (TypeError, "out", lambda: outer_sq_norms(X, X, out=torch.zeros(4, dtype=torch.float64))),
        (TypeError, "offsets", lambda: outer_sq_norms(X, X, torch.tensor([0, 4], dtype=torch.int32))),
        (ValueError, "offsets", lambda: outer_sq_norms(X, X, torch.tensor([0, 3]))),
        (ValueError, "offsets", lambda: outer_sq_norms(X, X, torch.tensor([1, 4]))),
        (ValueError, "offsets", lambda: outer_sq_norms(X, X, torch.tensor([0, 3, 2, 4]))),
        (ValueError, "offsets", lambda: outer_sq_norms(X, X, torch.zeros(0, dtype=torch.int64))),
        (ValueError, "backend", lambda: outer_sq_norms(X, X, backend="fast")),
        (ValueError, "factors", lambda: diagonal_sq_norms(X, factors=torch.ones(4, 2))),
        (TypeError, "factors", lambda: diagonal_sq_norms(X, factors=X.long())),
        (TypeError, "ids", lambda: scatter_sq_norms(IDS.int(), X)),
        (ValueError, "ids", lambda: scatter_sq_norms(IDS[:3], X)),
        (ValueError, "out", lambda: outer_weighted_sum(X, X, W, out=torch.zeros(3, 4))),
        (ValueError, "row_weights", lambda: outer_weighted_sum(X, X, W[:3], out=torch.zeros(3, 3))),
        (TypeError, "row_weights", lambda: scale_rows(X, W.double())),
        (ValueError, "out", lambda: diagonal_weighted_sum(X, W, out=torch.zeros(4))),
        (ValueError, "out", lambda: scatter_weighted_sum(IDS, X, W, out=torch.zeros(5, 4))),
        (TypeError, "key", lambda: gaussian_noise(1, key="k" * 32, stream=0, step=0)),
        (ValueError, "key", lambda: gaussian_noise(1, key=bytes(31), stream=0, step=0)),
        (ValueError, "stream", lambda: gaussian_noise(1, key=KEY, stream=2**15, step=0)),
        (ValueError, "stream", lambda: gaussian_noise(1, key=KEY, stream=-1, step=0)),
        (TypeError, "stream", lambda: gaussian_noise(1, key=KEY, stream=0.5, step=0)),
        (ValueError, "step", lambda: gaussian_noise(1, key=KEY, stream=0, step=2**48)),
        (ValueError, "start", lambda: gaussian_noise(1, **PLACE, start=-1)),
        (ValueError, "start", lambda: gaussian_noise(2, **PLACE, start=2**63 - 2)),
        (ValueError, "count", lambda: gaussian_noise(-1, **PLACE)),
        (ValueError, "count", lambda: chacha20_words(KEY, stream=0, step=0, start=0, count=-1)),
        (ValueError, "noise_std", lambda: add_gaussian_noise_(torch.zeros(3), **PLACE, noise_std=-1.0)),
        (
            ValueError,
            "noise_std",
            lambda: add_gaussian_noise_(torch.zeros(3), **PLACE, noise_std=float("nan")),
        ),
        (ValueError, "noise_std", lambda: adam(noise_std=float("inf"))),
        (TypeError, "sums", lambda: release(torch.zeros(5))),
        (ValueError, "sums", lambda: release(torch.zeros(5, 1, dtype=torch.float64))),
        (TypeError, "out", lambda: release(out=torch.zeros(5, dtype=torch.float64))),
        (ValueError, "out", lambda: release(out=torch.zeros(4))),
        (ValueError, "key", lambda: release(key=bytes(31))),
        (ValueError, "stream", lambda: release(stream=2**15)),
        (ValueError, "start", lambda: release(start=2**63 - 5)),
        (ValueError, "grid", lambda: release(grid=0.3)),
        (ValueError, "grid", lambda: release(grid=0.0)),
        (ValueError, "grid", lambda: release(grid=-0.25)),
        (ValueError, "grid", lambda: release(grid=float("nan"))),
        (ValueError, "grid", lambda: release(grid=2.0**-101)),
        (ValueError, "grid", lambda: release(grid=2.0**61)),
        (TypeError, "grid", lambda: release(grid=None)),
        (ValueError, "noise_std", lambda: release(noise_std=float("inf"))),
        (ValueError, "noise_std", lambda: release(noise_std=float("nan"))),
        (ValueError, "noise_std", lambda: release(noise_std=-1.0)),
        (ValueError, "noise_std", lambda: release(noise_std=0.0156)),
        (ValueError, "noise_std", lambda: release(noise_std=2.0**39)),
        (TypeError, "noise_std", lambda: release(noise_std=None)),
        (ValueError, "scale", lambda: rounded_gaussian(3, **PLACE, scale=2.0**41)),
        (ValueError, "scale", lambda: rounded_gaussian(3, **PLACE, scale=float("nan"))),
        (ValueError, "count", lambda: rounded_gaussian(-1, **PLACE, scale=1.0)),
        (ValueError, "noise_std", lambda: adam(noise_std=1e-46)),
        (TypeError, "noise_std", lambda: adam(noise_std=None)),
        (ValueError, "stream", lambda: adam(stream=2**15)),
        (ValueError, "step", lambda: sgd(step=2**48)),
        (ValueError, "lr", lambda: sgd(lr=float("nan"))),
        (ValueError, "grad_scale", lambda: sgd(grad_scale=float("inf"))),
        (ValueError, "beta2", lambda: adam(beta2=1.0)),
        (ValueError, "eps", lambda: adam(eps=-1e-8)),
        (ValueError, "adam_step", lambda: adam(adam_step=0)),
        (ValueError, "min_second_moment", lambda: adam(bias_variance=0.1)),
        (ValueError, "min_second_moment", lambda: adam(min_second_moment=1e-8)),
        (ValueError, "min_second_moment", lambda: adam(bias_variance=0.1, min_second_moment=0.0)),
        (ValueError, "min_second_moment", lambda: adam(bias_variance=0.1, min_second_moment=1e-40)),
        (ValueError, "bias_variance", lambda: adam(bias_variance=-0.1, min_second_moment=1e-8)),
        (ValueError, "bias_variance", lambda: adam(bias_variance=1e39, min_second_moment=1e-8)),
        (ValueError, "momentum", lambda: sgd(momentum=-0.1)),
        (TypeError, "tensor", lambda: add_gaussian_noise_(torch.zeros(3).double(), **PLACE, noise_std=1.0)),
        (ValueError, "exp_avg", lambda: noisy_adam_(W, W, W[:3], W, **ADAM)),
        (ValueError, "isa", lambda: force_isa("sse9")),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_refused(error, name, call, backend, monkeypatch):
    """The same with and without the compiled kernels: the check comes before the choice."""
    if backend == "reference":
        monkeypatch.setattr("synthward.kernels._select._fits", lambda *_: False)
    with pytest.raises(error, match=rf"^{name}: "):
        call()


@pytest.mark.parametrize("which", [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])
def test_buffers_of_an_update_may_not_overlap(which):
    memory = torch.zeros(5, 10)
    tensors = list(memory[:4])
    tensors[which[1]] = memory.view(-1)[which[0] * 10 + 9 : which[0] * 10 + 19]
    before = memory.clone()
    with pytest.raises(ValueError, match="overlaps"):
        noisy_adam_(*tensors, **ADAM)
    assert torch.equal(memory, before)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_what_is_released_may_not_overlap_the_sums(backend):
    memory = torch.ones(5, dtype=torch.float64)
    for out in (memory.view(torch.float32)[:5], memory.view(torch.float32)[5:]):
        with pytest.raises(ValueError, match="out: overlaps"):
            release(memory, out, backend=backend)
    assert torch.equal(memory, torch.ones(5, dtype=torch.float64))


def test_outputs_may_not_overlap_inputs():
    rows = torch.ones(3, 3)
    with pytest.raises(ValueError, match="out: overlaps"):
        diagonal_sq_norms(rows, out=rows.view(-1)[:3])


def test_arrays_that_would_have_to_be_copied_are_refused():
    """A silent copy of an output would be filled and dropped."""
    good = np.zeros(8, np.float32)
    read_only = good.copy()
    read_only.flags.writeable = False
    unaligned = np.frombuffer(bytearray(33), np.uint8)[1:33].view(np.float32)
    for bad, error in (
        (good.astype(np.float64), TypeError),
        (np.zeros(16, np.float32)[::2], TypeError),
        (good.tolist(), TypeError),
        (np.zeros((2, 4), np.float32), ValueError),
        (read_only, ValueError),
        (unaligned, ValueError),
    ):
        with pytest.raises(error):
            _C.gaussian_noise(bad, KEY, 0, 0, 0, 1)
    assert not read_only.any() and not unaligned.any()
    _C.gaussian_noise(good, KEY, 0, 0, 0, 1)
    assert good.all()


def test_views_at_any_element_are_fine():
    """Only element alignment is asked for, not that of a vector."""
    whole = gaussian_noise(100, **PLACE)
    for first in range(1, 17):
        buffer = torch.zeros(117)
        add_gaussian_noise_(buffer[first : first + 100], **PLACE, noise_std=1.0)
        assert torch.equal(buffer[first : first + 100], whole)
        assert not buffer[:first].any() and not buffer[first + 100 :].any()


def test_force_isa_goes_back_to_the_best():
    best = cpu_isa()
    force_isa("baseline")
    assert cpu_isa() == "baseline"
    force_isa(None)
    assert cpu_isa() == best
