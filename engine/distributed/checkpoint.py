"""Checkpoints of several ranks: each writes what it owns, any number of ranks reads it again.

On top of `torch.distributed.checkpoint`, whose planners share out what is written and read, and with a storage of its
own (`storage`): the library's default unpickles a file to read a checkpoint, and that may run code.
"""

from __future__ import annotations

import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.tensor import DTensor, Replicate, Shard

from synthward.engine.distributed.ranks import Ranks
from synthward.engine.distributed.storage import (
    DTYPES,
    INDEX_FILE,
    Index,
    Reader,
    SavedTensor,
    Writer,
    check_file,
    data_folders,
    read_index,
)
from synthward.engine.errors import CheckpointError, SynthwardError
from synthward.engine.files import sync_path

__all__ = ["Index", "SavedTensor", "is_saved", "load_sharded", "read_index", "remove_sharded", "save_sharded"]


def save_sharded(
    path: Path | str, tensors: Mapping[str, Tensor], ranks: Ranks, info: Mapping[str, Any] | None = None
) -> None:
    """Write a checkpoint in place of the one that is there; all ranks call it together.

    Args:
        path: folder of the checkpoint, on a file system that all ranks share. It is made, in a folder that exists.
        tensors: the same names, shapes and types on all ranks. A plain tensor is equal on all ranks and is written by
            one of them; of a `DTensor` (`Shard` or `Replicate` on a mesh of one dimension, of all ranks) each rank
            writes its shard. float64, float32, float16, bfloat16, int64, int32, int16, int8, uint8, bool.
        info: a dictionary that JSON can hold; rank 0's is kept.

    Raises:
        CheckpointError: on all ranks: something can not be written, or is no value that a checkpoint keeps. What was
            saved before is whole then.

    Guarantees: a kill of any rank at any point leaves the old or the new checkpoint whole, and what it left lying is
    removed by the next call. Sums that are not reduced yet (`Partial`) are refused. Bits are kept, those of NaN too.
    """
    path = Path(path)
    _agree(ranks, lambda: _check_values(path, tensors, ranks))
    kinds = sorted((k, isinstance(v, DTensor), tuple(v.shape), str(v.dtype)) for k, v in tensors.items())
    if not ranks.all_have(repr(kinds)):
        raise _told_once(CheckpointError(f"{path}: the ranks hold different tensors"), ranks)
    data = ranks.lead(lambda: _make_folder(path))
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with _translated(ranks), torch.no_grad():
            dcp.save(
                dict(tensors),
                storage_writer=Writer(path, data, info or {}),
                planner=planner,
                process_group=ranks.group,
                no_dist=ranks.group is None,
            )
    except CheckpointError:
        if ranks.is_main:
            shutil.rmtree(path / data, ignore_errors=True)
        raise
    if ranks.is_main:
        _clean(path, keep={data})


def load_sharded(
    path: Path | str, like: Mapping[str, Tensor] | None, ranks: Ranks, *, partial: bool = False
) -> dict[str, Tensor]:
    """Read a checkpoint that any number of ranks has written; all ranks call it together.

    Args:
        path: folder of the checkpoint.
        like: what each tensor is to be like: a plain tensor gives the full tensor on its device, a `DTensor` this
            rank's shard, however it was saved. None: every tensor of the checkpoint, in full, on the CPU.
        partial: whether the checkpoint may hold more than is asked for.

    Returns:
        New tensors (or `DTensor`) by name; ``like`` is not changed.

    Raises:
        CheckpointError: on all ranks: the checkpoint is missing or damaged, or its names, shapes or types are others.
    """
    path = Path(path)
    index = ranks.lead(lambda: read_index(path))
    if like is not None:
        _agree(ranks, lambda: _compare(path, index, like, partial))
    # Every file is compared before anything is read of it; the ranks share that work.
    _agree(ranks, lambda: _check_files(path, index, ranks))
    if like is None:
        tensors = {name: torch.empty(saved.shape, dtype=saved.dtype) for name, saved in index.tensors.items()}
    else:
        tensors = {name: torch.empty_like(value, requires_grad=False) for name, value in like.items()}
    with _translated(ranks), torch.no_grad():
        dcp.load(
            tensors,
            storage_reader=Reader(path, index),
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=ranks.group,
            no_dist=ranks.group is None,
        )
    return tensors


