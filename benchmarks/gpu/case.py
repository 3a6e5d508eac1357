"""A kernel at one shape, as `benchmarks.gpu` checks and times it; its operands, and the units that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows per unit; None: every row is a unit.
LAYOUTS: dict[str, list[int] | None] = {
    "rows": None,
    "single": [1] * 7,
    "ragged": [3, 0, 1, 5, 17, 0, 2, 4],
    "empty units": [0, 0],
    "no units": [],
    "long": [1, 64, 65, 130],
}


@dataclass(frozen=True)
class Case:
    """A kernel at one shape.

    `run` leaves its result in `result`; `exact` gives what it should be, float64, and the size of the terms that were
    added up, which the error is measured in. `clear` is added to by `run`, `poison` is written by it. `bytes` are the
    fewest it must move, `flops` its products and sums, `operations` those of integers.
    """

    name: str
    shape: str
    run: Callable[[], object]
    result: Callable[[], Tensor]
    exact: Callable[[], tuple[Tensor, Tensor]]
    tolerance: float
    bytes: float
    flops: float = 0.0
    dtype: torch.dtype = torch.float32
    operations: float = 0.0
    clear: list[Tensor] = field(default_factory=list)
    poison: list[Tensor] = field(default_factory=list)


Make = Callable[[], Case]


@dataclass(frozen=True)
class Kernel:
    """A kernel's cases by dtype: small ones of every family of shapes, and those that are timed.

    Each is made when it is its turn, so that the operands of one are freed before the next is made.
    """

    edges: Callable[[Maker, torch.dtype], Iterator[Make]]
    timed: Callable[[Maker, torch.dtype], Iterator[Make]]
    dtypes: tuple[torch.dtype, ...] = DTYPES


@dataclass(frozen=True)
class Units:
    """Which rows are whose."""

    lengths: list[int] | None
    offsets: Tensor | None
    rows: int
    text: str

    @property
    def count(self) -> int:
        return self.rows if self.lengths is None else len(self.lengths)

    def index(self, device: str) -> Tensor:
        """Unit of each row, int64 [rows]."""
        each = [1] * self.rows if self.lengths is None else self.lengths
        return torch.repeat_interleave(torch.tensor(each, dtype=torch.int64)).to(device)

    def ends(self) -> list[int]:
        return self.offsets.tolist() if self.offsets is not None else list(range(self.rows + 1))


class Maker:
    """Random operands on one device, the same for the same seed."""

    def __init__(self, device: str, small: bool) -> None:
        self.device, self.small = device, small
        self.generator = torch.Generator(device).manual_seed(0)

    def size(self, large: int, small: int) -> int:
        return small if self.small else large

    def matrix(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(rows, columns, generator=self.generator, device=self.device).to(dtype)

    def flat(self, count: int) -> Tensor:
        return torch.randn(count, generator=self.generator, device=self.device)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.device)

    def weights(self, rows: int) -> Tensor:
        return torch.rand(rows, generator=self.generator, device=self.device)

    def clipped(self, *operands: Tensor) -> Tensor:
        """Weights of rows, every fourth zero; such a row of the operands holds what is no number."""
        weights = self.weights(len(operands[0]))
        weights[1::4] = 0.0
        for operand, bad in zip(operands, (float("nan"), float("inf")), strict=False):
            operand[1::4] = bad
        return weights

    def units(self, lengths: list[int] | None, rows: int = 11, text: str = "") -> Units:
        if lengths is None:
            return Units(None, None, rows, text or f"{rows} rows")
        ends = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(self.device)
        return Units(lengths, ends, sum(lengths), text or f"units of {lengths}")

    def layouts(self, *, with_rows: bool) -> Iterator[Units]:
        for name, lengths in LAYOUTS.items():
            if lengths is not None or with_rows:
                yield self.units(lengths, text=name)

    def batch(self, units: int, length: int, *, ragged: bool = False) -> Units:
        """Units of one length, or of any with that average."""
        lengths, text = [length] * units, f"{units} units of {length}"
        if ragged:
            own = torch.Generator().manual_seed(units)
            cuts = torch.randint(0, units * length + 1, (units - 1,), generator=own).sort().values
            ends = torch.tensor([0]), torch.tensor([units * length])
            lengths, text = (
                torch.cat([ends[0], cuts, ends[1]]).diff().tolist(),
                f"{units} units of on average {length}",
            )
        return self.units(lengths, text=text)


def weighted(rows: Tensor, weights: Tensor) -> Tensor:
    """``w_n x_n`` in float64; nothing where the weight is zero."""
    weights = weights.double().view(-1, *[1] * (rows.ndim - 1))
    return torch.where(weights == 0.0, 0.0, rows.double() * weights)


def unit_sums(rows: Tensor, units: Units) -> Tensor:
    """float64 [U, ...]"""
    out = torch.zeros(units.count, *rows.shape[1:], dtype=torch.float64, device=rows.device)
    return out.index_add_(0, units.index(str(rows.device)), rows.double())


def error_of(case: Case) -> float:
    """Largest difference from float64 after one call, over the size of the terms.

    Infinite where a number is due and there is none, and where there is one and none is due.
    """
    for tensor in case.clear:
        tensor.zero_()
    for tensor in case.poison:
        tensor.fill_(float("nan") if tensor.dtype.is_floating_point else -1)
    case.run()
    exact, magnitude = case.exact()
    found, due = case.result().double(), exact.isfinite()
    assert found.shape == exact.shape, f"{case.name}: {list(found.shape)} for {list(exact.shape)}"
    if not torch.equal(found.isfinite(), due):
        return float("inf")
    off = (found - exact).abs() / magnitude.clamp_min(1e-30)
    off = off[due]
    return float(off.max()) if off.numel() else 0.0


def title(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
