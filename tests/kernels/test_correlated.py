"""Noise correlated over steps: against C^-1 z with dense matrices in float64, and bit by bit across every way to
compute it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from synthward.kernels import (
    Correlation,
    add_gaussian_noise_,
    available_isas,
    force_isa,
    gaussian_noise,
    noisy_adam_,
    noisy_sgd_,
)
from tests.kernels.cases import generator
from tests.kernels.correlations import KINDS, SLOTS, correlation, expected_noise, fresh_state

KEY = bytes(range(32, 64))
PLACE = {"key": KEY, "stream": 2}
ADAM = {"grad_scale": 1.0, "lr": 1e-2, "beta1": 0.0, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.0}
SGD = {
    "grad_scale": 1.0,
    "lr": 1.0,
    "momentum": 0.0,
    "dampening": 0.0,
    "nesterov": False,
    "weight_decay": 0.0,
}
STEPS = 23


def added(
    kind: str, step: int, state: Tensor | None, length: int, first_step: int = 0, **options: object
) -> Tensor:
    """The noise of one step by itself."""
    how = {**PLACE, "noise_std": 1.0, **options}
    recipe = correlation(kind, step, state, first_step)
    return add_gaussian_noise_(torch.zeros(length), step=step, correlation=recipe, **how)


def by_adam(length: int, **options: object) -> Tensor:
    """With beta1 0 the first moment is the noisy gradient, here the noise."""
    param, grad, first, second = (torch.zeros(length) for _ in range(4))
    noisy_adam_(param, grad, first, second, **{**PLACE, **ADAM, **options}, decoupled=False, adam_step=1)
    return first


def by_sgd(length: int, **options: object) -> Tensor:
    param = torch.zeros(length)
    noisy_sgd_(param, torch.zeros(length), None, **{**PLACE, **SGD, **options}, first_step=True)
    return -param


@pytest.mark.parametrize(("length", "start"), [(1, 0), (257, 0), (700, 300), (511, 256 * 2**33 + 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_white_noise_through_the_inverse_matrix(backend, kind, length, start):
    state = fresh_state(kind, length)
    expected = expected_noise(kind, STEPS, length, start=start, backend=backend, **PLACE)
    for step in range(STEPS):
        found = added(kind, step, state, length, start=start, backend=backend)
        torch.testing.assert_close(found.double(), expected[step], rtol=2.0**-20, atol=2.0**-20)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_count_from_the_first_of_the_instance(backend, kind):
    """An earlier step of the same stream takes no part."""
    state = fresh_state(kind, 300)
    expected = expected_noise(kind, 6, 300, first_step=9, start=5, backend=backend, **PLACE)
    for step in range(9, 15):
        found = added(kind, step, state, 300, first_step=9, start=5, backend=backend)
        torch.testing.assert_close(found.double(), expected[step - 9], rtol=2.0**-20, atol=2.0**-20)


def test_before_as_many_steps_as_taps_the_rest_is_left_out(backend):
    taps = (0.5, -0.25, 2.0)
    z = [gaussian_noise(40, step=step, backend=backend, **PLACE).double() for step in range(5)]
    for step, expected in (
        (2, 0.5 * z[2]),
        (3, 0.5 * z[3] - 0.25 * z[2]),
        (4, 0.5 * z[4] - 0.25 * z[3] + 2.0 * z[2]),
    ):
        found = torch.zeros(40)
        recipe = Correlation(taps, first_step=2)
        add_gaussian_noise_(found, step=step, noise_std=1.0, correlation=recipe, backend=backend, **PLACE)
        torch.testing.assert_close(found.double(), expected, rtol=2.0**-21, atol=2.0**-21)


@pytest.mark.parametrize("kind", KINDS)
def test_the_updates_add_the_same_noise(backend, kind):
    """Adam's, SGD's and that by itself, bit for bit, each with a state of its own."""
    length, states = 515, [fresh_state(kind, 515) for _ in range(3)]
    for step in range(6):
        place = {"step": step, "start": 77, "noise_std": 1.5, "backend": backend}
        noise = added(kind, step, states[0], length, **{k: v for k, v in place.items() if k != "step"})
        for made, state in ((by_adam, states[1]), (by_sgd, states[2])):
            assert torch.equal(made(length, correlation=correlation(kind, step, state), **place), noise)
            if state is not None:
                torch.testing.assert_close(state, states[0], rtol=0.0, atol=0.0, equal_nan=True)


def test_one_tap_of_one_is_the_plain_noise(backend):
    place = {"step": 5, "start": 300, "noise_std": 1.5, "backend": backend}
    one = Correlation((1.0,))
    for made in (by_adam, by_sgd):
        assert torch.equal(made(700, correlation=one, **place), made(700, **place))
    plain = add_gaussian_noise_(torch.ones(700), **PLACE, **place)
    assert torch.equal(add_gaussian_noise_(torch.ones(700), correlation=one, **PLACE, **place), plain)


def three_steps(kind: str, length: int, cuts: list[int]) -> Tensor:
    """Parameters, moments and state after steps that are taken in parts of the buffers."""
    buffers = [torch.randn(length, generator=generator(seed)) for seed in range(3)]
    buffers.append(torch.rand(length, generator=generator(3)))
    state = fresh_state(kind, length)
    options = {**PLACE, **ADAM, "beta1": 0.9, "noise_std": 0.7, "decoupled": False}
    for step in range(4):
        recipe = correlation(kind, step, state)
        for start, end in zip([0, *cuts], [*cuts, length], strict=True):
            parts = [buffer[start:end] for buffer in buffers]
            place = {"step": step, "start": 33 + start, "adam_step": step + 1}
            noisy_adam_(*parts, **options, **place, correlation=recipe.part(start, end), backend="cpp")
    return torch.cat([*buffers, *([] if state is None else state.unbind(0))])


@pytest.mark.parametrize("kind", KINDS)
def test_every_instruction_set_thread_count_and_split_gives_the_same_bits(kind, restore_threads):
    found = []
    for name in available_isas():
        force_isa(name)
        for threads, cuts in ((1, []), (2, []), (3, [1, 256, 70_001])):
            torch.set_num_threads(threads)
            found.append(three_steps(kind, 80_003, cuts))
    force_isa(None)
    assert found[0].isfinite().all()
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_a_part_uses_the_memory_of_the_whole(backend):
    """Rows of a slice are far apart; what lies between them is another's."""
    whole = torch.full((2, 100), 7.0)
    recipe = Correlation((1.0,), (0.0, 0.0), (0.0, 0.0), (1.0, 2.0), whole).part(30, 40)
    place = {"step": 1, "start": 30, "noise_std": 1.0, "backend": backend}
    noise = by_sgd(10, correlation=recipe, **place)
    assert torch.equal(whole[0, 30:40], noise)
    assert torch.equal(whole[1, 30:40], 2.0 * noise)
    assert (whole[:, :30] == 7.0).all() and (whole[:, 40:] == 7.0).all()


