"""One logical step: capture, norms, clip, weighted sums into one flat buffer, then noise and update."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from synthward.engine.capture import CaptureMode, CaptureState, Kept
from synthward.engine.clipping import clip_factors, rounding_slack
from synthward.engine.errors import PrivacyError, UnsupportedOperationError
from synthward.engine.flat import FlatParameters
from synthward.engine.keys import KeySchedule
from synthward.engine.layout import Layout
from synthward.engine.optim import Noise, make_updater
from synthward.engine.rules.families import (
    DiagonalRows,
    DiagonalUse,
    Norms,
    OuterUse,
    ScatterUse,
    Use,
    Weights,
    add_cross_term,
    merge_uses,
)
from synthward.engine.rules.registry import CHECKS, HANDLERS, HINTS, check_modules
from synthward.engine.spec import ClipSpec, NoiseSpec

# Noise streams of training steps: one per object that draws from the same key schedule.
_FIRST_STREAM = 1
_streams: weakref.WeakKeyDictionary[KeySchedule, int] = weakref.WeakKeyDictionary()


def _next_stream(keys: KeySchedule) -> int:
    stream = _streams.get(keys, _FIRST_STREAM)
    if stream >= 1 << 15:
        raise PrivacyError("this key schedule was given to too many trainers; draw a fresh one")
    _streams[keys] = stream + 1
    return stream


class DPStep:
    """The private step of one module and optimizer.

    Guarantees: what `release` adds to the parameters is a function of the sum over units of contributions of
    norm at most C, plus one N(0, (sigma C)^2) per coordinate, whatever the number of `accumulate` calls;
    noise is drawn at a (stream, step) that is never used again.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip: ClipSpec,
        noise: NoiseSpec,
        expected_batch_size: float,
        keys: KeySchedule,
    ) -> None:
        check_modules(module)
        self.module, self.optimizer, self.clip, self.noise = module, optimizer, clip, noise
        self.flat = FlatParameters(module, optimizer)
        self.updater = make_updater(self.flat, optimizer)
        names = [span.name for span in self.flat]
        self.state = CaptureState(self.flat.positions, names, self.flat.data.device)
        self.has_sum = False
        self._grad_scale = 1.0 / expected_batch_size
        self._key, self._stream, self._noise_step = keys.key("noise"), _next_stream(keys), 0

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Forward passes inside are captured."""
        self.flat.check_unchanged(allow_frozen=True)
        check_modules(self.module)
        self.state.forward += 1
        with CaptureMode(self.state, HANDLERS, CHECKS, HINTS):
            yield

    def accumulate(
        self, kept: list[Kept], layout: Layout, *, scale: float = 1.0, unit_mask: Tensor | None = None
    ) -> None:
        """Clip each unit of one physical batch and add the weighted sums to the flat buffer.

        Args:
            kept: what the backward pass kept.
            layout: which rows are whose.
            scale: what gradients are multiplied by before the clip.
            unit_mask: bool [U]; False weighs nothing.
        """
        self.has_sum = True
        if layout.num_rows == 0:
            return
        with torch.no_grad():
            by_parameter = self._group(kept, layout)
            sq_norms, row_bound, slack = self._norms(by_parameter, layout)
            factors = clip_factors(
                sq_norms, self.clip, slack=slack, row_bound=row_bound, scale=scale, unit_mask=unit_mask
            )
            self._weigh(by_parameter, factors, ~torch.isfinite(sq_norms))

    def _group(self, kept: list[Kept], layout: Layout) -> dict[int, list[tuple[Use, Layout]]]:
        """Uses of each parameter with the layout of their call; the first axis must hold whole batches of
        rows."""
        grouped: dict[int, list[tuple[Use, Layout]]] = defaultdict(list)
        for item in kept:
            for position, use in item.uses:
                rows = layout.num_rows
                if item.leading % rows:
                    raise UnsupportedOperationError(
                        f"parameter {self.state.name(position)!r} in operation {item.operation!r}: its "
                        f"input has {item.leading} rows where the batch has {rows}; the first axis must be "
                        "the batch's (expand what all rows share, such as position ids, to one row each)"
                    )
                if isinstance(use, DiagonalRows):
                    use = DiagonalUse(layout.expand(use.rows // rows).sum_rows(use.grads))
                if isinstance(use, DiagonalUse):
                    grouped[position].append((use, layout.units))
                else:
                    grouped[position].append((use, layout.expand(use.rows // rows)))
        return grouped

    def _norms(
        self, by_parameter: dict[int, list[tuple[Use, Layout]]], layout: Layout
    ) -> tuple[Tensor, Tensor, float]:
        """Squared norms of the units [U], and the bound [U] and slack of their rounding error
        (`clip_factors`)."""
        sq_norms = torch.zeros(layout.num_units, dtype=torch.float32, device=self.flat.data.device)
        row_bound, longest, count, norms = torch.zeros_like(sq_norms), 1, 0, Norms()
        for position, uses in by_parameter.items():
            merged = self._merge(position, uses)
            row_sums = torch.zeros_like(sq_norms)
            for use, use_layout in merged:
                use.add_norms(sq_norms, row_sums, use_layout, norms)
                longest = max(longest, use.longest, use_layout.num_rows // max(use_layout.num_units, 1))
                count += 1
            row_bound.addcmul_(row_sums, row_sums)
            if len(merged) == 2:
                (outer, outer_layout), (scatter, scatter_layout) = merged
                assert isinstance(outer, OuterUse) and isinstance(scatter, ScatterUse)
                add_cross_term(outer, outer_layout, scatter, scatter_layout, sq_norms)
        return sq_norms, row_bound, rounding_slack(longest, count)

    def _merge(self, position: int, uses: list[tuple[Use, Layout]]) -> list[tuple[Use, Layout]]:
        """One use per family, rows unit by unit; the outer family first."""
        if len(uses) == 1:
            return uses
        families: dict[type[Use], list[tuple[Use, Layout]]] = defaultdict(list)
        for use, layout in uses:
            families[type(use)].append((use, layout))
        if len(families) > 1 and set(families) != {OuterUse, ScatterUse}:
            raise UnsupportedOperationError(
                f"parameter {self.state.name(position)!r} is shared by operations whose cross term is not "
                "computed; give each its own parameter"
            )
        merged = [merge_uses([u for u, _ in group], [x for _, x in group]) for group in families.values()]
        return sorted(merged, key=lambda item: not isinstance(item[0], OuterUse))

    def _weigh(
        self, by_parameter: dict[int, list[tuple[Use, Layout]]], factors: Tensor, is_bad: Tensor
    ) -> None:
        weights: dict[int, tuple[Layout, Weights]] = {}
        for position, uses in by_parameter.items():
            for use, layout in uses:
                if id(layout) not in weights:
                    bad = layout.to_rows(is_bad).nonzero().squeeze(1)
                    weights[id(layout)] = (
                        layout,
                        Weights(layout.to_rows(factors), bad, self.state.workspace),
                    )
                use.add_weighted_sum(weights[id(layout)][1], self.flat.sums[position])

    def release(self) -> None:
        """Add noise, update the parameters, and leave the sum at zero.

        Raises:
            PrivacyError: a parameter was added, frozen or moved, or has a gradient that came past the engine.
        """
        self.check_coverage()
        noise = Noise(self._key, self._stream, self._noise_step, self.noise.noise_std(self.clip))
        # Never given out again, even if what follows fails half way.
        self._noise_step += 1
        with torch.no_grad():
            self.updater.update(noise, self._grad_scale)
        torch.autograd.graph.increment_version([span.parameter for span in self.flat])
        self.has_sum = False

    def check_coverage(self) -> None:
        """Every trainable parameter is tracked, in place, and has no gradient of its own."""
        self.flat.check_unchanged(allow_frozen=False)
        self.flat.check_in_place()

    def discard(self) -> None:
        """Drop what was accumulated since the last release."""
        self.state.take()
        if self.has_sum:
            self.flat.summed_grad.zero_()
            self.has_sum = False
