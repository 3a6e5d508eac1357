"""Triton's noise correlated over steps, and its corrected second moment, against those in CPU memory, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the package triton cannot be imported here")

from synthward.kernels import Correlation, add_gaussian_noise_, noisy_adam_, noisy_sgd_
from synthward.kernels._triton import INTERPRETED
from tests.kernels.cases import generator
from tests.kernels.correlations import KINDS, correlation, fresh_state

DEVICE = "cpu" if INTERPRETED else "cuda"
PLACE = {"key": bytes(range(32)), "stream": 3, "start": 77}
ADAM = {"grad_scale": 0.1, "lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
SGD = {"grad_scale": 0.1, "lr": 0.1, "momentum": 0.9, "dampening": 0.5, "nesterov": True, "weight_decay": 0.1}
# NumPy, which the interpreter computes with, warns of what the kernels are meant to survive.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def buffers(length: int, device: str) -> list[Tensor]:
    made = [torch.randn(length, generator=generator(seed)) for seed in range(3)]
    return [t.to(device) for t in (*made, torch.rand(length, generator=generator(3)))]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a.cpu(), b) for a, b in zip(ours, theirs, strict=True))


def by_adam(
    tensors: list[Tensor], step: int, recipe: Correlation | None, backend: str, **changes: object
) -> None:
    options = {**PLACE, **ADAM, "noise_std": 1.3, "decoupled": False, **changes}
    noisy_adam_(*tensors, **options, step=step, adam_step=step + 1, correlation=recipe, backend=backend)


def by_sgd(tensors: list[Tensor], step: int, recipe: Correlation | None, backend: str) -> None:
    options = {**PLACE, **SGD, "noise_std": 1.3, "first_step": step == 0}
    noisy_sgd_(*tensors[:3], **options, step=step, correlation=recipe, backend=backend)


def by_itself(tensors: list[Tensor], step: int, recipe: Correlation | None, backend: str) -> None:
    add_gaussian_noise_(tensors[0], **PLACE, step=step, noise_std=1.3, correlation=recipe, backend=backend)


@pytest.mark.parametrize("made", [by_adam, by_sgd, by_itself])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_that_of_the_cpu_bit_for_bit(made, kind):
    """On a part of longer rows, over more steps than a banded strategy has slots."""
    length = 300
    ours, theirs = buffers(length, DEVICE), buffers(length, "cpu")
    wide = fresh_state(kind, length + 50)
    states = (None, None) if wide is None else (wide.to(DEVICE, copy=True), wide)
    for step in range(5):
        for tensors, state, backend in ((ours, states[0], "triton"), (theirs, states[1], "cpp")):
            tensors[1].copy_(torch.randn(length, generator=generator(10 + step)))
            made(tensors, step, correlation(kind, step, state).part(20, 20 + length), backend)
    assert same(ours, theirs)
    if states[0] is not None:
        torch.testing.assert_close(states[0].cpu(), states[1], rtol=0.0, atol=0.0, equal_nan=True)


def test_a_step_of_more_than_32_bits_goes_back_over_their_border():
    recipe = Correlation((1.0, 0.5, 0.25))
    ours, theirs = torch.zeros(40, device=DEVICE), torch.zeros(40)
    for tensor, backend in ((ours, "triton"), (theirs, "cpp")):
        add_gaussian_noise_(tensor, **PLACE, step=2**32, noise_std=1.0, correlation=recipe, backend=backend)
    assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize(("noise_std", "length"), [(0.0, 700), (1.3, 1), (1.3, 700)])
def test_the_corrected_moment_is_that_of_the_cpu_bit_for_bit(noise_std, length):
    ours, theirs = buffers(length, DEVICE), buffers(length, "cpu")
    moment = {"noise_std": noise_std, "bias_variance": 0.02, "min_second_moment": 1e-3}
    for step in range(2):
        for tensors, backend in ((ours, "triton"), (theirs, "cpp")):
            tensors[1].copy_(torch.randn(length, generator=generator(10 + step)))
            by_adam(tensors, step, None, backend, **moment)
    assert same(ours, theirs)
