"""What `benchmarks.gpu` runs: operands, the call, the result in float64, and what the call must read and multiply."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.gpu.case import Case, Maker
from synthward.kernels import ConvShape, gaussian_noise, noisy_adam_, sum_chain
from synthward.kernels.conv import reference as conv_reference
from synthward.kernels.conv import triton_impl as conv
from synthward.kernels.diagonal import triton_impl as diagonal
from synthward.kernels.noise import triton_impl as noise
from synthward.kernels.normalize import triton_impl as normalize
from synthward.kernels.outer import triton_impl as outer
from synthward.kernels.scatter import triton_impl as scatter
from synthward.kernels.update import triton_impl as update

KEY = bytes(range(32))
# Additions, exclusive ors and rotations of 20 rounds, over the 16 normals of a block.
CIPHER_OPERATIONS = 20 * 4 * 12 / 16
UPDATE = {"key": KEY, "stream": 0, "step": 1, "start": 0, "noise_std": 1.0, "grad_scale": 0.01, "lr": 1e-3}
ADAM = {**UPDATE, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "decoupled": True}
SGD = {
    **UPDATE,
    "momentum": 0.9,
    "dampening": 0.0,
    "nesterov": False,
    "weight_decay": 0.01,
    "first_step": False,
}


def all_cases(device: str, *, small: bool) -> Iterator[Callable[[], Case]]:
    """Functions that make one case each, so that the operands of one are freed before the next is made."""
    make = Maker(device, small)
    for dtype in (torch.float32, torch.bfloat16):
        yield lambda dtype=dtype: rank1(make, dtype)
        for method, units, length, d, p in (
            ("gram", make.size(4096, 3), 16, make.size(512, 40), make.size(512, 24)),
            ("gram", make.size(512, 2), make.size(64, 20), make.size(1024, 40), make.size(1024, 24)),
            ("tile", make.size(64, 2), make.size(512, 40), make.size(768, 40), make.size(768, 24)),
            ("tile", make.size(8, 1), make.size(8192, 70), make.size(768, 40), make.size(768, 24)),
        ):
            for ragged in (False, True):
                yield lambda m=method, u=units, t=length, d=d, p=p, r=ragged, y=dtype: norms(
                    make, m, u, t, d, p, r, y
                )
        yield lambda dtype=dtype: outer_sum(make, dtype)
        yield lambda dtype=dtype: scaled_rows(make, dtype)
        yield lambda dtype=dtype: diagonal_norms(make, dtype)
        yield lambda dtype=dtype: diagonal_sum(make, dtype)
        yield lambda dtype=dtype: scatter_norms(make, dtype)
        yield lambda dtype=dtype: scatter_sum(make, dtype)
        for rows, p in (
            (make.size(256, 20), make.size(1024, 40)),
            (make.size(64, 20), make.size(8192, 5000)),
        ):
            yield lambda dtype=dtype, n=rows, p=p: layer_norm(make, n, p, dtype)
        for channels, length in ((512, make.size(49, 5)), (64, make.size(3136, 300))):
            yield lambda dtype=dtype, c=channels, m=length: group_norm(make, c, m, dtype)
    for rows, shape in _conv_shapes(make):
        for run in (conv_norms, conv_unit_grads, conv_sum):
            yield lambda run=run, n=rows, v=shape: run(make, n, v)
    yield lambda: added_noise(make)
    yield lambda: adam(make)
    yield lambda: sgd(make)


def rank1(make: Maker, dtype: torch.dtype) -> Case:
    rows, d, p = make.size(65536, 20), make.size(1024, 40), make.size(1024, 24)
    a, g = make.matrix(rows, d, dtype), make.matrix(rows, p, dtype)
    out, sums = make.zeros(rows), make.zeros(rows)

    def exact() -> tuple[Tensor, Tensor]:
        product = a.double().square().sum(1) * g.double().square().sum(1)
        return product, product

    return Case(
        *(
            "rank1_norms",
            f"{rows} rows, {d} x {p}",
            lambda: outer.rank1_norms(a, g, out, sums),
            lambda: out,
            exact,
        ),
        tolerance=1e-6,
        bytes=a.nbytes + g.nbytes + 20 * rows,
        dtype=dtype,
        clear=[out, sums],
    )


def norms(
    make: Maker, method: str, units: int, length: int, d: int, p: int, ragged: bool, dtype: torch.dtype
) -> Case:
    rows = units * length
    a, g = make.matrix(rows, d, dtype), make.matrix(rows, p, dtype)
    offsets, out = make.offsets(units, length, ragged), make.zeros(units)
    run = outer.gram_norms if method == "gram" else outer.tile_norms
    lengths = offsets.diff().double()

    def exact() -> tuple[Tensor, Tensor]:
        ends = offsets.tolist()
        found, sums = torch.zeros_like(lengths), torch.zeros_like(lengths)
        for unit in range(units):
            x, y = a[ends[unit] : ends[unit + 1]].double(), g[ends[unit] : ends[unit + 1]].double()
            found[unit] = (y.T @ x).square().sum()
            sums[unit] = (x.norm(dim=1) * y.norm(dim=1)).sum()
        return found, sums.square()

    pairs = float((lengths * (lengths + 1) / 2).sum())
    return Case(
        *(f"{method}_norms", f"{units} units of {'on average ' if ragged else ''}{length}, {d} x {p}"),
        *(lambda: run(a, g, offsets, out), lambda: out, exact),
        tolerance=2.0**-22 * (length if method == "tile" else max(d, p)),
        bytes=a.nbytes + g.nbytes,
        flops=2 * pairs * (d + p) if method == "gram" else 2.0 * rows * d * p,
        dtype=dtype,
        clear=[out],
    )


def outer_sum(make: Maker, dtype: torch.dtype) -> Case:
    rows, d, p = make.size(65536, 90), make.size(1024, 70), make.size(1024, 40)
    a, g, w, out = (
        make.matrix(rows, d, dtype),
        make.matrix(rows, p, dtype),
        make.weights(rows),
        make.zeros(p, d),
    )

    def exact() -> tuple[Tensor, Tensor]:
        scaled = g.double() * w.double().unsqueeze(1)
        return scaled.T @ a.double(), scaled.abs().T @ a.double().abs()

    return Case(
        *("outer_sum", f"{rows} rows, {d} x {p}", lambda: outer.outer_sum(a, g, w, out), lambda: out, exact),
        tolerance=2.0**-23 * rows,
        bytes=a.nbytes + g.nbytes + 2 * out.nbytes,
        # Three products of bf16 make one of a scaled gradient that keeps all of its bits.
        flops=2.0 * rows * d * p * (3 if dtype == torch.bfloat16 else 1),
        dtype=dtype,
        clear=[out],
    )


def scaled_rows(make: Maker, dtype: torch.dtype) -> Case:
    rows, p = make.size(131072, 20), make.size(1024, 24)
    x, w = make.matrix(rows, p, dtype), make.weights(rows)
    kept: list[Tensor] = [x]

    def run() -> None:
        kept[0] = outer.scale_rows(x, w)

    def exact() -> tuple[Tensor, Tensor]:
        product = x.double() * w.double().unsqueeze(1)
        return product, product.abs()

    tolerance = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-23
    return Case(
        *("scale_rows", f"{rows} x {p}", run, lambda: kept[0], exact), tolerance=tolerance, bytes=2 * x.nbytes
    )


def diagonal_norms(make: Maker, dtype: torch.dtype) -> Case:
    units, length, p = make.size(1024, 3), make.size(256, 20), make.size(1024, 40)
    rows, factors = make.matrix(units * length, p, dtype), make.matrix(units * length, p, dtype)
    offsets, out = make.offsets(units, length, True), make.zeros(units)

    def exact() -> tuple[Tensor, Tensor]:
        found = torch.zeros(units, p, dtype=torch.float64, device=out.device)
        unit = torch.searchsorted(offsets[1:], torch.arange(len(rows), device=out.device), right=True)
        found.index_add_(0, unit, rows.double() * factors.double())
        return found.square().sum(1), found.square().sum(1)

    return Case(
        *("diagonal_sq_norms", f"{units} units of on average {length}, {p}"),
        *(lambda: diagonal.diagonal_sq_norms(rows, offsets, factors, out), lambda: out, exact),
        tolerance=1e-6,
        bytes=rows.nbytes + factors.nbytes,
        dtype=dtype,
        clear=[out],
    )


def diagonal_sum(make: Maker, dtype: torch.dtype) -> Case:
    count, p = make.size(262144, 50), make.size(1024, 40)
    rows, factors = make.matrix(count, p, dtype), make.matrix(count, p, dtype)
    w, out = make.weights(count), make.zeros(p)

    def exact() -> tuple[Tensor, Tensor]:
        product = rows.double() * factors.double() * w.double().unsqueeze(1)
        return product.sum(0), product.abs().sum(0)

    return Case(
        *("diagonal_weighted_sum", f"{count} rows of {p}"),
        *(lambda: diagonal.diagonal_weighted_sum(rows, w, factors, out), lambda: out, exact),
        tolerance=1e-6,
        bytes=rows.nbytes + factors.nbytes,
        dtype=dtype,
        clear=[out],
    )


def _ids(make: Maker, rows: int, table: int) -> Tensor:
    """Codes as records have them: a few make up most of the rows."""
    uniform = torch.rand(rows, generator=make.generator, device=make.device)
    return (table ** uniform.double() - 1).long().clamp(max=table - 1)


def scatter_norms(make: Maker, dtype: torch.dtype) -> Case:
    units, length, p = make.size(512, 3), make.size(512, 30), make.size(768, 40)
    ids, g = _ids(make, units * length, 50_000), make.matrix(units * length, p, dtype)
    offsets, out = make.offsets(units, length, True), make.zeros(units)

    def exact() -> tuple[Tensor, Tensor]:
        unit = torch.searchsorted(offsets[1:], torch.arange(len(ids), device=ids.device), right=True)
        keys, place = torch.unique(unit * 50_000 + ids, return_inverse=True)
        sums = torch.zeros(len(keys), p, dtype=torch.float64, device=ids.device).index_add_(
            0, place, g.double()
        )
        found = torch.zeros(units, dtype=torch.float64, device=ids.device)
        found.index_add_(0, keys // 50_000, sums.square().sum(1))
        return found, found

    return Case(
        *("scatter_sq_norms", f"{units} units of on average {length}, {p}"),
        *(lambda: scatter.scatter_sq_norms(ids, g, offsets, out), lambda: out, exact),
        tolerance=1e-6,
        bytes=ids.nbytes + g.nbytes,
        dtype=dtype,
        clear=[out],
    )


def scatter_sum(make: Maker, dtype: torch.dtype) -> Case:
    rows, p, table = make.size(262144, 90), make.size(768, 40), make.size(50_000, 7)
    ids, g, w = _ids(make, rows, table), make.matrix(rows, p, dtype), make.weights(rows)
    out = make.zeros(table, p)

    def exact() -> tuple[Tensor, Tensor]:
        product = g.double() * w.double().unsqueeze(1)
        zeros = torch.zeros(table, p, dtype=torch.float64, device=ids.device)
        return zeros.clone().index_add_(0, ids, product), zeros.index_add_(0, ids, product.abs())

    return Case(
        *("scatter_weighted_sum", f"{rows} rows into {table} x {p}"),
        *(lambda: scatter.scatter_weighted_sum(ids, g, w, out), lambda: out, exact),
        tolerance=1e-6,
        bytes=ids.nbytes + g.nbytes + 8 * p * len(ids.unique()),
        dtype=dtype,
        clear=[out],
    )


def _norm_grad(
    x: Tensor, g: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Over the last axis in float64: the input gradient, the size of its terms, and ``g * (x - mean) * rstd``."""
    g, r = g.double(), rstd.double().unsqueeze(-1)
    c, h = (x.double() - mean.double().unsqueeze(-1)) * r, g * weight.double()
    dx = r * (h - h.mean(-1, keepdim=True) - c * (h * c).mean(-1, keepdim=True))
    size = h.abs() + h.abs().mean(-1, keepdim=True) + c.abs() * (h * c).abs().mean(-1, keepdim=True)
    return dx, r * size, g * c


