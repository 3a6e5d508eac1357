"""Modules under `torch.compile`: what a capture must see runs as it was written.

A compiled module would hide its calls from the capture, and a compiler that is put around a private module would trace
the engine's hooks with it. Nothing here imports the compiler, which takes seconds.
"""

from __future__ import annotations

import logging
import sys
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from synthward.engine.errors import ConfigError

logger = logging.getLogger("synthward")


def take_out(module: nn.Module) -> None:
    """Undo `module.compile()` of a module and of the layers in it."""
    compiled = [layer for layer in module.modules() if layer._compiled_call_impl is not None]
    for layer in compiled:
        layer._compiled_call_impl = None
    if compiled:
        logger.warning(
            "%s was compiled; its private passes run as it was written. PrivateTrainer.compile records passes",
            type(compiled[0]).__name__,
        )


def check_uncompiled() -> None:
    """
    Raises:
        ConfigError: inside of what a compiler traces, or has traced, around the caller.
    """
    # While it is traced the first is true and the second can not be asked.
    if torch.compiler.is_compiling() or _is_inside():
        raise ConfigError(
            "torch.compile around a private module: its calls would be hidden from the clipping. Leave the module as "
            "it is after make_private, or record its passes by PrivateTrainer.compile"
        )


def _is_inside() -> bool:
    return "torch._dynamo" in sys.modules and callable(torch._C._dynamo.eval_frame.get_eval_frame_callback())


def as_written() -> AbstractContextManager[None]:
    """Inside, compiled functions and modules run as they were written."""
    if "torch._dynamo" in sys.modules:
        return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]
    return nullcontext()
