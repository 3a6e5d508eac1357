"""The diagonal and scatter families and the normalisations' backward passes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu.case import Case, Kernel, Make, Maker, Units, unit_sums, weighted
from synthward.kernels import (
    diagonal_sq_norms,
    diagonal_weighted_sum,
    group_norm_backward,
    layer_norm_backward,
    scatter_sq_norms,
    scatter_weighted_sum,
)

WIDTHS = (1, 31, 300, 0)
# Of one rounding of an input gradient. (The interpreter rounds to bf16 towards zero.)
_ROUNDING = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def diagonal_norms(
    make: Maker,
    units: Units,
    p: int,
    dtype: torch.dtype,
    *,
    with_factors: bool = True,
    bad: float | None = None,
) -> Case:
    rows = make.matrix(units.rows, p, dtype)
    factors = make.matrix(units.rows, p, dtype) if with_factors else None
    if bad is not None:
        rows[-1, -1] = bad
    out = make.zeros(units.count)

    def exact() -> tuple[Tensor, Tensor]:
        product = rows.double() if factors is None else rows.double() * factors.double()
        found = unit_sums(product, units).square().sum(1)
        return found, unit_sums(product.abs(), units).square().sum(1)

    return Case(
        *("diagonal_sq_norms", f"{units.text}, {p}"),
        lambda: diagonal_sq_norms(rows, units.offsets, factors=factors, out=out, backend="triton"),
        *(lambda: out, exact),
        tolerance=1e-6,
        bytes=rows.nbytes * (2 if with_factors else 1),
        dtype=dtype,
        clear=[out],
    )


def diagonal_sum(
    make: Maker,
    count: int,
    p: int,
    dtype: torch.dtype,
    *,
    with_factors: bool = True,
    with_zeros: bool = False,
) -> Case:
    rows = make.matrix(count, p, dtype)
    factors = make.matrix(count, p, dtype) if with_factors else None
    w = make.clipped(rows) if with_zeros else make.weights(count)
    out = make.zeros(p)

    def exact() -> tuple[Tensor, Tensor]:
        product = weighted(rows if factors is None else rows.double() * factors.double(), w)
        return product.sum(0), product.abs().sum(0)

    return Case(
        *("diagonal_weighted_sum", f"{count} rows of {p}"),
        lambda: diagonal_weighted_sum(rows, w, factors=factors, out=out, backend="triton"),
        *(lambda: out, exact),
        tolerance=1e-6,
        bytes=rows.nbytes * (2 if with_factors else 1),
        dtype=dtype,
        clear=[out],
    )


def ids_of(make: Maker, rows: int, table: int, *, with_padding: bool) -> Tensor:
    """Codes as records have them: a few make up most of the rows. A negative one is no row."""
    uniform = torch.rand(rows, generator=make.generator, device=make.device)
    ids = (table ** uniform.double() - 1).long().clamp(max=table - 1)
    if with_padding:
        ids[2::5] = -1
    return ids


def scatter_norms(
    make: Maker, units: Units, p: int, table: int, dtype: torch.dtype, *, edge: bool, bad: float | None = None
) -> Case:
    ids, g = ids_of(make, units.rows, table, with_padding=edge), make.matrix(units.rows, p, dtype)
    if bad is not None:
        g[-1, -1], ids[-1] = bad, 0
    out = make.zeros(units.count)

    def exact() -> tuple[Tensor, Tensor]:
        there = ids >= 0
        keys, place = torch.unique((units.index(make.device) * table + ids)[there], return_inverse=True)
        sums = torch.zeros(len(keys), p, dtype=torch.float64, device=ids.device)
        sizes = sums.clone().index_add_(0, place, g[there].double().abs())
        sums.index_add_(0, place, g[there].double())
        found = [
            torch.zeros(units.count, dtype=torch.float64, device=ids.device).index_add_(
                0, keys // table, s.square().sum(1)
            )
            for s in (sums, sizes)
        ]
        return found[0], found[1]

    return Case(
        *("scatter_sq_norms", f"{units.text}, {p}"),
        lambda: scatter_sq_norms(ids, g, units.offsets, out=out, backend="triton"),
        *(lambda: out, exact),
        tolerance=1e-6,
        bytes=ids.nbytes + g.nbytes,
        dtype=dtype,
        clear=[out],
    )


def scatter_sum(make: Maker, rows: int, p: int, table: int, dtype: torch.dtype, *, edge: bool) -> Case:
    ids, g = ids_of(make, rows, table, with_padding=edge), make.matrix(rows, p, dtype)
    w = make.clipped(g) if edge else make.weights(rows)
    if edge:
        g[ids < 0] = float("nan")
    out = make.zeros(table, p)

    def exact() -> tuple[Tensor, Tensor]:
        there = ids >= 0
        product = weighted(g[there], w[there])
        zeros = torch.zeros(table, p, dtype=torch.float64, device=ids.device)
        return zeros.clone().index_add_(0, ids[there], product), zeros.index_add_(
            0, ids[there], product.abs()
        )

    return Case(
        *("scatter_weighted_sum", f"{rows} rows into {table} x {p}"),
        lambda: scatter_weighted_sum(ids, g, w, out=out, backend="triton"),
        *(lambda: out, exact),
        tolerance=1e-6,
        bytes=ids.nbytes + g.nbytes + 8 * p * len(ids.unique()),
        dtype=dtype,
        clear=[out],
    )


def _norm_grad(
    x: Tensor, g: Tensor, weight: Tensor | None, mean: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Over the last axis in float64: the input gradient, the size of its terms, and ``g * (x - mean) * rstd``."""
    g, r = g.double(), rstd.double().unsqueeze(-1)
    c = (x.double() if mean is None else x.double() - mean.double().unsqueeze(-1)) * r
    h = g if weight is None else g * weight.double()
    dx, size = (
        h - c * (h * c).mean(-1, keepdim=True),
        h.abs() + c.abs() * (h * c).abs().mean(-1, keepdim=True),
    )
    if mean is not None:
        dx, size = dx - h.mean(-1, keepdim=True), size + h.abs().mean(-1, keepdim=True)
    return r * dx, r * size, g * c


