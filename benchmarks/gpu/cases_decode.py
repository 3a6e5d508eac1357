"""What samplers of tables do at each step: features of a residual network, tokens of a head's columns."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.gpu.case import Case, Kernel, Make, Maker
from synthward.kernels import ResidualWeights, draw_tokens, residual_features
from synthward.kernels.decode import linear_rows

# Tokens of columns: one, few, primes, more than a block.
SIZES = [1, 2, 5, 17, 70]


def features(make: Maker, rows: int, width: int, numbers: int, blocks: int, bad: float | None = None) -> Case:
    dtype = torch.float32
    sums, values = make.matrix(rows, width, dtype), make.matrix(rows, numbers, dtype)
    common, value_weights = make.flat(width), make.matrix(numbers, width, dtype)
    if bad is not None:
        sums[-1, -1] = bad
    weights = make.flat(blocks * width * width).view(blocks, width, width) / width**0.5
    layers = [make.matrix(blocks, width, dtype), *(make.matrix(blocks + 1, width, dtype) for _ in range(2))]
    network = ResidualWeights(weights, *layers, 1e-5)
    kept: list[Tensor] = []

    def run() -> None:
        kept[:] = [residual_features(sums, common, values, value_weights, network, backend="triton")]

    def exact() -> tuple[Tensor, Tensor]:
        wide = (t.double() for t in (sums, common, values, value_weights))
        doubled = ResidualWeights(*(t.double() for t in network.tensors()), network.eps)
        found = residual_features(*wide, doubled, backend="reference")
        return found, 1.0 + found.abs()

    return Case(
        *("residual_features", f"{rows} rows, {blocks} blocks of {width}", run, lambda: kept[0], exact),
        # Rows that are all but constant are blown up by their norms, by 1 / sqrt(eps) at each at most.
        tolerance=1e-4 if width > 3 else 3e-2,
        bytes=2 * sums.nbytes + values.nbytes + sum(t.nbytes for t in network.tensors()),
        flops=2.0 * rows * width * (width * blocks + numbers),
    )


def linear(make: Maker, rows: int, p: int, outputs: int) -> Case:
    x, weight, bias = (
        make.matrix(rows, p, torch.float32),
        make.matrix(outputs, p, torch.float32),
        make.flat(outputs),
    )
    kept: list[Tensor] = []

    def run() -> None:
        kept[:] = [linear_rows(x, weight, bias, backend="triton")]

    def exact() -> tuple[Tensor, Tensor]:
        x_wide, wide = x.double(), weight.double()
        return x_wide @ wide.T + bias.double(), x_wide.abs() @ wide.abs().T + bias.double().abs()

    return Case(
        *("linear_rows", f"{rows} rows, {p} to {outputs}", run, lambda: kept[0], exact),
        tolerance=(p + 2) * 2.0**-24,
        bytes=x.nbytes + weight.nbytes + 4.0 * rows * outputs,
        flops=2.0 * rows * p * outputs,
    )


def tokens(make: Maker, rows: int, width: int, sizes: list[int], count: int) -> Case:
    """Uniform numbers in the middle of a token's share, where rounding can not make it another's."""
    total = sum(sizes)
    features = make.matrix(rows, width, torch.float32)
    weight, bias = make.matrix(total, width, torch.float32) / max(width, 1) ** 0.5, make.flat(total)
    offsets = torch.tensor([0, *sizes], device=make.device).cumsum(0)
    columns = torch.randint(len(sizes), (rows, count), generator=make.generator, device=make.device)
    added, start = make.matrix(total, 5, torch.float32), make.matrix(rows, 5, torch.float32)
    chosen, uniforms = _middles(make, features, weight, bias, offsets, columns)
    sums, kept = start.clone(), list[Tensor]()

    def run() -> None:
        sums.copy_(start)
        inputs = (features, weight, bias, offsets, columns, uniforms)
        kept[:] = [draw_tokens(*inputs, added=added, sums=sums, backend="triton")]

    def exact() -> tuple[Tensor, Tensor]:
        drawn = added.double()[offsets[columns] + chosen]
        found = torch.cat([chosen.double().flatten(), (start.double() + drawn.sum(1)).flatten()])
        size = torch.cat(
            [torch.ones_like(chosen.double().flatten()), (start.abs() + drawn.abs().sum(1)).flatten()]
        )
        return found, size

    asked = float(torch.tensor(sizes, device=make.device)[columns].sum())
    return Case(
        *("draw_tokens", f"{rows} rows of {width}, {count} of {len(sizes)} columns, {total} tokens"),
        *(run, lambda: torch.cat([kept[0].double().flatten(), sums.double().flatten()]), exact),
        tolerance=1e-6,
        bytes=features.nbytes + weight.nbytes + 4 * start.nbytes + 20.0 * columns.numel(),
        flops=2.0 * asked * width,
    )


def _middles(
    make: Maker, features: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens drawn at random from those with a share of some size, and the middle of each one's part of [0, 1)."""
    chosen = torch.zeros_like(columns)
    uniforms = torch.zeros(columns.shape, device=make.device)
    ends = offsets.tolist()
    for column, (first, last) in enumerate(pairwise(ends)):
        row, place = (columns == column).nonzero(as_tuple=True)
        share = torch.softmax(features.double()[row] @ weight[first:last].double().T + bias[first:last], 1)
        if not len(row):
            continue
        drawn = torch.multinomial(share.masked_fill(share < 1e-3, 0.0), 1, generator=make.generator)
        chosen[row, place] = drawn[:, 0]
        middle = (share.cumsum(1) - share / 2).gather(1, drawn)[:, 0]
        uniforms[row, place] = middle.float()
    return chosen, uniforms


