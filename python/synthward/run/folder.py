"""The run folder: everything a trained generator needs, none of it read off records without a charge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from synthward.encoding import TableEncoder
from synthward.engine.device import CPU
from synthward.engine.errors import CheckpointError, OutputError
from synthward.engine.files import replace_synced, sync_path
from synthward.generators import Generator, build_generator
from synthward.generators.registry import make_settings
from synthward.schema import Schema, load_schema

if TYPE_CHECKING:
    from synthward.engine.ledger import Ledger

RUN_FILE, SCHEMA_FILE, LEDGER_FILE = "run.json", "schema.toml", "ledger.jsonl"
ENCODER_FILE, MODEL_FILE, CHECKPOINT_FOLDER = "encoder.json", "model.safetensors", "checkpoint"


class RunFolder:
    """A folder written by ``synthward fit``; raises `CheckpointError` when it is not one."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        file = self.path / RUN_FILE
        if not file.is_file():
            raise CheckpointError(
                f"{self.path}: no run here ({RUN_FILE} is missing); make one with `synthward fit`"
            )
        try:
            self.info: dict[str, Any] = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{file}: is damaged ({error.msg} at line {error.lineno})") from None

    @classmethod
    def create(cls, path: Path, info: dict[str, Any], schema: Schema) -> RunFolder:
        """Make the folder and its first files; an existing run is an `OutputError`."""
        if (path / RUN_FILE).exists():
            raise OutputError(
                f"{path}: holds a run already; give another --out, --resume it, or --overwrite it"
            )
        path.mkdir(parents=True, exist_ok=True)
        # First what makes the folder a run: killed in between, it can be resumed.
        write_atomic(path / RUN_FILE, _dump(info))
        folder = cls(path)
        folder.save_schema(schema)
        return folder

    def save_schema(self, schema: Schema) -> None:
        """Write the declared schema, unless it is there."""
        if not (self.path / SCHEMA_FILE).exists():
            write_atomic(self.path / SCHEMA_FILE, schema.to_toml().encode())

    @property
    def schema(self) -> Schema:
        return load_schema(self.path / SCHEMA_FILE)

    @property
    def ledger_path(self) -> Path:
        return self.path / LEDGER_FILE

    @property
    def is_complete(self) -> bool:
        return self.info.get("status") == "complete"

    def open_ledger(self, *, readonly: bool = False) -> Ledger:
        """The run's ledger; one that was put back to an older state is a `LedgerError`."""
        # Accounting takes long to import, and a sampler needs none.
        from synthward.engine.ledger import Ledger

        return Ledger.open(self.ledger_path, expected_head=self.info.get("ledger_head"), readonly=readonly)

    def update(self, **fields: Any) -> None:
        """Change fields of run.json atomically."""
        self.info = {**self.info, **fields}
        write_atomic(self.path / RUN_FILE, _dump(self.info))

    def save_encoder(self, encoder: TableEncoder) -> None:
        write_atomic(self.path / ENCODER_FILE, _dump(encoder.to_dict()))

    def load_encoder(self) -> TableEncoder:
        file = self.path / ENCODER_FILE
        if not file.is_file():
            raise CheckpointError(f"{self.path}: has no encoder yet; finish it with `synthward fit --resume`")
        return TableEncoder.from_dict(json.loads(file.read_text()))

    def save_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write tensors under a temporary name, flush, then rename: a kill leaves the old file whole."""
        target = self.path / name
        temporary = target.with_name(f".{name}.tmp")
        save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, temporary)
        sync_path(temporary)
        temporary.replace(target)

    def load_tensors(self, name: str) -> dict[str, Tensor]:
        file = self.path / name
        if not file.is_file():
            raise CheckpointError(
                f"{self.path}: {name} is missing; finish the run with `synthward fit --resume`"
            )
        return dict(load_file(file))

    def new_generator(self, encoder: TableEncoder) -> Generator:
        """The run's generator, untrained."""
        settings = make_settings(self.info["generator"], self.info["settings"])
        return build_generator(self.info["generator"], encoder.layout, encoder.token_mass, settings)

    def load_generator(self, encoder: TableEncoder, device: torch.device = CPU) -> Generator:
        """The run's generator, trained on whatever device; `CheckpointError` while training is unfinished."""
        if not self.is_complete:
            raise CheckpointError(
                f"{self.path}: training is unfinished; finish it with `synthward fit --resume`"
            )
        generator = self.new_generator(encoder).to(device)
        generator.load_state(self.load_tensors(MODEL_FILE))
        return generator


def draw_context(encoder: TableEncoder, rows: int, rng: np.random.Generator) -> Tensor:
    """Context of sampled rows, int64 [rows], from the noisy distribution of records per unit."""
    mass = encoder.context_mass
    return torch.from_numpy(rng.choice(len(mass), size=rows, p=mass / mass.sum()).astype(np.int64))


def write_atomic(path: Path, data: bytes) -> None:
    """Write a small file so that a reader sees the old or the new one, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        replace_synced(path, data, temporary)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"{path}: can not be written ({error.strerror})") from None


def _dump(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=1, sort_keys=True) + "\n").encode()
