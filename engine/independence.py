"""A probe that units do not mix: the gradient of one unit's loss must vanish in the rows of all others.

Shapes alone can not tell a batch axis from a time axis of the same length, nor a mean over the batch from
one over features. So backward passes of each pattern of calls are preceded by one of a single unit's loss: the
first, and ever more rarely later ones. It inspects which entries are exactly zero, and nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from synthward.engine.capture import CaptureState, Kept
from synthward.engine.errors import UnsupportedOperationError
from synthward.engine.layout import Layout
from synthward.engine.provenance import Target
from synthward.engine.rules.uses import DiagonalUse

# A network whose gradient is zero at first (a head of zeros) shows nothing; each of so many passes is looked at.
_ATTEMPTS = 8
# A prime: units are visited in no order that a batch has.
_STRIDE = 7919

# Captured calls (operation, positions, rows for each row of the batch), and what else ran.
Pattern = tuple[tuple[tuple[str, tuple[int, ...], int], ...], int]


class IndependenceProbe:
    """Decides when to probe and remembers which patterns of calls were found independent.

    Args:
        any_rank: whether something holds on any of the ranks that go through all passes together (sharded parameters):
            if one of them probes, all do. None: passes are this process's own.
    """

    def __init__(self, state: CaptureState, any_rank: Callable[[bool], bool] | None = None) -> None:
        self._state, self._any_rank = state, any_rank
        self._passes_of: dict[Pattern, int] = {}
        self._shown: set[Pattern] = set()
        self._passes = 0

    def check(
        self,
        outputs: Tensor | Sequence[Tensor],
        weights_of: Callable[[int], Tensor | Sequence[Tensor]],
        layout: Layout,
        others: Sequence[Tensor] = (),
        *,
        is_due: bool = False,
    ) -> None:
        """Probe if the pattern of calls is due (or the caller says so); `weights_of` gives the weights of `outputs`
        that pick one unit's. `others` are outputs that have no rows of units, such as a mean loss beside the logits.

        Raises:
            UnsupportedOperationError: another unit's rows took part in a unit's loss, or a captured call takes part
                in `others` alone, where nothing shows whose rows are whose.
        """
        can_show = layout.num_units >= 2 and layout.num_rows > 0
        pattern, count = self._count(layout) if can_show else (None, 1)
        # Powers of two: a path that a gate of zeros (or a rate of zero) closes at first may open at any time.
        is_due = can_show and (
            is_due or count & (count - 1) == 0 or (count <= _ATTEMPTS and pattern not in self._shown)
        )
        is_wanted = is_due or (can_show and self._state.is_arranged)
        if not (is_wanted if self._any_rank is None else self._any_rank(is_wanted)):
            return
        # The first and the last: one of them sees a running sum over the batch, and both a reversed batch. Each batch
        # may be arranged in its own way, so another one every time.
        units = [0, layout.num_units - 1, self._passes * _STRIDE % max(layout.num_units, 1)]
        if self._any_rank is None:
            units = sorted(set(units if self._state.is_arranged or count > 1 else units[:2]))
        has_power = [self._probe(outputs, weights_of(unit), unit, layout) for unit in units if can_show]
        if not can_show:
            for _ in units:
                self._pass_through(outputs)
        elif all(has_power) and pattern is not None:
            self._shown.add(pattern)
        if others and (is_due or self._any_rank is not None):
            self._check_others([outputs] if isinstance(outputs, Tensor) else outputs, others)

    def _count(self, layout: Layout) -> tuple[Pattern, int]:
        """The pattern of the forward pass, and how often it has come."""
        calls = tuple((op, places, leading // layout.num_rows) for op, places, leading in self._state.calls)
        pattern: Pattern = (calls, self._state.trace)
        self._passes += 1
        count = self._passes_of[pattern] = self._passes_of.get(pattern, 0) + 1
        return pattern, count

    def _pass_through(self, outputs: Tensor | Sequence[Tensor]) -> None:
        """A backward pass that shows nothing, while other ranks look at theirs."""
        found = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        zeros = [torch.zeros_like(output) for output in found]
        with self._state.probe(lambda kept: None):
            torch.autograd.grad(found, [self._state.anchor], zeros, retain_graph=True, allow_unused=True)

    def _check_others(self, outputs: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        unseen = self._reached([*outputs, *others]) - self._reached(outputs)
        for operation, name in unseen:
            raise UnsupportedOperationError(
                f"parameter {name!r} in operation {operation!r}: of the module's outputs only one without a row "
                "per record (a loss, say) depends on it, so nothing shows that units do not mix there. "
                "Return a row per record of it, or use PrivateTrainer with a loss per unit"
            )

    def _reached(self, outputs: Sequence[Tensor]) -> Counter[tuple[str, str]]:
        """The captured calls (operation and a parameter's name) that outputs depend on."""
        found: Counter[tuple[str, str]] = Counter()
        ones = [torch.ones_like(output) for output in outputs]
        with self._state.probe(
            lambda kept: found.update([(kept.operation, self._state.name(kept.uses[0][0]))])
        ):
            torch.autograd.grad(outputs, [self._state.anchor], ones, retain_graph=True, allow_unused=True)
        return found

    def _probe(
        self,
        outputs: Tensor | Sequence[Tensor],
        weights: Tensor | Sequence[Tensor],
        unit: int,
        layout: Layout,
    ) -> bool:
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