def layer_norm(
    make: Maker,
    units: Units,
    p: int,
    dtype: torch.dtype,
    *,
    is_rms: bool = False,
    bad: float | None = None,
) -> Case:
    x, g = make.matrix(units.rows, p, dtype), make.matrix(units.rows, p, dtype)
    if bad is not None:
        g[-1, -1] = bad
    mean = None if is_rms else make.weights(units.rows)
    rstd, weight = make.weights(units.rows) + 0.5, None if is_rms else make.weights(p)
    dx, scale, bias = torch.empty_like(x), make.zeros(units.count, p), make.zeros(units.count, p)

    def exact() -> tuple[Tensor, Tensor]:
        dx, size, terms = _norm_grad(x, g, weight, mean, rstd)
        wide = (terms, g.double(), terms.abs(), g.double().abs())
        sums = [unit_sums(t, units).flatten() for t in wide]
        return torch.cat([dx.flatten(), *sums[:2]]), torch.cat([size.flatten(), *sums[2:]])

    return Case(
        *("layer_norm_backward", f"{units.text}, {p}{', RMS' if is_rms else ''}"),
        lambda: layer_norm_backward(
            x, g, mean, rstd, weight, units.offsets, dx=dx, scale=scale, bias=bias, backend="triton"
        ),
        lambda: torch.cat([t.flatten().float() for t in (dx, scale, bias)]),
        exact,
        tolerance=_ROUNDING[dtype],
        bytes=3 * x.nbytes + 2 * scale.nbytes,
        dtype=dtype,
        poison=[dx, scale, bias],
    )


def group_norm(
    make: Maker,
    rows: int,
    channels: int,
    groups: int,
    length: int,
    dtype: torch.dtype,
    bad: float | None = None,
) -> Case:
    x, g = (make.matrix(rows * channels, length, dtype).view(rows, channels, length) for _ in range(2))
    if bad is not None:
        g[-1, -1, -1] = bad
    mean, rstd = (make.weights(rows * groups).view(rows, groups) for _ in range(2))
    weight = make.weights(channels)
    dx, scale, bias = torch.empty_like(x), make.zeros(rows, channels), make.zeros(rows, channels)

    def exact() -> tuple[Tensor, Tensor]:
        if not x.numel():
            nothing = torch.zeros(dx.numel() + 2 * scale.numel(), dtype=torch.float64, device=x.device)
            return nothing, nothing
        factors = weight.view(groups, -1).repeat_interleave(length, 1)
        found = _norm_grad(*(t.view(rows, groups, -1) for t in (x, g)), factors, mean, rstd)
        grads, size, terms = (t.view(x.shape) for t in found)
        wide = [t.double().sum(2).flatten() for t in (terms, g, terms.abs(), g.abs())]
        return torch.cat([grads.flatten(), *wide[:2]]), torch.cat([size.flatten(), *wide[2:]])

    return Case(
        *("group_norm_backward", f"{rows} of {channels} in {groups}, {length} places"),
        lambda: group_norm_backward(
            x, g, mean, rstd, weight, dx=dx, scale=scale, bias=bias, backend="triton"
        ),
        lambda: torch.cat([t.flatten().float() for t in (dx, scale, bias)]),
        exact,
        tolerance=_ROUNDING[dtype],
        bytes=3 * x.nbytes + 2 * scale.nbytes,
        dtype=dtype,
        poison=[dx, scale, bias],
    )


def _bad_units(make: Maker) -> Iterator[tuple[Units, float]]:
    for lengths in (None, [3, 0, 5], [1, 64, 65]):
        for bad in (float("nan"), float("inf")):
            yield make.units(lengths), bad


