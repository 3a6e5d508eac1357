"""The Triton kernels against float64: on the GPU if there is one, else in Triton's interpreter (tests/conftest.py).

The interpreter runs every index, mask and order of additions, on small shapes. What it cannot show, how the device
multiplies, is read off the compiled code (test_triton_compiled.py).
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="the package triton cannot be imported here")

from synthward.kernels import (
    add_gaussian_noise_,
    diagonal_sq_norms,
    diagonal_weighted_sum,
    outer_norms,
    outer_sq_norms,
    outer_sum,
    outer_unit_grads,
    outer_weighted_sum,
    rank1_norms,
    scale_rows,
    scatter_sq_norms,
    scatter_weighted_sum,
)
from synthward.kernels._select import choose, use_cpp
from synthward.kernels._triton import INTERPRETED
from synthward.kernels.outer import triton_impl as outer_impl
from synthward.kernels.scatter import triton_impl as scatter_impl
from tests.kernels.cases import (
    LAYOUTS,
    assert_close,
    diagonal_gradient,
    generator,
    matrix,
    offsets_of,
    outer_gradient,
    row_count,
    scatter_gradient,
    segments,
    sq_norms,
)

# NumPy, which the interpreter computes with, warns of what the kernels are meant to survive.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

DEVICE = "cpu" if INTERPRETED else "cuda"
KEY = bytes(range(32))
PLACE = {"key": KEY, "stream": 3, "step": 7}
LAYOUT = pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS.keys())
UNITS = pytest.mark.parametrize(
    "lengths",
    [v for v in LAYOUTS.values() if v is not None],
    ids=[k for k, v in LAYOUTS.items() if v is not None],
)
WIDTH = pytest.mark.parametrize(("d", "p"), [(1, 1), (17, 31), (67, 15), (0, 4)])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_device(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(DEVICE) for t in tensors]


def row_sums(a: Tensor, g: Tensor, units: list[slice]) -> Tensor:
    products = a.double().norm(dim=1) * g.double().norm(dim=1)
    return torch.stack([products[unit].sum() for unit in units]) if units else torch.zeros(0).double()


def assert_norms(found: Tensor, expected: Tensor, sums: Tensor, chain: int) -> None:
    """Within the rounding of inner products of `chain` terms (the bound that the engine adds to a norm)."""
    assert found.dtype == torch.float32
    bound = (2 * chain + 8) * 2.0**-24 * sums.square() + 1e-30
    assert ((found.cpu().double() - expected).abs() <= bound).all()


def assert_sum(found: Tensor, expected: Tensor, magnitude: Tensor, terms: int) -> None:
    bound = (terms + 8) * 2.0**-24 * magnitude + 1e-30
    assert ((found.cpu().double() - expected).abs() <= bound).all()


def weights_of(rows: int) -> Tensor:
    weights = torch.rand(rows, generator=generator(3))
    weights[1::4] = 0.0
    return weights


@UNITS
@WIDTH
@pytest.mark.parametrize("method", ["gram", "tile"])
def test_outer_norms(method, lengths, d, p):
    rows = row_count(lengths)
    a, g, units = matrix(rows, d, 1), matrix(rows, p, 2), segments(lengths, rows)
    run = outer_impl.gram_norms if method == "gram" else outer_impl.tile_norms
    norms, sums = torch.zeros(len(units), device=DEVICE), torch.zeros(len(units), device=DEVICE)
    run(*on_device(a, g, offsets_of(lengths)), norms, sums)
    expected = row_sums(a, g, units)
    chain = max(d, p) if method == "gram" else max([1, *lengths])
    assert_norms(norms, sq_norms([outer_gradient(a, g, unit) for unit in units]), expected, chain)
    if d and p:
        assert_close(sums.cpu(), expected)


@LAYOUT
@pytest.mark.parametrize("dtype", DTYPES)
def test_outer_norms_by_cost(lengths, dtype):
    rows = row_count(lengths)
    a, g, units = matrix(rows, 19, 1).to(dtype), matrix(rows, 33, 2).to(dtype), segments(lengths, rows)
    found = outer_sq_norms(*on_device(a, g, offsets_of(lengths)), backend="triton")
    expected = sq_norms([outer_gradient(a, g, unit) for unit in units])
    assert_norms(found, expected, row_sums(a, g, units), 130)


def test_the_cheaper_way_to_a_norm_is_taken(monkeypatch):
    taken = []
    for name in ("gram_norms", "tile_norms"):
        monkeypatch.setattr(outer_impl, name, lambda *_, name=name: taken.append(name))
    for length, d, p in ((4, 64, 64), (256, 64, 64), (256, 1024, 1024)):
        a, g, offsets = torch.ones(length, d), torch.ones(length, p), torch.tensor([0, length])
        outer_impl.outer_sq_norms(a, g, offsets, torch.zeros(1))
    assert taken == ["gram_norms", "tile_norms", "gram_norms"]


def test_gradients_of_units_are_kept_if_asked_for():
    lengths = LAYOUTS["ragged"]
    rows = row_count(lengths)
    a, g = matrix(rows, 17, 1), matrix(rows, 70, 2)
    kept = torch.full((len(lengths), 70 * 17), float("nan"), device=DEVICE)
    norms = torch.zeros(len(lengths), device=DEVICE)
    outer_impl.tile_norms(*on_device(a, g, offsets_of(lengths)), norms, None, kept)
    for unit, of_unit in zip(segments(lengths, rows), kept.cpu(), strict=True):
        expected = torch.from_numpy(outer_gradient(a, g, unit)).flatten()
        torch.testing.assert_close(of_unit.double(), expected, rtol=1e-5, atol=1e-2)


def test_single_rows_give_norms_row_sums_and_squares():
    a, g = matrix(11, 300, 1), matrix(11, 5, 2)
    norms, sums = torch.ones(11, device=DEVICE), torch.ones(11, device=DEVICE)
    squares = outer_impl.rank1_norms(*on_device(a, g), norms, sums)
    product = a.double().square().sum(1) * g.double().square().sum(1)
    assert_close(squares.cpu(), g.double().square().sum(1))
    assert_close(norms.cpu(), 1 + product)
    assert_close(sums.cpu(), 1 + product.sqrt())


@pytest.mark.parametrize("run", [outer_impl.gram_norms, outer_impl.tile_norms, outer_impl.outer_sq_norms])
@pytest.mark.parametrize("tiny", [1e-20, 1e-23])
def test_norms_do_not_vanish_where_one_side_is_tiny(run, tiny):
    """|a|^2 underflows and |g|^2 does not: a norm of zero would let any gradient through unclipped."""
    units = [slice(0, 2), slice(2, 3), slice(3, 6)]
    for a, g in itertools.permutations((torch.full((6, 9), tiny), torch.full((6, 9), 1e18))):
        exact = sq_norms([outer_gradient(a, g, unit) for unit in units])
        found = torch.zeros(3, device=DEVICE)
        run(*on_device(a, g, torch.tensor([0, 2, 3, 6])), found)
        assert (found.cpu().double() >= exact * (1 - 1e-6)).all()


@LAYOUT
@pytest.mark.parametrize("p", [1, 31, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_diagonal_norms(lengths, p, dtype):
    rows = row_count(lengths)
    g, offsets = matrix(rows, p, 3).to(dtype), offsets_of(lengths)
    for factors in (None, matrix(rows, p, 4).to(dtype)):
        found = diagonal_sq_norms(*on_device(g, offsets), factors=on_device(factors)[0], backend="triton")
        expected = sq_norms([diagonal_gradient(g, factors, unit) for unit in segments(lengths, rows)])
        assert_close(found.cpu(), expected)


@LAYOUT
@pytest.mark.parametrize("span", [4, scatter_impl.SPAN])
def test_scatter_norms(lengths, span):
    """Few table rows, so that ids repeat; short spans, so that their runs cross them."""
    rows = row_count(lengths)
    ids = torch.randint(-1, 3, (rows,), generator=generator(5))
    g, units = matrix(rows, 19, 6), segments(lengths, rows)
    found = torch.ones(len(units), device=DEVICE)
    ids_there, g_there, offsets = on_device(ids, g, offsets_of(lengths))
    scatter_impl.scatter_sq_norms(ids_there, g_there, offsets, found, span=span)
    assert_close(found.cpu(), 1 + sq_norms([scatter_gradient(ids, g, unit, 3) for unit in units]))


def test_table_rows_that_the_key_cannot_hold_give_no_norm():
    """Rather than the norm of rows that were taken for one another."""
    ids, offsets = torch.tensor([1, 2**32 + 1, 4, 4]), torch.tensor([0, 2, 4])
    found = scatter_sq_norms(*on_device(ids, torch.ones(4, 3), offsets), backend="triton").cpu()
    assert torch.isnan(found[0]) and found[1] == 12.0


@pytest.mark.parametrize(
    ("rows", "d", "p"), [(0, 3, 4), (1, 1, 1), (13, 17, 33), (64, 40, 131), (131, 150, 20)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_outer_sum(rows, d, p, dtype):
    a, g, w = matrix(rows, d, 1).to(dtype), matrix(rows, p, 2).to(dtype), weights_of(rows)
    start = torch.randn(p, d, generator=generator(4))
    scaled = g.double() * w.double().unsqueeze(1)
    expected, magnitude = start.double() + scaled.t() @ a.double(), scaled.abs().t() @ a.double().abs()
    a[1::4], g[1::4] = float("nan"), float("inf")
    out = start.to(DEVICE)
    assert outer_weighted_sum(*on_device(a, g, w), out=out, backend="triton") is out
    assert_sum(out, expected, magnitude + start.double().abs(), rows)


def test_the_functions_that_the_engine_plans_with_come_here_too():
    lengths = LAYOUTS["ragged"]
    rows, units = row_count(lengths), len(lengths)
    a, g, w, offsets = on_device(
        matrix(rows, 17, 1), matrix(rows, 33, 2), weights_of(rows), offsets_of(lengths)
    )
    exact = sq_norms([outer_gradient(a.cpu(), g.cpu(), unit) for unit in segments(lengths, rows)])
    for method in ("gram", "tile"):
        norms, sums = torch.zeros(units, device=DEVICE), torch.zeros(units, device=DEVICE)
        outer_norms(a, g, offsets, norms, sums, method=method, backend="triton")
        assert_close(norms.cpu(), exact, 1e-5)
    grads, formed, formed_sums = outer_unit_grads(a, g, offsets, backend="triton")
    assert torch.equal(formed, norms) and torch.equal(formed_sums, sums)
    assert_close(grads.cpu().double().square().sum(1).float(), exact, 1e-5)
    single = torch.zeros(rows, device=DEVICE)
    squares = rank1_norms(a, g, single, torch.zeros(rows, device=DEVICE), backend="triton")
    assert_close(single.cpu() / squares.cpu(), a.cpu().double().square().sum(1), 1e-5)
    out, bias = torch.zeros(33, 17, device=DEVICE), torch.ones(33, device=DEVICE)
    outer_sum(a, g, w, out=out, bias=bias, backend="triton")
    scaled = g.cpu().double() * w.cpu().double().unsqueeze(1)
    assert_sum(out, scaled.t() @ a.cpu().double(), scaled.abs().t() @ a.cpu().double().abs(), rows)
    assert_sum(bias, 1 + scaled.sum(0), 1 + scaled.abs().sum(0), 2)


@pytest.mark.parametrize(("rows", "p"), [(0, 3), (1, 1), (13, 131), (300, 40)])
@pytest.mark.parametrize("with_factors", [False, True])
def test_diagonal_sum(rows, p, with_factors):
    g, w = matrix(rows, p, 2), weights_of(rows)
    factors = matrix(rows, p, 5) if with_factors else None
    start = torch.randn(p, generator=generator(4))
    product = g.double() if factors is None else g.double() * factors.double()
    expected, magnitude = (
        start.double() + w.double() @ product,
        start.double().abs() + w.double() @ product.abs(),
    )
    g[1::4] = float("nan")
    g, w, factors, out = on_device(g, w, factors, start.clone())
    diagonal_weighted_sum(g, w, factors=factors, out=out, backend="triton")
    assert_sum(out, expected, magnitude, 2)


@pytest.mark.parametrize(("rows", "table", "p"), [(0, 3, 4), (1, 1, 1), (75, 4, 33), (40, 50, 300)])
@pytest.mark.parametrize("span", [4, scatter_impl.SPAN])
def test_scatter_sum(rows, table, p, span):
    g, w = matrix(rows, p, 2), weights_of(rows)
    ids = torch.randint(-1, table, (rows,), generator=generator(6))
    # The last row in the table's order is one that counts, not one of weight zero.
    ids[-1:] = table - 1
    start = torch.randn(table, p, generator=generator(4))
    expected, magnitude = start.double(), start.double().abs()
    for n in range(rows):
        if ids[n] >= 0:
            expected[ids[n]] += w[n].double() * g[n].double()
            magnitude[ids[n]] += w[n].double() * g[n].double().abs()
    g[1::4], g[ids < 0] = float("inf"), float("nan")
    ids, g, w, out = on_device(ids, g, w, start.clone())
    scatter_impl.scatter_weighted_sum(ids, g, w, out, span=span)
    assert_sum(out, expected, magnitude, 3)


@pytest.mark.skipif(not INTERPRETED, reason="on a device this ends the process, as an assertion there does")
def test_an_id_beyond_the_table_is_refused_and_nothing_written():
    out = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="ids"):
        scatter_weighted_sum(torch.tensor([0, 3]), torch.ones(2, 2), torch.ones(2), out=out, backend="triton")
    assert not out.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaled_rows(dtype):
    x, w = matrix(13, 131, 2).to(dtype), weights_of(13)
    expected = x.float() * w.unsqueeze(1)
    x[1::4] = float("nan")
    found = scale_rows(*on_device(x, w), backend="triton").cpu()
    assert torch.equal(found, expected), "in single precision, whatever the rows are of"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["rows", "ragged", "long"])
def test_a_unit_that_is_not_finite_is_alone(bad, name):
    lengths = LAYOUTS[name]
    rows, width = row_count(lengths), 21
    offsets, units = offsets_of(lengths), segments(lengths, rows)
    victim = max(range(len(units)), key=lambda u: units[u].stop - units[u].start)
    a, g, ids = matrix(rows, width, 1), matrix(rows, width, 2), torch.arange(rows) % 3

    def all_norms() -> list[Tensor]:
        a_there, g_there, ids_there, offsets_there = on_device(a, g, ids, offsets)
        found = [
            outer_sq_norms(a_there, g_there, offsets_there, backend="triton"),
            diagonal_sq_norms(g_there, offsets_there, backend="triton"),
            scatter_sq_norms(ids_there, g_there, offsets_there, backend="triton"),
        ]
        if lengths is not None:
            for run in (outer_impl.gram_norms, outer_impl.tile_norms):
                found.append(torch.zeros(len(units), device=DEVICE))
                run(a_there, g_there, offsets_there, found[-1])
        return [norms.cpu() for norms in found]

    clean = all_norms()
    g[units[victim].stop - 1, width - 1] = bad
    others = torch.arange(len(units)) != victim
    for before, after in zip(clean, all_norms(), strict=True):
        assert not torch.isfinite(after[victim])
        assert torch.equal(before[others], after[others])


def test_who_executes():
    x = torch.ones(4, 3)
    assert choose("auto", x, written=(x,)) == "cpp", "the interpreter is never chosen"
    assert choose("triton", *on_device(x)) == "triton"
    with pytest.raises(ValueError, match="no Triton kernel"):
        use_cpp("triton", x)
    if not INTERPRETED:
        assert choose("auto", x.to(DEVICE)) == "triton"
        assert choose("auto", x.to(DEVICE).double()) == "reference"
    with pytest.raises(ValueError, match="backend 'triton' needs"):
        choose("triton", x.to("meta"))


def test_strided_inputs_are_taken_and_strided_outputs_refused():
    whole = matrix(24, 24, 9)
    for g in (whole[:, 3:10], whole.t(), whole[::2]):
        expected = g.double().square().sum(1)
        g = (
            g.to(DEVICE)
            if INTERPRETED
            else whole.to(DEVICE).as_strided(g.shape, g.stride(), g.storage_offset())
        )
        assert_close(diagonal_sq_norms(g, backend="triton").cpu(), expected)
        assert_close(outer_sq_norms(g, g, backend="triton").cpu(), expected.square())
    with pytest.raises(ValueError, match="contiguous where written"):
        diagonal_sq_norms(whole.to(DEVICE), out=torch.zeros(48, device=DEVICE)[::2], backend="triton")
    with pytest.raises(ValueError, match="fp32, bf16 or fp16"):
        diagonal_sq_norms(whole.to(DEVICE).double(), backend="triton")


def test_offsets_that_lie_are_kept_within_the_rows():
    """On a device nobody looks at them before; what they name outside of the matrix is not read."""
    a, g = on_device(torch.ones(4, 3), torch.ones(4, 2))
    offsets = torch.tensor([-5, 2, 2**40], device=DEVICE)
    for run in (outer_impl.gram_norms, outer_impl.tile_norms):
        norms = torch.zeros(2, device=DEVICE)
        run(a, g, offsets, norms)
        assert norms.tolist() == [24.0, 24.0]


def test_the_same_input_gives_the_same_bits():
    lengths = LAYOUTS["ragged"]
    rows = row_count(lengths)
    a, g, w, offsets = on_device(
        matrix(rows, 33, 1), matrix(rows, 40, 2), weights_of(rows), offsets_of(lengths)
    )
    found = []
    for _ in range(2):
        out = torch.zeros(40, 33, device=DEVICE)
        outer_weighted_sum(a, g, w, out=out, backend="triton")
        found.append(torch.cat([out.flatten(), outer_sq_norms(a, g, offsets, backend="triton")]))
    assert torch.equal(*found)


class Recorder(TorchDispatchMode):
    """Names of the torch operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device():
    """No value and no shape is asked for: what a launch does next depends on shapes alone."""
    lengths = LAYOUTS["ragged"]
    rows = row_count(lengths)
    a, g, w, offsets = on_device(
        matrix(rows, 7, 1), matrix(rows, 9, 2), weights_of(rows), offsets_of(lengths)
    )
    ids, units = torch.arange(rows, device=DEVICE) % 3, len(lengths)
    norms, sums, flat = (torch.zeros(n, device=DEVICE) for n in (units, units, 9))
    weight = torch.zeros(9, 7, device=DEVICE)
    with Recorder() as recorder:
        outer_impl.outer_sq_norms(a, g, offsets, norms)
        outer_impl.gram_norms(a, g, offsets, norms, sums)
        outer_impl.tile_norms(a, g, offsets, norms, sums)
        outer_impl.rank1_norms(a, g, torch.zeros_like(w), torch.zeros_like(w))
        outer_impl.outer_sum(a, g, w, weight, flat)
        outer_impl.scale_rows(g, w)
        diagonal_sq_norms(g, offsets if DEVICE == "cuda" else None, backend="triton")
        diagonal_weighted_sum(g, w, out=flat, backend="triton")
        scatter_impl.scatter_sq_norms(ids, g, offsets, norms)
        if DEVICE == "cuda":
            scatter_impl.scatter_weighted_sum(ids, g, w, weight[:3].new_zeros(3, 9))
        add_gaussian_noise_(flat, noise_std=1.0, **PLACE, backend="triton")
    waiting = {
        "item",
        "_local_scalar_dense",
        "nonzero",
        "_to_copy",
        "unique_dim",
        "_unique2",
        "equal",
        "masked_select",
    }
    assert "aten::sort.stable" in recorder.seen
    assert not {name for name in recorder.seen if name.split("::")[1].split(".")[0] in waiting}
