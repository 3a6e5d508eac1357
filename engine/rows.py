"""What the arguments and outputs of a module say of the rows of its batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from synthward.engine.errors import ConfigError, UnsupportedOperationError


def named_tensors(
    value: Any, name: str = "", *, attributes: bool = False, _seen: dict[int, Any] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Tensors in tuples, lists, mappings and dataclasses (and in any object, if `attributes`), each once, by path."""
    # Kept as well: the number of an object that is gone may be that of another one.
    seen = {} if _seen is None else _seen
    if id(value) in seen:
        return
    seen[id(value)] = value
    if isinstance(value, Tensor):
        yield name, value
        return
    for key, item in _children(value, attributes):
        path = f"{name}.{key}" if name else str(key)
        yield from named_tensors(item, path, attributes=attributes, _seen=seen)


def _children(value: Any, attributes: bool) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return value.items()
    if isinstance(value, list | tuple | set | frozenset):
        return enumerate(value)
    if isinstance(value, type | nn.Module):
        return ()
    if is_dataclass(value):
        return [(f.name, getattr(value, f.name, None)) for f in fields(value)]
    return list(vars(value).items()) if attributes and hasattr(value, "__dict__") else ()


def count_rows(args: tuple[Any, ...], kwargs: dict[str, Any], given: int | None, drawn: int | None) -> int:
    """Rows of the batch that a module is called with: the first axis of its tensors.

    Where they disagree, the number of unit ids (`given`) says which is the batch's, or that of the rows that the
    loader drew (`drawn`).

    Raises:
        ConfigError: nothing says how many they are.
    """
    named = [*named_tensors(args), *named_tensors(kwargs)]
    axes = {name: tensor.shape[0] for name, tensor in named if tensor.dim() > 0}
    if not axes:
        raise ConfigError(
            "the module's forward takes no tensor with a batch axis; the engine can not count its rows"
        )
    found = set(axes.values())
    if given is not None:
        if given not in found:
            listed = " or ".join(map(str, sorted(found)))
            raise ConfigError(f"units: {given} ids for a batch of {listed} rows")
        return given
    if len(found) == 1:
        return found.pop()
    if drawn in found:
        return drawn
    listed = ", ".join(f"{axis} ({name!r})" for name, axis in axes.items())
    raise ConfigError(
        f"the first axes of the module's arguments differ: {listed}; which one counts the records is not for the "
        "engine to guess. Keep what all records share in a buffer of the module, or repeat it for each; "
        "without Poisson sampling, `with engine.units(ids):` tells, too"
    )


@dataclass(frozen=True)
class Outputs:
    """The outputs of a module that take a gradient: those of one row per record, and the others."""

    rows: list[Tensor]
    others: list[Tensor]


class OutputReader:
    """Tells which outputs of a module have the batch's rows as their first axis."""

    def __init__(self) -> None:
        # Outputs whose first axis was once another one: that of layers or heads, which may be as long as the
        # batch by chance.
        self._others: set[str] = set()

    def read(self, output: Any, rows: int) -> Outputs:
        """
        Raises:
            UnsupportedOperationError: there are some, and none has the batch's rows.
        """
        named = [(n, t) for n, t in named_tensors(output, attributes=True) if t.requires_grad]
        having = {n for n, t in named if t.layout is torch.strided and t.dim() > 0 and t.shape[0] == rows}
        having -= self._others
        if named and not having:
            shapes = ", ".join(str(list(t.shape)) for _, t in named)
            raise no_rows(f"it took {rows} rows and returned {shapes}")
        self._others |= {n for n, _ in named} - having
        return Outputs([t for n, t in named if n in having], [t for n, t in named if n not in having])


def no_rows(what: str) -> UnsupportedOperationError:
    """The error of a module none of whose outputs shows which rows are whose."""
    return UnsupportedOperationError(
        f"the module's output: no tensor with a gradient has the rows of the batch as its first axis ({what}), so "
        "nothing shows that records are counted right and do not mix. Return one row per record, or use "
        "PrivateTrainer with a loss per unit"
    )


def row_weights(outputs: list[Tensor], is_own: Tensor) -> list[Tensor]:
    """Weights of outputs [rows, ...] that are zero but in rows where `is_own` (bool [rows])."""
    return [
        # Unequal ones: a plain sum is constant after a softmax or a norm, and would show nothing. Nor are they
        # those of the other outputs: what one adds and another one takes away would show nothing either.
        torch.linspace(0.5, 1.5 + index, output.numel()).view(output.shape).to(output)
        * is_own.view(-1, *[1] * (output.dim() - 1)).to(output)
        for index, output in enumerate(outputs)
    ]
