"""Capture: every parametric call of a forward pass, as a function, whatever module made it.

Under a `CaptureMode` the calls that touch a trainable parameter are replaced by functions whose backward
gives the input gradient alone and keeps (activation, output gradient). Whatever else touches a trainable
parameter stops with an error that names the parameter and the operation: nothing is trained uncovered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from synthward.engine.errors import PrivacyError, UnsupportedOperationError

_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
# Reading these of a parameter gives no gradient path.
_HARMLESS = frozenset(
    {"size", "dim", "numel", "stride", "is_floating_point", "is_complex", "element_size", "detach", "get_device"}
    | {"is_contiguous", "__len__", "__hash__", "__repr__", "untyped_storage", "storage_offset", "data_ptr"}
)


@dataclass
class Use:
    """One use of one parameter: rows of its per-unit gradient.

    family "outer": ``first`` [R, T, d] activations and ``grads`` [R, T, p]; "diagonal": ``first`` [R, T, p]
    factors or None; "scatter": ``first`` int64 [R, T] ids. R leading rows, T positions in each.
    """

    family: str
    first: Tensor | None
    grads: Tensor


@dataclass
class CaptureState:
    """What one or more forward passes left for the clipping: owned by the trainer, freed by `take`."""

    names: dict[int, str] = field(default_factory=dict)
    uses: dict[int, list[Use]] = field(default_factory=dict)
    rows: int | None = None
    on_backward: Callable[[], None] | None = None

    def note_rows(self, rows: int, operation: str, name: str) -> None:
        """Every captured call of a pass must have the batch as its first axis."""
        if self.rows is None:
            self.rows = rows
        elif self.rows != rows:
            raise UnsupportedOperationError(
                f"parameter {name!r}: {operation} got {rows} leading rows where the batch has {self.rows}; "
                "the first axis must be the batch in every layer"
            )

    def keep(self, parameter: int, use: Use) -> None:
        if self.on_backward is not None:
            self.on_backward()
        self.uses.setdefault(parameter, []).append(use)

    def take(self) -> dict[int, list[Use]]:
        """Hand over what was kept and be empty."""
        uses, self.uses, self.rows = self.uses, {}, None
        return uses


class CaptureMode(TorchFunctionMode):
    """Routes parametric functions to their captured forms while gradients are enabled."""

    def __init__(self, state: CaptureState) -> None:
        super().__init__()
        self.state = state

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if func is F.batch_norm and _batch_norm_trains(args, kwargs):
            raise UnsupportedOperationError(f"batch_norm in training mode {_BATCH_NORM_ADVICE}")
        touched = [p for p in _parameters_in((args, kwargs)) if p.requires_grad]
        if not touched or _is_harmless(func):
            return func(*args, **kwargs)
        for parameter in touched:
            if id(parameter) not in self.state.names:
                raise PrivacyError(
                    f"a trainable parameter of shape {list(parameter.shape)} was not there when the engine was "
                    "made; wrap the model again"
                )
        handler = _HANDLERS.get(func)
        if handler is None:
            name = self.state.names[id(touched[0])]
            raise UnsupportedOperationError(
                f"parameter {name!r} is used by {_name_of(func)}, whose per-unit gradients are not covered; "
                "freeze it or use linear, layer_norm or embedding"
            )
        return handler(self.state, *args, **kwargs)


_BATCH_NORM_ADVICE = "mixes privacy units; replace BatchNorm by GroupNorm or LayerNorm, or put it in eval mode"


def check_module(module: nn.Module) -> None:
    """Refuse modules that mix units: `PrivacyError` with the replacement."""
    for name, part in module.named_modules():
        if isinstance(part, _BATCH_NORMS) and part.training:
            raise UnsupportedOperationError(f"module {name or type(part).__name__!r}: {type(part).__name__} {_BATCH_NORM_ADVICE}")


def _linear(state: CaptureState, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    trained = _first_trained(weight, bias)
    if input.ndim < 2:
        raise UnsupportedOperationError(f"parameter {state.names[id(trained)]!r}: linear got an input without a batch axis")
    state.note_rows(len(input), "linear", state.names[id(trained)])
    return _Linear.apply(state, input, weight, bias)  # type: ignore[no-any-return,no-untyped-call]


def _layer_norm(
    state: CaptureState,
    input: Tensor,
    normalized_shape: Iterable[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    trained = _first_trained(weight, bias)
    state.note_rows(len(input), "layer_norm", state.names[id(trained)])
    return _LayerNorm.apply(state, input, tuple(normalized_shape), weight, bias, eps)  # type: ignore[no-any-return,no-untyped-call]


def _embedding(
    state: CaptureState,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    name = state.names[id(weight)]
    for option, value in (("max_norm", max_norm), ("scale_grad_by_freq", scale_grad_by_freq), ("sparse", sparse)):
        if value:
            raise UnsupportedOperationError(f"parameter {name!r}: embedding with {option} is not covered; leave it off")
    if padding_idx is not None and padding_idx < 0:
        padding_idx += len(weight)
    if input.ndim < 1:
        raise UnsupportedOperationError(f"parameter {name!r}: embedding got an input without a batch axis")
    state.note_rows(len(input), "embedding", name)
    return _Embedding.apply(state, input, weight, padding_idx)  # type: ignore[no-any-return,no-untyped-call]


_HANDLERS: dict[Any, Callable[..., Tensor]] = {
    F.linear: _linear,
    F.layer_norm: _layer_norm,
    F.embedding: _embedding,
}


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state: CaptureState, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.state, ctx.weight, ctx.bias = state, weight, bias
        ctx.save_for_backward(input, weight)
        return F.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        (grad,) = grads
        grad = grad.contiguous()
        rows = len(input)
        if _is_trained(ctx.weight):
            use = Use("outer", _positions(input, rows), _positions(grad, rows))
            ctx.state.keep(id(ctx.weight), use)
        if _is_trained(ctx.bias):
            ctx.state.keep(id(ctx.bias), Use("diagonal", None, _positions(grad, rows)))
        return None, grad @ weight if ctx.needs_input_grad[1] else None, None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        state: CaptureState,
        input: Tensor,
        shape: tuple[int, ...],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        output, mean, rstd = torch.native_layer_norm(input, shape, weight, bias, eps)
        ctx.state, ctx.shape, ctx.weight, ctx.bias = state, shape, weight, bias
        ctx.save_for_backward(input, mean, rstd, weight, bias)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        input, mean, rstd, weight, bias = ctx.saved_tensors
        grad = grads[0].contiguous()
        rows, width = len(input), len(ctx.shape)
        flat = _positions(grad.flatten(grad.ndim - width), rows)
        if _is_trained(ctx.weight):
            normalised = ((input - mean) * rstd).flatten(input.ndim - width)
            ctx.state.keep(id(ctx.weight), Use("diagonal", _positions(normalised, rows), flat))
        if _is_trained(ctx.bias):
            ctx.state.keep(id(ctx.bias), Use("diagonal", None, flat))
        grad_input = None
        if ctx.needs_input_grad[1]:
            grad_input = torch.ops.aten.native_layer_norm_backward(
                grad, input, ctx.shape, mean, rstd, weight, bias, [True, False, False]
            )[0]
        return None, grad_input, None, None, None, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state: CaptureState, input: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
        ctx.state, ctx.weight, ctx.padding_idx = state, weight, padding_idx
        ctx.save_for_backward(input)
        return F.embedding(input, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (input,) = ctx.saved_tensors
        grad = grads[0].contiguous()
        rows = len(input)
        ids = input.long().reshape(rows, input.numel() // max(rows, 1))
        if ctx.padding_idx is not None:
            ids = torch.where(ids == ctx.padding_idx, -1, ids)
        ctx.state.keep(id(ctx.weight), Use("scatter", ids, _positions(grad, rows)))
        return None, None, None, None


def _positions(tensor: Tensor, rows: int) -> Tensor:
    """[R, ..., p] as [R, T, p]."""
    width = tensor.shape[-1]
    positions = 1
    for size in tensor.shape[1:-1]:
        positions *= size
    return tensor.reshape(rows, positions, width)


def _is_trained(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.requires_grad


def _first_trained(*parameters: Tensor | None) -> Tensor:
    return next(p for p in parameters if isinstance(p, nn.Parameter) and p.requires_grad)


def _batch_norm_trains(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    # F.batch_norm(input, running_mean, running_var, weight, bias, training, ...)
    return bool(kwargs.get("training", args[5] if len(args) > 5 else False))


def _parameters_in(value: Any) -> Iterable[nn.Parameter]:
    """Parameters anywhere in nested arguments."""
    if isinstance(value, nn.Parameter):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _parameters_in(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _parameters_in(part)


def _is_harmless(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        # Properties such as .shape and .dtype; views such as .T and .mT carry gradients.
        owner = getattr(getattr(func, "__self__", None), "__name__", "")
        return owner not in ("T", "mT", "H", "mH", "real", "imag")
    return name in _HARMLESS


def _name_of(func: Any) -> str:
    return getattr(func, "__name__", None) or str(func)