def _norm_case(
    name: str,
    shape: str,
    run: Callable[[], object],
    read: tuple[Tensor, Tensor],
    outputs: tuple[Tensor, Tensor, Tensor],
    exact: Callable[[], tuple[Tensor, Tensor]],
) -> Case:
    dtype = read[0].dtype
    return Case(
        *(name, shape, run, lambda: torch.cat([t.flatten().float() for t in outputs]), exact),
        # (The interpreter rounds to bf16 towards zero.)
        tolerance=2.0**-7 if dtype == torch.bfloat16 else 2.0**-20,
        bytes=sum(t.nbytes for t in (*read, *outputs)),
        dtype=dtype,
    )


def layer_norm(make: Maker, length: int, p: int, dtype: torch.dtype) -> Case:
    units = make.size(1024, 3)
    rows = units * length
    x, g, offsets = (
        make.matrix(rows, p, dtype),
        make.matrix(rows, p, dtype),
        make.offsets(units, length, True),
    )
    mean, rstd, weight = make.weights(rows), make.weights(rows) + 0.5, make.weights(p)
    outputs = (torch.empty_like(x), make.zeros(units, p), make.zeros(units, p))

    def exact() -> tuple[Tensor, Tensor]:
        dx, size, terms = _norm_grad(x, g, weight, mean, rstd)
        unit = torch.searchsorted(offsets[1:], torch.arange(rows, device=x.device), right=True)
        wide = (terms, g.double(), terms.abs(), g.double().abs())
        sums = [
            torch.zeros(units, p, device=x.device).double().index_add_(0, unit, t).flatten() for t in wide
        ]
        return torch.cat([dx.flatten(), *sums[:2]]), torch.cat([size.flatten(), *sums[2:]])

    return _norm_case(
        *("layer_norm_backward", f"{units} units of on average {length}, {p}"),
        lambda: normalize.layer_norm_backward(x, g, mean, rstd, weight, offsets, None, units, outputs),
        *((x, g), outputs, exact),
    )


