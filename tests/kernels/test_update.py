"""The fused updates against torch's own optimizers, and their noise against the stream they name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from synthward.kernels import available_isas, force_isa, gaussian_noise, noisy_adam_, noisy_sgd_
from tests.kernels.cases import generator

KEY = bytes(range(32, 64))
NOISE = {"key": KEY, "stream": 0, "step": 5, "start": 300}
SILENT = {**NOISE, "noise_std": 0.0}
STEPS = 6
LENGTHS = [0, 1, 15, 257, 1031]


def gradients(length: int) -> list[Tensor]:
    return [torch.randn(length, generator=generator(seed)) for seed in range(STEPS)]


def assert_same_path(found: Tensor, expected: Tensor) -> None:
    """Equal up to a few float32 roundings per step."""
    torch.testing.assert_close(found, expected, rtol=STEPS * 2.0**-22, atol=STEPS * 2.0**-22)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize(
    ("lr", "betas", "eps", "weight_decay"),
    [(1e-2, (0.9, 0.999), 1e-8, 0.0), (3e-2, (0.5, 0.9), 1e-3, 0.1), (1e-3, (0.0, 0.99), 1e-8, 0.01)],
)
def test_adam_is_torchs(backend, length, decoupled, lr, betas, eps, weight_decay):
    start = torch.randn(length, generator=generator(99))
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    theirs = torch.nn.Parameter(start.clone())
    optimizer = kind([theirs], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    ours, first, second = start.clone(), torch.zeros(length), torch.zeros(length)
    for step, grad in enumerate(gradients(length), start=1):
        theirs.grad = grad * 0.25
        optimizer.step()
        summed = grad.clone()
        noisy_adam_(
            *(ours, summed, first, second),
            **SILENT,
            grad_scale=0.25,
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            eps=eps,
            weight_decay=weight_decay,
            decoupled=decoupled,
            adam_step=step,
            backend=backend,
        )
        assert not summed.any()
    assert_same_path(ours, theirs.detach())
    assert_same_path(first, optimizer.state[theirs]["exp_avg"])
    assert_same_path(second, optimizer.state[theirs]["exp_avg_sq"])


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov", "weight_decay"),
    [
        (0.0, 0.0, False, 0.0),
        (0.0, 0.0, False, 0.1),
        (0.9, 0.0, False, 0.1),
        (0.9, 0.5, False, 0.0),
        (0.8, 0.0, True, 0.1),
    ],
)
def test_sgd_is_torchs(backend, length, momentum, dampening, nesterov, weight_decay):
    start = torch.randn(length, generator=generator(99))
    theirs = torch.nn.Parameter(start.clone())
    options = {
        "momentum": momentum,
        "dampening": dampening,
        "nesterov": nesterov,
        "weight_decay": weight_decay,
    }
    optimizer = torch.optim.SGD([theirs], lr=0.1, **options)
    # The first step must write the buffer without reading it.
    ours, buffer = start.clone(), torch.full((length,), float("nan")) if momentum else None
    for step, grad in enumerate(gradients(length)):
        theirs.grad = grad * 0.25
        optimizer.step()
        summed = grad.clone()
        noisy_sgd_(
            *(ours, summed, buffer),
            **SILENT,
            **options,
            grad_scale=0.25,
            lr=0.1,
            first_step=step == 0,
            backend=backend,
        )
        assert not summed.any()
    assert_same_path(ours, theirs.detach())
    if buffer is not None:
        assert_same_path(buffer, optimizer.state[theirs]["momentum_buffer"])


def corrected(tensors: list[Tensor], step: int, backend: str, **changes: object) -> None:
    options = {**SILENT, "grad_scale": 0.25, "lr": 1e-2, "beta1": 0.8, "beta2": 0.9, "eps": 1.0}
    options |= {"weight_decay": 0.1, "decoupled": False, "bias_variance": 0.04, "min_second_moment": 1e-3}
    noisy_adam_(*tensors, **{**options, **changes}, adam_step=step, backend=backend)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("decoupled", [False, True])
def test_the_noise_variance_is_taken_off_the_second_moment(backend, length, decoupled):
    """Tang, Shpilevskiy and Lecuyer 2023, algorithm 1, in float64; elements above the floor and at it."""
    param, first, second = (
        torch.randn(length, generator=generator(99)),
        torch.zeros(length),
        torch.zeros(length),
    )
    x, m, v = param.double(), first.double(), second.double()
    floored = torch.zeros(length, dtype=torch.bool)
    for step, grad in enumerate(gradients(length), start=1):
        corrected([param, grad.clone(), first, second], step, backend, decoupled=decoupled)
        g = 0.25 * grad.double() + (0.0 if decoupled else 0.1) * x
        x = x * (1.0 - 1e-2 * 0.1) if decoupled else x
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        rest = v / (1.0 - 0.9**step) - 0.04
        floored |= rest < 1e-3
        x = x - 1e-2 * (m / (1.0 - 0.8**step)) / rest.clamp(min=1e-3).sqrt()
    assert length < 100 or 0.05 < floored.double().mean() < 1.0
    # A difference of numbers near each other: what is left keeps fewer digits, and weighs more below a root.
    torch.testing.assert_close(param.double(), x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second.double(), v, rtol=STEPS * 2.0**-20, atol=STEPS * 2.0**-22)


def test_without_a_second_moment_the_floor_is_the_denominator(backend):
    tensors = [torch.zeros(3), torch.full((3,), 0.4), torch.zeros(3), torch.zeros(3)]
    corrected(tensors, 1, backend, bias_variance=0.5, min_second_moment=0.25)
    torch.testing.assert_close(tensors[0], torch.full((3,), -1e-2 * 0.1 / 0.5), rtol=2.0**-21, atol=0.0)


def test_a_moment_that_is_not_a_number_is_not_hidden_by_the_floor(backend):
    tensors = [torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.tensor([float("nan"), 1.0])]
    corrected(tensors, 1, backend)
    assert tensors[0][0].isnan() and not tensors[0][1].isnan()


def sgd_step(length: int, backend: str, **options: object) -> Tensor:
    param, summed = torch.zeros(length), torch.randn(length, generator=generator(1))
    noisy_sgd_(
        *(param, summed, None),
        **{**NOISE, "noise_std": 1.5, **options},
        grad_scale=0.5,
        lr=1.0,
        momentum=0.0,
        dampening=0.0,
        nesterov=False,
        weight_decay=0.0,
        first_step=True,
        backend=backend,
    )
    return param


@pytest.mark.parametrize("length", [1, 255, 700])
def test_the_noise_is_that_of_the_stream(backend, length):
    """Once per coordinate, at `noise_std`, before the scale."""
    z = gaussian_noise(length, key=KEY, stream=0, step=5, start=300, backend=backend)
    summed = torch.randn(length, generator=generator(1))
    expected = -(summed + 1.5 * z) * 0.5
    torch.testing.assert_close(sgd_step(length, backend), expected, rtol=2.0**-22, atol=2.0**-22)


def test_noise_of_adam_is_that_of_the_stream(backend):
    """With beta1 0 the first moment is the noisy gradient itself."""
    length = 515
    param, summed = torch.zeros(length), torch.randn(length, generator=generator(1))
    first, second = torch.zeros(length), torch.zeros(length)
    z = gaussian_noise(length, key=KEY, stream=0, step=5, start=300, backend=backend)
    expected = (summed + 1.5 * z) * 0.5
    noisy_adam_(
        *(param, summed, first, second),
        **NOISE,
        noise_std=1.5,
        grad_scale=0.5,
        lr=1e-3,
        beta1=0.0,
        beta2=0.9,
        eps=1e-8,
        weight_decay=0.0,
        decoupled=False,
        adam_step=1,
        backend=backend,
    )
    torch.testing.assert_close(first, expected, rtol=2.0**-22, atol=2.0**-22)


def test_other_places_give_other_noise():
    base = sgd_step(100, "cpp")
    for change in ({"stream": 1}, {"step": 6}, {"start": 301}, {"key": KEY[::-1]}):
        assert (sgd_step(100, "cpp", **change) != base).all()


def adam_steps(length: int) -> Tensor:
    tensors = [torch.randn(length, generator=generator(seed)) for seed in range(3)]
    second = torch.rand(length, generator=generator(3))
    for step in range(1, 4):
        tensors[1].copy_(torch.randn(length, generator=generator(10 + step)))
        noisy_adam_(
            *(*tensors, second),
            key=KEY,
            stream=0,
            step=step,
            start=33,
            noise_std=0.7,
            grad_scale=0.1,
            lr=1e-2,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            weight_decay=0.1,
            decoupled=step == 2,
            adam_step=step,
        )
    return torch.cat([tensors[0], tensors[2], second])


def test_every_instruction_set_thread_count_and_split_gives_the_same_bits(restore_threads):
    found = []
    for name in available_isas():
        force_isa(name)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(torch.cat([adam_steps(150_001), sgd_step(150_001, "cpp")]))
        whole = sgd_step(1000, "cpp", start=40)
        summed = torch.randn(1000, generator=generator(1))
        part = torch.zeros(700)
        noisy_sgd_(
            *(part, summed[300:].clone(), None),
            **{**NOISE, "start": 340},
            noise_std=1.5,
            grad_scale=0.5,
            lr=1.0,
            momentum=0.0,
            dampening=0.0,
            nesterov=False,
            weight_decay=0.0,
            first_step=True,
        )
        assert torch.equal(part, whole[300:])
    force_isa(None)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_a_saved_tensor_that_the_update_overwrote_is_an_error():
    """The kernel writes behind autograd's back; a backward pass with the old value must not pass."""
    weight = torch.ones(8, requires_grad=True)
    loss = (weight * weight).sum()
    noisy_sgd_(
        *(weight, torch.ones(8), None),
        **SILENT,
        grad_scale=1.0,
        lr=1.0,
        momentum=0.0,
        dampening=0.0,
        nesterov=False,
        weight_decay=0.0,
        first_step=True,
        backend="cpp",
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
