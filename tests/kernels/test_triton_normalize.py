"""Triton kernels of normalisations: on the GPU if there is one, else in Triton's interpreter (tests/conftest.py).

Means of whole numbers and deviations of powers of two make what is added up exact: per-unit sums are right to the last
bit, or wrong. Input gradients are held to the size of their terms.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="the package triton cannot be imported here")

from synthward.engine.rules import group_norm as group_rule
from synthward.engine.rules import layer_norm as layer_rule
from synthward.kernels import group_norm_backward, layer_norm_backward, uses_triton
from synthward.kernels._triton import INTERPRETED
from synthward.kernels.normalize import triton_impl
from tests.engine.rules.test_norms import CASES, assert_exact, build
from tests.kernels.cases import generator, offsets_of, segments, whole
from tests.kernels.test_triton import Recorder

# NumPy, which the interpreter computes with, warns of what the kernels are meant to survive.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
WAITING = {"item", "_local_scalar_dense", "nonzero", "_to_copy", "equal", "masked_select"}
STEP = triton_impl._LEAST_ROWS
# Rows of units: empty ones, one program's, and those that several programs share, to the row.
COUNTS = [[0], [1], [3, 0, 5], [0, 0], [STEP, 0, STEP + 1], [2 * STEP + 1, 1, 3 * STEP, 2], [7, 5 * STEP - 1]]
WIDE = triton_impl._WHOLE + 5


@contextmanager
def blocks(*, small: bool) -> Iterator[None]:
    """Shapes of programs; `small`: so that narrow rows are as wide ones, of several programs."""
    with pytest.MonkeyPatch.context() as patch:
        if small:
            for name, value in (("_WHOLE", 16), ("_COLUMNS", 16), ("_TILE", 64), ("_SPAN", 32)):
                patch.setattr(triton_impl, name, value)
        yield


class Rows(NamedTuple):
    """A call of layer norm, or of RMS norm without a mean."""

    x: Tensor
    g: Tensor
    mean: Tensor | None
    rstd: Tensor
    weight: Tensor | None


def powers(*shape: int, seed: int) -> Tensor:
    """One half, one or two."""
    return 2.0 ** torch.randint(-1, 2, shape, generator=generator(seed)).float()


def rows_of(
    rows: int, p: int, seed: int = 0, *, is_rms: bool = False, weighted: bool = True, dtype=torch.float32
) -> Rows:
    mean = None if is_rms else whole(1, rows, seed + 2)[0]
    weight = torch.randn(p, generator=generator(seed + 4)) if weighted else None
    x, g = whole(rows, p, seed).to(dtype), whole(rows, p, seed + 1).to(dtype)
    return Rows(x, g, mean, powers(rows, seed=seed + 3), weight)


def run_rows(
    call: Rows,
    offsets: Tensor | None,
    order: Tensor | None = None,
    wanted: tuple[bool, bool, bool] = (True, True, True),
) -> list[Tensor | None]:
    """dx, scale and bias, or None where they are not wanted; written over what is no number."""
    units = len(call.x) if offsets is None else len(offsets) - 1
    shapes = (call.x.shape, (units, call.x.shape[1]), (units, call.x.shape[1]))
    dtypes = (call.x.dtype, torch.float32, torch.float32)
    outputs = [
        torch.full(shape, torch.nan, dtype=dtype, device=DEVICE) if want else None
        for shape, dtype, want in zip(shapes, dtypes, wanted, strict=True)
    ]
    there = [None if t is None else t.to(DEVICE) for t in (*call, offsets, order)]
    named = dict(zip(("order", "dx", "scale", "bias"), (there[-1], *outputs), strict=True))
    layer_norm_backward(*there[:-1], **named, backend="triton")
    return [None if t is None else t.cpu() for t in outputs]


def exact_dx(c: Tensor, h: Tensor, r: Tensor, *, is_centred: bool) -> tuple[Tensor, Tensor]:
    """Input gradient over the last axis in float64, and the size of its terms. c is centred, h the gradient at the
    normalised input."""
    inner = (h * c).mean(-1, keepdim=True) * r * r
    shift = h.mean(-1, keepdim=True) if is_centred else torch.zeros_like(r)
    size = h.abs() + (h * c).abs().mean(-1, keepdim=True) * r * r * c.abs() + h.abs().mean(-1, keepdim=True)
    return r * (h - c * inner - shift), r * size


def assert_dx(found: Tensor, exact: Tensor, size: Tensor) -> None:
    # (The interpreter rounds to bf16 towards zero.)
    bound = 8 * 2.0**-24 * size + 2 * ROUNDING[found.dtype] * exact.abs() + 1e-30
    assert ((found.double() - exact).abs() <= bound).all()


def assert_rows(
    call: Rows,
    lengths: list[int] | None,
    order: Tensor | None = None,
    wanted: tuple[bool, bool, bool] = (True, True, True),
) -> None:
    rows = len(call.x)
    dx, scale, bias = run_rows(call, offsets_of(lengths), order, wanted)
    x, g, r = call.x.double(), call.g.double(), call.rstd.double().unsqueeze(1)
    c = x if call.mean is None else x - call.mean.double().unsqueeze(1)
    at = torch.arange(rows) if order is None else order
    units = [at[unit] for unit in segments(lengths, rows)]
    for found, terms in ((scale, g * c * r), (bias, g)):
        if found is not None:
            expected = [terms[unit].sum(0) for unit in units]
            assert torch.equal(
                found, torch.stack(expected).float() if units else found.new_zeros(found.shape)
            )
    if dx is not None and rows:
        h = g if call.weight is None else g * call.weight.double()
        assert_dx(dx, *exact_dx(c, h, r, is_centred=call.mean is not None))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.sampled_from([*COUNTS, None]),
    p=st.sampled_from([1, 2, 3, 15, 16, 17, 31, 64, 77]),
    is_rms=st.booleans(),
    weighted=st.booleans(),
    shuffled=st.booleans(),
    small=st.booleans(),
    wanted=st.sampled_from([(True,) * 3, *itertools.product((True, False), repeat=3)]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10**6),
)
def test_layer_norm_of_any_shape(lengths, p, is_rms, weighted, shuffled, small, wanted, dtype, seed):
    rows = 2 * STEP + 3 if lengths is None else sum(lengths)
    order = torch.randperm(rows, generator=generator(seed)) if shuffled else None
    with blocks(small=small):
        assert_rows(
            rows_of(rows, p, seed, is_rms=is_rms, weighted=weighted, dtype=dtype), lengths, order, wanted
        )


@pytest.mark.parametrize("lengths", [None, [2, 0, STEP + 1]], ids=str)
@pytest.mark.parametrize("is_rms", [False, True])
@pytest.mark.parametrize("p", [triton_impl._WHOLE, WIDE, triton_impl._SPAN + 1])
def test_rows_of_more_than_one_block(p, is_rms, lengths):
    rows = 3 if lengths is None else sum(lengths)
    assert_rows(rows_of(rows, p, is_rms=is_rms), lengths, torch.randperm(rows, generator=generator()))


@pytest.mark.parametrize("most", [STEP // 2, triton_impl._MOST_ROWS])
def test_programs_of_more_and_of_fewer_rows(most, monkeypatch):
    """As where there are many rows, or few."""
    monkeypatch.setattr(triton_impl, "_PROGRAMS", 1)
    monkeypatch.setattr(triton_impl, "_LEAST_ROWS", 2)
    monkeypatch.setattr(triton_impl, "_MOST_ROWS", most)
    assert_rows(rows_of(5 * most + 4, 20), [1, most, most + 1, 0, 2 * most, most + 2])
    assert_rows(rows_of(2 * most + 1, 20), None)


@pytest.mark.parametrize("lengths", [[], [0, 0, 0], None], ids=str)
def test_no_rows(lengths):
    dx, *sums = run_rows(rows_of(0, 5), offsets_of(lengths))
    assert dx.shape == (0, 5)
    assert all(torch.equal(s, torch.zeros(len(lengths or []), 5)) for s in sums)
    dx, *sums = run_rows(rows_of(4, 0), offsets_of([1, 3]))
    assert dx.shape == (4, 0) and all(s.shape == (2, 0) for s in sums)


# Group norm


class Groups(NamedTuple):
    x: Tensor
    g: Tensor
    mean: Tensor
    rstd: Tensor
    weight: Tensor | None


def groups_of(
    rows: int, groups: int, each: int, length: int, seed: int = 0, *, weighted=True, dtype=torch.float32
) -> Groups:
    channels = groups * each
    x, g = (whole(rows * channels, length, seed + i).view(rows, channels, length).to(dtype) for i in range(2))
    weight = torch.randn(channels, generator=generator(seed + 4)) if weighted else None
    return Groups(x, g, whole(rows, groups, seed + 2), powers(rows, groups, seed=seed + 3), weight)


def run_groups(call: Groups, *, with_dx: bool = True) -> list[Tensor | None]:
    x, *others = [None if t is None else t.to(DEVICE) for t in call]
    scale, bias = torch.full((2, *call.x.shape[:2]), torch.nan, device=DEVICE)
    dx = torch.full_like(x, torch.nan) if with_dx else None
    group_norm_backward(x, *others, dx=dx, scale=scale, bias=bias, backend="triton")
    return [None if t is None else t.cpu() for t in (dx, scale, bias)]


def assert_groups(call: Groups, *, with_dx: bool = True) -> None:
    (rows, channels, _), groups = call.x.shape, call.mean.shape[1]
    dx, scale, bias = run_groups(call, with_dx=with_dx)
    each = channels // groups
    mean, r = (t.double().repeat_interleave(each, 1).unsqueeze(2) for t in (call.mean, call.rstd))
    c, g = call.x.double() - mean, call.g.double()
    assert torch.equal(scale, (g * c * r).sum(2).float())
    assert torch.equal(bias, g.sum(2).float())
    if dx is not None:
        h = g if call.weight is None else g * call.weight.double().unsqueeze(1)
        flat = (rows, groups, -1)
        r = call.rstd.double().unsqueeze(2)
        exact, size = exact_dx(c.reshape(flat), h.reshape(flat), r, is_centred=True)
        assert_dx(dx, exact.view(dx.shape), size.view(dx.shape))


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 4),
    groups=st.integers(1, 4),
    each=st.integers(1, 5),
    length=st.sampled_from([1, 2, 7, 15, 16, 17, 49, 100]),
    weighted=st.booleans(),
    small=st.booleans(),
    with_dx=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10**6),
)
def test_group_norm_of_any_shape(rows, groups, each, length, weighted, small, with_dx, dtype, seed):
    with blocks(small=small):
        assert_groups(
            groups_of(rows, groups, each, length, seed, weighted=weighted, dtype=dtype), with_dx=with_dx
        )


@pytest.mark.parametrize(
    ("groups", "each", "length"),
    [
        (2, 2, triton_impl._WHOLE // 2),
        (2, 3, 2000),
        (3, 1, 2 * triton_impl._SPAN + 1),
        (1, WIDE, 1),
        (1, 150, 30),
    ],
)
def test_groups_of_one_block_and_more(groups, each, length):
    assert_groups(groups_of(2, groups, each, length))


@pytest.mark.parametrize("shape", [(0, 1, 2, 3), (2, 1, 2, 0)])
def test_no_elements(shape):
    dx, scale, bias = run_groups(groups_of(*shape))
    assert not dx.numel() and not scale.any() and not bias.any()


# What holds for both


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_what_is_not_finite_stays_in_its_own_row_and_unit(bad, small):
    lengths, at = [2, 0, STEP + 2, 1], STEP + 1
    rows, offsets = sum(lengths), offsets_of(lengths)
    call, order = rows_of(rows, 20), torch.randperm(rows, generator=generator(1))
    row = int(order[at])
    for units, where in ((offsets, [[row], [2], [2]]), (None, [[row], [at], [at]])):
        with blocks(small=small):
            clean = run_rows(call, units, order)
        for name in ("x", "g", "mean", "rstd"):
            spoilt = call._replace(**{name: getattr(call, name).clone()})
            getattr(spoilt, name)[(row, 3) if name in ("x", "g") else row] = bad
            with blocks(small=small):
                after = run_rows(spoilt, units, order)
            for i, (before, found, own) in enumerate(zip(clean, after, where, strict=True)):
                others = [n for n in range(len(before)) if n not in own]
                assert torch.equal(before[others], found[others])
                assert torch.isfinite(found[own]).all() == (i == 2 and name != "g")


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_own_group(bad, small):
    for name in ("x", "g", "mean", "rstd"):
        call = groups_of(3, 2, 3, 10)
        spoilt = call._replace(**{name: getattr(call, name).clone()})
        getattr(spoilt, name)[(1, 1) if name in ("mean", "rstd") else (1, 4, 2)] = bad
        with blocks(small=small):
            clean, after = run_groups(call), run_groups(spoilt)
        own = torch.zeros(3, 6, dtype=torch.bool)
        own[1, 3:] = True
        for i, (before, found) in enumerate(zip(clean, after, strict=True)):
            assert torch.equal(before[~own], found[~own])
            assert torch.isfinite(found[own]).all() == (i == 2 and name != "g")


@pytest.mark.parametrize("small", [False, True])
def test_the_same_input_gives_the_same_bits(small):
    lengths, found = [1, 2 * STEP, 0, 2], []
    rows = sum(lengths)
    x, g, statistics = (torch.randn(n, rows, generator=generator(n)) for n in (33, 34, 2))
    call = Rows(x.T.contiguous(), g[1:].T.contiguous(), *statistics, torch.randn(33))
    images = [torch.randn(3, 6, 53, generator=generator(i)) for i in range(2)]
    groups = Groups(*images, torch.randn(3, 2), torch.rand(3, 2), torch.randn(6))
    for _ in range(2):
        with blocks(small=small):
            results = [*run_rows(call, offsets_of(lengths)), *run_groups(groups)]
        found.append(torch.cat([result.flatten() for result in results]))
    assert torch.equal(*found)


@pytest.mark.parametrize("small", [False, True])
def test_a_large_offset_does_not_drown_the_scale(small):
    """Values that float32 holds exactly, far from zero: sums of g * x and of g apart would cancel."""
    call, offsets = rows_of(STEP + 4, 20), offsets_of([3, STEP + 1])
    far = call._replace(x=call.x + 2.0**20, mean=call.mean + 2.0**20)
    images = groups_of(2, 2, 3, 20)
    moved = images._replace(x=images.x + 2.0**20, mean=images.mean + 2.0**20)
    with blocks(small=small):
        for before, after in zip(run_rows(call, offsets), run_rows(far, offsets), strict=True):
            assert torch.equal(before, after)
        for before, after in zip(run_groups(images), run_groups(moved), strict=True):
            assert torch.equal(before, after)


def test_sums_are_of_doubles():
    """What one large term would drown in float32 is there when it is gone again, within a program and between them."""
    rows = 4 * STEP
    g = torch.full((rows, 3), 2.0**-30)
    g[0], g[-1] = 1.0, -1.0
    x, ones = torch.ones(rows, 3), torch.ones(rows)
    for unit in (slice(0, STEP), slice(0, rows)):
        part = g[unit].clone()
        part[-1] = -1.0
        n = len(part)
        _, scale, bias = run_rows(Rows(x[:n], part, None, ones[:n], None), torch.tensor([0, n]))
        assert torch.equal(scale, torch.full((1, 3), (n - 2) * 2.0**-30)) and torch.equal(scale, bias)


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    is_rms=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_it_is_what_the_reference_gives(lengths, is_rms, seed):
    """Of numbers that are not whole."""
    rows, offsets = sum(lengths), offsets_of(lengths)
    x, g = (torch.randn(rows, 24, generator=generator(seed + i)) for i in range(2))
    mean = None if is_rms else x.mean(1)
    call = Rows(x, g, mean, (x.square().mean(1) + 1e-5).rsqrt(), torch.randn(24, generator=generator(seed)))
    expected = [torch.empty(rows, 24), *torch.empty(2, len(lengths), 24)]
    named = dict(zip(("dx", "scale", "bias"), expected, strict=True))
    layer_norm_backward(*call, offsets, **named, backend="reference")
    for mine, theirs in zip(run_rows(call, offsets), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


# Who executes, and on what


def test_who_executes():
    x = torch.ones(4, 3)
    assert not uses_triton(x), "the interpreter is never chosen"
    if not INTERPRETED:
        assert uses_triton(x.to(DEVICE), None, x.to(DEVICE).bfloat16())
        assert not uses_triton(x.to(DEVICE).double())


def test_strided_inputs_are_taken_and_strided_outputs_refused():
    call = rows_of(6, 5)
    strided = call._replace(x=call.x.t().contiguous().t(), rstd=torch.stack([call.rstd, -call.rstd], 1)[:, 0])
    assert not strided.x.is_contiguous() and not strided.rstd.is_contiguous()
    for mine, theirs in zip(run_rows(strided, None), run_rows(call, None), strict=True):
        assert torch.equal(mine, theirs)
    x, g, mean, rstd, _ = (t.to(DEVICE) for t in call)
    with pytest.raises(ValueError, match="contiguous where written"):
        layer_norm_backward(x, g, mean, rstd, scale=x.new_zeros(5, 6).t(), backend="triton")
    sums = {"scale": x.new_zeros(6, 5), "bias": x.new_zeros(5, 6).t()}
    with pytest.raises(ValueError, match="contiguous where written"):
        group_norm_backward(
            x.unsqueeze(2), g.unsqueeze(2), mean[:, None], rstd[:, None], **sums, backend="triton"
        )


def test_operands_of_two_types():
    """As under autocast: the input is bf16, the gradient of the output fp32."""
    call = rows_of(5, 9)
    mixed = run_rows(call._replace(x=call.x.bfloat16()), None)
    for mine, theirs in zip(mixed, run_rows(call, None), strict=True):
        rounding = 2 * ROUNDING[torch.bfloat16] if mine.dtype == torch.bfloat16 else 0.0
        assert ((mine.float() - theirs).abs() <= rounding * theirs.abs()).all()


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_order_is_checked(backend):
    x, *others = (t.to(DEVICE) for t in rows_of(3, 4))
    for order, error in ((torch.tensor([0, 1]), ValueError), (torch.tensor([0, 1, 2]).int(), TypeError)):
        with pytest.raises(error, match=r"^order: "):
            layer_norm_backward(x, *others, order=order.to(DEVICE), dx=torch.empty_like(x), backend=backend)


def test_offsets_and_orders_that_lie_are_kept_within_the_rows():
    """On a device nobody looks at them before; what they name outside of the rows is neither read nor written."""
    x, *others = (t.to(DEVICE) for t in rows_of(4 * STEP, 6))
    rows = len(x)
    liars = [[-5, 2, 2**40], [rows, 3, -1], [7, rows - 1, rows], [2**40, 2**41, 0]]
    for offsets, turned in itertools.product(liars, (False, True)):
        order = torch.arange(rows, device=DEVICE) * (2**33 if turned else 1) - 3
        guard = torch.full((4, rows, 6), 7.0, device=DEVICE)
        dx, (scale, bias) = guard[1], torch.full((2, 2, 6), 7.0, device=DEVICE)
        triton_impl.layer_norm_backward(
            x, *others, torch.tensor(offsets, device=DEVICE), order, 2, (dx, scale, bias)
        )
        assert guard[[0, 2, 3]].eq(7.0).all()
        assert torch.isfinite(scale).all() and torch.isfinite(bias).all()
    with pytest.raises(ValueError, match=r"^offsets: "):
        triton_impl.layer_norm_backward(
            x, *others, torch.tensor([0], device=DEVICE), None, 0, (dx, None, None)
        )


@pytest.mark.parametrize("small", [False, True])
def test_nothing_waits_for_the_device(small):
    """No value and no shape is asked for: what a launch does next depends on shapes alone."""
    call = [t.to(DEVICE) for t in rows_of(2 * STEP, 20)]
    groups = [t.to(DEVICE) for t in groups_of(2, 2, 3, 10)]
    offsets, order = torch.tensor([0, 1, 2 * STEP], device=DEVICE), torch.arange(2 * STEP, device=DEVICE)
    outputs = (torch.empty_like(call[0]), *torch.empty(2, 2, 20, device=DEVICE))
    of_groups = (torch.empty_like(groups[0]), *torch.empty(2, 2, 6, device=DEVICE))
    with blocks(small=small), Recorder() as recorder:
        triton_impl.layer_norm_backward(*call, offsets, order, 2, outputs)
        triton_impl.group_norm_backward(*groups, *of_groups)
    assert "aten::empty.memory_format" in recorder.seen
    assert not {name for name in recorder.seen if name.split("::")[1].split(".")[0] in WAITING}


# In the engine


@pytest.mark.parametrize("counts", [[1] * 4, [2, 0, 3]], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_clipped_sums_are_exact_by_these_kernels(name, counts, monkeypatch):
    """As on a device: input gradients too are the kernel's."""
    seen = []

    def there(kernel):
        def run(*arguments, **named):
            arguments = [None if t is None else t.to(DEVICE) for t in arguments]
            moved = {key: None if t is None else t.to(DEVICE) for key, t in named.items()}
            kernel(*arguments, **moved, backend="triton")
            for key, t in named.items():
                if t is not None and key != "order":
                    t.copy_(moved[key])
            seen.append(named["dx"] is not None)

        return run

    monkeypatch.setattr(layer_rule, "is_compiled", lambda *_: False)
    monkeypatch.setattr(layer_rule, "uses_triton", lambda *_: True)
    monkeypatch.setattr(layer_rule, "layer_norm_backward", there(layer_norm_backward))
    monkeypatch.setattr(group_rule, "group_norm_backward", there(group_norm_backward))
    module, shape = build(name)
    x = torch.randn(sum(counts), *shape)
    assert_exact(module, x, counts, max_grad_norm=1e-2)
    assert seen and all(seen)
