"""What rank 0 tells the other processes of a run: what to train on, or that there is nothing to do.

Rank 0 reads the records, pays for the histograms and writes every file. The others wait for their part of the training.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synthward.encoding import Encoded, TableEncoder
from synthward.engine import KeySchedule, PrivacyPlan
from synthward.engine.device import CPU, choose_device, copy_to
from synthward.engine.distributed.exchange import copy_from_main
from synthward.engine.distributed.ranks import Ranks
from synthward.engine.draws import Draws
from synthward.engine.errors import ConfigError, RankLostError, SynthwardError
from synthward.generators import Batch
from synthward.run.folder import RunFolder


@dataclass(frozen=True)
class Start:
    """What a process needs to take part in a training, the records and the key apart."""

    path: Path
    encoder: dict[str, Any]
    plan: PrivacyPlan
    num_units: int
    seed: int
    parallel: str
    device: str


@dataclass(frozen=True)
class Nothing:
    """There is nothing to train; rank 0 says why."""

    error: SynthwardError | None


@contextmanager
def leading(ranks: Ranks) -> Iterator[None]:
    """On rank 0: the others, who wait for a `Start`, are told if it never comes."""
    if ranks.world_size == 1:
        yield
        return
    ranks.is_awaited = True
    try:
        yield
    except BaseException as error:
        if ranks.is_awaited:
            told = error if isinstance(error, SynthwardError) else RankLostError("rank 0 stopped")
            _tell(ranks, Nothing(told))
        raise
    if ranks.is_awaited:
        _tell(ranks, Nothing(None))


def begin(
    ranks: Ranks,
    folder: RunFolder,
    encoder: TableEncoder,
    plan: PrivacyPlan,
    num_units: int,
    keys: KeySchedule,
    parallel: str,
    device: str,
) -> int:
    """On rank 0: call the others in; returns the seed of all that is random and neither noise nor sampling."""
    seed = folder.info["seed"]
    seed = secrets.randbits(62) if seed is None else int(seed)
    if ranks.world_size > 1:
        start = Start(folder.path.absolute(), encoder.to_dict(), plan, num_units, seed, parallel, device)
        _tell(ranks, start)
        KeySchedule.shared(ranks, keys)
    return seed


def await_start(ranks: Ranks) -> tuple[Start, KeySchedule] | None:
    """On the other ranks: what to take part in, or None where there is nothing to do.

    Raises:
        SynthwardError: what went wrong on rank 0, which has said so.
    """
    ranks.await_main()
    found = ranks.broadcast(None)
    if isinstance(found, Nothing):
        if found.error is not None:
            found.error.is_told = True
            raise found.error
        return None
    assert isinstance(found, Start)
    return found, KeySchedule.shared(ranks)


def _tell(ranks: Ranks, message: Start | Nothing) -> None:
    ranks.is_awaited = False
    ranks.await_main()
    ranks.broadcast(message)


def device_for(asked: str, ranks: Ranks) -> torch.device:
    """This process's device (`choose_device`), whose tensors the ranks can exchange.

    Raises:
        ConfigError: a GPU is asked for and the processes have no NCCL; what `choose_device` refuses.
    """
    device = choose_device(asked, one_each=ranks.world_size > 1)
    if ranks.world_size == 1 or device == CPU or ranks.backend_of(device) == "nccl":
        return device
    if asked == "auto":
        return CPU
    raise ConfigError(
        f"device: got {asked!r}, but these processes exchange by {ranks.backend}; begin by "
        "init_process_group('cpu:gloo,cuda:nccl')"
    )


def agreed_device(asked: str, ranks: Ranks) -> torch.device:
    """`device_for`, which is of one kind on all ranks. All take part.

    Raises:
        ConfigError: on all ranks.
    """
    if ranks.world_size == 1:
        return device_for(asked, ranks)
    device, error = CPU, None
    try:
        device = device_for(asked, ranks)
    except ConfigError as found:
        error = found
    outcomes = ranks.gather((device.type, error))
    error = next((failed for _, failed in outcomes if failed is not None), None)
    if error is None and len({kind for kind, _ in outcomes}) > 1:
        error = ConfigError("device: some of the processes see a GPU and others do not; give cpu")
    if error is not None:
        error.is_told = not ranks.is_main
        raise error
    return device


class Units:
    """Encoded records as tensors, and batches of them: whole units, records drawn inside each. All ranks have all.

    Records stay in CPU memory, where batches are put together; a batch goes to its device by itself.
    """

    def __init__(self, encoded: Encoded | None, ranks: Ranks) -> None:
        mine: list[Tensor] = []
        if encoded is not None:
            arrays = (encoded.tokens, encoded.scores, encoded.context, encoded.unit_offsets)
            mine = [torch.from_numpy(array).contiguous() for array in arrays]
        shapes = ranks.broadcast([(tensor.shape, tensor.dtype) for tensor in mine])
        if encoded is None:
            mine = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]
        copy_from_main(ranks, mine)
        self.tokens, self.scores, self.context, self.offsets = mine

    def batch(
        self, units: Tensor, draws: int, rng: Draws, device: torch.device = CPU
    ) -> tuple[Batch, Tensor]:
        """Rows of ``draws`` records per unit, and which units are real; padding (-1) repeats the first unit.

        units int64 [U] in CPU memory; the random numbers, there too, are those of as many numbered rows. The results
        are on the device, which is not waited for.
        """
        mask = units >= 0
        index = units.clamp(min=0)
        first, last = self.offsets[index], self.offsets[index + 1]
        pick = rng.uniform(len(index), draws).double() * (last - first).unsqueeze(1)
        rows = (first.unsqueeze(1) + pick.long()).flatten()
        tokens, scores, context, mask = (
            copy_to(part, device) for part in (self.tokens[rows], self.scores[rows], self.context[rows], mask)
        )
        return Batch(tokens, scores, context), mask