def group_norm(make: Maker, channels: int, length: int, dtype: torch.dtype) -> Case:
    rows, groups = make.size(256, 2), 32
    x, g = (make.matrix(rows * channels, length, dtype).view(rows, channels, length) for _ in range(2))
    mean, rstd = (make.weights(rows * groups).view(rows, groups) for _ in range(2))
    weight = make.weights(channels)
    outputs = (torch.empty_like(x), make.zeros(rows, channels), make.zeros(rows, channels))

    def exact() -> tuple[Tensor, Tensor]:
        factors = weight.view(groups, -1).repeat_interleave(length, 1)
        found = _norm_grad(*(t.view(rows, groups, -1) for t in (x, g)), factors, mean, rstd)
        dx, size, terms = (t.view(x.shape) for t in found)
        wide = [t.double().sum(2).flatten() for t in (terms, g, terms.abs(), g.abs())]
        return torch.cat([dx.flatten(), *wide[:2]]), torch.cat([size.flatten(), *wide[2:]])

    return _norm_case(
        *("group_norm_backward", f"{rows} of {channels} in {groups}, {length} places"),
        lambda: normalize.group_norm_backward(x, g, mean, rstd, weight, *outputs),
        *((x, g), outputs, exact),
    )


# Images; groups, channels and outputs of one; height and width, kernel, stride. The first layer of an image network,
# one of its middle, one of its end, a depthwise one, and one of sequences.
CONVOLUTIONS = [
    (128, 1, 3, 64, (224, 224), (7, 7), 2),
    (256, 1, 64, 64, (56, 56), (3, 3), 1),
    (256, 1, 512, 512, (7, 7), (3, 3), 1),
    (256, 256, 1, 1, (28, 28), (3, 3), 1),
    (512, 1, 128, 256, (1, 1024), (1, 5), 1),
]
SMALL_CONVOLUTIONS = [
    (2, 1, 3, 20, (9, 10), (7, 7), 2),
    (2, 1, 9, 70, (6, 7), (3, 3), 1),
    (2, 3, 1, 1, (6, 5), (3, 3), 1),
    (2, 1, 9, 20, (1, 150), (1, 5), 1),
]


