"""Operations after which a row's place in its tensor no longer tells, for every batch alike, whose it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Argument `dim` where they have one: (place among the positional arguments, default).
_ALONG: dict[Any, tuple[int, int | None]] = {
    torch.index_select: (1, None),
    Tensor.index_select: (1, None),
    torch.gather: (1, None),
    Tensor.gather: (1, None),
    torch.take_along_dim: (2, None),
    Tensor.take_along_dim: (2, None),
    torch.index_add: (1, None),
    Tensor.index_add: (1, None),
    Tensor.index_add_: (1, None),
    torch.index_reduce: (1, None),
    Tensor.index_reduce: (1, None),
    Tensor.index_reduce_: (1, None),
    torch.index_copy: (1, None),
    Tensor.index_copy: (1, None),
    Tensor.index_copy_: (1, None),
    torch.scatter: (1, None),
    Tensor.scatter: (1, None),
    Tensor.scatter_: (1, None),
    torch.scatter_add: (1, None),
    Tensor.scatter_add: (1, None),
    Tensor.scatter_add_: (1, None),
    torch.scatter_reduce: (1, None),
    Tensor.scatter_reduce: (1, None),
    Tensor.scatter_reduce_: (1, None),
    torch.sort: (1, -1),
    Tensor.sort: (1, -1),
    torch.topk: (2, -1),
    Tensor.topk: (2, -1),
    torch.repeat_interleave: (2, None),
    Tensor.repeat_interleave: (2, None),
}
_BY_VALUE = frozenset({torch.sort, Tensor.sort, torch.topk, Tensor.topk})
# These put data at places of their first argument, which may well be constant.
_PLACING = frozenset(
    func
    for func in _ALONG
    if func.__name__.startswith(("index_add", "index_copy", "index_reduce", "scatter"))
)
_PUTS = frozenset({torch.index_put, Tensor.index_put, Tensor.index_put_})
_ALWAYS = frozenset(
    {
        torch.masked_scatter,
        Tensor.masked_scatter,
        Tensor.masked_scatter_,
        torch.msort,
        Tensor.msort,
        torch.put,
        Tensor.put,
        Tensor.put_,
        torch.masked_select,
        Tensor.masked_select,
        torch.take,
        Tensor.take,
        torch.unique,
        Tensor.unique,
        torch.unique_consecutive,
        Tensor.unique_consecutive,
    }
)


def picks_rows(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], is_constant: Callable[[Tensor], bool]
) -> bool:
    """Whether a call on data chooses or reorders entries of its first axis by what the data say.

    A choice by constants (``x[torch.arange(len(x)), last]``) is the same in every batch, and looking up data in a
    table that is constant gives each row its own entries; putting data into one does not.
    """
    if func in _ALWAYS:
        return True
    source = args[0] if args else kwargs.get("input")
    if func is F.embedding:
        table = args[1] if len(args) > 1 else kwargs.get("weight")
        is_data = isinstance(table, Tensor) and not isinstance(table, nn.Parameter) and not is_constant(table)
        return is_data and isinstance(source, Tensor) and not is_constant(source)
    if not isinstance(source, Tensor):
        return False
    if is_constant(source) and func not in _PLACING | _PUTS:
        return False
    if func is Tensor.__getitem__ or func is Tensor.__setitem__ or func in _PUTS:
        index = args[1] if isinstance(args[1], tuple | list) else (args[1],)
        first = next((part for part in index if part is not None), None)
        return isinstance(first, Tensor) and not is_constant(first)
    if func not in _ALONG:
        return False
    place, default = _ALONG[func]
    dim = kwargs.get("dim", args[place] if len(args) > place else default)
    on_first = dim is None or not isinstance(dim, int) or dim % max(source.dim(), 1) == 0
    others = [v for v in (*args[1:], *kwargs.values()) if isinstance(v, Tensor)]
    if func in _PLACING:
        places = args[2] if len(args) > 2 else kwargs.get("index")
        others = [places] if isinstance(places, Tensor) else []
    return on_first and (func in _BY_VALUE or any(not is_constant(t) for t in others))
