"""Every operation that has a Triton form, and the shapes on which the watched memory of `guarded` is shown to it.

Shapes are nothing, one, primes, and the shape of a program less one and plus one. A case returns all that it wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from synthward.kernels import (
    ConvShape,
    add_gaussian_noise_,
    conv_norms,
    conv_sum,
    conv_unit_grads,
    diagonal_sq_norms,
    diagonal_weighted_sum,
    discrete_release_,
    draw_tokens,
    gaussian_noise,
    group_norm_backward,
    layer_norm_backward,
    linear_rows,
    noisy_adam_,
    noisy_sgd_,
    outer_sq_norms,
    outer_weighted_sum,
    residual_features,
    rounded_gaussian,
    scale_rows,
    uniform_noise,
)
from synthward.kernels.noise.triton_impl import chacha20_blocks
from synthward.kernels.outer import triton_impl as outer_impl
from synthward.kernels.outer import triton_sum
from synthward.kernels.scatter import triton_impl as scatter_impl
from tests.kernels.cases import generator, matrix, offsets_of, whole
from tests.kernels.correlations import correlation
from tests.kernels.test_conv import must, shape_of
from tests.kernels.test_decode import head, inputs, network

RAGGED, LONG, EMPTY, NONE = [3, 0, 1, 5, 17, 0, 2, 4], [1, 64, 65, 0, 63], [0, 0], []
FLOAT, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
KEY = bytes(range(32))
PLACE = {"key": KEY, "stream": 3, "step": 7}
TRITON: dict[str, Any] = {"backend": "triton"}
Run = Callable[..., list[Tensor]]


@dataclass(frozen=True)
class Operation:
    """What is run on each of `fast`, and in slow tests of `slow`; together the fast ones launch these kernels."""

    run: Run
    kernels: frozenset[str]
    fast: Sequence[tuple[Any, ...]]
    slow: Sequence[tuple[Any, ...]] = ()


def operands(rows: int, d: int, p: int, dtype: torch.dtype = FLOAT) -> tuple[Tensor, Tensor]:
    return matrix(rows, d, 1).to(dtype), matrix(rows, p, 2).to(dtype)


def weights_of(rows: int, run: int = 1) -> Tensor:
    """Some zero; each `run` rows have one weight."""
    weights = torch.rand(-(-rows // run), generator=generator(3))
    weights[1::4] = 0.0
    return weights.repeat_interleave(run)[:rows].contiguous()


def unit_rows(lengths: list[int] | None, rows: int = 11) -> int:
    return rows if lengths is None else sum(lengths)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


def gram(lengths: list[int], d: int, p: int, dtype: torch.dtype) -> list[Tensor]:
    norms, sums = ones(2, len(lengths))
    outer_impl.gram_norms(*operands(sum(lengths), d, p, dtype), offsets_of(lengths), norms, sums)
    return [norms, sums]


def tile(lengths: list[int], d: int, p: int, dtype: torch.dtype, keeps: bool) -> list[Tensor]:
    norms, sums = ones(2, len(lengths))
    grads = torch.full((len(lengths), d * p), torch.nan) if keeps else None
    a, g = operands(sum(lengths), d, p, dtype)
    outer_impl.tile_norms(a, g, offsets_of(lengths), norms, sums, grads)
    return [norms, sums] if grads is None else [norms, sums, grads]


def single_rows(rows: int, d: int, p: int, dtype: torch.dtype) -> list[Tensor]:
    a, g = operands(rows, d, p, dtype)
    norms, sums = ones(2, rows)
    return [norms, sums, outer_impl.rank1_norms(a, g, norms, sums), outer_sq_norms(a, g, **TRITON)]


def outer_sum(
    rows: int, d: int, p: int, dtype: torch.dtype, run: int, parts: int | None = None
) -> list[Tensor]:
    a, g = operands(rows, d, p, dtype)
    out, bias, w = ones(p, d), ones(p), weights_of(rows, run)
    with pytest.MonkeyPatch.context() as patch:
        if parts is not None:
            patch.setattr(triton_sum, "parts_of", lambda *_: parts)
        outer_impl.outer_sum(a, g, w, out, bias)
        again = outer_weighted_sum(a, g, w, out=ones(p, d), **TRITON)
    return [out, bias, again, scale_rows(g, w, **TRITON)]


def diagonal_norms(lengths: list[int] | None, p: int, dtype: torch.dtype) -> list[Tensor]:
    rows, offsets = unit_rows(lengths), offsets_of(lengths)
    g, factors = operands(rows, p, p, dtype)
    return [diagonal_sq_norms(g, offsets, factors=f, **TRITON) for f in (None, factors)]


def diagonal_sum(rows: int, p: int, dtype: torch.dtype) -> list[Tensor]:
    g, factors = operands(rows, p, p, dtype)
    w = weights_of(rows)
    return [diagonal_weighted_sum(g, w, factors=f, out=ones(p), **TRITON) for f in (None, factors)]


def ids_of(rows: int, table: int) -> Tensor:
    return torch.randint(-1, table, (rows,), generator=generator(5))


def scatter_norms(lengths: list[int] | None, p: int, span: int) -> list[Tensor]:
    rows = unit_rows(lengths)
    out = ones(rows if lengths is None else len(lengths))
    scatter_impl.scatter_sq_norms(ids_of(rows, 3), matrix(rows, p, 6), offsets_of(lengths), out, span=span)
    return [out]


def scatter_sum(rows: int, table: int, p: int, span: int) -> list[Tensor]:
    out = ones(table, p)
    scatter_impl.scatter_weighted_sum(
        ids_of(rows, table), matrix(rows, p, 6), weights_of(rows), out, span=span
    )
    return [out]


def conv(shape: ConvShape, lengths: list[int], shuffled: bool, dtype: torch.dtype) -> list[Tensor]:
    rows, units, offsets = sum(lengths), len(lengths), offsets_of(lengths)
    assert offsets is not None
    x, g = (
        whole(rows, n, i, most=2).to(dtype) for i, n in enumerate((shape.image_numel, shape.output_numel))
    )
    order = torch.randperm(rows, generator=generator(4)) if shuffled else None
    (norms, sums), out = ones(2, units), ones(shape.numel)
    conv_norms(shape, x, g, offsets, norms, sums, order=order, **TRITON)
    grads = conv_unit_grads(shape, x, g, offsets, order=order, **TRITON)
    conv_sum(shape, x, g, weights_of(rows), out=out, **TRITON)
    return [norms, sums, grads, out]


def layer_norm(
    lengths: list[int] | None, p: int, dtype: torch.dtype, is_rms: bool, is_weighted: bool, is_shuffled: bool
) -> list[Tensor]:
    rows = unit_rows(lengths)
    x, g = operands(rows, p, p, dtype)
    units = rows if lengths is None else len(lengths)
    dx, (scale, bias) = torch.full_like(x, torch.nan), torch.full((2, units, p), torch.nan)
    mean = None if is_rms else x.float().mean(1)
    weight = torch.randn(p, generator=generator(4)) if is_weighted else None
    order = torch.randperm(rows, generator=generator(4)) if is_shuffled else None
    arguments = (x, g, mean, torch.rand(rows, generator=generator(5)), weight, offsets_of(lengths))
    layer_norm_backward(*arguments, order=order, dx=dx, scale=scale, bias=bias, **TRITON)
    return [dx, scale, bias]


def group_norm(
    rows: int, groups: int, each: int, length: int, dtype: torch.dtype, is_weighted: bool
) -> list[Tensor]:
    channels = groups * each
    x, g = (t.view(rows, channels, length) for t in operands(rows * channels, length, length, dtype))
    dx, (scale, bias) = torch.full_like(x, torch.nan), torch.full((2, rows, channels), torch.nan)
    mean, rstd = x.float().view(rows, groups, -1).mean(2), torch.rand(rows, groups, generator=generator(5))
    weight = torch.randn(channels, generator=generator(4)) if is_weighted else None
    group_norm_backward(x, g, mean, rstd, weight, dx=dx, scale=scale, bias=bias, **TRITON)
    return [dx, scale, bias]


def noise(start: int, count: int, kind: str | None) -> list[Tensor]:
    added, states = torch.linspace(-1, 1, count), []
    named = {**PLACE, "start": start, "noise_std": 2.5, **TRITON}
    if kind is not None:
        state = torch.ones(3, count + 50)
        states = [state]
        named["correlation"] = correlation(kind, 7, state).part(20, 20 + count)
    add_gaussian_noise_(added, **named)
    if kind is None:
        return [added, gaussian_noise(count, start=start, **PLACE, **TRITON)]
    return [added, *states]


def uniform(start: int, count: int) -> list[Tensor]:
    return [uniform_noise(count, start=start, **PLACE, **TRITON)]


def words(start: int, count: int) -> list[Tensor]:
    return [chacha20_blocks(KEY, 3, 7, start, count)]


def integers(start: int, count: int) -> list[Tensor]:
    sums, out = torch.randn(count, dtype=torch.float64, generator=generator()), ones(count)
    discrete_release_(sums, out, start=start, grid=2.0**-20, noise_std=1.5, **PLACE, **TRITON)
    return [sums, out, rounded_gaussian(count, start=start, scale=3.0, **PLACE, **TRITON)]


def buffers(count: int, kind: str | None) -> tuple[list[Tensor], dict[str, Any]]:
    made = [torch.rand(count, generator=generator(seed)) for seed in range(4)]
    named: dict[str, Any] = {**PLACE, "start": 77, "grad_scale": 0.1, "weight_decay": 0.1, **TRITON}
    if kind is not None:
        named["correlation"] = correlation(kind, 7, ones(3, count))
    return made, named


def adam(count: int, noise_std: float, kind: str | None, is_corrected: bool) -> list[Tensor]:
    tensors, named = buffers(count, kind)
    named |= {"bias_variance": 0.02, "min_second_moment": 1e-3} if is_corrected else {}
    rates = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "decoupled": False, "adam_step": 8}
    noisy_adam_(*tensors, noise_std=noise_std, **rates, **named)
    return tensors


def sgd(count: int, noise_std: float, kind: str | None, is_first: bool, has_buffer: bool) -> list[Tensor]:
    (param, grad, buffer, _), named = buffers(count, kind)
    rates = {"lr": 0.1, "momentum": 0.9 if has_buffer else 0.0, "dampening": 0.0, "nesterov": has_buffer}
    kept = buffer if has_buffer else None
    noisy_sgd_(param, grad, kept, noise_std=noise_std, first_step=is_first, **rates, **named)
    return [param, grad, buffer]


def decode(rows: int, p: int, numbers: int, blocks: int, sizes: list[int], count: int) -> list[Tensor]:
    rng = generator(7)
    features = residual_features(*inputs(rows, p, numbers, rng), network(p, blocks, rng), **TRITON)
    _, *others = head(rows, p, sizes, count, rng)
    outputs = linear_rows(features, *others[:2], **TRITON)
    sums = ones(rows, 5)
    tokens = draw_tokens(features, *others, added=whole(sum(sizes), 5, 3), sums=sums, **TRITON)
    return [features, outputs, tokens, sums]


def names(*kernels: str) -> frozenset[str]:
    return frozenset(f"_{name}_kernel" for name in kernels)


PADDED = must(shape_of(2, 3, 5, (1, 4, 5), (1, 3, 3), padding=(0, 1, 1)))
BEFORE = must(shape_of(1, 2, 3, (1, 1, 8), (1, 1, 2), stride=(1, 1, 3), padding=(0, 0, 1)))
DEEP = must(shape_of(2, 3, 4, (4, 6, 7), (3, 2, 4), stride=(1, 2, 3), padding=(1, 0, 2), dilation=(1, 2, 1)))
POINT = must(shape_of(1, 1, 1, (1, 1, 1), (1, 1, 1)))
WIDE = must(shape_of(1, 65, 63, (1, 1, 3), (1, 1, 1)))
DEPTHWISE = must(shape_of(17, 1, 1, (1, 3, 3), (1, 3, 3), padding=(0, 1, 1)))

OPERATIONS = {
    "gram": Operation(
        gram,
        names("slots", "gram", "totals", "rank1"),
        [
            (RAGGED, 17, 31, FLOAT),
            (LONG, 1, 33, FLOAT),
            (RAGGED, 33, 1, BRAIN),
            (EMPTY, 3, 2, FLOAT),
            (NONE, 3, 2, FLOAT),
            (RAGGED, 0, 2, FLOAT),
        ],
        [
            *((LONG, d, p, dtype) for d, p in ((31, 65), (129, 32), (127, 7)) for dtype in (FLOAT, HALF)),
            ([1] * 7, 3, 2, BRAIN),
            ([257, 0, 1], 3, 2, FLOAT),
        ],
    ),
    "tile": Operation(
        tile,
        names("tile", "totals", "rank1"),
        [
            (RAGGED, 17, 31, FLOAT, True),
            (LONG, 65, 1, FLOAT, False),
            (RAGGED, 63, 17, BRAIN, True),
            (EMPTY, 3, 2, FLOAT, True),
            (NONE, 3, 2, FLOAT, True),
            (RAGGED, 3, 0, FLOAT, False),
        ],
        [
            *((LONG, d, p, dtype, True) for d, p in ((1, 65), (129, 63)) for dtype in (FLOAT, BRAIN, HALF)),
            ([1] * 7, 131, 2, HALF, False),
        ],
    ),
    "single rows": Operation(
        single_rows,
        names("rank1"),
        [(0, 3, 4, FLOAT), (1, 1, 1, FLOAT), (7, 127, 3, BRAIN), (9, 129, 31, HALF)],
        [(8, 128, 257, FLOAT), (17, 1, 400, BRAIN)],
    ),
    "outer sum": Operation(
        outer_sum,
        names("kinds", "order", "sum", "join", "scale", "pieces", "columns"),
        [
            (0, 3, 4, FLOAT, 1),
            (1, 1, 1, FLOAT, 1),
            (17, 17, 33, FLOAT, 1, 2),
            (257, 7, 15, BRAIN, 128),
            (65, 31, 3, HALF, 1),
        ],
        [
            (131, 65, 15, BRAIN, 64),
            (257, 7, 5, BRAIN, 128, 3),
            (129, 63, 129, HALF, 128, 5),
            (131, 63, 129, FLOAT, 1),
            (200, 129, 127, BRAIN, 64),
            (129, 257, 131, BRAIN, 1),
            (300, 15, 17, HALF, 150),
            (64, 128, 256, BRAIN, 64),
        ],
    ),
    "diagonal norms": Operation(
        diagonal_norms,
        names("rows", "units", "totals"),
        [
            (None, 1, FLOAT),
            (None, 257, BRAIN),
            (RAGGED, 65, FLOAT),
            (LONG, 63, HALF),
            (EMPTY, 3, FLOAT),
            (NONE, 3, FLOAT),
        ],
        [(None, 255, FLOAT), (LONG, 129, BRAIN), (RAGGED, 1, FLOAT), (RAGGED, 0, FLOAT)],
    ),
    "diagonal sum": Operation(
        diagonal_sum,
        names("pieces", "columns"),
        [(0, 3, FLOAT), (1, 1, FLOAT), (7, 129, BRAIN), (13, 17, FLOAT)],
        [(129, 127, HALF), (127, 15, FLOAT), (128, 128, FLOAT), (257, 3, BRAIN)],
    ),
    "scatter norms": Operation(
        scatter_norms,
        names("runs", "seams", "totals"),
        [(None, 19, 32), (RAGGED, 17, 4), (LONG, 1, 32), (EMPTY, 3, 32), (NONE, 3, 32)],
        [(LONG, 257, 32), (RAGGED, 255, 5), (LONG, 31, 4)],
    ),
    "scatter sum": Operation(
        scatter_sum,
        names("runs", "seams"),
        [(0, 3, 4, 32), (1, 1, 1, 32), (31, 2, 33, 32), (33, 5, 7, 4), (65, 1, 1, 32)],
        [(75, 4, 257, 4), (64, 50, 255, 32), (128, 1, 16, 32)],
    ),
    "convolution": Operation(
        conv,
        names(
            *("conv_tile", "conv_sum", "conv_squares", "conv_half_tile", "conv_half_sum", "columns", "totals")
        ),
        [
            (PADDED, [3, 0, 1], False, FLOAT),
            (BEFORE, [2, 0, 5], True, FLOAT),
            (POINT, [1], False, FLOAT),
            (DEPTHWISE, [1, 2], True, FLOAT),
            (PADDED, [1, 0, 2], True, BRAIN),
            (PADDED, EMPTY, False, FLOAT),
            (PADDED, NONE, False, FLOAT),
        ],
        [
            (DEEP, RAGGED, True, FLOAT),
            (WIDE, RAGGED, True, FLOAT),
            (PADDED, LONG, False, BRAIN),
            (WIDE, RAGGED, True, BRAIN),
            (DEPTHWISE, [2, 0, 1], False, BRAIN),
            (DEEP, [1, 1], False, HALF),
        ],
    ),
    "layer norm": Operation(
        layer_norm,
        names("slots", "layer_norm", "layer_norm_units", "row_sums", "row_coefficients"),
        [
            (RAGGED, 17, FLOAT, False, True, True),
            (None, 31, BRAIN, True, True, False),
            ([15, 0, 17, 33], 3, FLOAT, False, False, False),
            ([2, 0, 1], 4097, FLOAT, False, True, True),
            (None, 1, FLOAT, False, True, False),
            ([1], 1, FLOAT, False, True, False),
        ],
        [
            (LONG, 65, HALF, False, True, True),
            ([1, 15, 16, 0, 80], 63, BRAIN, True, True, True),
            ([17, 1], 8193, BRAIN, True, False, False),
            (None, 4095, FLOAT, False, True, False),
        ],
    ),
    "group norm": Operation(
        group_norm,
        names("group_norm", "row_sums", "row_coefficients", "group_norm_grad"),
        [
            (2, 3, 5, 7, FLOAT, True),
            (1, 1, 1, 1, FLOAT, False),
            (2, 1, 3, 15, BRAIN, True),
            (2, 2, 3, 1367, FLOAT, True),
            (1, 2, 1, 8193, HALF, False),
        ],
        [(2, 1, 4097, 1, FLOAT, True), (3, 2, 1, 4097, BRAIN, True), (1, 3, 150, 31, FLOAT, True)],
    ),
    "noise": Operation(
        noise,
        names("noise"),
        [(7, 0, None), (0, 1, None), (100, 1025, None), (3, 131, "banded"), (3, 257, "blt")],
        [(256 * 2**33 + 3, 2049, None), (255, 1024, "inverse"), (1023, 1023, "banded")],
    ),
    "uniform": Operation(
        uniform,
        names("uniform"),
        [(7, 0), (0, 1), (15, 1), (13, 67)],
        [(3, 1021), (16 * 2**33 + 5, 1040), (0, 1024)],
    ),
    "words": Operation(words, names("words"), [(0, 1), (2**32 - 5, 65)], [(5, 63), (7, 128)]),
    "integers": Operation(
        integers, names("rounded", "release"), [(7, 0), (0, 1), (77, 513)], [(127, 511), (5, 1300)]
    ),
    "adam": Operation(
        adam,
        names("adam", "adam_silent"),
        [(0, 1.3, None, False), (1, 0.0, None, False), (131, 1.3, "blt", True), (1025, 0.0, None, True)],
        [(1023, 1.3, None, False), (1025, 1.3, "banded", False), (1024, 1.3, "inverse", True)],
    ),
    "sgd": Operation(
        sgd,
        names("sgd", "sgd_silent"),
        [
            (0, 1.3, None, True, True),
            (1, 1.3, None, True, True),
            (131, 1.3, "blt", False, True),
            (1025, 0.0, None, False, False),
        ],
        [(1023, 1.3, None, False, False), (1025, 1.3, "banded", False, True), (1023, 0.0, None, True, True)],
    ),
    "decode": Operation(
        decode,
        names("first_layer", "residual", "last_norm", "linear", "draw", "add"),
        [
            (0, 3, 2, 1, [3, 2], 1),
            (1, 1, 0, 0, [1], 1),
            (5, 33, 3, 1, [1, 17, 2], 3),
            (3, 17, 1, 1, [300, 5, 2], 2),
            (2, 3, 2, 1, [3, 2], 0),
        ],
        [
            (65, 65, 5, 2, [16, 15, 1], 2),
            (63, 15, 1, 1, [128, 129, 1], 1),
            (4, 257, 2, 1, [255, 256, 7], 5),
        ],
    ),
}
