"""The clipped sum of the outer family in Triton: blocks of rows with one weight and with several, and what is rounded.

The oracle is a loop over the rows in float64. Rows of weight zero hold what is not finite.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the package triton cannot be imported here")

from synthward.kernels import outer_sum, rounding_of
from synthward.kernels._triton import INTERPRETED
from synthward.kernels.outer import library, triton_sum
from synthward.kernels.outer.reference import in_bf16
from tests.kernels.cases import generator, matrix

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
DEVICE = "cpu" if INTERPRETED else "cuda"
B = triton_sum.ROWS


def each(lengths: list[int], zeros: tuple[int, ...] = ()) -> Tensor:
    """A weight for each unit, the same for its rows; units that count nothing, and single rows of others."""
    weights = torch.rand(len(lengths), generator=generator(3)) + 0.01
    rows = weights.repeat_interleave(torch.tensor(lengths))
    rows[list(zeros)] = 0.0
    return rows


WEIGHTS = {
    "no rows": torch.zeros(0),
    "one row": each([1]),
    "one block": each([B]),
    "units of two blocks": each([2 * B, 2 * B, 2 * B]),
    "units across blocks": each([B + 7, 3 * B - 1, 5, 2 * B + 30]),
    "one unit": each([5 * B + 3]),
    "units of one row": each([1] * 131),
    "one weight for all": torch.full((3 * B,), 0.37),
    "nothing counts": torch.zeros(2 * B + 1),
    "units that do not count": each([B, B, B, B], tuple(range(B, 2 * B))),
    "rows that do not count": each([2 * B, 2 * B], (3, 2 * B + 1, 4 * B - 1)),
    "the first row does not count": each([2 * B], (0,)),
}


def operands(rows: int, d: int, p: int, dtype: torch.dtype, weights: Tensor) -> tuple[Tensor, Tensor]:
    a, g = matrix(rows, d, 1).to(dtype), matrix(rows, p, 2).to(dtype)
    a[weights == 0], g[weights == 0] = float("nan"), float("inf")
    return a, g


def loop(a: Tensor, g: Tensor, weights: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The sum in float64, and the sum of the sizes of its terms."""
    found = np.zeros((2, g.shape[1], a.shape[1]))
    for x, y, w in zip(a.double().numpy(), g.double().numpy(), weights.double().numpy(), strict=True):
        if w != 0.0:
            found += [w * np.outer(y, x), w * np.abs(np.outer(y, x))]
    return found[0], found[1]


def summed(a: Tensor, g: Tensor, weights: Tensor, **options) -> np.ndarray:
    out = torch.zeros(g.shape[1], a.shape[1], device=DEVICE)
    triton_sum.outer_sum(a.to(DEVICE), g.to(DEVICE), weights.to(DEVICE), out, **options)
    return out.cpu().double().numpy()