def _features_edges(make: Maker, _: torch.dtype) -> Iterator[Make]:
    for rows in (0, 1, 65):
        for width, numbers, blocks in ((1, 1, 1), (31, 0, 2), (64, 5, 0), (130, 5, 3)):
            yield lambda n=rows, w=width, c=numbers, b=blocks: features(make, n, w, c, b)
    for bad in (float("nan"), float("inf")):
        yield lambda bad=bad: features(make, 70, 24, 2, 2, bad)


def _features_timed(make: Maker, _: torch.dtype) -> Iterator[Make]:
    yield lambda: features(make, make.size(65536, 20), make.size(256, 40), 16, make.size(4, 2))


def _linear_edges(make: Maker, _: torch.dtype) -> Iterator[Make]:
    for rows, p, outputs in ((0, 3, 2), (3, 0, 2), (1, 1, 1), (65, 17, 65), (7, 130, 0), (131, 150, 67)):
        yield lambda n=rows, p=p, q=outputs: linear(make, n, p, q)


def _linear_timed(make: Maker, _: torch.dtype) -> Iterator[Make]:
    yield lambda: linear(make, make.size(65536, 20), make.size(256, 40), make.size(2048, 24))


def _tokens_edges(make: Maker, _: torch.dtype) -> Iterator[Make]:
    for rows in (0, 1, 40):
        for width in (1, 31, 130):
            for count in (0, 1, 4):
                yield lambda n=rows, w=width, k=count: tokens(make, n, w, SIZES, k)


def _tokens_timed(make: Maker, _: torch.dtype) -> Iterator[Make]:
    sizes = make.size(50, 3)
    yield lambda: tokens(make, make.size(65536, 20), make.size(256, 40), [*range(2, 2 + 2 * sizes, 2)], 4)


_FP32 = (torch.float32,)
KERNELS = {
    "residual_features": Kernel(_features_edges, _features_timed, _FP32),
    "linear_rows": Kernel(_linear_edges, _linear_timed, _FP32),
    "draw_tokens": Kernel(_tokens_edges, _tokens_timed, _FP32),
}
