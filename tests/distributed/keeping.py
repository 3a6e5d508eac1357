"""What ranks do in `test_checkpoint.py`: save and load checkpoints in groups of one, two and four of them."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from synthward.engine.distributed import storage
from synthward.engine.distributed.checkpoint import load_sharded, read_index, save_sharded
from synthward.engine.distributed.ranks import Ranks
from synthward.engine.distributed.storage import DTYPES
from synthward.engine.errors import CheckpointError

# None, one, primes, fewer rows than ranks, as many, more.
ROWS = (0, 1, 2, 3, 4, 5, 7, 13, 64)
PLACES = ("plain", "rows", "columns", "copies")


def values(seed: int) -> dict[str, Tensor]:
    """Tensors of every type with any bits (NaN of all kinds, infinities); the first part of the name is a placement."""
    draw = random.Random(seed)
    found = {}
    for place in PLACES:
        for name, dtype in DTYPES.items():
            least = {"plain": 0, "copies": 0, "rows": 1, "columns": 2}[place]
            shape = [draw.choice(ROWS) for _ in range(draw.randint(least, 3))]
            size = torch.Size(shape).numel() * dtype.itemsize
            raw = torch.frombuffer(bytearray(draw.randbytes(size) + b"\0"), dtype=torch.uint8)[:size].clone()
            raw = raw % 2 if dtype == torch.bool else raw
            found[f"{place}.network.{name}.weight"] = raw.view(dtype).reshape(shape)
    found["plain.step"] = torch.tensor(draw.getrandbits(40))
    return found


def bits(value: Tensor) -> bytes:
    return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def placed(value: Tensor, place: str, mesh: DeviceMesh | None) -> Tensor:
    """A full tensor as it is placed on the ranks of a mesh."""
    if mesh is None or place == "plain":
        return value
    placement = {"rows": Shard(0), "columns": Shard(1), "copies": Replicate()}[place]
    return distribute_tensor(value, mesh, [placement], src_data_rank=None)


def local_bits(value: Tensor) -> bytes:
    return bits(value.to_local() if isinstance(value, DTensor) else value)


def likes(found: dict[str, Tensor], mesh: DeviceMesh | None) -> Iterator[dict[str, Tensor] | None]:
    """What to load as: in full without being told, in full, and, where there are ranks, every other way."""
    yield None
    yield {name: torch.zeros_like(value) for name, value in found.items()}
    if mesh is None:
        return
    for other in ("rows", "copies"):
        yield {
            name: placed(torch.zeros_like(value), other if value.dim() else "copies", mesh)
            for name, value in found.items()
        }
    yield {name: placed(torch.zeros_like(value), name.split(".")[0], mesh) for name, value in found.items()}


def groups() -> dict[int, tuple[Ranks, DeviceMesh | None] | None]:
    """By size: this process's part in a group of one, of the last two of four processes, and of all four."""
    pair = dist.new_group([2, 3])
    found: dict[int, tuple[Ranks, DeviceMesh | None] | None] = {1: None, 2: None}
    if dist.get_rank() == 1:
        found[1] = Ranks.alone(), None
    if dist.get_rank() in (2, 3):
        found[2] = Ranks(pair), DeviceMesh.from_group(pair, "cpu")
    found[4] = Ranks.current(), DeviceMesh.from_group(dist.group.WORLD, "cpu")
    return found


def every_direction(folder: Path, seeds: range) -> dict[tuple[int, int], int]:
    """Saved on 1, 2 and 4 ranks, loaded on 1, 2 and 4; tensors compared, by both."""
    parts = groups()
    compared: dict[tuple[int, int], int] = {}
    for seed in seeds:
        full = values(seed)
        for size, part in parts.items():
            if part is not None:
                ranks, mesh = part
                tensors = {name: placed(value, name.split(".")[0], mesh) for name, value in full.items()}
                save_sharded(folder / f"from{size}", tensors, ranks, {"seed": seed, "size": size})
        dist.barrier()
        for saved in parts:
            path = folder / f"from{saved}"
            index = read_index(path)
            assert index.info == {"seed": seed, "size": saved} and set(index.tensors) == set(full)
            assert len(list(path.glob("data-*"))) == 1 and len(list(path.iterdir())) == 2
            for size, part in parts.items():
                if part is not None:
                    compared[saved, size] = compared.get((saved, size), 0) + _compare(path, full, *part)
        dist.barrier()
    return compared


