"""Operations that write into a tensor that they are given."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from synthward.engine.provenance import tensors_in

_OPERATORS = "add sub mul matmul truediv div floordiv mod pow and or xor lshift rshift"
_DUNDERS = frozenset({"__setitem__", *(f"__i{name}__" for name in _OPERATORS.split())})
_SETTERS = frozenset({Tensor.data.__set__})  # type: ignore[attr-defined]
# Functions that write running statistics without a version of theirs telling: what says that they do, and where they
# are, among the positional arguments.
_STATISTICS: dict[Any, tuple[int | None, slice]] = {
    torch.batch_norm: (5, slice(3, 5)),
    torch.native_batch_norm: (5, slice(3, 5)),
    torch.instance_norm: (5, slice(3, 5)),
    torch.batch_norm_update_stats: (None, slice(1, 3)),
    torch.fused_moving_avg_obs_fake_quant: (1, slice(3, 7)),
}


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Tensors that ``func(*args, **kwargs)`` writes into, as far as its name and its ``out=`` tell, or it is a
    known one."""
    if kwargs.get("out") is not None:
        yield from tensors_in(kwargs["out"])
    if _is_in_place(func):
        first = args[0] if args else kwargs.get("input", kwargs.get("self"))
        yield from tensors_in(first)
    if func in _STATISTICS:
        flag, places = _STATISTICS[func]
        if len(args) < places.stop or (flag is not None and len(args) <= flag):
            yield from tensors_in([*args, *kwargs.values()])
        elif flag is None or bool(args[flag]):
            yield from tensors_in(args[places])


@lru_cache(maxsize=4096)
def _is_in_place(func: Any) -> bool:
    # An overload of torch.ops is called "copy_.default".
    name = str(getattr(func, "__name__", "")).partition(".")[0]
    return (name.endswith("_") and not name.endswith("__")) or name in _DUNDERS or func in _SETTERS
