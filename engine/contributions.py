"""The contributions of a physical batch's units: norms as the backward pass brings them, then factors and sums.

A parameter's norm is taken inside the backward of its own layer, while what it needs is in cache, as soon as its
last use has come. A clipping group whose parameters are all there is finished on the spot where the rule allows
it; flat clipping waits for the end of the backward pass.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from synthward.engine.capture import Batch, CaptureState, Kept, positions_of
from synthward.engine.clipping import clip_factors
from synthward.engine.errors import PrivacyError, UnsupportedOperationError
from synthward.engine.group_norms import GroupNorms
from synthward.engine.layout import Layout, Length, longer
from synthward.engine.planner import Planner
from synthward.engine.precision import exact_products
from synthward.engine.provenance import Derived, Part, Span, Target, flat_range
from synthward.engine.rules.mixed import add_derived_sum, add_mixed_norms
from synthward.engine.rules.uses import (
    BiasOfOuter,
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
from synthward.engine.spec import ClipSpec
from synthward.engine.sums import Sums

# What a gradient that is computed again may differ by, relative to its norm (sums by atomics on a device).
_REPEATED = 2.0**-16

# A use, whose parameter it is of, and which rows are whose.
Item = tuple[Target, Use, Layout]


@dataclass
class Groups:
    """Clipping groups: which group each parameter is in, and the bound of each group."""

    of_position: list[int]
    bounds: list[float]
    names: list[str]


@dataclass
class _Group:
    """What is known of one clipping group in this pass."""

    norms: GroupNorms
    sq_norms: Tensor | None = None
    items: list[Item] = field(default_factory=list)
    done: set[int] = field(default_factory=set)
    is_summed: bool = False


class Contributions:
    """One backward pass over one physical batch.

    Args:
        state: what the capture knows of the forward passes.
        batch: the rows and units.
        clip: the clipping rule.
        groups: its groups.
        sums: where weighted sums are added up.
        planner: chooses the method of each norm.
        observe: called with each group's index and the upper bounds of its units' norms [U], and the mask of
            units that count.
        factors: of an earlier pass over the same batch (one tensor [U] per group): each use is summed at once, and
            `finish` makes sure that its norms are those of the earlier pass.
        measure_only: nothing is kept for a sum; `factors()` gives what the sums need.
    """

    def __init__(
        self,
        state: CaptureState,
        batch: Batch,
        *,
        clip: ClipSpec,
        groups: Groups,
        sums: Sums,
        planner: Planner,
        observe: Callable[[int, Tensor, Tensor], None] | None = None,
        factors: list[tuple[Tensor, Tensor]] | None = None,
        measure_only: bool = False,
    ) -> None:
        self._state, self._batch, self._layout = state, batch, batch.layout
        self._clip, self._groups, self._sums, self._planner = clip, groups, sums, planner
        self._observe, self._given = observe, factors
        self._measure_only = measure_only or factors is not None
        # A pass that measures alone adds nothing to the sums, and ends none of them.
        self._is_summed = not measure_only
        self._norms = Norms()
        self._waiting: dict[int, list[Item]] = defaultdict(list)
        self._states = [_Group(GroupNorms(self.num_units, sums.device)) for _ in groups.bounds]
        self._found: dict[int, tuple[Tensor, Tensor]] = {}
        self._weights: dict[tuple[int, int], tuple[Layout, Weights]] = {}
        self.forwards: set[int] = set()
        self.has_summed = False
        self.most_rows = 0
        self._biases: set[int] = set()
        self._took_bias = False
        self._empty: Counter[int] = Counter()  # uses that had no rows
        # What was measured is what is summed: versions of the kept tensors, by use, and names for the message.
        self._versions: dict[int, list[int]] = {}
        self._measured_names: dict[int, str] = {}
        planner.begin(state.forward_bytes)

    @property
    def num_units(self) -> int:
        """Privacy units of this physical batch."""
        return self._layout.num_units

    # While the backward pass runs

    @exact_products()
    def receive(self, kept: Kept, batch: Batch) -> None:
        """Called in the backward of each captured call."""
        rows = self._layout.num_rows
        self.forwards.add(kept.forward)
        if batch.layout.num_units != self._layout.num_units or batch.scale != self._batch.scale:
            return  # several forward passes of different batches: refused by name when the pass ends
        if rows == 0:
            return self._receive_nothing(kept)
        if kept.leading % rows:
            raise UnsupportedOperationError(
                f"parameter {self._state.name(kept.uses[0][0])!r} in operation {kept.operation!r}: its input has "
                f"{kept.leading} rows where the batch has {rows}; the first axis must be the batch's (expand "
                "what all rows share, such as position ids, to one row each)"
            )
        outer: OuterUse | None = None
        self._took_bias = False
        for target, found in kept.uses:
            use: Use
            if isinstance(found, OuterUse) and self._takes_bias(kept, found):
                outer = replace(found, with_bias=True)
                self._add((target, outer, self._layout.expand(found.rows // rows)))
                continue
            if outer is not None and self._took_bias:
                self._add_bias(target, outer)
                continue
            if isinstance(found, DiagonalRows):
                use = DiagonalUse(self._layout.expand(found.rows // rows).sum_rows(found.grads))
            else:
                use = found
            if isinstance(use, DiagonalUse):
                self._add(self._simplify(target, use, self._layout.units))
            else:
                self._add(self._simplify(target, use, self._layout.expand(use.rows // rows)))
        # The cache holds the rows too, which else would live on.
        self._norms = Norms()

    def _receive_nothing(self, kept: Kept) -> None:
        """A call on no rows: groups are finished where other ranks finish theirs, who wait for the sums."""
        for position in (p for target, _ in kept.uses for p in positions_of(target)):
            self._empty[position] += 1
            if self._empty[position] == self._state.expected(position):
                self._states[self._groups.of_position[position]].done.add(position)
                self._finish_if_complete(self._groups.of_position[position])

    def _takes_bias(self, kept: Kept, outer: OuterUse) -> bool:
        """Whether the norm of a product's weight is to be taken with that of its bias: both are used this once."""
        if self._measure_only or self._planner.perf.keep == "bf16" or len(kept.uses) != 2:
            return False
        (weight, _), (bias, rows) = kept.uses
        if not (isinstance(rows, DiagonalRows) and rows.is_bias_of_outer):
            return False
        if not isinstance(weight, int) or not isinstance(bias, int) or weight == bias:
            return False
        groups = self._groups.of_position
        is_once = self._state.expected(weight) == 1 and self._state.expected(bias) == 1
        layout = self._layout.expand(outer.rows // self._layout.num_rows)
        return is_once and groups[weight] == groups[bias] and outer.can_take_bias(layout)

    def _add_bias(self, target: Target, outer: OuterUse) -> None:
        """Note the bias of a product whose norm has just been taken with it."""
        assert isinstance(target, int)
        index = self._groups.of_position[target]
        group = self._states[index]
        group.done.add(target)
        self._planner.note_with_weight(target)
        if not self._measure_only:
            layout = self._layout.expand(outer.rows // self._layout.num_rows)
            self._hold(group, [(target, BiasOfOuter(outer.output_grads), layout)])
        self._finish_if_complete(index)

    def _simplify(self, target: Target, use: Use, layout: Layout) -> Item:
        """A use of a computed weight that is no more than a transpose or a choice of rows, as a use of the
        parameter itself."""
        if isinstance(target, Derived):
            if target.transposed is not None and isinstance(use, OuterUse):
                return target.transposed, OuterUse(use.output_grads, use.activations), layout
            if target.gathered is not None and isinstance(use, DiagonalUse):
                position, ids = target.gathered
                rows, width = self._sums.shapes[position]
                grads = use.unit_rows.reshape(-1, width)
                ids = ids.reshape(-1).long().repeat(layout.num_units)
                scatter = ScatterUse(ids, grads, rows)
                return position, scatter, layout.expand(len(ids) // max(layout.num_units, 1))
        return target, use, layout

    def _add(self, item: Item) -> None:
        target = item[0]
        if self._given is not None:
            factors, is_bad = self._given[self._group_of(target)]
            self._sum(item, factors, is_bad, self._group_of(target))
        item = (target, self._planner.keep(item[1]), item[2])
        for position in positions_of(target):
            if position in self._states[self._groups.of_position[position]].done:
                raise UnsupportedOperationError(
                    f"parameter {self._state.name(position)!r} is used again in a backward pass after its norm "
                    "was taken; run forward and backward once each"
                )
        first = min(positions_of(target))
        self._waiting[first].append(item)
        waiting = self._waiting[first]
        is_whole = isinstance(target, int) and all(t == target for t, _, _ in waiting)
        if is_whole and self._state.expected(first) == len(waiting):
            self._measure(first)
            self._finish_if_complete(self._groups.of_position[first])

    def _measure(self, position: int) -> None:
        """Take the norm of a parameter all of whose uses are there."""
        items = _added_up(self._waiting.pop(position))
        group = self._states[self._groups.of_position[position]]
        group.done.add(position)
        if len(items) > 1:
            self._add_norms(group, items)
            self._hold(group, items)
            return
        target, kept, layout = items[0]
        planner = self._planner
        use, layout = planner.prepare(planner.widen(kept), layout, position, may_keep=not self._measure_only)
        self._took_bias = isinstance(use, OuterUse) and use.with_bias
        self._add_norms(group, [(target, use, layout)])
        # Gradients that were materialised are held as they were measured; the rest is what was rounded before.
        self._hold(group, [(target, planner.keep(use) if type(use) is type(kept) else use, layout)])

    def _hold(self, group: _Group, items: list[Item]) -> None:
        """They were measured and wait for their sum."""
        if self._measure_only:
            return
        group.items += items
        for target, use, _ in items:
            self._versions[id(use)] = versions_of(use)
            self._measured_names[id(use)] = self._state.name(target)

    def _finish_if_complete(self, index: int) -> None:
        """A group of a rule that takes groups one by one is summed as soon as its parameters are all there."""
        if not self._clip.is_single_pass or self._measure_only:
            return
        group = self._states[index]
        wanted = (p for p, g in enumerate(self._groups.of_position) if g == index)
        if all(p in group.done or self._state.expected(p) == 0 for p in wanted):
            self._finish_group(index)

    # At its end

    @exact_products()
    def finish(self) -> None:
        """Take the norms that waited, then clip and sum what was not summed yet.

        Raises:
            PrivacyError: the factors were those of an earlier pass, and this one has other gradients.
        """
        self._measure_rest()
        for index, group in enumerate(self._states):
            if not group.is_summed:
                self._finish_group(index)
        for index, (factors, _) in enumerate(self._given or ()):
            if bool((factors > self._found[index][0]).any()):
                raise PrivacyError(
                    "keep='recompute': the second backward pass gave other gradients than the one that was measured "
                    "(something random in it: dropout under a checkpoint that does not keep its random state, a "
                    "custom backward). Make it repeatable, or use keep='full'"
                )

    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """For each group the factors [U] and which units are not finite [U], for a second pass."""
        found = (self._found[index] for index in range(len(self._states)))
        # A little less than this pass allows, which covers what may differ in a repetition on a device.
        return [(factors * (1.0 - _REPEATED), is_bad) for factors, is_bad in found]

    def sq_norms(self) -> Tensor:
        """Squared norms of a finished pass, float32 [groups, U]."""
        return torch.stack([group.sq_norms for group in self._states if group.sq_norms is not None])

    def _measure_rest(self) -> None:
        while self._waiting:
            items = _added_up(self._connected(next(iter(self._waiting))))
            groups = {self._groups.of_position[p] for target, _, _ in items for p in positions_of(target)}
            if len(groups) > 1:
                names = self._state.name(items[0][0])
                raise UnsupportedOperationError(
                    f"parameter {names!r}: it is computed together with parameters of another clipping group; "
                    "put them into one group"
                )
            group = self._states[groups.pop()]
            group.done.update(p for target, _, _ in items for p in positions_of(target))
            self._add_norms(group, items)
            self._hold(group, items)
            self._norms = Norms()

    def _connected(self, first: int) -> list[Item]:
        """The waiting items that share a parameter with those of `first`, directly or by way of others."""
        items = self._waiting.pop(first)
        positions = {p for target, _, _ in items for p in positions_of(target)}
        changed = True
        while changed:
            changed = False
            for key in list(self._waiting):
                if any(p in positions for target, _, _ in self._waiting[key] for p in positions_of(target)):
                    found = self._waiting.pop(key)
                    positions.update(p for target, _, _ in found for p in positions_of(target))
                    items, changed = items + found, True
        return items

    def _add_norms(self, group: _Group, items: list[Item]) -> None:
        """The squared norm of the uses of one parameter, or of several that are computed together."""
        pair = group.norms.new()
        sq_norms, row_sums = pair.unbind()
        items = [(target, self._planner.widen(use), layout) for target, use, layout in items]
        merged = self._merge(items)
        product: Length | None
        formed = longer(*(use.released_chain(layout) for use, layout in merged or [i[1:] for i in items]))
        if merged is None:
            product = add_mixed_norms(
                items,
                self._sums.shapes,
                self._layout.num_units,
                sq_norms,
                row_sums,
                self._norms,
                self._planner.chunk_bytes,
            )
        elif len(merged) == 1:
            use, layout = merged[0]
            use.add_norms(sq_norms, row_sums, layout, self._norms)
            chain = use.chain(layout)
            # Formed twice, then: for the norm, and in the sum.
            is_formed = getattr(use, "is_formed", False)
            product, formed = (None, chain + formed + 2) if is_formed else (chain, formed)
        else:
            product = self._add_several(merged, items, sq_norms, row_sums)
        group.norms.add(pair, product=product, formed=formed, uses=len(items))

    def _add_several(
        self, merged: list[tuple[Use, Layout]], items: list[Item], sq_norms: Tensor, row_sums: Tensor
    ) -> Length:
        """Norms of uses that add up, with the cross term of a table that is also a linear layer's weight; the longest
        chain of their inner products."""
        for use, layout in merged:
            use.add_norms(sq_norms, row_sums, layout, self._norms)
        chain = longer(*(use.chain(layout) for use, layout in merged))
        if len(merged) == 2 and isinstance(items[0][0], int):
            (outer, outer_layout), (scatter, scatter_layout) = merged
            assert isinstance(outer, OuterUse) and isinstance(scatter, ScatterUse)
            add_cross_term(outer, outer_layout, scatter, scatter_layout, sq_norms)
            width = outer.activations.shape[1]
            chain = longer(chain, width) + outer_layout.lengths
        return chain

    def _merge(self, items: list[Item]) -> list[tuple[Use, Layout]] | None:
        """One use per family (the outer family first) whose norms add up, or None where only the gradients
        themselves tell."""
        if len(items) == 1 and isinstance(items[0][0], int | Part | Span):
            return [items[0][1:]]
        if self._are_disjoint([target for target, _, _ in items]):
            return [item[1:] for item in items]
        if not all(isinstance(target, int) for target, _, _ in items):
            return None
        families: dict[type[Use], list[tuple[Use, Layout]]] = defaultdict(list)
        for _, use, layout in items:
            families[type(use)].append((use, layout))
        kinds = set(families)
        if not (kinds == {OuterUse, ScatterUse} or kinds in ({OuterUse}, {ScatterUse}, {DiagonalUse})):
            return None
        widths = {u.activations.shape[1] for u, _ in families.get(OuterUse, []) if isinstance(u, OuterUse)}
        if len(widths) > 1:
            return None
        merged = [merge_uses([u for u, _ in group], [x for _, x in group]) for group in families.values()]
        return sorted(merged, key=lambda item: not isinstance(item[0], OuterUse))

    def _are_disjoint(self, targets: list[Target]) -> bool:
        """Whether they are parts of one parameter that do not overlap."""
        ranges = []
        for target in targets:
            if not isinstance(target, Part | Span) or target.position != positions_of(targets[0])[0]:
                return False
            ranges.append(flat_range(target, self._sums.shapes[target.position]))
        ranges.sort()
        return all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))

    def _finish_group(self, index: int) -> None:
        group = self._states[index]
        group.is_summed = True
        group.sq_norms, error = group.norms.complete()
        factors, norms, counts = clip_factors(
            group.sq_norms,
            self._clip,
            bound=self._groups.bounds[index],
            error=error,
            parameters=group.norms.count,
            scale=self._batch.scale,
            unit_mask=self._batch.unit_mask,
        )
        is_bad = ~torch.isfinite(group.sq_norms)
        self._found[index] = (factors, is_bad)
        if self._observe is not None:
            self._observe(index, norms, counts)
        # The sum over rows that a bias needs comes with the one of its weight, which stands before it.
        self._biases = {id(u.unit_rows) for _, u, _ in group.items if isinstance(u, DiagonalUse)}
        self._biases |= {id(u.output_grads) for _, u, _ in group.items if isinstance(u, BiasOfOuter)}
        group.items.reverse()
        left = Counter(p for target, _, _ in group.items for p in positions_of(target))
        while group.items:
            # Released one by one, as its sum is there.
            item = group.items.pop()
            self._sum(item, factors, is_bad, index)
            for position in positions_of(item[0]):
                left[position] -= 1
                if not left[position]:
                    self._sums.done(position)
        for position, group_of in enumerate(self._groups.of_position):
            if group_of == index and position not in left and self._is_summed:
                self._sums.done(position)
        self._biases = set()
        self._planner.free()

    def _sum(self, item: Item, factors: Tensor, is_bad: Tensor, index: int) -> None:
        """Add the weighted sum of one use to its parameter's."""
        self.has_summed = True
        target, use, layout = item
        if self._versions.pop(id(use), None) not in (None, versions_of(use)):
            raise PrivacyError(
                f"parameter {self._measured_names[id(use)]!r}: a gradient or an activation was written to after the "
                "norm was taken of it (a hook, or a custom backward, that changes its gradient in place); return a "
                "new tensor there"
            )
        use = self._planner.widen(use)
        self.most_rows = max(self.most_rows, use.rows)
        if isinstance(target, Derived) and self._sums.dtype == torch.float64:
            raise UnsupportedOperationError(
                f"parameter {self._state.name(target)!r}: it is computed from others (weight norm, a merge of "
                "adapters), and arithmetic='discrete' needs sums of parameters themselves; use arithmetic='float'"
            )
        key = (index, id(layout))
        if key not in self._weights:
            weights = Weights(layout.to_rows(factors), layout.rows_per_unit)
            self._weights[key] = (layout, weights)
        weights = self._weights[key][1]
        if isinstance(use, OuterUse) and id(use.output_grads) in self._biases:
            weights.row_totals[id(use.output_grads)] = None
        if isinstance(target, Derived):
            add_derived_sum(target, use, weights, self._sums)
        elif isinstance(target, Part | Span):
            start, stop = flat_range(target, self._sums.shapes[target.position])
            use.add_weighted_sum(weights, self._sums[target.position].view(-1)[start:stop])
        else:
            use.add_weighted_sum(weights, self._sums[target])

    def _group_of(self, target: Target) -> int:
        return self._groups.of_position[min(positions_of(target))]

    def check_finished(self) -> None:
        """`PrivacyError` if something measured was not summed; a guard on this class itself."""
        if self._waiting or any(group.items for group in self._states):
            raise PrivacyError("a captured use was neither summed nor refused; nothing is released")


def versions_of(use: Use) -> list[int]:
    """How often each tensor of a use was written to."""
    return [v._version for v in vars(use).values() if isinstance(v, Tensor) and not v.is_inference()]


def _added_up(items: list[Item]) -> list[Item]:
    """Uses of one parameter whose unit's rows lie in it entry by entry, as one: its norm and its sum are then of the
    same tensor, whatever cancels between them."""
    target, _, layout = items[0]
    rows = [use for _, use, _ in items if type(use) is DiagonalUse]
    is_one = all(isinstance(t, int) and t == target for t, _, _ in items)
    if len(items) == 1 or len(rows) < len(items) or not is_one:
        return items
    return [(target, DiagonalUse.add(rows), layout)]
