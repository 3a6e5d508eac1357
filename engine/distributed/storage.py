"""How a checkpoint of several ranks lies on disk: the storage layer under `torch.distributed.checkpoint`.

    path/index.json     names, shapes, types, what lies in which file; each file's size and SHA-256
    path/data-<16 hex digits>/part-<rank>.safetensors

The index alone says what the checkpoint is, and it is replaced atomically: a kill leaves the old or the new one whole.
Reading is JSON and safetensors; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import Metadata, SavePlan, SavePlanner, StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from synthward.engine.errors import CheckpointError
from synthward.engine.files import sync_file, sync_path, write_synced

INDEX_FILE = "index.json"
FORMAT, VERSION = "synthward-checkpoint", 1
_FOLDER = re.compile(r"data-[0-9a-f]{16}")
_FILE = re.compile(r"data-[0-9a-f]{16}/part-[0-9]{5}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")

# Types that a checkpoint keeps, by their names in safetensors.
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor: the file it lies in (under the tensor's name), where it begins, how large it is."""

    file: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class SavedTensor:
    """A tensor of a checkpoint: type, full shape, and its parts, which cover it once."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class SavedFile:
    """Size in bytes and SHA-256 (hexadecimal) of a file of tensors."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """What a checkpoint holds: tensors by name, files by path in its folder, and a JSON-able dictionary."""

    tensors: dict[str, SavedTensor]
    files: dict[str, SavedFile]
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def total_size(self) -> int:
        """Bytes of all files of tensors."""
        return sum(file.size for file in self.files.values())

    def to_json(self) -> bytes:
        tensors = {
            name: {
                "dtype": _NAMES[saved.dtype],
                "shape": saved.shape,
                "chunks": [[chunk.file, chunk.offsets, chunk.sizes] for chunk in saved.chunks],
            }
            for name, saved in self.tensors.items()
        }
        files = {name: {"size": file.size, "sha256": file.sha256} for name, file in self.files.items()}
        body = {"tensors": tensors, "files": files, "total_size": self.total_size, "info": self.info}
        whole = {"format": FORMAT, "version": VERSION, "sha256": _digest(body), "checkpoint": body}
        return (json.dumps(whole, sort_keys=True) + "\n").encode()


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_index(path: Path) -> Index:
    """The index of the checkpoint in a folder.

    Raises:
        CheckpointError: there is none, it is damaged, of another format or of a later version.
    """
    file = Path(path) / INDEX_FILE
    try:
        whole = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: holds no checkpoint ({INDEX_FILE} is missing)") from None
    except OSError as error:
        raise CheckpointError(f"{file}: can not be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{file}: is damaged (it is not JSON)") from None
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        raise CheckpointError(f"{file}: is not the index of a checkpoint")
    if whole.get("version") != VERSION:
        raise CheckpointError(
            f"{file}: was written in version {whole.get('version')!r} of the format, this program reads {VERSION}"
        )
    body = whole.get("checkpoint")
    if whole.get("sha256") != _digest(body):
        raise CheckpointError(f"{file}: is damaged (its checksum does not fit)")
    try:
        return _parse(body)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file}: contradicts itself ({error})") from None


def _parse(body: Any) -> Index:
    files = {name: SavedFile(entry["size"], entry["sha256"]) for name, entry in body["files"].items()}
    for name, entry in files.items():
        if not _FILE.fullmatch(name) or type(entry.size) is not int or not _SHA256.fullmatch(entry.sha256):
            raise ValueError(f"file {name!r} can not be of a checkpoint")
    tensors = {}
    room = {name: entry.size for name, entry in files.items()}
    for name, entry in body["tensors"].items():
        chunks = tuple(Chunk(file, _sizes(at), _sizes(sizes)) for file, at, sizes in entry["chunks"])
        tensors[name] = SavedTensor(DTYPES[entry["dtype"]], _sizes(entry["shape"]), chunks)
        if not _cover(tensors[name]):
            raise ValueError(f"tensor {name!r} is not whole")
        for chunk in chunks:
            room[chunk.file] -= math.prod(chunk.sizes) * tensors[name].dtype.itemsize
    if any(left < 0 for left in room.values()):
        raise ValueError("a file holds less than is said")
    if not isinstance(body["info"], dict):
        raise ValueError("info")
    index = Index(tensors, files, body["info"])
    if index.total_size != body["total_size"]:
        raise ValueError("the sizes do not add up")
    return index


def _sizes(values: Iterable[Any]) -> tuple[int, ...]:
    found = tuple(values)
    if not all(type(value) is int and value >= 0 for value in found):
        raise ValueError("a size is no number")
    return found


def _cover(saved: SavedTensor) -> bool:
    """Whether the parts are the tensor, cut along one dimension: each element lies in one of them."""
    shape, chunks = saved.shape, saved.chunks
    if not chunks or any(len(c.sizes) != len(shape) or len(c.offsets) != len(shape) for c in chunks):
        return False
    cut = {d for chunk in chunks for d, size in enumerate(chunk.sizes) if size != shape[d]}
    if not cut:
        return len(chunks) == 1 and not any(chunks[0].offsets)
    if len(cut) > 1:
        return False
    (along,) = cut
    end = 0
    for chunk in sorted(chunks, key=lambda c: (c.offsets[along], c.sizes[along])):
        if chunk.offsets[along] != end or any(at for d, at in enumerate(chunk.offsets) if d != along):
            return False
        end += chunk.sizes[along]
    return end == shape[along]


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> SavedFile:
    """Write one safetensors file and flush it to the disk; hashed as it is written, one tensor copied at a time."""
    # As the library orders them: every tensor is then aligned to its type.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("xb") as file:
        pieces: Iterable[bytes | memoryview[int]] = (_raw(tensors[name]) for name in order)
        for raw in chain((len(text).to_bytes(8, "little"), text), pieces):
            digest.update(raw)
            file.write(raw)
        sync_file(file)
    return SavedFile(8 + len(text) + end, digest.hexdigest())


def _raw(tensor: Tensor) -> memoryview[int]:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def check_file(path: Path, name: str, saved: SavedFile) -> None:
    """Compare a file with what the index says of it.

    Raises:
        CheckpointError: it is missing, cut short or damaged.
    """
    try:
        with (path / name).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != saved.size:
                raise CheckpointError(
                    f"{path / name}: has {size} bytes, not the {saved.size} that were written"
                )
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise CheckpointError(f"{path / name}: is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path / name}: can not be read ({error.strerror})") from None
    if found != saved.sha256:
        raise CheckpointError(f"{path / name}: is damaged (its checksum does not fit)")


def data_folders(path: Path) -> set[str]:
    """Names of the folders of data in a checkpoint's folder; whatever else lies there is not ours."""
    return {entry.name for entry in path.iterdir() if _FOLDER.fullmatch(entry.name) and entry.is_dir()}