def _diagonal_norm_edges(make: Maker, dtype: torch.dtype) -> Iterator[Make]:
    for units in make.layouts(with_rows=True):
        for p in WIDTHS:
            yield lambda u=units, p=p: diagonal_norms(make, u, p, dtype, with_factors=p != 300)
    for units, bad in _bad_units(make):
        yield lambda u=units, bad=bad: diagonal_norms(make, u, 31, dtype, bad=bad)


def _diagonal_norm_timed(make: Maker, dtype: torch.dtype) -> Iterator[Make]:
    units = make.batch(make.size(1024, 3), make.size(256, 20), ragged=True)
    yield lambda: diagonal_norms(make, units, make.size(1024, 40), dtype)


def _diagonal_sum_edges(make: Maker, dtype: torch.dtype) -> Iterator[Make]:
    for rows, p in ((0, 3), (1, 1), (13, 131), (300, 40), (5, 0)):
        for factors in (False, True):
            yield lambda n=rows, p=p, f=factors: diagonal_sum(
                make, n, p, dtype, with_factors=f, with_zeros=True
            )


def _diagonal_sum_timed(make: Maker, dtype: torch.dtype) -> Iterator[Make]:
    yield lambda: diagonal_sum(make, make.size(262144, 50), make.size(1024, 40), dtype)


def _scatter_norm_edges(make: Maker, dtype: torch.dtype) -> Iterator[Make]:
    for units in make.layouts(with_rows=True):
        for p in WIDTHS[:3]:
            yield lambda u=units, p=p: scatter_norms(make, u, p, 5, dtype, edge=True)
    for units, bad in _bad_units(make):
        yield lambda u=units, bad=bad: scatter_norms(make, u, 31, 5, dtype, edge=False, bad=bad)


def _scatter_norm_timed(make: Maker, dtype: torch.dtype) -> Iterator[Make]:
    units = make.batch(make.size(512, 3), make.size(512, 30), ragged=True)
    yield lambda: scatter_norms(make, units, make.size(768, 40), 50_000, dtype, edge=False)


def _scatter_sum_edges(make: Maker, dtype: torch.dtype) -> Iterator[Make]:
    for rows, p, table in ((0, 4, 3), (1, 1, 1), (75, 33, 4), (40, 300, 50), (131, 17, 1)):
        yield lambda n=rows, p=p, t=table: scatter_sum(make, n, p, t, dtype, edge=True)


def _scatter_sum_timed(make: Maker, dtype: torch.dtype) -> Iterator[Make]:
    shape = make.size(262144, 90), make.size(768, 40), make.size(50_000, 7)
    yield lambda: scatter_sum(make, *shape, dtype, edge=False)


def _layer_edges(make: Maker, dtype: torch.dtype) -> Iterator[Make]:
    for units in make.layouts(with_rows=True):
        if units.count:
            for p in (1, 31, 300):
                yield lambda u=units, p=p: layer_norm(make, u, p, dtype, is_rms=p == 300)
    yield lambda: layer_norm(make, make.units([2, 0, 3]), 5000, dtype)
    for units, bad in _bad_units(make):
        yield lambda u=units, bad=bad: layer_norm(make, u, 31, dtype, bad=bad)


def _layer_timed(make: Maker, dtype: torch.dtype) -> Iterator[Make]:
    for length, p in ((make.size(256, 20), make.size(1024, 40)), (make.size(32, 20), make.size(8192, 5000))):
        units = make.batch(make.size(512, 3), length, ragged=True)
        yield lambda u=units, p=p: layer_norm(make, u, p, dtype)


def _group_edges(make: Maker, dtype: torch.dtype) -> Iterator[Make]:
    for rows, channels, groups, length in (
        *((0, 4, 2, 3), (1, 1, 1, 1), (3, 6, 3, 7), (2, 34, 1, 131), (2, 5, 5, 9000), (7, 64, 32, 49)),
    ):
        yield lambda s=(rows, channels, groups, length): group_norm(make, *s, dtype)
    for bad in (float("nan"), float("inf")):
        yield lambda bad=bad: group_norm(make, 3, 6, 3, 7, dtype, bad)


def _group_timed(make: Maker, dtype: torch.dtype) -> Iterator[Make]:
    for channels, length in ((512, make.size(49, 5)), (64, make.size(3136, 300))):
        yield lambda c=channels, n=length: group_norm(make, make.size(256, 2), c, 32, n, dtype)


KERNELS = {
    "diagonal_sq_norms": Kernel(_diagonal_norm_edges, _diagonal_norm_timed),
    "diagonal_weighted_sum": Kernel(_diagonal_sum_edges, _diagonal_sum_timed),
    "scatter_sq_norms": Kernel(_scatter_norm_edges, _scatter_norm_timed),
    "scatter_weighted_sum": Kernel(_scatter_sum_edges, _scatter_sum_timed),
    "layer_norm_backward": Kernel(_layer_edges, _layer_timed),
    "group_norm_backward": Kernel(_group_edges, _group_timed),
}
