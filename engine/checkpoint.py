"""What is kept of a trainer: parameters, moments, step counter. Tensors only, in safetensors; JSON beside
them.

Never kept: sums without noise, noise keys, anything per unit. A resumed trainer draws a fresh key.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from synthward.engine.errors import CheckpointError
from synthward.engine.files import sync_path
from synthward.engine.optim import load_optimizer_tensors, optimizer_tensors
from synthward.engine.step import DPStep

_STEP = "step"
_PARAMETER = "parameter."
_OPTIMIZER = "optimizer."
# The bound that adaptive clipping has reached: computed from released counts alone.
_BOUND = "clipping.bound"


def trainer_tensors(step: DPStep, steps_done: int) -> dict[str, Tensor]:
    """The state of a step object as a flat dictionary of copies. All ranks take part."""
    tensors = {f"{_PARAMETER}{span.name}": span.parameter.detach().clone() for span in step.flat}
    moments = optimizer_tensors(step.flat, step.optimizer, step.updater)
    tensors |= {f"{_OPTIMIZER}{key}": value for key, value in moments.items()}
    tensors[_STEP] = torch.tensor(steps_done, dtype=torch.int64)
    if step.quantile is not None:
        tensors[_BOUND] = torch.tensor(step.quantile.bound, dtype=torch.float64)
    return tensors


def restore_tensors(step: DPStep, tensors: dict[str, Tensor]) -> int:
    """Write `trainer_tensors` back; returns the number of steps done.

    Raises:
        CheckpointError: parameters are missing, unknown or of another shape. Nothing is changed then.
    """
    if _STEP not in tensors:
        raise CheckpointError("the checkpoint has no step counter")
    if (step.quantile is not None) != (_BOUND in tensors):
        raise CheckpointError("the checkpoint is of another clipping rule")
    saved = {k.removeprefix(_PARAMETER): v for k, v in tensors.items() if k.startswith(_PARAMETER)}
    spans = {span.name: span for span in step.flat}
    if set(saved) != set(spans):
        wrong = ", ".join(sorted(set(saved) ^ set(spans)))
        raise CheckpointError(f"the checkpoint is of another network; parameters that do not match: {wrong}")
    for name, span in spans.items():
        if saved[name].shape != span.parameter.shape:
            raise CheckpointError(
                f"the checkpoint is of another network: parameter {name!r} has shape "
                f"{list(saved[name].shape)}, expected {list(span.parameter.shape)}"
            )
    for name, span in spans.items():
        step.flat.load(span, saved[name])
    moments = {k.removeprefix(_OPTIMIZER): v for k, v in tensors.items() if k.startswith(_OPTIMIZER)}
    load_optimizer_tensors(step.flat, step.optimizer, step.updater, moments)
    if step.quantile is not None:
        step.quantile.bound = float(tensors[_BOUND])
    return int(tensors[_STEP])


def save_checkpoint(path: Path | str, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Write tensors and a JSON-able dictionary to one safetensors file, atomically."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, part, metadata={"info": json.dumps(info)})
        sync_path(part)
        part.replace(path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: can not be written ({error})") from None


def load_checkpoint(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inverse of `save_checkpoint`; reading runs no code.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dictionary
            info = json.loads((file.metadata() or {}).get("info", "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: is no checkpoint, or damaged ({error})") from None
    return tensors, info
