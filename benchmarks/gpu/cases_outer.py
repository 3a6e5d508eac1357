"""The outer family: norms in both ways, gradients of units, the clipped sum, scaled rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu.case import Case, Kernel, Make, Maker, Units, weighted
from synthward.kernels import Backend, outer_sum, outer_unit_grads, rank1_norms, scale_rows
from synthward.kernels.outer import triton_impl
from synthward.kernels.outer.dense import rounding_of

# One column, fewer than a block, more than one, none.
WIDTHS = [(1, 1), (17, 31), (150, 67), (0, 4), (64, 48)]


def rank1(make: Maker, rows: int, d: int, p: int, dtype: torch.dtype, bad: float | None = None) -> Case:
    a, g = make.matrix(rows, d, dtype), make.matrix(rows, p, dtype)
    if bad is not None:
        g[-1, -1] = bad
    out, sums, kept = make.zeros(rows), make.zeros(rows), [make.zeros(rows)]

    def run() -> None:
        kept[0] = rank1_norms(a, g, out, sums, backend="triton")

    def exact() -> tuple[Tensor, Tensor]:
        squares = g.double().square().sum(1)
        product = a.double().square().sum(1) * squares
        found = torch.cat([product, product.sqrt(), squares])
        return found, found

    return Case(
        *("rank1_norms", f"{rows} rows, {d} x {p}", run, lambda: torch.cat([out, sums, kept[0]]), exact),
        tolerance=1e-6,
        bytes=a.nbytes + g.nbytes + 20 * rows,
        dtype=dtype,
        clear=[out, sums],
    )


def norms(
    make: Maker,
    method: str,
    units: Units,
    d: int,
    p: int,
    dtype: torch.dtype,
    *,
    with_sums: bool,
    bad: float | None = None,
) -> Case:
    a, g = make.matrix(units.rows, d, dtype), make.matrix(units.rows, p, dtype)
    if bad is not None:
        g[-1, -1] = bad
    out, sums = make.zeros(units.count), make.zeros(units.count)
    run = triton_impl.gram_norms if method == "gram" else triton_impl.tile_norms
    lengths = torch.tensor(units.lengths or [0]).double()

    def exact() -> tuple[Tensor, Tensor]:
        found, rows = make.zeros(2, units.count).double()
        ends = units.ends()
        for unit in range(units.count):
            x, y = a[ends[unit] : ends[unit + 1]].double(), g[ends[unit] : ends[unit + 1]].double()
            found[unit] = (y.T @ x).square().sum()
            rows[unit] = (x.norm(dim=1) * y.norm(dim=1)).sum()
        pairs = [(found, rows.square()), *[(rows, rows)] * with_sums]
        return torch.cat([value for value, _ in pairs]), torch.cat([size for _, size in pairs])

    chain = max(d, p) if method == "gram" else max([1, *(units.lengths or [])])
    pairs = float((lengths * (lengths + 1) / 2).sum())
    name = f"{method}_norms" + (" and row sums" if with_sums else "")
    return Case(
        *(name, f"{units.text}, {d} x {p}"),
        lambda: run(a, g, units.offsets, out, sums if with_sums else None),
        lambda: torch.cat([out, sums]) if with_sums else out,
        exact,
        tolerance=(2 * chain + 8) * 2.0**-24,
        bytes=a.nbytes + g.nbytes,
        flops=2 * pairs * (d + p) if method == "gram" else 2.0 * units.rows * d * p,
        dtype=dtype,
        clear=[out, sums],
    )


def unit_grads(make: Maker, units: Units, d: int, p: int, dtype: torch.dtype) -> Case:
    a, g = make.matrix(units.rows, d, dtype), make.matrix(units.rows, p, dtype)
    kept: list[Tensor] = []

    def run() -> None:
        assert units.offsets is not None
        kept[:] = [outer_unit_grads(a, g, units.offsets, backend="triton")[0]]

    def exact() -> tuple[Tensor, Tensor]:
        ends = units.ends()
        found = make.zeros(2, units.count, p * d).double()
        for unit in range(units.count):
            x, y = a[ends[unit] : ends[unit + 1]].double(), g[ends[unit] : ends[unit + 1]].double()
            found[0, unit], found[1, unit] = (y.T @ x).flatten(), (y.abs().T @ x.abs()).flatten()
        return found[0], found[1]

    return Case(
        *("outer_unit_grads", f"{units.text}, {d} x {p}", run, lambda: kept[0], exact),
        tolerance=(max([1, *(units.lengths or [])]) + 8) * 2.0**-24,
        bytes=a.nbytes + g.nbytes + 4.0 * units.count * d * p,
        flops=2.0 * units.rows * d * p,
        dtype=dtype,
    )


def clipped_sum(
    make: Maker,
    rows: int,
    d: int,
    p: int,
    dtype: torch.dtype,
    *,
    with_bias: bool = False,
    with_zeros: bool = False,
    terms: int = 3,
    run: int = 1,
    backend: Backend = "triton",
) -> Case:
    """`run` rows after another have one weight; `with_zeros`: a quarter of the weights is zero."""
    a, g = make.matrix(rows, d, dtype), make.matrix(rows, p, dtype)
    w = make.weights(-(-rows // run)).repeat_interleave(run)[:rows]
    if with_zeros:
        w[torch.arange(rows, device=w.device) // run % 4 == 1] = 0.0
        a[w == 0.0], g[w == 0.0] = float("nan"), float("inf")
    out, bias = make.zeros(p, d), make.zeros(p)

    def exact() -> tuple[Tensor, Tensor]:
        scaled, kept = weighted(g, w), weighted(a, (w != 0.0).double())
        found = (scaled.T @ kept).flatten(), (scaled.abs().T @ kept.abs()).flatten()
        if not with_bias:
            return found
        return torch.cat([found[0], scaled.sum(0)]), torch.cat([found[1], scaled.abs().sum(0)])

    # A scaled row of half precision is held in several bf16, of which each takes a product.
    is_half = dtype != torch.float32
    products = 1 if run > 1 or not is_half else 6 if dtype == torch.float16 else terms
    said = [f"{run} rows of a weight"] * (run > 1) + [f"{terms} terms"] * (terms < 3)
    said += [backend] * (backend != "triton")
    return Case(
        *("outer_sum", ", ".join([f"{rows} rows", f"{d} x {p}", *said])),
        lambda: outer_sum(
            *(a, g, w),
            out=out,
            bias=bias if with_bias else None,
            terms=terms,
            run=run if run > 1 else None,
            backend=backend,
        ),
        lambda: torch.cat([out.flatten(), bias]) if with_bias else out.flatten(),
        exact,
        tolerance=2.0**-24 * (2 * rows + 8) + (rounding_of(terms) if dtype == torch.bfloat16 else 0.0),
        bytes=a.nbytes + g.nbytes + 2 * out.nbytes,
        flops=2.0 * rows * d * p * products,
        dtype=dtype,
        clear=[out, bias],
    )


def scaled(make: Maker, rows: int, p: int, dtype: torch.dtype, *, with_zeros: bool) -> Case:
    x = make.matrix(rows, p, dtype)
    w = make.clipped(x) if with_zeros else make.weights(rows)
    kept: list[Tensor] = [x]

    def run() -> None:
        kept[0] = scale_rows(x, w, backend="triton")

    def exact() -> tuple[Tensor, Tensor]:
        product = weighted(x, w)
        return product, product.abs()

    return Case(
        *("scale_rows", f"{rows} x {p}", run, lambda: kept[0], exact),
        tolerance=2.0**-23,
        bytes=x.nbytes + 4 * x.numel(),
        dtype=dtype,
    )


def _rank1_edges(make: Maker, dtype: torch.dtype) -> Iterator[Make]:
    for rows in (0, 1, 11, 131):
        for d, p in WIDTHS:
            yield lambda n=rows, d=d, p=p: rank1(make, n, d, p, dtype)
    for bad in (float("nan"), float("inf")):
        yield lambda bad=bad: rank1(make, 11, 17, 31, dtype, bad)


def _norm_edges(method: str, make: Maker, dtype: torch.dtype) -> Iterator[Make]:
    for units in make.layouts(with_rows=False):
        for d, p in WIDTHS:
            yield lambda u=units, d=d, p=p: norms(make, method, u, d, p, dtype, with_sums=bool(d))
    for bad in (float("nan"), float("inf")):
        yield lambda bad=bad: norms(
            make, method, make.units([3, 0, 5]), 17, 31, dtype, with_sums=True, bad=bad
        )


def _norm_shapes(method: str, make: Maker) -> list[tuple[int, int, int, int]]:
    if method == "gram":
        return [
            (make.size(4096, 3), 16, make.size(512, 40), make.size(512, 24)),
            (make.size(512, 2), make.size(64, 20), make.size(1024, 40), make.size(1024, 24)),
        ]
    return [
        (make.size(64, 2), make.size(512, 40), make.size(768, 40), make.size(768, 24)),
        (make.size(8, 1), make.size(8192, 70), make.size(768, 40), make.size(768, 24)),
    ]


def _norm_timed(method: str, make: Maker, dtype: torch.dtype) -> Iterator[Make]:
    for number, (units, length, d, p) in enumerate(_norm_shapes(method, make)):
        for ragged in (False, True):
            batch = make.batch(units, length, ragged=ragged)
            yield lambda u=batch, d=d, p=p: norms(make, method, u, d, p, dtype, with_sums=False)
        if number == 0:  # as a step calls it
            batch = make.batch(units, length)
            yield lambda u=batch, d=d, p=p: norms(make, method, u, d, p, dtype, with_sums=True)


def _grads_edges(make: Maker, dtype: torch.dtype) -> Iterator[Make]:
    for units in make.layouts(with_rows=False):
        for d, p in WIDTHS[:3]:
            yield lambda u=units, d=d, p=p: unit_grads(make, u, d, p, dtype)


def _grads_timed(make: Maker, dtype: torch.dtype) -> Iterator[Make]:
    units, length, d, p = _norm_shapes("tile", make)[0]
    yield lambda: unit_grads(make, make.batch(units, length), d, p, dtype)


def _sum_edges(make: Maker, dtype: torch.dtype) -> Iterator[Make]:
    for rows in (0, 1, 13, 131):
        for d, p in WIDTHS:
            for extra in (False, True):
                yield lambda n=rows, d=d, p=p, e=extra: clipped_sum(
                    make, n, d, p, dtype, with_bias=e, with_zeros=e
                )
    # Blocks of rows of one weight beside such of several.
    for terms in (1, 2, 3):
        for run in (1, 64, 100):
            yield lambda t=terms, r=run: clipped_sum(
                make, 500, 31, 33, dtype, with_zeros=True, terms=t, run=r
            )


def _sum_timed(make: Maker, dtype: torch.dtype) -> Iterator[Make]:
    shape = make.size(65536, 90), make.size(1024, 70), make.size(1024, 40)
    yield lambda: clipped_sum(make, *shape, dtype)
    if dtype == torch.float32:
        yield lambda: clipped_sum(make, *shape, dtype, backend="auto")
        return
    yield lambda: clipped_sum(make, *shape, dtype, terms=2)
    yield lambda: clipped_sum(make, *shape, dtype, run=make.size(512, 64))


def _scaled_edges(make: Maker, dtype: torch.dtype) -> Iterator[Make]:
    for rows, p in ((0, 3), (1, 1), (13, 131), (300, 40), (4, 0)):
        yield lambda n=rows, p=p: scaled(make, n, p, dtype, with_zeros=True)


def _scaled_timed(make: Maker, dtype: torch.dtype) -> Iterator[Make]:
    yield lambda: scaled(make, make.size(131072, 20), make.size(1024, 24), dtype, with_zeros=False)


def _rank1_timed(make: Maker, dtype: torch.dtype) -> Iterator[Make]:
    yield lambda: rank1(make, make.size(65536, 20), make.size(1024, 40), make.size(1024, 24), dtype)


KERNELS = {
    "rank1_norms": Kernel(_rank1_edges, _rank1_timed),
    "gram_norms": Kernel(lambda *a: _norm_edges("gram", *a), lambda *a: _norm_timed("gram", *a)),
    "tile_norms": Kernel(lambda *a: _norm_edges("tile", *a), lambda *a: _norm_timed("tile", *a)),
    "outer_unit_grads": Kernel(_grads_edges, _grads_timed),
    "outer_sum": Kernel(_sum_edges, _sum_timed),
    "scale_rows": Kernel(_scaled_edges, _scaled_timed),
}
