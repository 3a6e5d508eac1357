"""Bare parameters in broadcast operations with data, and repeated for each row: positions, tokens, scales.

The gradient of a row with respect to a parameter that is broadcast is the operation's own gradient, summed over
all broadcast axes but the first (the batch's). These are rows of the diagonal family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from synthward.engine.capture import CaptureState, Kept
from synthward.engine.provenance import Derived, Target
from synthward.engine.rules.embedding import embedding
from synthward.engine.rules.uses import DiagonalRows, ScatterUse, Use, diagonal_use

Operation = Callable[..., Tensor]


def _aligned(shape: torch.Size, dims: int) -> tuple[int, ...]:
    """A shape with ones put in front, up to `dims` axes."""
    return (1,) * (dims - len(shape)) + tuple(shape)


def _reduce(grads: Tensor, shape: torch.Size) -> Tensor:
    """Gradients [leading, ...] summed over the axes but the first along which `shape` is broadcast or repeated,
    float32 [leading, k]; k is the number of elements, or those of one row where the first axis is the batch's."""
    aligned = _aligned(shape, grads.dim())
    split = [len(grads)]
    for whole, part in zip(grads.shape[1:], aligned[1:], strict=True):
        split += [whole // part, part]
    repeats = [1 + 2 * i for i, part in enumerate(aligned[1:]) if grads.shape[1 + i] != part]
    rows = grads.reshape(split)
    if repeats:
        rows = rows.sum(repeats, dtype=torch.float32)
    return rows.reshape(len(grads), math.prod(aligned[1:])).float().contiguous()


def _use(
    state: CaptureState, target: Target, shape: torch.Size, rows: Tensor, forward: int
) -> tuple[Target, Use | DiagonalRows]:
    """The use of a leaf of that shape, given its gradient for each row of the batch [leading, k]."""
    leading = len(rows)
    if not isinstance(target, Derived) or shape.numel() != rows.numel() or leading == 1:
        return target, diagonal_use(state, rows, leading, forward)
    # A weight computed for each row of the batch: row i of it is row i's alone.
    if target.gathered is not None:
        position, ids = target.gathered
        table = state.parameters[position]
        return position, ScatterUse(ids.reshape(-1).long(), rows.view(-1, table.shape[1]), len(table))
    if target.graph.stride(0) == 0:
        return _first_row(state, target), diagonal_use(state, rows, leading, forward)
    return target, ScatterUse(torch.arange(leading, device=rows.device), rows, leading)


def _first_row(state: CaptureState, target: Derived) -> Target:
    """What a weight that was expanded along its first axis was expanded from."""
    with torch.enable_grad():
        row = target.graph[:1]
    (position, *others) = target.leaves
    parameter = state.parameters[position]
    is_whole = row.data_ptr() == parameter.data_ptr() and row.numel() == parameter.numel()
    if not others and is_whole and row.is_contiguous() and parameter.is_contiguous():
        return position
    return Derived(row, target.leaves)


def _check_place(state: CaptureState, value: Tensor, out: torch.Size, operation: str) -> None:
    """Refuse a parameter whose own first axis lies along the batch's."""
    if len(out) == 0:
        state.refuse(value, operation, "its output has no batch axis")
    if _aligned(value.shape, len(out))[0] == 1:
        return
    target = state.target(value)
    if (
        not isinstance(target, Derived)
        or target.has_own_rows
        or target.transposed is not None
        or _is_slice(target)
        or _is_of_places(target)
    ):
        state.refuse(
            value,
            operation,
            f"its first axis (length {value.shape[0]}) lies along the batch's, so that what a unit trains depends "
            "on its place in the batch; put an axis of length 1 in front, or look rows up with nn.Embedding",
        )


def _is_slice(target: Derived) -> bool:
    """Whether it is a part of a parameter, of which each row of the batch would have another row."""
    graph = target.graph
    places = {leaf.untyped_storage().data_ptr() for leaf in target.leaves.values()}
    return graph.untyped_storage().data_ptr() in places and graph.stride(0) != 0


def _is_of_places(target: Derived) -> bool:
    """Whether the first and the last rows are computed from different elements of a parameter."""
    graph = target.graph
    if graph.stride(0) == 0:
        return False
    if target.gathered is not None:
        # Other ids may have been drawn for each row, or be the same for all.
        ids = target.gathered[1]
        return ids.dim() == 1 and torch.equal(ids, ids[0] + torch.arange(len(ids), device=ids.device))
    half = len(graph) // 2
    # Unequal weights: a plain sum is constant after a softmax or a norm, and would show nothing.
    weights = torch.linspace(0.5, 1.5, graph.numel(), device=graph.device).view(graph.shape).to(graph.dtype)
    leaves, found = list(target.leaves.values()), []
    for rows in (slice(0, half), slice(half, None)):
        chosen = torch.zeros_like(weights)
        chosen[rows] = weights[rows]
        grads = torch.autograd.grad(graph, leaves, chosen, retain_graph=True, allow_unused=True)
        found.append([None if grad is None else grad != 0 for grad in grads])
    return any(
        bool((first | last).any()) and not bool((first & last).any())
        for first, last in zip(*found, strict=True)
        if first is not None and last is not None
    )


def _check_data(state: CaptureState, values: list[Tensor], out: torch.Size, operation: str) -> None:
    """Refuse outputs whose first axis is not that of data."""
    known = state.provenance
    tracked = [value for value in values if state.target(value) is not None]
    for value in values:
        is_data = state.target(value) is None and not known.is_constant(value)
        if is_data and value.dim() == len(out) and value.shape[0] == out[0]:
            return
    state.refuse(tracked[0], operation, "the first axis of its output is not that of data (the batch's)")


class _Add(torch.autograd.Function):
    """``func(x, p)`` of slope `slopes` in its two arguments."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        p: Tensor,
        slopes: tuple[float, float],
        run: Callable[[], Tensor],
        anchor: Tensor,
        state: CaptureState,
        call: Any,
    ) -> Tensor:
        ctx.slopes, ctx.shapes, ctx.state, ctx.call = slopes, (x.shape, p.shape), state, call
        return run()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.state.refuse_double("add")
        (x_shape, p_shape), (x_slope, p_slope) = ctx.shapes, ctx.slopes
        target, leading, forward = ctx.call
        rows = _reduce(grad, p_shape)
        if p_slope != 1:
            rows = rows * p_slope
        ctx.state.keep(Kept("add", leading, forward, [_use(ctx.state, target, p_shape, rows, forward)]))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad.sum_to_size(x_shape)
            grad_x = grad_x if x_slope == 1 else grad_x * x_slope
        return grad_x, None, None, None, ctx.state.anchor_grad, None, None


class _Multiply(torch.autograd.Function):
    """``x * p``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor, anchor: Tensor, state: CaptureState, call: Any) -> Tensor:
        ctx.save_for_backward(x, p)
        ctx.state, ctx.call = state, call
        return x * p

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.state.refuse_double("mul")
        x, p = ctx.saved_tensors
        target, leading, forward = ctx.call
        rows = _reduce(grad.float() * x.detach(), p.shape)
        ctx.state.keep(Kept("mul", leading, forward, [_use(ctx.state, target, p.shape, rows, forward)]))
        grad_x = (grad * p).sum_to_size(x.shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, ctx.state.anchor_grad, None, None


class _Elementwise(torch.autograd.Function):
    """Any broadcast function of tensors; backward runs it again on parameters with an axis for the batch."""

    @staticmethod
    def forward(
        ctx: Any,
        operation: str,
        run: Callable[[list[Tensor]], Tensor],
        targets: list[Target | None],
        anchor: Tensor,
        state: CaptureState,
        call: Any,
        *values: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*values)
        ctx.operation, ctx.run, ctx.targets, ctx.state, ctx.call = operation, run, targets, state, call
        return run(list(values))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.state.refuse_double(ctx.operation)
        values, needs = ctx.saved_tensors, ctx.needs_input_grad[6:]
        leading, forward = ctx.call[-2:]
        inputs, wanted = [], []
        for value, target, need in zip(values, ctx.targets, needs, strict=True):
            leaf = value.detach()
            if target is not None:
                aligned = _aligned(value.shape, grad.dim())
                leaf = leaf.reshape(aligned).expand(leading, *aligned[1:])
            inputs.append(leaf.requires_grad_(need or target is not None))
            if leaf.requires_grad:
                wanted.append(leaf)
        with torch.enable_grad():
            out = ctx.run(inputs)
        found = iter(torch.autograd.grad(out, wanted, grad.to(out.dtype), allow_unused=True))
        grads: list[Tensor | None] = []
        uses: list[tuple[Target, Use | DiagonalRows]] = []
        for value, leaf, target in zip(values, inputs, ctx.targets, strict=True):
            slope = next(found) if leaf.requires_grad else None
            grads.append(slope if target is None else None)
            if target is not None and slope is not None:
                rows = slope.reshape(leading, math.prod(leaf.shape[1:])).float().contiguous()
                uses.append(_use(ctx.state, target, value.shape, rows, forward))
        ctx.state.keep(Kept(ctx.operation, leading, forward, uses))
        return None, None, None, ctx.state.anchor_grad, None, None, *grads


class _Expand(torch.autograd.Function):
    """A parameter repeated along the batch's axis (and others)."""

    @staticmethod
    def forward(
        ctx: Any, p: Tensor, run: Operation, anchor: Tensor, state: CaptureState, call: Any
    ) -> Tensor:
        ctx.shape, ctx.state, ctx.call = p.shape, state, call
        return run(p)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.state.refuse_double("expand")
        target, leading, forward = ctx.call
        use = _use(ctx.state, target, ctx.shape, _reduce(grad, ctx.shape), forward)
        ctx.state.keep(Kept("expand", leading, forward, [use]))
        return None, None, ctx.state.anchor_grad, None, None


def _elementwise(func: Operation, state: CaptureState, *args: Any, **kwargs: Any) -> Tensor:
    """Handler of any function that broadcasts its tensors and works element by element."""
    operation = func.__name__
    values = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    targets = [state.target(value) for value in values]
    out = _check(state, values, operation, kwargs)
    slots = [isinstance(arg, Tensor) for arg in args]
    rest = [None if is_slot else arg for is_slot, arg in zip(slots, args, strict=True)]
    names = [key for key, arg in kwargs.items() if isinstance(arg, Tensor)]
    options = {key: arg for key, arg in kwargs.items() if not isinstance(arg, Tensor)}

    def run(tensors: list[Tensor]) -> Tensor:
        given = iter(tensors)
        positional = [next(given) if is_slot else arg for is_slot, arg in zip(slots, rest, strict=True)]
        return func(*positional, **dict(zip(names, given, strict=True)), **options)

    call = state.call(operation, tuple(t for t in targets if t is not None), out[0])
    apply: Callable[..., Tensor] = _Elementwise.apply
    return apply(operation, run, targets, state.anchor, state, call, *values)


def _check(state: CaptureState, values: list[Tensor], operation: str, options: dict[str, Any]) -> torch.Size:
    """The shape of the output; refuses what has no rule."""
    tracked = [value for value in values if state.target(value) is not None]
    if options.get("out") is not None:
        state.refuse(tracked[0], operation, "out= is not supported")
    out: torch.Size = torch.broadcast_shapes(*(v.shape for v in values))  # type: ignore[no-untyped-call]
    for value in tracked:
        _check_place(state, value, out, operation)
    _check_data(state, values, out, operation)
    return out


def _add(
    func: Operation,
    slopes: tuple[int, int],
    state: CaptureState,
    input: Tensor,
    other: Tensor,
    **options: Any,
) -> Tensor:
    """Handler of sums and differences; `slopes` of `input` and `other`, alpha times in the one subtracted or
    added to the other."""
    out = _check(state, [input, other], func.__name__, options)
    scaled = 0 if func is torch.rsub else 1
    alpha = options.get("alpha", 1)
    first, second = (slopes[i] * (alpha if i == scaled else 1) for i in (0, 1))
    target = state.target(other)
    is_last = target is not None
    x, p = (input, other) if is_last else (other, input)
    target = target if is_last else state.target(input)
    call = state.call(func.__name__, (target,), out[0])
    apply: Callable[..., Tensor] = _Add.apply
    between = (first, second) if is_last else (second, first)
    return apply(x, p, between, partial(func, input, other, **options), state.anchor, state, call)


def _multiply(state: CaptureState, input: Tensor, other: Tensor, **options: Any) -> Tensor:
    """Handler of products."""
    out = _check(state, [input, other], "mul", options)
    x, p = (input, other) if state.target(input) is None else (other, input)
    call = state.call("mul", (state.target(p),), out[0])
    apply: Callable[..., Tensor] = _Multiply.apply
    return apply(x, p, state.anchor, state, call)


def _in_place(
    handler: Operation, keeps_input: bool, state: CaptureState, input: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Handler of a function that writes its result into its first argument, which must be data."""
    if state.target(input) is not None:
        state.refuse(
            input, "in-place operation", "writes into a parameter, or into a weight computed from some"
        )
    before = input.clone() if keeps_input else input
    return input.copy_(handler(state, before, *args, **kwargs))


def _expand(func: Operation, state: CaptureState, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Handler of a parameter repeated for each row of the batch; the others are computed weights."""
    if state.target(input) is None:
        return func(input, *args, **kwargs)
    out = func(input.detach(), *args, **kwargs)
    _check_place(state, input, out.shape, func.__name__)
    call = state.call(func.__name__, (state.target(input),), out.shape[0])
    apply: Callable[..., Tensor] = _Expand.apply
    return apply(input, lambda p: func(p, *args, **kwargs), state.anchor, state, call)


def _cat(state: CaptureState, tensors: Sequence[Tensor], dim: int = 0, **options: Any) -> Tensor:
    """Handler of ``torch.cat`` of data and what is computed for each row of the batch."""
    first = next(t for t in tensors if state.target(t) is not None)
    if options or dim % first.dim() == 0:
        state.refuse(first, "cat", "only along another axis than the first (the batch's), and without out=")
    rows = next(len(t) for t in tensors if state.target(t) is None)
    return torch.cat([as_data(state, t, rows, "cat") for t in tensors], dim)


def _stack(state: CaptureState, tensors: Sequence[Tensor], dim: int = 0, **options: Any) -> Tensor:
    """Handler of ``torch.stack``."""
    first = next(t for t in tensors if state.target(t) is not None)
    if options or dim % (first.dim() + 1) == 0:
        state.refuse(first, "stack", "only along another axis than the first (the batch's), and without out=")
    rows = next(len(t) for t in tensors if state.target(t) is None)
    return torch.stack([as_data(state, t, rows, "stack") for t in tensors], dim)


def as_data(state: CaptureState, value: Tensor, rows: int, operation: str) -> Tensor:
    """A weight computed for each of the batch's `rows`, as data whose gradient is captured."""
    target = state.target(value)
    if target is None:
        return value
    _check_place(state, value, value.shape, operation)
    if len(value) != rows:
        state.refuse(value, operation, "its first axis is not the batch's")
    call = state.call(operation, (target,), rows)
    apply: Callable[..., Tensor] = _Expand.apply
    return apply(value, lambda p: p.view_as(p), state.anchor, state, call)


def _getitem(state: CaptureState, input: Tensor, index: Any) -> Tensor:
    """Handler of ``table[ids]`` with ids that are data."""
    if state.target(input) is None:
        state.refuse(index, "getitem", "a parameter as the index has no per-unit gradient rule")
    if isinstance(index, tuple) and len(index) == 1:
        index = index[0]
    if (
        not isinstance(index, Tensor)
        or index.is_floating_point()
        or index.dtype == torch.bool
        or input.dim() != 2
    ):
        state.refuse(input, "getitem", "only rows of a table [n, d] by one tensor of ids have a rule")
    return embedding(state, torch.where(index < 0, index + len(input), index), input)


def _index_select(state: CaptureState, input: Tensor, dim: int, index: Tensor) -> Tensor:
    """Handler of ``torch.index_select`` of a table's rows."""
    if state.target(input) is None or dim % input.dim() != 0 or input.dim() != 2:
        state.refuse(input, "index_select", "only rows of a table [n, d] have a rule")
    return embedding(state, index, input)


_SUMS: list[tuple[Operation, tuple[int, int]]] = [
    *((f, (1, 1)) for f in (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)),
    *((f, (1, -1)) for f in (torch.sub, torch.subtract, Tensor.sub, Tensor.subtract, Tensor.__sub__)),
    *((f, (-1, 1)) for f in (torch.rsub, Tensor.__rsub__)),
]
_PRODUCTS = (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__)
_NAMES = (
    "div divide true_divide pow where lerp addcmul addcdiv maximum minimum fmax fmin atan2 hypot logaddexp"
)
_METHODS = (Tensor.__truediv__, Tensor.__rtruediv__, Tensor.__pow__, Tensor.__rpow__)


def _handlers() -> dict[Any, Callable[..., Tensor]]:
    found: dict[Any, Callable[..., Tensor]] = {f: partial(_add, f, slopes) for f, slopes in _SUMS}
    found |= dict.fromkeys(_PRODUCTS, _multiply)
    for name in _NAMES.split():
        for place in (torch, Tensor):
            if hasattr(place, name):
                found[getattr(place, name)] = partial(_elementwise, getattr(place, name))
    found |= {f: partial(_elementwise, f) for f in _METHODS}
    for name in ("add", "sub", "subtract"):
        found[getattr(Tensor, name + "_")] = partial(_in_place, found[getattr(Tensor, name)], False)
    for name in ("mul", "multiply", "div", "divide", "true_divide", "pow", "lerp", "addcmul", "addcdiv"):
        found[getattr(Tensor, name + "_")] = partial(_in_place, found[getattr(Tensor, name)], True)
    found |= {f: partial(_in_place, found[Tensor.add], False) for f in (Tensor.__iadd__,)}
    found |= {f: partial(_in_place, found[Tensor.sub], False) for f in (Tensor.__isub__,)}
    found |= {f: partial(_in_place, found[Tensor.mul], True) for f in (Tensor.__imul__,)}
    expansions = (Tensor.expand, Tensor.expand_as, Tensor.repeat, Tensor.broadcast_to, Tensor.tile)
    found |= {f: partial(_expand, f) for f in (*expansions, torch.broadcast_to, torch.tile)}
    found |= {
        Tensor.__getitem__: _getitem,
        torch.index_select: _index_select,
        Tensor.index_select: _index_select,
    }
    found |= dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _cat) | {torch.stack: _stack}
    return found


HANDLERS = _handlers()
