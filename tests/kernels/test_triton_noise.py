"""Triton's noise and fused updates against those in CPU memory, bit for bit (see test_triton.py)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the package triton cannot be imported here")

from synthward.kernels import (
    add_gaussian_noise_,
    chacha20_words,
    gaussian_noise,
    noisy_adam_,
    noisy_sgd_,
    uniform_noise,
)
from synthward.kernels._chacha import RARE, reference_blocks
from synthward.kernels._triton import INTERPRETED
from synthward.kernels.noise.triton_impl import chacha20_blocks
from tests.kernels.cases import generator

DEVICE = "cpu" if INTERPRETED else "cuda"
KEY = bytes(range(32))
PLACE = {"key": KEY, "stream": 3, "step": 7}
# NumPy, which the interpreter computes with, warns of what the kernels are meant to survive.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.mark.parametrize("block", [0, 2**32 - 5, 2**40 - 3])
def test_cipher_words(block):
    words = chacha20_blocks(KEY, 3, 7, block, 70, DEVICE).cpu().numpy().view(np.uint32).ravel()
    assert np.array_equal(words, chacha20_words(KEY, stream=3, step=7, start=16 * block, count=16 * 70))
    high = chacha20_blocks(b"\xff" * 32, 2**15 - 1, 2**48 - 1, block, 1, DEVICE).cpu().numpy().view(np.uint32)
    assert np.array_equal(high, reference_blocks(b"\xff" * 32, 2**63 - 1, np.array([block], np.uint64)))


@pytest.mark.parametrize(("start", "count"), [(0, 1), (0, 3000), (100, 1500), (256 * 2**33 + 3, 257), (7, 0)])
def test_normals_are_those_of_the_cpu_bit_for_bit(start, count):
    expected = gaussian_noise(count, start=start, **PLACE)
    found = gaussian_noise(count, start=start, **PLACE, device=DEVICE, backend="triton")
    assert torch.equal(found.cpu(), expected)
    tensor = torch.linspace(-1, 1, count)
    added = add_gaussian_noise_(tensor.to(DEVICE), start=start, noise_std=2.5, **PLACE, backend="triton")
    assert torch.equal(added.cpu(), add_gaussian_noise_(tensor, start=start, noise_std=2.5, **PLACE))


@pytest.mark.parametrize("start", [0, 15, 100, 16 * 2**33 + 3])
@pytest.mark.parametrize("count", [0, 1, 17, 1030])
def test_uniform_numbers_are_those_of_the_cpu(start, count):
    found = uniform_noise(count, start=start, **PLACE, device=DEVICE, backend="triton")
    assert torch.equal(found.cpu(), uniform_noise(count, start=start, **PLACE, backend="cpp"))


def test_rare_radii_are_refined_as_on_the_cpu():
    words = reference_blocks(KEY, 3 << 48 | 7, np.arange(1 << 15, dtype=np.uint64))[:, :8]
    block, pair = np.nonzero(words < RARE)
    assert len(block) > 1, "the sample holds too few rare radii to test anything"
    for b, j in list(zip(block.tolist(), pair.tolist(), strict=True))[:4]:
        start = b // 16 * 256 + j * 16 + b % 16
        expected = gaussian_noise(1, start=start, **PLACE)
        assert abs(float(expected)) > 0
        assert torch.equal(
            gaussian_noise(1, start=start, **PLACE, device=DEVICE, backend="triton").cpu(), expected
        )


def buffers(length: int) -> list[Tensor]:
    made = [torch.randn(length, generator=generator(seed)) for seed in range(3)]
    return [*made, torch.rand(length, generator=generator(3))]


@pytest.mark.parametrize(("noise_std", "length"), list(itertools.product((0.0, 1.3), (0, 1, 700))))
@pytest.mark.parametrize("decoupled", [False, True])
def test_adam_is_that_of_the_cpu_bit_for_bit(noise_std, length, decoupled):
    ours, theirs = [t.to(DEVICE) for t in buffers(length)], buffers(length)
    for step in (1, 2):
        for tensors, backend in ((ours, "triton"), (theirs, "cpp")):
            tensors[1].copy_(torch.randn(length, generator=generator(10 + step)))
            noisy_adam_(
                *tensors,
                key=KEY,
                stream=1,
                step=step,
                start=77,
                noise_std=noise_std,
                grad_scale=0.1,
                lr=1e-2,
                beta1=0.9,
                beta2=0.999,
                eps=1e-8,
                weight_decay=0.1,
                decoupled=decoupled,
                adam_step=step,
                backend=backend,
            )
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("noise_std", "length"), [(0.0, 700), (1.3, 1), (1.3, 700)])
@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"), [(0.0, 0.0, False), (0.9, 0.5, False), (0.8, 0.0, True)]
)
def test_sgd_is_that_of_the_cpu_bit_for_bit(noise_std, length, momentum, dampening, nesterov):
    ours, theirs = [t.to(DEVICE) for t in buffers(length)[:3]], buffers(length)[:3]
    # The first step must write the buffer without reading it.
    ours[2], theirs[2] = (
        torch.full_like(t, float("nan")) if momentum else None for t in (ours[2], theirs[2])
    )
    for step in (0, 1):
        for tensors, backend in ((ours, "triton"), (theirs, "cpp")):
            tensors[1].copy_(torch.randn(length, generator=generator(10 + step)))
            noisy_sgd_(
                *tensors,
                key=KEY,
                stream=1,
                step=step,
                start=77,
                noise_std=noise_std,
                grad_scale=0.1,
                lr=1e-2,
                momentum=momentum,
                dampening=dampening,
                nesterov=nesterov,
                weight_decay=0.1,
                first_step=step == 0,
                backend=backend,
            )
    assert all(a is b is None or torch.equal(a.cpu(), b) for a, b in zip(ours, theirs, strict=True))