def test_what_is_not_weighted_is_not_read_and_what_stays_is_not_written(backend):
    nan = float("nan")
    state = torch.tensor([[nan], [nan], [3.0]])
    read_only = state[1]
    recipe = Correlation((1.0,), (0.0, 0.0, 0.5), (0.0, 1.0, 0.5), (1.0, 0.0, 0.0), state)
    place = {"step": 0, "noise_std": 1.0, "backend": backend}
    z = gaussian_noise(1, step=0, backend=backend, **PLACE)
    noise = by_adam(1, correlation=recipe, **place)
    assert torch.equal(noise, z - 1.5)
    assert torch.equal(state[0], noise) and read_only.isnan().all() and state[2] == 1.5


@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_the_state_stays(backend, kind):
    length = 20
    state = None if SLOTS[kind] == 0 else torch.randn(SLOTS[kind], length, generator=generator(1))
    before = None if state is None else state.clone()
    recipe, place = correlation(kind, 7, state), {"step": 7, "noise_std": 0.0, "backend": backend}
    assert not by_adam(length, correlation=recipe, **place).any()
    assert not by_sgd(length, correlation=recipe, **place).any()
    assert not add_gaussian_noise_(torch.zeros(length), correlation=recipe, **PLACE, **place).any()
    assert state is None or torch.equal(state, before)


def test_autograd_is_told_that_the_state_was_written():
    state = torch.ones(1, 8, requires_grad=True)
    loss = (state * state).sum()
    recipe = Correlation((1.0,), (0.5,), (0.5,), (1.0,), state.detach())
    by_sgd(8, step=0, noise_std=1.0, correlation=recipe, backend="cpp")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def row(**changes: object) -> Correlation:
    """A recipe with one slot, but for the changes."""
    usual = {"taps": (1.0,), "weights": (0.5,), "decays": (0.5,), "gains": (1.0,), "state": torch.zeros(1, 5)}
    return Correlation(**{**usual, **changes})