def assert_off(
    found: np.ndarray, expected: tuple[np.ndarray, np.ndarray], rows: int, rounding: float
) -> None:
    exact, size = expected
    assert (np.abs(found - exact) <= ((rows + 8) * 2.0**-24 + rounding) * size + 1e-30).all()


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("terms", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_over_blocks_of_one_weight(dtype, terms, weights):
    rows = len(weights)
    a, g = operands(rows, 37, 19, dtype, weights)
    expected = loop(a, g, weights)
    rounding = rounding_of(terms) if dtype == torch.bfloat16 else 0.0
    assert_off(summed(a, g, weights, terms=terms), expected, rows, rounding)
    # Told that there is nothing to be found, it does not look, and finds the same.
    assert_off(summed(a, g, weights, terms=terms, run=1), expected, rows, rounding)


@pytest.mark.parametrize(
    ("d", "p"), [(1, 1), (3, 300), (130, 7), (16, 48), (257, 129), (1, 70), (0, 3), (4, 0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widths(dtype, d, p):
    weights = each([B, B + 5, 40])
    a, g = operands(len(weights), d, p, dtype, weights)
    assert_off(summed(a, g, weights), loop(a, g, weights), len(weights), 0.0)


def test_strided_operands_and_what_is_there_already():
    weights = WEIGHTS["units across blocks"]
    wide = (
        torch.stack([matrix(len(weights), 60, 5), matrix(len(weights), 60, 6)], dim=2).bfloat16().to(DEVICE)
    )
    a, g = wide[:, 3:40, 0], wide[:, ::3, 1]
    out = torch.ones(20, 37, device=DEVICE)
    outer_sum(a, g, weights.to(DEVICE), out=out, backend="triton")
    exact, size = loop(a.cpu(), g.cpu(), weights)
    assert_off(out.cpu().double().numpy(), (1 + exact, 1 + size), len(weights), 0.0)


@pytest.mark.parametrize(
    "name", ["one block", "units of two blocks", "one weight for all", "units that do not count"]
)
def test_where_blocks_have_one_weight_nothing_is_rounded(name):
    weights = WEIGHTS[name]
    a, g = operands(len(weights), 33, 20, torch.bfloat16, weights)
    assert_off(summed(a, g, weights, terms=1), loop(a, g, weights), len(weights), 0.0)


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_rounding_is_what_was_asked_for(terms):
    """Single products, whose only error is the rounding: as large as said, and not much smaller."""
    weights = torch.rand(1000, generator=generator(9)) + 0.5
    g = matrix(1000, 1, 4).bfloat16()
    worst = 0.0
    for at in range(0, 1000, 25):
        w, y = weights[at : at + 25], g[at : at + 25]
        found = summed(torch.eye(25, dtype=torch.bfloat16), y, w, terms=terms, run=1).ravel()
        exact = (w.double() * y.double().ravel()).numpy()
        worst = max(worst, float(np.abs(found / exact - 1.0).max()))
    bound = rounding_of(terms) + 2.0**-24
    assert worst <= bound
    assert worst >= bound / 4


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_the_reference_rounds_as_the_kernel_does(terms):
    weights = torch.rand(40, generator=generator(8)) + 0.5
    a, g = matrix(40, 9, 1).bfloat16(), matrix(40, 5, 2).bfloat16()
    found = []
    for who in ("triton", "reference"):
        out, bias = torch.zeros(5, 9, device=DEVICE), torch.zeros(5, device=DEVICE)
        outer_sum(
            *(t.to(DEVICE) for t in (a, g, weights)), out=out, bias=bias, terms=terms, run=1, backend=who
        )
        found.append(torch.cat([out.flatten(), bias]).cpu())
    size = float(found[1].abs().max())
    torch.testing.assert_close(*found, rtol=0.0, atol=2e-6 * size)
    held = in_bf16(g.float() * weights.unsqueeze(1), terms)
    torch.testing.assert_close(found[1][:45].view(5, 9), held.T @ a.float(), rtol=0.0, atol=2e-6 * size)


def test_terms_that_are_none():
    with pytest.raises(ValueError, match="terms: got 4"):
        outer_sum(torch.ones(2, 3), torch.ones(2, 4), torch.ones(2), out=torch.zeros(4, 3), terms=4)


def test_blocks_are_sorted_and_counted():
    weights = torch.cat(
        [
            each([1, B - 1]),  # mixed
            torch.full((B,), 0.25),  # of one weight
            torch.zeros(B),  # dead
            torch.full((B,), float("nan")),  # equal to nothing
            torch.full((2 * B,), 0.5),  # two of one weight
            torch.full((B - 1,), 0.125),  # its last row is not there
        ]
    ).to(DEVICE)
    order, shared, counts = triton_sum._sorted_blocks(weights, 7, B)
    assert counts.tolist() == [3, 3]
    assert order.tolist()[:6] == [1, 4, 5, 0, 3, 6]
    assert shared[:3].tolist() == [0.25, 0.5, 0.5] and shared[3].isnan()


def test_many_blocks_are_sorted_alike():
    """More than one program looks at, and more than one goes of them is put in order."""
    kinds = torch.randint(0, 3, (1200,), generator=generator(4))
    rows = torch.zeros(1200, 2)
    rows[kinds == 1] = 0.5
    rows[kinds == 2] = torch.tensor([0.5, 0.75])
    order, shared, counts = triton_sum._sorted_blocks(rows.flatten().to(DEVICE), 1200, 2)
    ones, mixed = (kinds == 1).nonzero().flatten(), (kinds == 2).nonzero().flatten()
    assert counts.tolist() == [len(ones), len(mixed)]
    assert order[: len(ones) + len(mixed)].tolist() == [*ones.tolist(), *mixed.tolist()]
    assert (shared[: len(ones)] == 0.5).all()


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_take_each_block_once(monkeypatch, dtype, parts):
    """Whole numbers, so that a block too many or too few is no rounding. More parts than blocks, too."""
    monkeypatch.setattr(triton_sum, "parts_of", lambda *_: parts)
    for lengths in ([1] * 200, [B] * 4, [2 * B, 3, B + 9, 40]):
        rows = sum(lengths)
        unit = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        weights = (unit % 3 + 1).float()
        a, g = (torch.randint(-2, 3, (rows, n), generator=generator(n)).to(dtype) for n in (5, 6))
        exact, _ = loop(a, g, weights)
        assert (summed(a, g, weights) == exact).all()


def test_parts_fill_the_device_and_cost_their_seams():
    cut = triton_sum.parts_of
    assert cut(1024, 128, 1e-6, 65536.0, 132) == 1, "enough tiles"
    assert cut(64, 1024, 1e-6, 65536.0, 132) == 2, "two for each tile fit at once"
    assert cut(1, 4096, 1e-6, 65536.0, 132) > 32
    assert cut(1, 1, 1e-6, 65536.0, 132) == 1
    assert cut(100, 1, 1e-9, 65536.0, 132) == 1, "nothing to be cut"


def test_the_same_weights_give_the_same_bits():
    weights = WEIGHTS["units across blocks"]
    a, g = operands(len(weights), 37, 19, torch.bfloat16, weights)
    assert (summed(a, g, weights, terms=2) == summed(a, g, weights, terms=2)).all()


@pytest.mark.parametrize(("d", "p"), [(37, 19), (19, 37), (1, 1)])
@pytest.mark.parametrize("step", [1 << 28, 1000])
def test_the_library_sums_the_same(monkeypatch, d, p, step):
    """All rows at once, and a few at a time."""
    monkeypatch.setattr(library, "_COPIED_BYTES", step)
    weights = WEIGHTS["rows that do not count"]
    a, g = operands(len(weights), d, p, torch.float32, weights)
    out, bias = torch.ones(p, d), torch.ones(p)
    library.outer_sum(a, g, weights, out, bias)
    exact, size = loop(a, g, weights)
    assert_off(out.double().numpy(), (1 + exact, 1 + size), len(weights), 0.0)
    g[weights == 0] = 0.0
    expected = 1 + (g.double() * weights.double().unsqueeze(1)).sum(0)
    torch.testing.assert_close(bias.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_library_multiplies_as_ieee_has_it(monkeypatch):
    place, seen, real = torch.backends.cuda.matmul, [], Tensor.addmm_
    before = place.fp32_precision
    monkeypatch.setattr(Tensor, "addmm_", lambda *args: (seen.append(place.fp32_precision), real(*args))[1])
    place.fp32_precision = "tf32"
    try:
        library.outer_sum(torch.ones(3, 2), torch.ones(3, 4), torch.ones(3), torch.zeros(4, 2))
        assert seen == ["ieee"]
        assert place.fp32_precision == "tf32"
    finally:
        place.fp32_precision = before


def test_the_library_is_for_wide_layers():
    assert library.pays(65536, 1024, 1024) and library.pays(100, 4096, 4096)
    assert not library.pays(65536, 128, 128)
    assert not library.pays(65536, 4096, 10)


@pytest.mark.parametrize("parts", [1, 2])
def test_many_tiles_are_each_taken_once(monkeypatch, parts):
    """More than one strip of them, the last one lower; more than one in a row."""
    monkeypatch.setattr(triton_sum, "parts_of", lambda *_: parts)
    monkeypatch.setattr(triton_sum, "sum_blocks", lambda *_, **__: triton_sum.SumBlocks(16, 16, B, 4, 3))
    a, g = (torch.randint(-2, 3, (B + 9, n), generator=generator(n)).bfloat16() for n in (70, 16 * 11 - 3))
    weights = torch.ones(B + 9)
    assert (summed(a, g, weights) == loop(a, g, weights)[0]).all()
