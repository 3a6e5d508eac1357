"""Noise and updates: bit for bit those of the compiled kernels in CPU memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.case import Case, Kernel, Make, Maker
from synthward.kernels import (
    Correlation,
    add_gaussian_noise_,
    chacha20_words,
    discrete_release_,
    gaussian_noise,
    noisy_adam_,
    noisy_sgd_,
    rounded_gaussian,
)
from synthward.kernels.noise.triton_impl import chacha20_blocks

KEY = bytes(range(32))
PLACE: dict[str, Any] = {"key": KEY, "stream": 3, "step": 7}
# Additions, exclusive ors and rotations of 20 rounds, over the 16 normals of a block.
CIPHER_OPERATIONS = 20 * 4 * 12 / 16
ADAM: dict[str, Any] = {
    **PLACE,
    "grad_scale": 0.01,
    "lr": 1e-3,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.01,
    "decoupled": True,
    "adam_step": 3,
}
SGD: dict[str, Any] = {**PLACE, "grad_scale": 0.01, "lr": 1e-3, "weight_decay": 0.01}
# Elements of a stream: one, more than a program's, from within a block, past 32 bits, none.
PARTS = [(0, 1), (0, 3000), (100, 1500), (256 * 2**33 + 3, 257), (7, 0)]


def same(
    make: Maker,
    name: str,
    shape: str,
    start: list[Tensor],
    call: Callable[[list[Tensor], Any], object],
    *,
    bytes_each: float,
    count: int,
    silent: bool = False,
) -> Case:
    """A call that changes flat tensors in place, on the device and in CPU memory: the same bits."""
    there = [t.clone() for t in start]

    def run() -> None:
        for tensor, first in zip(there, start, strict=True):
            tensor.copy_(first)
        call(there, "triton")

    def exact() -> tuple[Tensor, Tensor]:
        here = [t.cpu().clone() for t in start]
        call(here, "cpp")
        found = torch.cat([t.flatten().double() for t in here]).to(make.device)
        return found, torch.ones_like(found)

    return Case(
        *(name, shape, run, lambda: torch.cat([t.flatten().double() for t in there]), exact),
        tolerance=0.0,
        bytes=bytes_each * count,
        operations=0.0 if silent else CIPHER_OPERATIONS * count,
    )


def timed(case: Case, call: Callable[[], object]) -> Case:
    """The case, whose repetitions do not begin by copying what the first began with."""
    first = [True]

    def run() -> None:
        if first[0]:
            case.run()
            first[0] = False
        else:
            call()

    return Case(
        *(case.name, case.shape, run, case.result, case.exact),
        tolerance=case.tolerance,
        bytes=case.bytes,
        operations=case.operations,
    )


def noise(make: Maker, count: int, start: int = 0, recipe: str = "") -> Case:
    wide = recipe_of(recipe, make.flat(2 * count).view(2, count) if recipe == "state" else None)
    state = [] if wide is None or wide.state is None else [wide.state]

    def call(tensors: list[Tensor], backend: Any) -> None:
        own = recipe_of(recipe, tensors[1] if len(tensors) > 1 else None)
        add_gaussian_noise_(tensors[0], **PLACE, start=start, noise_std=1.3, correlation=own, backend=backend)

    return same(
        *(make, "add_gaussian_noise_", f"{count} elements from {start}{', ' if recipe else ''}{recipe}"),
        *([make.flat(count), *state], call),
        bytes_each=8,
        count=count,
    )


def recipe_of(name: str, state: Tensor | None) -> Correlation | None:
    """None, a banded strategy, or one with a state of two rows."""
    if name == "taps":
        return Correlation((1.0, 0.5, -0.25))
    if name == "state":
        return Correlation((1.0,), (0.4, 0.2), (0.9, 0.5), (1.0, 1.0), state)
    return None


def words(make: Maker, first: int, count: int) -> Case:
    kept: list[Tensor] = []

    def run() -> None:
        kept[:] = [chacha20_blocks(KEY, 3, 7, first, count, make.device)]

    def exact() -> tuple[Tensor, Tensor]:
        found = chacha20_words(KEY, stream=3, step=7, start=16 * first, count=16 * count)
        whole = torch.from_numpy(found.view(np.int32).astype(np.float64)).view(count, 16).to(make.device)
        return whole, torch.ones_like(whole)

    return Case(
        *("chacha20_words", f"{count} blocks from {first}", run, lambda: kept[0], exact),
        tolerance=0.0,
        bytes=64 * count,
        operations=CIPHER_OPERATIONS * 16 * count,
    )


def filled(make: Maker, count: int, start: int = 0) -> Case:
    kept: list[Tensor] = []

    def run() -> None:
        kept[:] = [gaussian_noise(count, start=start, **PLACE, device=make.device, backend="triton")]

    def exact() -> tuple[Tensor, Tensor]:
        found = gaussian_noise(count, start=start, **PLACE).double().to(make.device)
        return found, torch.ones_like(found)

    return Case(
        *("gaussian_noise", f"{count} elements from {start}", run, lambda: kept[0], exact),
        tolerance=0.0,
        bytes=4 * count,
        operations=CIPHER_OPERATIONS * count,
    )


def rounded(make: Maker, count: int, start: int = 0, scale: float = 3.0) -> Case:
    kept: list[Tensor] = []

    def run() -> None:
        kept[:] = [
            rounded_gaussian(count, start=start, scale=scale, **PLACE, device=make.device, backend="triton")
        ]

    def exact() -> tuple[Tensor, Tensor]:
        found = rounded_gaussian(count, start=start, scale=scale, **PLACE).double().to(make.device)
        return found, torch.ones_like(found)

    return Case(
        *("rounded_gaussian", f"{count} elements from {start}, scale {scale:g}", run, lambda: kept[0], exact),
        tolerance=0.0,
        bytes=8 * count,
        # Four words a normal instead of one.
        operations=4 * CIPHER_OPERATIONS * count,
    )


def release(make: Maker, count: int, grid: float, noise_std: float) -> Case:
    sums = make.flat(count).double() * 1e6 * grid
    special = [float("nan"), float("inf"), -float("inf"), 2.0**62 * grid, 0.5 * grid, 1.5 * grid]
    sums[: len(special)] = torch.tensor(special, dtype=torch.float64)[:count].to(sums.device)
    ours, found = sums.clone(), make.zeros(count)
    place = {**PLACE, "start": 77, "grid": grid, "noise_std": noise_std}

    def run() -> None:
        ours.copy_(sums)
        discrete_release_(ours, found, **place, backend="triton")

    def exact() -> tuple[Tensor, Tensor]:
        here, out = sums.cpu().clone(), torch.empty(count)
        discrete_release_(here, out, **place, backend="cpp")
        both = torch.cat([out.double(), here]).to(make.device)
        return both, torch.ones_like(both)

    return Case(
        *(
            "discrete_release_",
            f"{count} sums, grid {grid:g}",
            run,
            lambda: torch.cat([found.double(), ours]),
            exact,
        ),
        tolerance=0.0,
        bytes=36 * count,  # and the sums are put back
        operations=4 * CIPHER_OPERATIONS * count,
        poison=[found],
    )


def adam(make: Maker, count: int, noise_std: float = 1.0, recipe: str = "", **changes: Any) -> Case:
    start = [*(make.flat(count) for _ in range(3)), make.weights(count)]
    if recipe == "state":
        start.append(make.flat(2 * count).view(2, count))

    def call(tensors: list[Tensor], backend: Any) -> None:
        own = recipe_of(recipe, tensors[4] if len(tensors) > 4 else None)
        noisy_adam_(
            *tensors[:4], **{**ADAM, **changes}, noise_std=noise_std, correlation=own, backend=backend
        )

    said = ", ".join([recipe] * bool(recipe) + [f"{k} {v:g}" for k, v in changes.items()])
    return same(
        *(
            make,
            "noisy_adam_",
            f"{count} parameters, noise {noise_std:g}{', ' if said else ''}{said}",
            start,
            call,
        ),
        bytes_each=32,
        count=count,
        silent=noise_std == 0.0,
    )


def sgd(make: Maker, count: int, noise_std: float = 1.0, momentum: float = 0.9, **changes: Any) -> Case:
    start = [make.flat(count) for _ in range(3 if momentum else 2)]
    how = {**SGD, "momentum": momentum, "dampening": 0.0, "nesterov": False, "first_step": False, **changes}

    def call(tensors: list[Tensor], backend: Any) -> None:
        buffer = tensors[2] if momentum else None
        noisy_sgd_(*tensors[:2], buffer, **how, noise_std=noise_std, backend=backend)

    return same(
        *(make, "noisy_sgd_", f"{count} parameters, noise {noise_std:g}, momentum {momentum:g}", start, call),
        bytes_each=24 if momentum else 16,
        count=count,
        silent=noise_std == 0.0,
    )


def _adam_timed(make: Maker, _: torch.dtype) -> Iterator[Make]:
    count = make.size(1 << 27, 700)
    for noise_std in (1.0, 0.0):

        def made(noise_std: float = noise_std) -> Case:
            tensors = [*(make.flat(count) for _ in range(3)), make.weights(count)]
            return timed(
                adam(make, count, noise_std),
                lambda: noisy_adam_(*tensors, **ADAM, noise_std=noise_std, backend="triton"),
            )

        yield made


def _sgd_timed(make: Maker, _: torch.dtype) -> Iterator[Make]:
    def made() -> Case:
        tensors = [make.flat(make.size(1 << 27, 700)) for _ in range(3)]
        how = {**SGD, "momentum": 0.9, "dampening": 0.0, "nesterov": False, "first_step": False}
        return timed(
            sgd(make, len(tensors[0])), lambda: noisy_sgd_(*tensors, **how, noise_std=1.0, backend="triton")
        )

    yield made


def _noise_timed(make: Maker, _: torch.dtype) -> Iterator[Make]:
    def made() -> Case:
        out = make.flat(make.size(1 << 28, 700))
        return timed(
            noise(make, len(out)), lambda: add_gaussian_noise_(out, **PLACE, noise_std=1.3, backend="triton")
        )

    yield made


def _noise_edges(make: Maker, _: torch.dtype) -> Iterator[Make]:
    for start, count in PARTS:
        yield lambda s=start, n=count: noise(make, n, s)
    for recipe in ("taps", "state"):
        yield lambda r=recipe: noise(make, 300, 77, r)


def _adam_edges(make: Maker, _: torch.dtype) -> Iterator[Make]:
    for noise_std in (0.0, 1.3):
        for count in (0, 1, 131, 3000):
            for decoupled in (False, True):
                yield lambda n=count, s=noise_std, d=decoupled: adam(make, n, s, decoupled=d)
        yield lambda s=noise_std: adam(make, 700, s, bias_variance=0.02, min_second_moment=1e-3)
    for recipe in ("taps", "state"):
        yield lambda r=recipe: adam(make, 700, 1.3, r)


def _sgd_edges(make: Maker, _: torch.dtype) -> Iterator[Make]:
    for noise_std in (0.0, 1.3):
        for count in (0, 1, 131, 3000):
            for momentum in (0.0, 0.9):
                yield lambda n=count, s=noise_std, m=momentum: sgd(make, n, s, m, start=77)
        yield lambda s=noise_std: sgd(make, 700, s, dampening=0.5, first_step=True)
        yield lambda s=noise_std: sgd(make, 700, s, nesterov=True)


def _from_parts(build: Callable[[Maker, int, int], Case]) -> Callable[[Maker, torch.dtype], Iterator[Make]]:
    def edges(make: Maker, _: torch.dtype) -> Iterator[Make]:
        for start, count in PARTS:
            yield lambda s=start, n=count: build(make, n, s)

    return edges


def _rounded_edges(make: Maker, _: torch.dtype) -> Iterator[Make]:
    for start, count in PARTS:
        for scale in (0.0, 3.0, 2.0**40):
            yield lambda s=start, n=count, f=scale: rounded(make, n, s, f)


def _release_edges(make: Maker, _: torch.dtype) -> Iterator[Make]:
    for count in (0, 1, 127, 2000):
        for grid, noise_std in ((1.0, 0.0), (2.0**-20, 1.5), (2.0**60, 2.0**62), (2.0**-100, 2.0**-70)):
            yield lambda n=count, g=grid, s=noise_std: release(make, n, g, s)


def _words_edges(make: Maker, _: torch.dtype) -> Iterator[Make]:
    for first in (0, 2**32 - 5, 2**40 - 3):
        for count in (1, 70):
            yield lambda f=first, n=count: words(make, f, n)


def _one(build: Callable[[Maker], Case]) -> Callable[[Maker, torch.dtype], Iterator[Make]]:
    return lambda make, _: iter([lambda: build(make)])


_FP32 = (torch.float32,)
KERNELS = {
    "chacha20_words": Kernel(_words_edges, _one(lambda make: words(make, 0, make.size(1 << 22, 70))), _FP32),
    "gaussian_noise": Kernel(
        _from_parts(filled), _one(lambda make: filled(make, make.size(1 << 28, 700))), _FP32
    ),
    "add_gaussian_noise_": Kernel(_noise_edges, _noise_timed, _FP32),
    "rounded_gaussian": Kernel(
        _rounded_edges, _one(lambda make: rounded(make, make.size(1 << 26, 700))), _FP32
    ),
    "discrete_release_": Kernel(
        _release_edges, _one(lambda make: release(make, make.size(1 << 26, 700), 1.0, 8.0)), _FP32
    ),
    "noisy_adam_": Kernel(_adam_edges, _adam_timed, _FP32),
    "noisy_sgd_": Kernel(_sgd_edges, _sgd_timed, _FP32),
}
