"""Which rows of a batch belong to which privacy unit."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from synthward.engine.errors import ConfigError

# A number of additions, the same for all units or one for each [U].
Length: TypeAlias = int | Tensor


def longer(*lengths: Length) -> Length:
    """The largest of several lengths, unit by unit."""
    most: Length = 0
    for length in lengths:
        if isinstance(most, int) and isinstance(length, int):
            most = max(most, length)
        elif isinstance(length, Tensor):
            most = length.clamp(min=most) if isinstance(most, int) else torch.maximum(most, length)
        else:
            assert isinstance(most, Tensor)
            most = most.clamp(min=length)
    return most


class Layout:
    """Rows of one physical batch, unit by unit.

    Rows are those of the batch axis: ``num_rows`` of them over ``num_units`` units. A captured call may see
    each of them several times (a time or patch axis after the batch axis): `expand` gives the layout of that
    call. ``offsets`` is int64 [U + 1], or None where each row is a unit. ``order``, if not None, is the
    permutation that puts the rows in unit order.
    """

    def __init__(
        self,
        num_units: int,
        num_rows: int,
        offsets: Tensor | None,
        *,
        rows_per_unit: int | None = None,
        order: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.num_units, self.num_rows = num_units, num_rows
        self.offsets, self.order, self.rows_per_unit = offsets, order, rows_per_unit
        self._device = device
        self._expanded: dict[int, Layout] = {1: self}
        self._row_units: Tensor | None = None
        self._row_offsets: Tensor | None = None
        self._units: Layout | None = None
        self._ones: Tensor | None = None

    @classmethod
    def uniform(cls, num_units: int, rows_per_unit: int, device: torch.device | None = None) -> Layout:
        """`rows_per_unit` rows for each unit, unit by unit."""
        if rows_per_unit < 1:
            raise ConfigError(f"rows_per_unit: got {rows_per_unit}; give at least 1")
        rows = num_units * rows_per_unit
        offsets = None
        if rows_per_unit != 1:
            offsets = torch.arange(0, rows + 1, rows_per_unit, dtype=torch.int64, device=device)
        return cls(num_units, rows, offsets, rows_per_unit=rows_per_unit, device=device)

    @classmethod
    def ragged(cls, offsets: Tensor, device: torch.device | None = None) -> Layout:
        """Unit u owns rows ``offsets[u]:offsets[u + 1]``, maybe none. Offsets are looked at where they lie, and go to
        `device` then."""
        if offsets.dim() != 1 or offsets.dtype != torch.int64 or len(offsets) == 0:
            raise ConfigError("offsets: expected an int64 vector of one more entry than units")
        if int(offsets[0]) != 0 or bool((offsets.diff() < 0).any()):
            raise ConfigError("offsets: must start at 0 and never decrease")
        rows = int(offsets[-1])
        return cls(len(offsets) - 1, rows, offsets.to(device or offsets.device, non_blocking=True))

    @classmethod
    def from_ids(cls, ids: Tensor) -> Layout:
        """One integer id per row, in any order; rows of equal id are one unit."""
        if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ConfigError("unit ids: expected one integer per row of the batch")
        sorted_ids, order = torch.sort(ids, stable=True)
        _, counts = torch.unique_consecutive(sorted_ids, return_counts=True)
        if len(counts) == len(ids):
            return cls.uniform(len(ids), 1, ids.device)
        offsets = torch.zeros(len(counts) + 1, dtype=torch.int64, device=ids.device)
        torch.cumsum(counts, 0, out=offsets[1:])
        is_sorted = bool((order.diff() > 0).all())
        return cls(len(counts), len(ids), offsets, order=None if is_sorted else order)

    def expand(self, factor: int) -> Layout:
        """The layout of a call that sees each row `factor` times, row by row."""
        if factor not in self._expanded:
            self._expanded[factor] = self._expand(factor)
        return self._expanded[factor]

    @property
    def units(self) -> Layout:
        """The layout of one row for each unit."""
        if self._units is None:
            device = self._device if self.offsets is None else self.offsets.device
            self._units = self if self.is_single else Layout.uniform(self.num_units, 1, device)
        return self._units

    def _expand(self, factor: int) -> Layout:
        if self.rows_per_unit is not None:
            return Layout.uniform(self.num_units, self.rows_per_unit * factor, self._device)
        assert self.offsets is not None
        order = self.order
        if order is not None:
            order = (order.unsqueeze(1) * factor + torch.arange(factor, device=order.device)).flatten()
        return Layout(self.num_units, self.num_rows * factor, self.offsets * factor, order=order)

    @property
    def is_single(self) -> bool:
        """Whether each row is a unit."""
        return self.rows_per_unit == 1

    @property
    def row_offsets(self) -> Tensor:
        """The offsets, int64 [U + 1], also where each row is a unit."""
        return self.offsets_on(self._device)

    def offsets_on(self, device: torch.device | None) -> Tensor:
        """`row_offsets`; where each row is a unit they are made on a device, once for all calls that ask."""
        if self.offsets is not None:
            return self.offsets
        if self._row_offsets is None or (device is not None and self._row_offsets.device != device):
            self._row_offsets = torch.arange(self.num_rows + 1, device=device)
        return self._row_offsets

    @property
    def lengths(self) -> Length:
        """Rows of each unit [U], or the one number that all have. What is said of a unit must follow from its own
        rows: were it to follow from the longest unit's, adding that one would move all others."""
        if self.rows_per_unit is not None:
            return self.rows_per_unit
        assert self.offsets is not None
        return self.offsets.diff()

    @property
    def longest(self) -> int:
        """Most rows of one unit (all rows, where looking would wait for the device)."""
        if self.rows_per_unit is not None:
            return self.rows_per_unit
        if self.offsets is None or self.offsets.device.type != "cpu" or self.num_units == 0:
            return self.num_rows
        return int(self.offsets.diff().max())

    @property
    def row_units(self) -> Tensor:
        """Unit of each row in the batch's own order, int64 [num_rows]."""
        if self._row_units is None:
            if self.offsets is None:
                self._row_units = torch.arange(self.num_rows, device=self._device)
            else:
                units = torch.arange(self.num_units, device=self.offsets.device)
                in_order = torch.repeat_interleave(units, self.offsets.diff(), output_size=self.num_rows)
                if self.order is None:
                    self._row_units = in_order
                else:
                    self._row_units = torch.empty_like(in_order).index_copy_(0, self.order, in_order)
        return self._row_units

    def tensors(self) -> list[Tensor]:
        """What describes the rows, as far as it is a tensor."""
        return [tensor for tensor in (self.offsets, self.order) if tensor is not None]

    def sort_rows(self, rows: Tensor) -> Tensor:
        """Rows [num_rows, ...] in unit order."""
        return rows if self.order is None else rows.index_select(0, self.order)

    def unit_rows(self, rows: Tensor, first: int, last: int, fill: int = 0) -> Tensor:
        """Rows [num_rows, ...] (in the batch's own order) of units ``first:last`` as [last - first, K, ...], K the
        most rows of a unit of them; what is missing is `fill`."""
        if self.rows_per_unit is not None:
            each = self.rows_per_unit
            return rows[first * each : last * each].view(last - first, each, *rows.shape[1:])
        assert self.offsets is not None
        bounds = self.offsets[first : last + 1]
        counts = bounds.diff()
        begin, end = int(bounds[0]), int(bounds[-1])
        most = int(counts.max()) if len(counts) else 0
        chosen = rows[begin:end] if self.order is None else rows.index_select(0, self.order[begin:end])
        units = torch.repeat_interleave(torch.arange(last - first, device=rows.device), counts)
        place = torch.arange(end - begin, device=rows.device) - (bounds - begin)[units]
        padded = rows.new_full((last - first, most, *rows.shape[1:]), fill)
        padded[units, place] = chosen
        return padded

    def to_rows(self, per_unit: Tensor) -> Tensor:
        """A value per unit [U] as a value per row [num_rows], in the batch's own order."""
        if self.is_single:
            return per_unit
        if self.rows_per_unit is not None:
            return per_unit.unsqueeze(1).expand(-1, self.rows_per_unit).flatten()
        return per_unit.index_select(0, self.row_units)

    def sum_rows(self, rows: Tensor, factors: Tensor | None = None) -> Tensor:
        """Rows [num_rows] or [num_rows, p], in the batch's own order, added up per unit: [U] or [U, p].

        `factors` [num_rows] multiply rows [num_rows, p]. The result may be `rows` itself where each is a
        unit; sums of rows of half precision are fp32.
        """
        if not self.is_single and rows.is_floating_point() and rows.element_size() == 2:
            rows = rows.float()
        if self.rows_per_unit is not None and rows.dim() == 2 and not self.is_single:
            # A product with a row of ones or factors: faster than a sum over the middle axis.
            if factors is None:
                if self._ones is None or self._ones.dtype != rows.dtype:
                    self._ones = rows.new_ones(self.num_rows)
                factors = self._ones
            left = factors.view(self.num_units, 1, self.rows_per_unit)
            return torch.bmm(left, rows.view(self.num_units, self.rows_per_unit, rows.shape[1])).squeeze(1)
        if factors is not None:
            rows = rows * factors.unsqueeze(1)
        if self.is_single:
            return rows
        if self.rows_per_unit is not None:
            return rows.view(self.num_units, self.rows_per_unit).sum(1)
        return rows.new_zeros(self.num_units, *rows.shape[1:]).index_add_(0, self.row_units, rows)