class Writer(StorageWriter):
    """Writes each rank's part of a plan to a file of its own; rank 0 then replaces the index.

    Args:
        path: the checkpoint's folder; it has the folder ``data``.
        data: name of the folder of this checkpoint's files.
        info: goes into the index.
    """

    def __init__(self, path: Path, data: str, info: Mapping[str, Any]) -> None:
        self.path, self.data, self.info = path, data, dict(info)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from one checkpoint to the next."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The folders are there already."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        done: Future[list[WriteResult]] = Future()
        done.set_result(self._write(plan, planner) if plan.items else [])
        return done

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        name = f"{self.data}/part-{plan.storage_data:05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for item in plan.items:
            value = planner.resolve_data(item)
            assert isinstance(value, Tensor) and item.index.fqn not in tensors
            tensors[item.index.fqn] = value
        try:
            saved = write_tensors(self.path / name, tensors)
            sync_path((self.path / name).parent)
        except OSError as error:
            raise CheckpointError(f"{self.path / name}: can not be written ({error.strerror})") from None
        return [WriteResult(item.index, tensors[item.index.fqn].nbytes, (name, saved)) for item in plan.items]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        places = {result.index: result.storage_data[0] for part in results for result in part}
        files: dict[str, SavedFile] = dict(result.storage_data for part in results for result in part)
        for name, saved in files.items():
            found = self.path / name
            if not found.is_file() or found.stat().st_size != saved.size:
                raise CheckpointError(
                    f"{found}: is not what another rank wrote; all ranks need one file system for {self.path}"
                )
        by_tensor: dict[str, list[Chunk]] = {}
        for index, name in places.items():
            stored = metadata.state_dict_metadata[index.fqn]
            assert isinstance(stored, TensorStorageMetadata) and index.offset is not None
            sizes = next(chunk.sizes for chunk in stored.chunks if chunk.offsets == index.offset)
            by_tensor.setdefault(index.fqn, []).append(Chunk(name, tuple(index.offset), tuple(sizes)))
        tensors = {}
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            chunks = tuple(sorted(by_tensor[name], key=lambda c: (c.offsets, c.sizes)))
            tensors[name] = SavedTensor(stored.properties.dtype, tuple(stored.size), chunks)
        self._replace_index(Index(tensors, files, self.info))

    def _replace_index(self, index: Index) -> None:
        target = self.path / INDEX_FILE
        part = target.with_name(INDEX_FILE + ".part")
        try:
            write_synced(part, index.to_json())
            sync_path(self.path)
            part.replace(target)
            sync_path(self.path)
        except OSError as error:
            raise CheckpointError(f"{target}: can not be written ({error.strerror})") from None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class Reader(StorageReader):
    """Reads the parts that a plan asks for; the index is known, and the files were compared with it."""

    def __init__(self, path: Path, index: Index) -> None:
        self.path, self.index = path, index

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from one checkpoint to the next."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=saved.dtype),
                    torch.Size(saved.shape),
                    [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in saved.chunks],
                )
                for name, saved in self.index.tensors.items()
            }
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """The index is known already."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[tuple[ReadItem, Chunk]]] = {}
        for item in plan.items:
            number = item.storage_index.index
            assert number is not None
            chunk = self.index.tensors[item.storage_index.fqn].chunks[number]
            by_file.setdefault(chunk.file, []).append((item, chunk))
        for name, items in by_file.items():
            try:
                with safe_open(self.path / name, framework="pt") as file:
                    for item, chunk in items:
                        target = planner.resolve_tensor(item).detach()
                        target.copy_(self._part(file, item, chunk))
                        planner.commit_tensor(item, target)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.path / name}: can not be read ({error})") from None
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _part(self, file: Any, item: ReadItem, chunk: Chunk) -> Tensor:
        name = item.storage_index.fqn
        stored = file.get_slice(name)
        if (
            tuple(stored.get_shape()) != chunk.sizes
            or DTYPES.get(stored.get_dtype()) != self.index.tensors[name].dtype
        ):
            raise CheckpointError(f"{self.path / chunk.file}: tensor {name!r} is not the one of the index")
        if tuple(item.lengths) == chunk.sizes:
            whole: Tensor = file.get_tensor(name)
            return whole
        part: Tensor = stored[
            tuple(slice(at, at + n) for at, n in zip(item.storage_offsets, item.lengths, strict=True))
        ]
        return part

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True
