"""Which exact method measures each norm."""

from __future__ import annotations

from synthward.engine.layout import Layout
from synthward.engine.rules.uses import Use
from synthward.engine.spec import PerfSpec


class Planner:
    """Chooses per use; never changes what is released beyond rounding."""

    def __init__(self, perf: PerfSpec, names: list[str]) -> None:
        self.perf, self._names = perf, names

    def keep(self, use: Use) -> Use:
        return use

    def prepare(self, use: Use, layout: Layout, numel: int) -> tuple[Use, Layout]:
        return use, layout
