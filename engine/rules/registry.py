"""Which functions are captured, which are refused, and what to use in their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import nn

from synthward.engine.errors import UnsupportedOperationError
from synthward.engine.rules import (
    attention,
    bare,
    bilinear,
    conv,
    embedding_bag,
    group_norm,
    layer_norm,
    matmul,
    recurrent,
)
from synthward.engine.rules.embedding import embedding
from synthward.engine.rules.linear import linear

HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: linear,
    F.embedding: embedding,
    **conv.HANDLERS,
    **layer_norm.HANDLERS,
    **group_norm.HANDLERS,
    **bare.HANDLERS,
    **matmul.HANDLERS,
    **recurrent.HANDLERS,
    **attention.HANDLERS,
    **bilinear.HANDLERS,
    **embedding_bag.HANDLERS,
}

HINTS = {
    "scaled_dot_product_attention": "give each row of the batch its copy of a learned mask: "
    "mask.expand(rows, -1, -1, -1)",
}


_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")


def check_modules(module: nn.Module) -> None:
    """`UnsupportedOperationError` for layers that mix the units of a batch, with what to use in their
    place."""
    if type(module).__name__ in _WRAPPERS:
        raise UnsupportedOperationError(
            f"the module is wrapped in {type(module).__name__}, whose gradients would not be clipped; give the module "
            "itself, or one that fully_shard (FSDP2) has sharded: the engine does the reduction over ranks"
        )
    for name, layer in module.named_modules():
        kind, where = type(layer).__name__, f"layer {name!r} ({type(layer).__name__})"
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training:
            raise UnsupportedOperationError(
                f"{where} mixes the units of a batch: {kind} in training mode has no per-unit gradient; "
                "use nn.GroupNorm or nn.LayerNorm"
            )
        if (
            isinstance(layer, nn.modules.instancenorm._InstanceNorm)
            and layer.training
            and layer.track_running_stats
        ):
            raise UnsupportedOperationError(
                f"{where} keeps running statistics of the records without noise; use {kind} with "
                "track_running_stats=False"
            )


def _batch_norm(
    input: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    *_: Any,
    **__: Any,
) -> None:
    if training or running_mean is None:
        raise UnsupportedOperationError(
            "operation 'batch_norm' in training mode mixes the units of a batch; use group_norm or layer_norm"
        )


def _instance_norm(input: Any, running_mean: Any = None, running_var: Any = None, *_: Any, **__: Any) -> None:
    if running_mean is not None:
        raise UnsupportedOperationError(
            "operation 'instance_norm' with running statistics keeps statistics of the records without "
            "noise; use it without them"
        )


CHECKS: dict[Any, Callable[..., None]] = {F.batch_norm: _batch_norm, F.instance_norm: _instance_norm}