def _conv_shapes(make: Maker) -> Iterator[tuple[int, ConvShape]]:
    table = SMALL_CONVOLUTIONS if make.small else CONVOLUTIONS
    for rows, groups, channels, outputs, size, kernel, step in table:
        padding = tuple(k // 2 for k in kernel)
        high, wide = ((n + 2 * p - k) // step + 1 for n, p, k in zip(size, padding, kernel, strict=True))
        axes = ((1, *size), (1, *kernel), (1, step, step), (0, *padding), (1, 1, 1), (1, high, wide))
        yield rows, ConvShape(groups, channels, outputs, *axes)


def _conv_name(rows: int, v: ConvShape) -> str:
    return f"{rows} of {v.groups} x {v.channels}-{v.outputs}, {v.size[1]} x {v.size[2]}, {v.kernel[1]} x {v.kernel[2]}"


def _conv_rows(make: Maker, rows: int, v: ConvShape) -> tuple[Tensor, Tensor]:
    return make.matrix(rows, v.image_numel, torch.float32), make.matrix(rows, v.output_numel, torch.float32)


def conv_norms(make: Maker, rows: int, v: ConvShape) -> Case:
    x, g = _conv_rows(make, rows, v)
    offsets = make.offsets(rows, 1, False)
    out, sums = make.zeros(rows), make.zeros(rows)

    def exact() -> tuple[Tensor, Tensor]:
        found = conv_reference.unit_grads(v, x, g, offsets, None).square().sum(1)
        return found, found

    return Case(
        *("conv_norms", _conv_name(rows, v)),
        *(lambda: conv.norms(v, x, g, offsets, None, out, sums), lambda: out, exact),
        tolerance=1e-5,
        bytes=x.nbytes + g.nbytes,
        flops=2.0 * rows * v.places * v.numel,
        clear=[out, sums],
    )


def conv_unit_grads(make: Maker, rows: int, v: ConvShape) -> Case:
    x, g = _conv_rows(make, rows, v)
    offsets, out = make.offsets(rows, 1, False), make.zeros(rows, v.numel)

    def exact() -> tuple[Tensor, Tensor]:
        found = conv_reference.unit_grads(v, x, g, offsets, None)
        return found, conv_reference.unit_grads(v, x.abs(), g.abs(), offsets, None)

    return Case(
        *("conv_unit_grads", _conv_name(rows, v)),
        *(lambda: conv.unit_grads(v, x, g, offsets, None, out), lambda: out, exact),
        tolerance=2.0**-23 * sum_chain(v.places, compiled=True),
        bytes=x.nbytes + g.nbytes + out.nbytes,
        flops=2.0 * rows * v.places * v.numel,
    )


def conv_sum(make: Maker, rows: int, v: ConvShape) -> Case:
    x, g = _conv_rows(make, rows, v)
    w, out = make.weights(rows), make.zeros(v.numel)

    def exact() -> tuple[Tensor, Tensor]:
        found, magnitude = out.double().zero_(), out.double().zero_()
        conv_reference.weighted_sum(v, x, g, w, found)
        conv_reference.weighted_sum(v, x.abs(), g.abs(), w, magnitude)
        return found, magnitude

    return Case(
        *("conv_sum", _conv_name(rows, v), lambda: conv.weighted_sum(v, x, g, w, out), lambda: out, exact),
        tolerance=2.0**-23 * sum_chain(rows * v.places, compiled=True),
        bytes=x.nbytes + g.nbytes + 2 * out.nbytes,
        flops=2.0 * rows * v.places * v.numel,
        clear=[out],
    )


def added_noise(make: Maker) -> Case:
    count = make.size(1 << 28, 700)
    out = make.zeros(count)

    def exact() -> tuple[Tensor, Tensor]:
        # The compiled kernel in CPU memory, bit for bit.
        z = gaussian_noise(count, key=KEY, stream=0, step=1).to(out.device)
        return z.double(), torch.ones(1, device=out.device).double()

    return Case(
        *("add_gaussian_noise_", f"{count} elements"),
        *(lambda: noise.add_gaussian_noise_(out, KEY, 0, 1, 0, 1.0), lambda: out, exact),
        tolerance=0.0,
        bytes=8 * count,
        operations=CIPHER_OPERATIONS * count,
        clear=[out],
    )


def adam(make: Maker) -> Case:
    count = make.size(1 << 27, 700)
    start = [make.matrix(1, count, torch.float32).flatten() for _ in range(3)] + [make.weights(count)]
    tensors = [t.clone() for t in start]

    def exact() -> tuple[Tensor, Tensor]:
        here = [t.cpu() for t in start]
        noisy_adam_(*here, **ADAM, adam_step=3, backend="cpp")
        return here[0].to(tensors[0].device).double(), torch.ones(1, device=tensors[0].device).double()

    def run() -> None:
        update.noisy_adam_(*tensors, **ADAM, bias1=1 - 0.9**3, bias2=1 - 0.999**3)

    return Case(
        *("noisy_adam_", f"{count} parameters", run, lambda: tensors[0], exact),
        tolerance=0.0,
        bytes=32 * count,
        operations=CIPHER_OPERATIONS * count,
    )


def sgd(make: Maker) -> Case:
    count = make.size(1 << 27, 700)
    tensors = [make.matrix(1, count, torch.float32).flatten() for _ in range(3)]
    start = [t.clone() for t in tensors]

    def exact() -> tuple[Tensor, Tensor]:
        z = gaussian_noise(count, key=KEY, stream=0, step=1).to(tensors[0].device).double()
        param, grad, buffer = (t.double() for t in start)
        buffer = 0.9 * buffer + (grad + z) * 0.01 + 0.01 * param
        return param - 1e-3 * buffer, param.abs() + buffer.abs()

    return Case(
        *("noisy_sgd_", f"{count} parameters, momentum"),
        *(lambda: update.noisy_sgd_(*tensors, **SGD), lambda: tensors[0], exact),
        tolerance=2.0**-21,
        bytes=24 * count,
        operations=CIPHER_OPERATIONS * count,
    )
