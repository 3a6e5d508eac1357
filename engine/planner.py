"""Which exact method measures each norm: the cheapest by a cost model, within a memory budget."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from torch import Tensor

from synthward.engine.layout import Layout
from synthward.engine.rates import Rates, measured_rates
from synthward.engine.rules.uses import DiagonalUse, OuterUse, ScatterUse, Use, Way
from synthward.engine.spec import PerfSpec
from synthward.kernels import place_of

# Of what the forward pass keeps, and so of less than the plain step's peak, what per-unit gradients may take.
_MATERIALISED_SHARE = 0.1
# Gradients formed for a moment, a few units at a time, where no formula holds.
_CHUNK_BYTES = 64 << 20


class Choosable(Protocol):
    """A use with several exact ways to its norm."""

    def ways(self, layout: Layout) -> list[Way]:
        """What each way costs."""

    def by(self, method: str) -> Use:
        """This use, measured that way."""

    def materialise(self, layout: Layout) -> DiagonalUse:
        """Its units' gradients as rows."""


@dataclass(frozen=True)
class Choice:
    """How the norm of one parameter is taken: cost per physical batch, in units of `Way`."""

    parameter: str
    method: str
    flops: float
    bytes: float
    memory: float


class Planner:
    """Chooses per use, by shapes of single units alone; never changes what is released beyond rounding.

    Args:
        perf: the user's settings.
        names: of the parameters, by position.
        rates: of the machine; None for those that are measured on this one.
    """

    def __init__(self, perf: PerfSpec, names: list[str], rates: Rates | None = None) -> None:
        self.perf, self._names, self._rates = perf, names, rates
        self._budget, self._used = 0.0, 0.0
        self.choices: dict[int, Choice] = {}

    @property
    def chunk_bytes(self) -> int:
        """Memory for gradients that are formed a few units at a time."""
        given = self.perf.materialise_bytes
        return _CHUNK_BYTES if given is None else max(given, 1)

    def begin(self, forward_bytes: int) -> None:
        """A backward pass begins, over a forward pass whose captured calls gave that many bytes."""
        given = self.perf.materialise_bytes
        # All of it grows with the number of units, and so do the costs: the choice does not depend on how many there
        # are, which is private.
        share = _MATERIALISED_SHARE * forward_bytes
        self._budget, self._used = share if given is None else float(given), 0.0

    def free(self) -> None:
        """What was materialised has been summed."""
        self._used = 0.0

    def keep(self, use: Use) -> Use:
        """The use as it is kept: with `keep="bf16"` rounded, before its norm is taken."""
        if self.perf.keep != "bf16":
            return use
        return _converted(use, torch.float32, torch.bfloat16)

    def widen(self, use: Use) -> Use:
        """The use as it is measured and summed: on a CPU rounded values in single precision, for which there are
        compiled kernels; the copy lives for one layer."""
        if self.perf.keep != "bf16" or place_of(use.evidence) != "cpu":
            return use
        return _converted(use, torch.bfloat16, torch.float32)

    def prepare(
        self, use: Use, layout: Layout, position: int, *, may_keep: bool = True
    ) -> tuple[Use, Layout]:
        """The use with its method chosen; materialised ones come back as rows of the units."""
        if isinstance(use, OuterUse):
            use = use.summed(self.perf.half_sums, layout)
        if not hasattr(use, "ways"):
            self._note(position, Way(_family(use), 0.0, 0.0, 0.0))
            return use, layout
        chosen = cast("Choosable", use)
        ways = [way for way in chosen.ways(layout) if may_keep or way.method != "materialise"]
        if layout.rows_per_unit is None and self.perf.method == "auto":
            # Each way inflates norms by its own bound: a choice by the lengths of the units that are there would let
            # one of them move all others.
            ways = [way for way in ways if way.method == "tile"] or ways
        way = self._choose(ways, use.evidence)
        self._note(position, way)
        if way.method != "materialise":
            return chosen.by(way.method), layout
        # What is freed makes room for others.
        self._used += way.memory
        return chosen.materialise(layout), layout.units

    def _choose(self, ways: list[Way], evidence: Tensor) -> Way:
        if len(ways) == 1:
            return ways[0]
        if self.perf.method != "auto":
            named = [way for way in ways if way.method == self.perf.method]
            if named:
                return named[0]
        rates = self._rates_of(evidence)
        fits = [way for way in ways if way.memory <= 0.0 or self._used + way.memory <= self._budget]
        return min(fits or ways[:1], key=lambda way: seconds(way, rates))

    def _rates_of(self, evidence: Tensor) -> Rates:
        """The rates of operands like this one."""
        return self._rates or _rates_for(evidence)

    def _note(self, position: int, way: Way) -> None:
        self.choices[position] = Choice(self._names[position], way.method, way.flops, way.bytes, way.memory)

    def note_with_weight(self, position: int) -> None:
        """A bias whose norm comes with its weight's."""
        self._note(position, Way("with its weight", 0.0, 0.0, 0.0))

    def explain(self) -> Explanation:
        """What was chosen in the last steps."""
        return Explanation([self.choices[position] for position in sorted(self.choices)])


class Explanation(list[Choice]):
    """The choices, one per parameter; printed as a table."""

    def __str__(self) -> str:
        head = ("parameter", "method", "GFLOP", "MB moved", "MB extra")
        rows = [
            (c.parameter, c.method, f"{c.flops / 1e9:.3f}", f"{c.bytes / 1e6:.2f}", f"{c.memory / 1e6:.2f}")
            for c in self
        ]
        if not rows:
            return "nothing chosen yet: methods are chosen in the first step"
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in [head, *rows]
        ]
        return "\n".join(line.rstrip() for line in lines)

    __repr__ = __str__


def _converted(use: Use, old: torch.dtype, new: torch.dtype) -> Use:
    """The use with its matrices of one type in another one."""
    changed = {
        name: value.to(new)
        for name, value in vars(use).items()
        if isinstance(value, Tensor) and value.dtype == old and value.dim() > 1
    }
    return replace(use, **changed)  # type: ignore[type-var]


def _rates_for(operand: Tensor) -> Rates:
    """Half precision has kernels of its own on a GPU; on a CPU all take the way that fp32 takes."""
    if operand.device.type == "cpu":
        return measured_rates(operand.device)
    return measured_rates(operand.device, operand.dtype)


def seconds(way: Way | Choice, rates: Rates) -> float:
    """What a way to a norm takes by these rates."""
    rate = rates.gram if way.method == "gram" else rates.tile
    return way.flops / rate + way.bytes / rates.bytes


def _family(use: Use) -> str:
    if isinstance(use, DiagonalUse):
        return "unit sums"
    return "scatter" if isinstance(use, ScatterUse) else type(use).__name__.removesuffix("Use").lower()
