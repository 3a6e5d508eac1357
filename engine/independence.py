"""A probe that units do not mix: the gradient of one unit's loss must vanish in the rows of all others.

Shapes alone can not tell a batch axis from a time axis of the same length, nor a mean over the batch from
one over features. So the first backward passes of each pattern of calls are preceded by one of a single
unit's loss; it inspects which entries are exactly zero, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from synthward.engine.capture import CaptureState, Kept
from synthward.engine.errors import UnsupportedOperationError
from synthward.engine.layout import Layout
from synthward.engine.provenance import Target
from synthward.engine.rules.uses import DiagonalUse

# A network whose gradient is zero at first (a head of zeros) shows nothing; the probe tries again this often.
_ATTEMPTS = 8
# A prime: units are visited in no order that a batch has.
_STRIDE = 7919

# Captured calls (operation, positions, rows for each row of the batch), and what else ran.
Pattern = tuple[tuple[tuple[str, tuple[int, ...], int], ...], int]


class IndependenceProbe:
    """Decides when to probe and remembers which patterns of calls were found independent."""

    def __init__(self, state: CaptureState) -> None:
        self._state = state
        self._attempts: dict[Pattern, int] = {}
        self._passes = 0

    def check(self, outputs: Tensor, weights_of: Callable[[int], Tensor], layout: Layout) -> None:
        """Probe if the pattern of calls is new; `weights_of` gives the weights of `outputs` that pick one
        unit's.

        Raises:
            UnsupportedOperationError: another unit's rows took part in a unit's loss.
        """
        rows = layout.num_rows
        if layout.num_units < 2 or rows == 0:
            return
        calls = tuple((op, positions, leading // rows) for op, positions, leading in self._state.calls)
        pattern: Pattern = (calls, self._state.trace)
        self._passes += 1
        if self._state.is_arranged:
            # Each batch may be arranged in its own way, so each is looked at, another unit every time.
            for unit in {0, layout.num_units - 1, self._passes * _STRIDE % layout.num_units}:
                self._probe(outputs, weights_of(unit), unit, layout)
            return
        if self._attempts.get(pattern, 0) >= _ATTEMPTS:
            return
        # The first and the last: one of them sees a running sum over the batch, and both a reversed batch.
        has_power = [
            self._probe(outputs, weights_of(unit), unit, layout) for unit in (0, layout.num_units - 1)
        ]
        self._attempts[pattern] = _ATTEMPTS if all(has_power) else self._attempts.get(pattern, 0) + 1

    def _probe(self, outputs: Tensor, weights: Tensor, unit: int, layout: Layout) -> bool:
        """Whether the unit's own rows show a gradient in every call; raises if another unit's do."""
        verdicts: list[_Verdict] = []
        # Looked at one by one: kept to the end, they would take as much memory as the whole backward pass.
        with self._state.probe(lambda kept: verdicts.append(_look(kept, unit, layout))):
            torch.autograd.grad(outputs, [self._state.anchor], weights, retain_graph=True, allow_unused=True)
        for verdict in verdicts:
            if verdict.mixed is not None:
                raise UnsupportedOperationError(
                    f"parameter {self._state.name(verdict.mixed)!r} in operation {verdict.operation!r}: units "
                    "mix. One unit's loss depends on rows of other units there (a statistic or "
                    "attention over the batch, an input that all rows share, or a batch axis that is "
                    "not the first)"
                )
        return all(verdict.has_power for verdict in verdicts)


@dataclass(frozen=True)
class _Verdict:
    """What one captured call shows: whether the unit's own rows have a gradient, and of which parameter another
    unit's have."""

    operation: str
    has_power: bool
    mixed: Target | None


def _look(kept: Kept, unit: int, layout: Layout) -> _Verdict:
    has_power, mixed = True, None
    for target, use in kept.uses:
        if kept.leading % layout.num_rows:
            continue  # refused by name when it is accumulated
        grads = use.evidence
        call = layout.units if isinstance(use, DiagonalUse) else layout.expand(use.rows // layout.num_rows)
        is_own = call.row_units == unit
        is_zero = (grads == 0).flatten(1)
        # NaN is not evidence: 0 * inf in another unit's rows gives it.
        touched = ~(is_zero | grads.isnan().flatten(1)).all(1)
        has_power = has_power and not bool(is_zero.all(1)[is_own].all())
        if bool((touched & ~is_own).any()):
            mixed = target
    return _Verdict(kept.operation, has_power, mixed)