def is_saved(path: Path | str) -> bool:
    """Whether a folder holds a checkpoint (which may be damaged)."""
    return (Path(path) / INDEX_FILE).is_file()


def remove_sharded(path: Path | str) -> None:
    """Remove a checkpoint and what a kill left of others; one rank calls it. What is not a checkpoint's stays."""
    path = Path(path)
    if not path.is_dir():
        return
    # Without its index it is no checkpoint any more, whatever else is still there.
    (path / INDEX_FILE).unlink(missing_ok=True)
    _clean(path, keep=set())
    if not any(path.iterdir()):
        path.rmdir()


def _agree(ranks: Ranks, work: Callable[[], object]) -> None:
    """Do something that involves no other rank on every rank; an error on one is raised on all."""
    error: SynthwardError | None = None
    try:
        work()
    except SynthwardError as found:
        error = found
    first = next((found for found in ranks.gather(error) if found is not None), None)
    if first is not None:
        raise _told_once(first, ranks)


def _told_once(error: SynthwardError, ranks: Ranks) -> SynthwardError:
    """An error that is raised on all ranks; rank 0 says it."""
    error.is_told = not ranks.is_main
    return error


def _check_values(path: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    for name, value in tensors.items():
        if value.dtype not in DTYPES.values() or name == "__metadata__":
            raise CheckpointError(f"{path}: tensor {name!r} of {value.dtype} is not kept by a checkpoint")
        if value.is_meta:
            raise CheckpointError(f"{path}: tensor {name!r} has no values yet (it is on the meta device)")
        if isinstance(value, DTensor):
            known = all(type(placement) in (Shard, Replicate) for placement in value.placements)
            if len(value.placements) != 1 or not known or value.device_mesh.size() != ranks.world_size:
                raise CheckpointError(
                    f"{path}: tensor {name!r} is placed as {value.placements} on {value.device_mesh.size()} ranks; "
                    "a checkpoint keeps shards and copies, on one mesh of all ranks"
                )


def _check_files(path: Path, index: Index, ranks: Ranks) -> None:
    for number, (name, saved) in enumerate(sorted(index.files.items())):
        if number % ranks.world_size == ranks.rank:
            check_file(path, name, saved)


def _compare(path: Path, index: Index, like: Mapping[str, Tensor], partial: bool) -> None:
    strange = set(like) - set(index.tensors) if partial else set(like) ^ set(index.tensors)
    if strange:
        names = ", ".join(sorted(strange))
        raise CheckpointError(f"{path}: is of another run; names that do not match: {names}")
    for name, value in like.items():
        saved = index.tensors[name]
        if tuple(value.shape) != saved.shape or value.dtype != saved.dtype:
            raise CheckpointError(
                f"{path}: is of another run: tensor {name!r} is {saved.dtype} {list(saved.shape)}, "
                f"expected {value.dtype} {list(value.shape)}"
            )


def _make_folder(path: Path) -> str:
    """Make the folder and, in it, one for new data; remove what a kill has left."""
    data = f"data-{secrets.token_hex(8)}"
    try:
        path.mkdir(exist_ok=True)
        # An index that can not be read may be of something else altogether: it is not replaced.
        held = read_index(path).files if is_saved(path) else {}
        _clean(path, keep={name.split("/")[0] for name in held})
        (path / data).mkdir()
        sync_path(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path}: can not be written ({error.strerror})") from None
    return data


def _clean(path: Path, keep: set[str]) -> None:
    for name in data_folders(path) - keep:
        shutil.rmtree(path / name, ignore_errors=True)
    (path / (INDEX_FILE + ".part")).unlink(missing_ok=True)


@contextmanager
def _translated(ranks: Ranks) -> Iterator[None]:
    """One line for what `torch.distributed.checkpoint` reports with the trace of every rank."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            if ranks.group is None:
                yield
            else:
                with ranks.exchanging():
                    yield
    except CheckpointException as error:
        found = [failure[0] for _, failure in sorted(error.failures.items())]
        first = next((e for e in found if isinstance(e, SynthwardError)), found[0])
        if isinstance(first, SynthwardError):
            raise _told_once(first, ranks) from None
        raise first from error
