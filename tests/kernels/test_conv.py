"""Weight gradients of convolutions against a plain float64 loop over places and taps.

Operands of small whole numbers make every product and sum exact in float32, whatever the order of the additions: then
a kernel is right to the last bit or wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from synthward.engine.clipping import UNIT_ROUNDOFF, formed_error, product_error
from synthward.engine.layout import Layout
from synthward.engine.rules.conv import ConvUse
from synthward.kernels import ConvShape, available_isas, conv_norms, conv_sum, conv_unit_grads
from tests.kernels.cases import executing, generator, offsets_of, segments, sq_norms, whole

BACKENDS = ["reference", *available_isas()]
METHODS = ["tile", "gram"]
FLOATS = [1.0, 1.0 + 2.0**-23, 1.0 + 2.0**-12, 0.1, 1.0 / 3.0, 1.9]
ONES, ZEROS = (1, 1, 1), (0, 0, 0)
Axes = tuple[int, int, int]


def shape_of(
    groups: int, channels: int, outputs: int, size: Axes, kernel: Axes, **how: Axes
) -> ConvShape | None:
    """The shape with as many places as torch gives it; None if the kernel does not fit."""
    stride, padding, dilation = (
        how.get("stride", ONES),
        how.get("padding", ZEROS),
        how.get("dilation", ONES),
    )
    spans = zip(size, kernel, stride, padding, dilation, strict=True)
    x, y, z = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in spans)
    if min(x, y, z) < 1:
        return None
    return ConvShape(groups, channels, outputs, size, kernel, stride, padding, dilation, (x, y, z))


def must(shape: ConvShape | None) -> ConvShape:
    assert shape is not None
    return shape


def gradient(v: ConvShape, images: Tensor, output_grads: Tensor, rows: list[int]) -> np.ndarray:
    """``sum_n G_n`` [groups, outputs, taps, channels] over `rows`: each place times what each tap sees there."""
    total = np.zeros((v.groups, v.outputs, v.taps, v.channels))
    x = images[rows].double().numpy().reshape(len(rows), v.groups, v.channels, *v.size)
    g = output_grads[rows].double().numpy().reshape(len(rows), v.groups, v.outputs, *v.out)
    for tap, offset in enumerate(product(*(range(k) for k in v.kernel))):
        for place in product(*(range(o) for o in v.out)):
            axes = zip(place, v.stride, offset, v.dilation, v.padding, strict=True)
            at = [i * s + k * d - p for i, s, k, d, p in axes]
            if all(0 <= i < n for i, n in zip(at, v.size, strict=True)):
                seen, here = x[:, :, :, at[0], at[1], at[2]], g[:, :, :, place[0], place[1], place[2]]
                total[:, :, tap] += np.einsum("ngo,ngc->goc", here, seen)
    return total


def place_lengths(v: ConvShape, images: Tensor, output_grads: Tensor) -> Tensor:
    """Of each image, the sum over groups and places of the norms of the place's own gradient, float64 [N]."""
    pads = [n for axis in (2, 1, 0) for n in (v.padding[axis], v.padding[axis] + v.reach[axis])]
    x = F.pad(images.double().square().view(-1, v.groups, v.channels, *v.size).sum(2), pads)
    seen: Tensor | int = 0
    for offset in product(*(range(k) for k in v.kernel)):
        at = x
        for axis in range(3):
            index = torch.arange(v.out[axis]) * v.stride[axis] + offset[axis] * v.dilation[axis]
            at = at.index_select(2 + axis, index)
        seen = seen + at
    assert isinstance(seen, Tensor)
    here = output_grads.double().square().view(-1, v.groups, v.outputs, *v.out).sum(2)
    return (seen * here).sqrt().flatten(1).sum(1)