@pytest.mark.parametrize(
    ("error", "name", "call"),
    [
        (ValueError, "taps", lambda: Correlation(())),
        (ValueError, "taps", lambda: Correlation((0.0, 1.0))),
        (ValueError, "taps", lambda: Correlation((-1.0,))),
        (ValueError, "taps", lambda: Correlation((1e-46,))),
        (ValueError, "taps", lambda: Correlation((1.0, float("nan")))),
        (TypeError, "taps", lambda: Correlation(("x",))),
        (ValueError, "weights", lambda: row(weights=(float("inf"),))),
        (ValueError, "decays", lambda: row(decays=())),
        (ValueError, "decays", lambda: row(decays=(1e39,))),
        (ValueError, "gains", lambda: row(gains=(1.0, 1.0))),
        (ValueError, "state", lambda: row(state=None)),
        (ValueError, "state", lambda: Correlation((1.0,), state=torch.zeros(0, 5))),
        (ValueError, "state", lambda: row(state=torch.zeros(2, 5))),
        (ValueError, "state", lambda: row(state=torch.zeros(5))),
        (TypeError, "state", lambda: row(state=torch.zeros(1, 5).double())),
        (ValueError, "state", lambda: row(state=torch.zeros(1, 10)[:, ::2])),
        (ValueError, "state", lambda: row(state=torch.zeros(5, 1).expand(5, 5)[:1])),
        (
            ValueError,
            "state",
            lambda: Correlation((1.0,), (1.0,) * 2, (1.0,) * 2, (1.0,) * 2, torch.zeros(1, 5).expand(2, 5)),
        ),
        (ValueError, "state", lambda: by_sgd(4, step=0, noise_std=1.0, correlation=row())),
        (ValueError, "state", lambda: by_adam(6, step=0, noise_std=0.0, correlation=row())),
        (ValueError, "step", lambda: by_sgd(5, step=3, noise_std=1.0, correlation=row(first_step=4))),
        (TypeError, "first_step", lambda: by_sgd(5, step=3, noise_std=1.0, correlation=row(first_step=0.5))),
    ],
)
def test_refused(error, name, call):
    with pytest.raises(error, match=rf"^{name}: "):
        call()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("which", range(4))
def test_the_state_may_not_lie_in_another_buffer(which, backend):
    memory = torch.zeros(6, 10)
    buffers, state = list(memory[:4]), memory[4:]
    buffers[which] = memory.view(-1)[49:59]
    recipe = Correlation((1.0,), (0.5,) * 2, (0.5,) * 2, (1.0,) * 2, state)
    options = {**PLACE, **ADAM, "step": 1, "noise_std": 1.0, "decoupled": False, "adam_step": 1}
    with pytest.raises(ValueError, match=r"^state: overlaps"):
        noisy_adam_(*buffers, **options, correlation=recipe, backend=backend)
    assert not memory.any()


def test_buffers_between_the_rows_of_the_state_are_apart():
    memory = torch.zeros(2, 20)
    recipe = Correlation((1.0,), (0.5,) * 2, (0.5,) * 2, (1.0,) * 2, memory[:, :10])
    param = memory[0, 10:]
    noisy_sgd_(
        param,
        memory[1, 10:],
        None,
        **PLACE,
        **SGD,
        step=0,
        noise_std=1.0,
        first_step=True,
        correlation=recipe,
    )
    assert torch.equal(-param, memory[0, :10])


def test_the_binding_checks_for_itself():
    """Wrong lengths, strides and overlaps would write where nobody expects it."""
    import numpy as np

    from synthward import _C

    tensor, state = np.zeros(5, np.float32), np.zeros((2, 5), np.float32)
    usual = {"taps": [1.0], "weights": [0.5] * 2, "decays": [0.5] * 2, "gains": [1.0] * 2, "state": state}
    for changes, message in (
        ({"taps": []}, "taps"),
        ({"taps": [1.0, 1.0]}, "taps"),
        ({"gains": [1.0]}, "weights"),
        ({"state": None}, "state"),
        ({"state": np.zeros((1, 5), np.float32)}, "state"),
        ({"state": np.zeros((2, 4), np.float32)}, "state"),
        ({"state": np.zeros((2, 10), np.float32)[:, ::2]}, "state"),
        ({"state": np.zeros((5, 2), np.float32).T}, "state"),
        ({"state": np.broadcast_to(np.zeros(5, np.float32), (2, 5))}, "state"),
    ):
        with pytest.raises(ValueError, match=rf"^{message}: "):
            _C.add_gaussian_noise(tensor, KEY, 0, 0, 0, 1.0, 1, **{**usual, **changes})
    with pytest.raises(TypeError):
        _C.add_gaussian_noise(tensor, KEY, 0, 0, 0, 1.0, 1, **{**usual, "state": state.astype(np.float64)})
    with pytest.raises(ValueError, match=r"^state: overlaps"):
        _C.add_gaussian_noise(state[1], KEY, 0, 0, 0, 1.0, 1, **usual)
    assert not tensor.any() and not state.any()