def _compare(path: Path, full: dict[str, Tensor], ranks: Ranks, mesh: DeviceMesh | None) -> int:
    compared = 0
    for like in likes(full, mesh):
        found = load_sharded(path, like, ranks)
        assert list(found) == list(like if like is not None else read_index(path).tensors)
        for name, value in found.items():
            wanted = full[name]
            assert value.shape == wanted.shape and value.dtype == wanted.dtype, name
            if like is not None and isinstance(like[name], DTensor):
                assert isinstance(value, DTensor) and value.placements == like[name].placements
                wanted = distribute_tensor(wanted, mesh, value.placements, src_data_rank=None)
            assert local_bits(value) == local_bits(wanted), (path, name, value.shape)
            compared += 1
    return compared


def refused(work: Callable[[], Any]) -> tuple[str, bool]:
    """The one line that is raised, and whether another rank says it."""
    try:
        work()
    except CheckpointError as error:
        return str(error), error.is_told
    return "", False


def refusals(folder: Path) -> dict[str, tuple[str, bool]]:
    """What every rank says when one of them, or all, can not save or load."""
    ranks = Ranks.current()
    mesh = DeviceMesh.from_group(dist.group.WORLD, "cpu")
    path, first = folder / "kept", {"a": torch.arange(6.0), "b": placed(torch.ones(8, 3), "rows", mesh)}
    save_sharded(path, first, ranks)
    kept = (path / "index.json").read_bytes()
    said = {}

    def save(**tensors: Tensor) -> Callable[[], None]:
        return lambda: save_sharded(path, tensors, ranks)

    partial = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    said["partial"] = refused(save(a=partial))
    said["meta"] = refused(save(a=torch.ones(3, device="meta")))
    said["complex"] = refused(save(a=torch.ones(3, dtype=torch.complex64)))
    said["names"] = refused(save(**{"a": torch.ones(2), f"b{ranks.rank}": torch.ones(1)}))
    said["shapes"] = refused(save(a=torch.ones(2 + ranks.rank)))
    said["one rank"] = refused(save(a=partial) if ranks.rank == 1 else save(a=torch.ones(3)))
    said["no folder"] = refused(lambda: save_sharded(folder / "not" / "there", first, ranks))
    write = storage.write_tensors
    if ranks.rank == 1:
        storage.write_tensors = _full_disk
    said["full disk"] = refused(save(**first))
    storage.write_tensors = write
    dist.barrier()
    assert (path / "index.json").read_bytes() == kept and len(list(path.iterdir())) == 2
    found = load_sharded(path, first, ranks)
    assert all(local_bits(found[name]) == local_bits(first[name]) for name in first)
    said["shape"] = refused(lambda: load_sharded(path, {"a": torch.ones(5), "b": first["b"]}, ranks))
    said["dtype"] = refused(lambda: load_sharded(path, {"a": torch.ones(6).double(), "b": first["b"]}, ranks))
    said["fewer"] = refused(lambda: load_sharded(path, {"a": torch.ones(6)}, ranks))
    assert set(load_sharded(path, {"a": torch.ones(6)}, ranks, partial=True)) == {"a"}
    said["more"] = refused(lambda: load_sharded(path, {**first, "c": torch.ones(1)}, ranks, partial=True))
    said["none"] = refused(lambda: load_sharded(folder / "nothing", None, ranks))
    dist.barrier()
    if ranks.is_main:
        part = max(path.rglob("*.safetensors"))
        part.write_bytes(part.read_bytes()[:-1])
    dist.barrier()
    said["cut short"] = refused(lambda: load_sharded(path, None, ranks))
    return said


def _full_disk(path: Path, tensors: dict[str, Tensor]) -> Any:
    path.write_bytes(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")