def whole_rows(v: ConvShape, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    return whole(rows, v.image_numel, seed, most=2), whole(rows, v.output_numel, seed + 1, most=2)


def rows_of(lengths: list[int], order: Tensor | None) -> list[list[int]]:
    """Images of each unit."""
    index = list(range(sum(lengths))) if order is None else order.tolist()
    return [index[unit] for unit in segments(lengths, sum(lengths))]


@st.composite
def shapes(draw: st.DrawFn) -> ConvShape:
    """1 to 3 axes; grouped and depthwise; kernels that stand out over the image, and images that stand out over what
    the kernel reaches."""
    axes = draw(st.sampled_from([1, 1, 2, 2, 2, 3]))
    most = {1: 40, 2: 8, 3: 5}[axes]

    def three(values: st.SearchStrategy[int], fill: int) -> Axes:
        x, y, z = [fill] * (3 - axes) + [draw(values) for _ in range(axes)]
        return x, y, z

    size, kernel = three(st.integers(1, most), 1), three(st.integers(1, 5 if axes < 3 else 3), 1)
    how = {
        "stride": draw(st.sampled_from([ONES, three(st.integers(1, 3), 1)])),
        "padding": three(st.integers(0, 3), 0),
        "dilation": three(st.integers(1, 2), 1),
    }
    groups = draw(st.sampled_from([1, 1, 2, 5]))
    channels = draw(st.sampled_from([1, 3, 4, 17, 33] if groups == 1 else [1, 1, 3]))
    outputs = draw(st.sampled_from([1, 2, 3, 17, 33] if groups == 1 else [1, 1, 3]))
    fitting = shape_of(groups, channels, outputs, size, kernel, **how)
    if fitting is None:  # pad until it fits
        wide = tuple(k * d for k, d in zip(kernel, how["dilation"], strict=True))
        fitting = must(shape_of(groups, channels, outputs, size, kernel, **{**how, "padding": wide}))
    return fitting


LAYOUTS = [[1], [1, 1, 1], [2, 0, 3], [5], [0, 1, 0], [1, 4]]


@settings(max_examples=150, deadline=None)
@given(
    v=shapes(),
    lengths=st.sampled_from(LAYOUTS),
    shuffled=st.booleans(),
    backend=st.sampled_from(BACKENDS),
    seed=st.integers(0, 10**6),
)
def test_norms_and_gradients_of_any_shape(v, lengths, shuffled, backend, seed):
    rows, offsets = sum(lengths), offsets_of(lengths)
    order = torch.randperm(rows, generator=generator(seed)) if shuffled else None
    x, g = whole_rows(v, rows, seed)
    expected = [gradient(v, x, g, unit) for unit in rows_of(lengths, order)]
    lengths_at = place_lengths(v, x, g)
    least = torch.stack([lengths_at[unit].sum() for unit in rows_of(lengths, order)])
    is_gram = lengths == [1] * rows and order is None and v.stride == ONES
    with executing(backend) as chosen:
        for method in METHODS if is_gram else ["tile"]:
            found, row_sums = torch.ones(len(lengths)), torch.ones(len(lengths))
            conv_norms(v, x, g, offsets, found, row_sums, order=order, method=method, backend=chosen)
            assert torch.equal(found, 1.0 + sq_norms(expected).float())
            assert (row_sums.double() >= (1.0 + least) * (1.0 - 1e-6)).all()
        grads = conv_unit_grads(v, x, g, offsets, order=order, backend=chosen)
    assert grads.shape == (len(lengths), v.numel)
    for mine, theirs in zip(grads, expected, strict=True):
        assert torch.equal(mine, torch.from_numpy(theirs).float().flatten())


@settings(max_examples=100, deadline=None)
@given(
    v=shapes(),
    rows=st.sampled_from([0, 1, 2, 5, 17, 33]),
    backend=st.sampled_from(BACKENDS),
    seed=st.integers(0, 10**6),
)
def test_sums_of_any_shape(v, rows, backend, seed):
    """Weights, and what stood in `out`; images of weight zero hold what is no number."""
    x, g = whole_rows(v, rows, seed)
    weights = torch.tensor([0.0, 0.25, 1.0, 2.0])[torch.randint(0, 4, (rows,), generator=generator(seed))]
    start = whole(1, v.numel, seed + 2, most=50)[0]
    scaled = g * weights.unsqueeze(1)
    expected = start.double() + torch.from_numpy(gradient(v, x, scaled, list(range(rows)))).flatten()
    x[weights == 0], g[weights == 0] = torch.nan, torch.inf
    out = start.clone()
    with executing(backend) as chosen:
        conv_sum(v, x, g, weights, out=out, backend=chosen)
    assert torch.equal(out, expected.float())


# Around a block of places (128), a panel of columns, and one place alone.
EDGES = [
    *(must(shape_of(1, 3, 5, (1, 1, n), (1, 1, 1))) for n in (1, 127, 128, 129, 257)),
    *(
        must(shape_of(1, c, o, (1, 3, 3), (1, 3, 3)))
        for c, o in ((1, 1), (3, 17), (17, 3), (31, 33), (128, 1))
    ),
    must(shape_of(1, 129, 127, (1, 1, 1), (1, 1, 1))),
    must(shape_of(17, 1, 1, (1, 12, 11), (1, 3, 3), padding=(0, 1, 1))),
    must(shape_of(17, 1, 2, (1, 1, 131), (1, 1, 7), stride=(1, 1, 2))),
    must(shape_of(1, 2, 3, (1, 2, 2), (1, 5, 7), padding=(0, 3, 6), dilation=(1, 1, 2))),
    must(shape_of(2, 3, 4, (4, 6, 7), (3, 2, 4), stride=(1, 2, 3), padding=(1, 0, 2), dilation=(1, 2, 1))),
]


@pytest.mark.parametrize("v", EDGES, ids=lambda v: f"{v.groups}x{v.channels}-{v.outputs} {v.size} {v.kernel}")
def test_edges(backend, v):
    lengths, rows = [1] * 3, 3
    x, g = whole_rows(v, rows, 1)
    expected = [gradient(v, x, g, [n]) for n in range(rows)]
    for method in METHODS if v.stride == ONES else ["tile"]:
        found, row_sums = torch.zeros(rows), torch.zeros(rows)
        conv_norms(v, x, g, offsets_of(lengths), found, row_sums, method=method, backend=backend)
        assert ((found - sq_norms(expected).float()).abs() <= 1e-27).all()
        assert (row_sums.double() >= place_lengths(v, x, g) * (1.0 - 1e-6)).all()
    out = torch.zeros(v.numel)
    conv_sum(v, x, g, torch.tensor([1.0, 0.5, 2.0]), out=out, backend=backend)
    total = expected[0] + 0.5 * expected[1] + 2.0 * expected[2]
    assert torch.equal(out, torch.from_numpy(total).float().flatten())


@pytest.mark.parametrize("places", [1, 2, 63, 64, 65])
@pytest.mark.parametrize("rows", [1, 16, 17, 300])
def test_sums_of_many_small_images(backend, places, rows):
    """Several images share a block of places; every third has weight zero."""
    v = must(shape_of(2, 3, 2, (1, 1, places), (1, 1, 3), padding=(0, 0, 1)))
    x, g = whole_rows(v, rows, 3)
    weights = torch.tensor([1.0, 0.0, 0.5])[torch.arange(rows) % 3]
    each = conv_unit_grads(v, x, g, torch.arange(rows + 1), backend="reference").double()
    expected = 1.0 + (weights.double().unsqueeze(1) * each).sum(0)
    x[1::3], g[1::3] = torch.inf, torch.nan
    out = torch.ones(v.numel)
    conv_sum(v, x, g, weights, out=out, backend=backend)
    assert torch.equal(out, expected.float())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_gradient_is_torchs(backend, transposed, groups):
    """A transposed convolution is one from its output to its input."""
    x = whole(4, 6 * 5 * 8, 1).view(4, 6, 5, 8).double()
    sizes = (6, 9 // groups, 3, 2) if transposed else (9, 6 // groups, 3, 2)
    weight = torch.zeros(sizes, dtype=torch.float64, requires_grad=True)
    run = F.conv_transpose2d if transposed else F.conv2d
    out = run(x, weight, stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=groups)
    g = whole(out.numel(), 1, 2).view_as(out).double()
    (expected,) = torch.autograd.grad(out, weight, g)
    images, grads = (g, x) if transposed else (x, g)
    v = ConvShape(
        groups,
        images.shape[1] // groups,
        grads.shape[1] // groups,
        (1, *images.shape[2:]),
        (1, 3, 2),
        (1, 2, 1),
        (0, 1, 0),
        (1, 1, 2),
        (1, *grads.shape[2:]),
    )
    found = torch.zeros(v.numel)
    conv_sum(
        v, images.float().flatten(1), grads.float().flatten(1), torch.ones(4), out=found, backend=backend
    )
    mine = found.view(-1, v.taps, v.channels).mT.reshape(weight.shape)
    assert torch.equal(mine, expected.float())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", ["images", "output_grads"])
@pytest.mark.parametrize("at", ["first", "last"])
def test_what_is_not_finite_stays_in_its_unit(backend, bad, side, at):
    v = must(shape_of(2, 3, 5, (1, 6, 7), (1, 3, 3), padding=(0, 1, 1)))
    lengths, others = [1, 3, 0, 2], torch.tensor([True, False, True, True])
    x, g = whole_rows(v, 6, 1)

    def results(offsets: Tensor, *methods: str) -> list[Tensor]:
        found = []
        for method in methods:
            norms, sums = torch.zeros(len(offsets) - 1), torch.zeros(len(offsets) - 1)
            conv_norms(v, x, g, offsets, norms, sums, method=method, backend=backend)
            found += [norms, sums]
        return [*found, conv_unit_grads(v, x, g, offsets, backend=backend)]

    single = torch.arange(7)
    clean, clean_rows = results(offsets_of(lengths), "tile"), results(single, *METHODS)
    row = 1 if at == "first" else 3
    (x if side == "images" else g)[row, 0 if at == "first" else -1] = bad
    for before, after in zip(clean, results(offsets_of(lengths), "tile"), strict=True):
        assert not torch.isfinite(after[1]).all()
        assert torch.equal(before[others], after[others])
    others = torch.arange(6) != row
    for before, after in zip(clean_rows, results(single, *METHODS), strict=True):
        assert not torch.isfinite(after[row]).all()
        assert torch.equal(before[others], after[others])


def test_the_number_of_threads_changes_no_bit(isa, restore_threads):
    v = must(shape_of(2, 5, 7, (1, 9, 10), (1, 3, 3), padding=(0, 1, 1)))
    lengths = [1 + i % 4 for i in range(30)]
    rows = sum(lengths)
    x = torch.randn(rows, v.image_numel, generator=generator(1))
    g = torch.randn(rows, v.output_numel, generator=generator(2))
    weights, found = torch.rand(rows, generator=generator(3)), []
    order = torch.randperm(rows, generator=generator(4))
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        out, results = torch.zeros(v.numel), [conv_unit_grads(v, x, g, offsets_of(lengths), order=order)]
        for method in METHODS:
            offsets = offsets_of(lengths) if method == "tile" else torch.arange(rows + 1)
            norms, sums = torch.zeros(len(offsets) - 1), torch.zeros(len(offsets) - 1)
            conv_norms(v, x, g, offsets, norms, sums, method=method)
            results += [norms, sums]
        conv_sum(v, x, g, weights, out=out)
        found.append(torch.cat([r.flatten() for r in [*results, out]]))
    assert all(torch.equal(found[0], other) for other in found[1:])


# The bound on rounding

LONG = {
    "places": must(shape_of(1, 1, 1, (1, 1, 1500), (1, 1, 3))),
    "rows of places": must(shape_of(1, 2, 2, (1, 40, 33), (1, 2, 2))),
    "channels": must(shape_of(1, 3000, 2, (1, 1, 2), (1, 1, 1))),
    "outputs": must(shape_of(1, 2, 3000, (1, 1, 2), (1, 1, 1))),
    "taps": must(shape_of(1, 1, 1, (1, 1, 700), (1, 1, 600))),
    "groups": must(shape_of(3000, 1, 1, ONES, ONES)),
}


def measured(v: ConvShape, x: Tensor, g: Tensor, layout: Layout, method: str) -> tuple[Tensor, Tensor]:
    """Squared norms and the engine's bound on their error."""
    use = ConvUse(x, g, v, method=method)
    found, row_sums = torch.zeros(layout.num_units), torch.zeros(layout.num_units)
    offsets = layout.offsets if layout.offsets is not None else torch.arange(layout.num_rows + 1)
    conv_norms(v, x, g, offsets, found, row_sums, method=method)
    chain = use.chain(layout)
    if use.is_formed:
        return found, formed_error(chain, found, row_sums)
    return found, product_error(chain, row_sums)


def assert_within(found: Tensor, exact: Tensor, error: Tensor) -> None:
    """The squared norm is off by no more than `error` and the rounding of the result itself."""
    assert ((found.double() - exact).abs() <= error.double() + UNIT_ROUNDOFF * exact).all()


def exact_norms(v: ConvShape, x: Tensor, g: Tensor, layout: Layout) -> Tensor:
    offsets = layout.offsets if layout.offsets is not None else torch.arange(layout.num_rows + 1)
    found, row_sums = torch.zeros(layout.num_units), torch.zeros(layout.num_units)
    conv_norms(v, x, g, offsets, found, row_sums, backend="reference")
    return found.double()


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("value", FLOATS)
@pytest.mark.parametrize("method", METHODS)
def test_norms_stay_within_their_bound(isa, name, value, method):
    """All terms positive and alike: roundings go one way for long stretches instead of cancelling."""
    v, layout = LONG[name], Layout.uniform(2, 1)
    x, g = torch.full((2, v.image_numel), value), torch.full((2, v.output_numel), value)
    x[1, ::2] *= 1e3
    found, error = measured(v, x, g, layout, method)
    assert_within(found, exact_norms(v, x, g, layout), error)


@pytest.mark.parametrize("value", FLOATS)
def test_units_of_many_images_stay_within_their_bound(isa, value):
    v, layout = must(shape_of(2, 2, 2, (1, 1, 130), (1, 1, 2))), Layout.ragged(torch.tensor([0, 300, 301]))
    x, g = torch.full((301, v.image_numel), value), torch.full((301, v.output_numel), value)
    found, error = measured(v, x, g, layout, "tile")
    assert_within(found, exact_norms(v, x, g, layout), error)


@pytest.mark.parametrize("method", METHODS)
def test_small_groups_beside_a_large_one_are_not_lost(isa, method):
    """Each of them is below half a unit in the last place of the first one's square."""
    groups = 4096
    v, layout = must(shape_of(groups, 1, 1, ONES, ONES)), Layout.uniform(1, 1)
    x, g = torch.full((1, groups), 2.0**-12 * 0.999), torch.ones(1, groups)
    x[0, 0] = 1.0
    found, error = measured(v, x, g, layout, method)
    assert_within(found, x.double().square().sum(1), error)
    assert float(found) > 1.0002


@pytest.mark.parametrize(("small", "large"), [(1e-23, 1e18), (1e-30, 1e10)])
@pytest.mark.parametrize("side", ["images", "output_grads"])
@pytest.mark.parametrize("method", METHODS)
def test_underflow_is_covered(backend, small, large, side, method):
    """The squares of one operand vanish in float32; its products with the other do not."""
    v = must(shape_of(2, 3, 2, (1, 4, 5), (1, 2, 2)))
    x, g = torch.full((1, v.image_numel), small), torch.full((1, v.output_numel), large)
    if side == "output_grads":
        x, g = torch.full_like(x, large), torch.full_like(g, small)
    exact = float(sq_norms([gradient(v, x, g, [0])]))
    found, row_sums = torch.zeros(1), torch.zeros(1)
    conv_norms(v, x, g, torch.tensor([0, 1]), found, row_sums, method=method, backend=backend)
    assert float(found) >= exact * (1.0 - 1e-5)
    if method == "tile":
        assert float(row_sums) >= math.sqrt(exact) * (1.0 - 1e-5)


# What is refused

V = must(shape_of(1, 2, 3, (1, 4, 4), (1, 3, 3)))
X, G, W = torch.ones(4, V.image_numel), torch.ones(4, V.output_numel), torch.ones(4)
UNITS = torch.tensor([0, 1, 4])


def norms_with(
    x: Tensor = X,
    g: Tensor = G,
    offsets: Tensor = UNITS,
    out: Tensor | None = None,
    sums: Tensor | None = None,
    shape: ConvShape = V,
    **how: object,
) -> None:
    out, sums = torch.zeros(2) if out is None else out, torch.zeros(2) if sums is None else sums
    conv_norms(shape, x, g, offsets, out, sums, **how)


STRIDED = must(shape_of(1, 2, 3, (1, 4, 4), (1, 2, 2), stride=(1, 2, 2)))
REFUSED: list[tuple[type[Exception], str, Callable[[], object]]] = [
    (ValueError, "images", lambda: norms_with(x=X[:, :-1])),
    (TypeError, "images", lambda: norms_with(x=X.long())),
    (ValueError, "images", lambda: norms_with(x=W)),
    (ValueError, "output_grads", lambda: norms_with(g=G[:, 1:])),
    (ValueError, "output_grads", lambda: norms_with(g=G[:3])),
    (TypeError, "offsets", lambda: norms_with(offsets=UNITS.int())),
    (ValueError, "offsets", lambda: norms_with(offsets=torch.tensor([0, 3, 1, 4]))),
    (ValueError, "offsets", lambda: norms_with(offsets=torch.tensor([0, 3]))),
    (ValueError, "offsets", lambda: norms_with(offsets=torch.tensor([1, 4]))),
    (ValueError, "sq_norms", lambda: norms_with(out=torch.zeros(3))),
    (TypeError, "row_sums", lambda: norms_with(sums=torch.zeros(2).double())),
    (ValueError, "method", lambda: norms_with(method="gram")),
    (ValueError, "method", lambda: norms_with(method="fast")),
    (
        ValueError,
        "method",
        lambda: conv_norms(STRIDED, X, G, torch.arange(5), torch.zeros(4), torch.zeros(4), method="gram"),
    ),
    (ValueError, "output_grads", lambda: conv_unit_grads(V, X, G[:1], UNITS)),
    (ValueError, "offsets", lambda: conv_unit_grads(V, X, G, torch.tensor([0, 3]))),
    (ValueError, "row_weights", lambda: conv_sum(V, X, G, W[:3], out=torch.zeros(V.numel))),
    (TypeError, "row_weights", lambda: conv_sum(V, X, G, W.double(), out=torch.zeros(V.numel))),
    (ValueError, "out", lambda: conv_sum(V, X, G, W, out=torch.zeros(V.numel + 1))),
    (TypeError, "out", lambda: conv_sum(V, X, G, W, out=torch.zeros(V.numel).half())),
]


@pytest.mark.parametrize(("error", "name", "call"), REFUSED)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_refused(error, name, call, backend, monkeypatch):
    """The same with and without the compiled kernels: the check comes before the choice."""
    if backend == "reference":
        monkeypatch.setattr("synthward.kernels._select._fits", lambda *_: False)
    with pytest.raises(error, match=rf"^{name}: "):
        call()


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("order", lambda: norms_with(order=torch.tensor([0, 1, 2, 4]), backend="cpp")),
        ("order", lambda: norms_with(order=torch.tensor([0, 1, 2, -1]), backend="cpp")),
        ("order", lambda: norms_with(order=torch.tensor([0, 1, 2]), backend="cpp")),
        ("row_sums", lambda: (lambda m: norms_with(out=m[:2], sums=m[1:]))(torch.zeros(3))),
        ("out", lambda: norms_with(out=X.view(-1)[:2])),
        ("backend 'cpp'", lambda: norms_with(x=torch.ones(V.image_numel, 4).t(), backend="cpp")),
    ],
)
def test_what_the_compiled_kernels_refuse(name, call):
    with pytest.raises(ValueError, match=rf"^{name}"):
        call()


def test_what_is_not_contiguous_is_taken_by_choice():
    x = whole(V.image_numel, 4, 1).t()
    found, row_sums = torch.zeros(2), torch.zeros(2)
    conv_norms(V, x, G, UNITS, found, row_sums)
    assert torch.equal(found, sq_norms([gradient(V, x, G, rows) for rows in ([0], [1, 2, 3])]).float())
