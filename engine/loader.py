"""A data loader whose batches are Poisson draws over privacy units."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)
from torch.utils.data import default_collate as default_collate

from synthward.engine.distributed.ranks import Ranks
from synthward.engine.errors import ConfigError
from synthward.engine.sampling import Sampler, rank_part
from synthward.engine.spec import SamplingSpec

Collate = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class Draw:
    """One Poisson draw, or this rank's part of it: its number, and per row of its batch the id of the row's unit (None:
    rows are units)."""

    index: int
    rows: int
    unit_ids: npt.NDArray[np.int64] | None


class PoissonBatches:
    """Endless batch sampler: each item is the row indices of one fresh draw; one epoch is ``round(period / q)``
    draws. With several ranks all of them make the same draw, and each takes its own part of it."""

    def __init__(
        self, sampler: Sampler, unit_ids: npt.NDArray[np.int64] | None, ranks: Ranks | None = None
    ) -> None:
        self._sampler, self._next, self._ranks = sampler, 0, ranks or Ranks.alone()
        self.epoch_length = max(1, round(sampler.period / sampler.sample_rate))
        self.drawn: deque[Draw] = deque()
        self._unit_ids = unit_ids
        if unit_ids is not None:
            self._order = np.argsort(unit_ids, kind="stable")
            _, counts = np.unique(unit_ids, return_counts=True)
            self._starts = np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        return self.epoch_length

    def __iter__(self) -> Iterator[list[int]]:
        # Draws that a former pass made and did not use are never handed out under a new batch.
        self.drawn.clear()
        for _ in range(self.epoch_length):
            units = self._sampler.draw(self._next)
            start, stop = rank_part(len(units), self._ranks.rank, self._ranks.world_size)
            units = units[start:stop]
            rows, ids = units, None
            if self._unit_ids is not None:
                parts = [self._order[self._starts[u] : self._starts[u + 1]] for u in units]
                rows = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
                ids = self._unit_ids[rows]
            self.drawn.append(Draw(self._next, len(rows), ids))
            self._next += 1
            yield rows.tolist()


class PoissonLoader(DataLoader[Any]):
    """A `DataLoader` over the same data set, by Poisson draws; `draw` is the one handed out last. With several ranks
    each has its part of every draw.

    A batch has as many rows as were drawn, possibly none: it then has the right shapes with a batch axis of
    0.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        sampling: SamplingSpec,
        key: bytes,
        unit_ids: npt.NDArray[np.int64] | None,
        ranks: Ranks | None = None,
    ) -> None:
        check_loader(loader)
        self.sampling = sampling
        units = len(np.unique(unit_ids)) if unit_ids is not None else rows_of(loader)
        if units == 0:
            raise ConfigError("data_loader: its data set is empty")
        self.units = units
        self.draw: Draw | None = None
        self._batches = PoissonBatches(sampling.sampler(units, key), unit_ids, ranks)
        collate = loader.collate_fn if loader.collate_fn is not None else default_collate
        super().__init__(
            loader.dataset,
            batch_sampler=self._batches,
            num_workers=loader.num_workers,
            collate_fn=_Collate(collate, collate([loader.dataset[0]])),
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=loader.generator,
            persistent_workers=loader.persistent_workers,
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            # Workers fetch ahead, so the draw of a batch is known only when the batch is handed out.
            self.draw = self._batches.drawn.popleft()
            yield batch


class _Collate:
    """The user's collate function, with a batch of no rows for an empty draw."""

    def __init__(self, collate: Collate, one: Any) -> None:
        self._collate, self._empty = collate, _without_rows(one)

    def __call__(self, items: list[Any]) -> Any:
        return self._collate(items) if items else self._empty


def _without_rows(batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch[:0].clone()
    if isinstance(batch, dict):
        return {key: _without_rows(value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_without_rows(value) for value in batch))
    if isinstance(batch, list | tuple):
        inner = [_without_rows(v) for v in batch if isinstance(v, torch.Tensor | dict | list | tuple)]
        return type(batch)(inner)
    raise ConfigError(
        f"data_loader: its batches hold {type(batch).__name__}; an empty draw needs batches of tensors (in "
        "tuples, lists or dictionaries)"
    )


def check_loader(loader: DataLoader[Any]) -> None:
    """`ConfigError` where a Poisson draw can not stand in for the loader's own sampler."""
    if isinstance(loader.dataset, IterableDataset):
        raise ConfigError(
            "data_loader: Poisson sampling needs a data set with length and index, not an iterable one"
        )
    sampler = loader.sampler
    if not isinstance(sampler, RandomSampler | SequentialSampler) or type(loader.batch_sampler) not in (
        BatchSampler,
        type(None),
    ):
        raise ConfigError(
            f"data_loader: it samples by {type(loader.batch_sampler).__name__} over "
            f"{type(sampler).__name__}, which Poisson sampling would silently replace; give a plain loader "
            "(shuffle=True or False)"
        )


def rows_of(loader: DataLoader[Any]) -> int:
    """Rows of a loader's data set; `ConfigError` where it has no length."""
    if not hasattr(loader.dataset, "__len__"):
        raise ConfigError("data_loader: Poisson sampling needs a data set with a length")
    return len(loader.dataset)


def fingerprint(data: object, unit_ids: npt.NDArray[np.int64] | None = None) -> str:
    """Tells data sets apart, hex: by the ids of their units, the rows of a `Subset`, and the first, middle and last row
    of a `TensorDataset`. Of others, whose rows may be random, by their class alone."""
    found = hashlib.sha256(type(data).__qualname__.encode())
    if unit_ids is not None:
        found.update(unit_ids.tobytes())
    if isinstance(data, Subset):
        found.update(np.asarray(data.indices, dtype=np.int64).tobytes())
        found.update(fingerprint(data.dataset).encode())
    elif isinstance(data, TensorDataset):
        for tensor in data.tensors:
            found.update(repr((tensor.shape, tensor.dtype)).encode())
            places = [0, len(tensor) // 2, len(tensor) - 1] if len(tensor) else []
            rows = tensor[places].detach().cpu().contiguous().view(-1)
            found.update(rows.view(torch.uint8).numpy().tobytes() if len(rows) else b"")
    return found.hexdigest()


def as_unit_ids(unit_ids: Sequence[int] | torch.Tensor | npt.ArrayLike, rows: int) -> npt.NDArray[np.int64]:
    """One integer id per row of a data set, checked."""
    ids = np.asarray(unit_ids)
    if ids.shape != (rows,) or not np.issubdtype(ids.dtype, np.integer):
        raise ConfigError(
            f"unit_ids: expected one integer per row of the data set ({rows} rows), got {ids.dtype} "
            f"{ids.shape}"
        )
    return ids.astype(np.int64)
