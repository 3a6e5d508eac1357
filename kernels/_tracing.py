"""Operations while a step is traced: they are written into the graph, as the custom ops of `ops`, and not run."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from synthward.kernels.conv.shape import ConvShape

P = ParamSpec("P")
R = TypeVar("R")


def is_tracing() -> bool:
    """Whether operations are being written into a graph (`torch.fx.experimental.proxy_tensor.make_fx`)."""
    return get_proxy_mode() is not None


def traceable(function: Callable[P, R]) -> Callable[P, R]:
    """The same function; while a step is traced, the custom op of its name."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if get_proxy_mode() is None:
            return function(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return _through_op(function.__name__, dict(bound.arguments))  # type: ignore[no-any-return]

    return run


def _through_op(name: str, arguments: dict[str, Any]) -> Any:
    from synthward.kernels import ops

    op = getattr(ops, name, None)
    if op is None:
        raise NotImplementedError(f"operation {name!r} can not be traced: it is no custom op")
    declared = {argument.name for argument in op._opoverload._schema.arguments}
    for left_out in arguments.keys() - declared:
        if arguments[left_out] is not None:
            raise NotImplementedError(f"operation {name!r} can not be traced with {left_out!r}")
    if "out" in arguments and arguments["out"] is None:
        arguments["out"] = _unit_zeros(arguments)
    given = {
        key: value.numbers() if isinstance(value, ConvShape) else value
        for key, value in arguments.items()
        if key in declared
    }
    found = op(**given)
    return arguments.get("out") if found is None else found


def _unit_zeros(arguments: dict[str, Any]) -> Tensor:
    """The output [U] of an operation that was given none."""
    offsets, rows = arguments["offsets"], arguments.get("output_grads", arguments.get("rows"))
    assert isinstance(rows, Tensor)
    return torch.zeros(len(rows) if offsets is None else len(offsets) - 1, device=rows.device)
