"""Products of data with a bare parameter: matmul and its relatives, einsum of two operands, tensordot.

Every one of them is an einsum. Its indices say what the parameter's gradient is: indices that the parameter shares
with the output alone are output features, those it shares with the data alone are contracted, those of all three are
blocks; everything else but the batch's axis is more rows. The outer family, or one product for each block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from synthward.engine.capture import CaptureState, Kept
from synthward.engine.provenance import Derived, Target
from synthward.engine.rules.linear import linear
from synthward.engine.rules.outputs import owned
from synthward.engine.rules.uses import BlockOuterUse, DiagonalRows, OuterUse, Use, diagonal_use

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class SwappedOuterUse(OuterUse):
    """An outer use whose activations are the output gradients: for a parameter [d, p]."""

    @property
    def evidence(self) -> Tensor:
        return self.activations


@dataclass(frozen=True)
class SwappedBlockUse(BlockOuterUse):
    """A block use whose activations are the output gradients: for a parameter [G, d, p]."""

    @property
    def evidence(self) -> Tensor:
        return self.activations.transpose(0, 1)


@dataclass(frozen=True)
class Contraction:
    """Two-operand einsum ``data,weight->out``, one letter for each axis, none repeated in an operand.

    `blocks`: the first indices of the weight, each a product of its own; `features`, `contracted`: the others, that
    it shares with the output or not; `is_swapped`: the contracted ones come first.
    """

    data: str
    weight: str
    out: str
    batch: str
    blocks: str
    features: str
    contracted: str
    is_swapped: bool

    @property
    def equation(self) -> str:
        return f"{self.data},{self.weight}->{self.out}"


def _classify(data: str, weight: str, out: str) -> Contraction | str:
    """The roles of the indices; or why there is no rule."""
    for name, letters in (("data", data), ("parameter", weight), ("output", out)):
        if len(set(letters)) < len(letters):
            return f"an index is repeated within the {name}"
    batch = data[:1]
    if not batch or batch not in out or batch in weight:
        return (
            "the first axis of the data (the batch's) must also be one of the output and none of the parameter; "
            "put the batch's axis first"
        )
    if any(i not in data and i not in out for i in weight):
        return "the parameter has an index of its own; sum it out beforehand"
    for length in range(len(weight) + 1):
        blocks, rest = weight[:length], weight[length:]
        if any(i in data and i in out for i in rest):
            continue
        features, contracted = "".join(i for i in rest if i in out), "".join(i for i in rest if i not in out)
        if rest in (features + contracted, contracted + features):
            is_swapped = bool(features and contracted) and rest == contracted + features
            return Contraction(data, weight, out, batch, blocks, features, contracted, is_swapped)
    raise AssertionError("the last split has no rest")


class _Contract(torch.autograd.Function):
    """An einsum of data and a parameter, run as the function that the caller called."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        how: Contraction,
        operation: str,
        run: Callable[[Tensor, Tensor], Tensor],
        anchor: Tensor,
        state: CaptureState,
        call: Any,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how, ctx.operation, ctx.state, ctx.call = how, operation, state, call
        return owned(run(x, weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.state.refuse_double(ctx.operation)
        x, weight = ctx.saved_tensors
        how: Contraction = ctx.how
        target, leading, forward = ctx.call
        use = _use(ctx.state, how, x.detach(), grad, target, leading, forward)
        ctx.state.keep(Kept(ctx.operation, leading, forward, [use]))
        grad_x = None
        if ctx.needs_input_grad[0]:
            # An index of the data alone was summed over: its gradient is the same all along it.
            kept = "".join(i for i in how.data if i in how.weight or i in how.out)
            grad_x = torch.einsum(f"{how.out},{how.weight}->{kept}", grad, weight.to(grad.dtype))
            shape = [n if i in kept else 1 for i, n in zip(how.data, x.shape, strict=True)]
            grad_x = grad_x.reshape(shape).expand(x.shape)
        return grad_x, None, None, None, None, ctx.state.anchor_grad, None, None


def _use(
    state: CaptureState, how: Contraction, x: Tensor, g: Tensor, target: Target, leading: int, forward: int
) -> tuple[Target, Use | DiagonalRows]:
    """The use of the parameter: data and output gradient brought to rows, the batch's axis first."""
    summed = [axis for axis, i in enumerate(how.data) if i not in how.out and i not in how.weight]
    data = "".join(i for i in how.data if i in how.out or i in how.weight)
    if summed:
        x = x.sum(summed, dtype=torch.float32)
    sizes = dict(zip(data, x.shape, strict=True)) | dict(zip(how.out, g.shape, strict=True))
    count = math.prod(sizes[i] for i in how.weight)
    if how.blocks and count * leading <= x.numel() + g.numel():
        # Per-row gradients take no more memory than what they come from.
        rows = torch.einsum(f"{data},{how.out}->{how.batch}{how.weight}", x.float(), g.float())
        return target, diagonal_use(state, rows.reshape(leading, count), leading, forward)
    a, grads = _arrange(x, data, how, how.contracted, sizes), _arrange(g, how.out, how, how.features, sizes)
    if how.blocks:
        return target, SwappedBlockUse(grads, a) if how.is_swapped else BlockOuterUse(a, grads)
    a, grads = a[0], grads[0]
    if not how.is_swapped:
        return target, OuterUse(a, grads)
    if not isinstance(target, int):
        return target, SwappedOuterUse(grads, a)
    parameter = state.parameters[target]
    with torch.enable_grad():
        turned = parameter.reshape(a.shape[1], grads.shape[1]).t()
    return Derived(turned, {target: parameter}, transposed=target), OuterUse(a, grads)


def _arrange(value: Tensor, letters: str, how: Contraction, columns: str, sizes: dict[str, int]) -> Tensor:
    """``[blocks, rows, columns]`` float32 of a tensor of these indices; repeated, without a copy where one index
    allows it, along blocks that it lacks."""
    rows = how.batch + "".join(i for i in how.out if i not in how.weight and i != how.batch)
    order = "".join(i for i in how.blocks + rows + columns if i in letters)
    found = value.permute([letters.index(i) for i in order])
    blocks = [sizes[i] if i in letters else 1 for i in how.blocks]
    sides = [math.prod(sizes[i] for i in group) for group in (rows, columns)]
    found = found.reshape([*blocks, *sides]).float().contiguous()
    whole = [sizes[i] for i in how.blocks]
    return found.expand([*whole, *sides]).reshape([math.prod(whole), *sides])


def contract(
    state: CaptureState,
    operation: str,
    terms: tuple[str, str, str],
    x: Tensor,
    weight: Tensor,
    run: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """The einsum of data and a parameter (`terms`: indices of data, parameter, output), captured.

    `run` computes it from both, if not `torch.einsum`.

    Raises:
        UnsupportedOperationError: by the indices it has no per-unit gradient rule.
    """
    how = _classify(*terms)
    if isinstance(how, str):
        state.refuse(weight, operation, how)
    known = dict(zip(how.data, x.shape, strict=True))
    if any(known.get(i, n) != n for i, n in zip(how.weight, weight.shape, strict=True)):
        state.refuse(weight, operation, "an index of length 1 is broadcast; write it as no index at all")
    call = state.call(operation, (state.target(weight),), known[how.batch])
    apply: Callable[..., Tensor] = _Contract.apply
    run = run or partial(torch.einsum, how.equation)
    return apply(x, weight, how, operation, run, state.anchor, state, call)


def _pair(state: CaptureState, left: Tensor, right: Tensor, operation: str) -> bool:
    """Whether the parameter of a product is the one on the right; the other must be data."""
    is_right = state.target(right) is not None
    if is_right and state.target(left) is not None:
        state.refuse(
            right, operation, "a product of two parameters with data has no rule; multiply them first"
        )
    return is_right


def _matmul(state: CaptureState, left: Tensor, right: Tensor) -> Tensor:
    """Handler of matrix products [..., n, d] @ [..., d, p], either side a parameter, vectors included."""
    is_right = _pair(state, left, right, "matmul")
    shapes = [list(left.shape), list(right.shape)]
    if not shapes[0] or not shapes[1]:
        return torch.matmul(left, right)
    inner = [["n", "d"][-left.dim() :] if left.dim() > 1 else ["d"], ["d", "p"] if right.dim() > 1 else ["d"]]
    outer = [shape[: len(shape) - len(letters)] for shape, letters in zip(shapes, inner, strict=True)]
    batches = max(len(outer[0]), len(outer[1]))
    names = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:batches]
    terms, narrow = [], []
    for side in (0, 1):
        named = list(zip(names[batches - len(outer[side]) :], outer[side], strict=True))
        others = dict(zip(names[batches - len(outer[1 - side]) :], outer[1 - side], strict=True))
        # What is broadcast is no index of its own; a parameter's axis of length 1 never is.
        least = 0 if is_right == bool(side) else 1
        dropped = [axis for axis, (name, n) in enumerate(named) if n == 1 and others.get(name, least) > least]
        narrow.append(dropped)
        kept = "".join(name for axis, (name, _) in enumerate(named) if axis not in dropped)
        terms.append(kept + "".join(inner[side]))
    out = names + "".join(i for i in inner[0] + inner[1] if i != "d")
    return _squeezed_product(state, (left, right), terms, narrow, out, is_right)


def _squeezed_product(
    state: CaptureState,
    operands: tuple[Tensor, Tensor],
    terms: list[str],
    narrow: list[list[int]],
    out: str,
    is_right: bool,
) -> Tensor:
    """A matrix product once the axes of length 1 that are broadcast (`narrow`) are taken out of its operands."""
    at = 1 if is_right else 0
    x, weight = operands[1 - at], operands[at]
    indices = terms[1 - at], terms[at], out
    if not narrow[0] and not narrow[1]:
        ordered = torch.matmul if is_right else _flipped
        return contract(state, "matmul", indices, x, weight, ordered)
    if narrow[at]:
        weight = reshaped(state, weight, [n for axis, n in enumerate(weight.shape) if axis not in narrow[at]])
    if narrow[1 - at]:
        x = x.squeeze(tuple(narrow[1 - at]))
    return contract(state, "matmul", indices, x, weight)


def _flipped(right: Tensor, left: Tensor) -> Tensor:
    return torch.matmul(left, right)


def reshaped(state: CaptureState, weight: Tensor, shape: list[int]) -> Tensor:
    """A parameter in another shape, as a parameter."""
    assert state.mode is not None
    with state.mode:
        return weight.reshape(shape)


def turned(state: CaptureState, weight: Tensor) -> Tensor:
    """The transpose of a parameter [p, d], as a parameter."""
    assert state.mode is not None
    with state.mode:
        return weight.t()


def _addmm(
    state: CaptureState, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """Handler of ``beta * input + alpha * mat1 @ mat2``."""
    is_bias = input.dim() == 1 and (state.target(input) is not None or not input.requires_grad)
    if is_bias and beta == alpha == 1 and state.target(mat2) is not None and state.target(mat1) is None:
        return linear(state, mat1, turned(state, mat2), input)
    return _sum_of_product(state, input, mat1, mat2, beta=beta, alpha=alpha)


def _sum_of_product(
    state: CaptureState, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """The same of batches, each part by its own rule."""
    assert state.mode is not None
    with state.mode:
        product = torch.matmul(mat1, mat2)
        product = product if alpha == 1 else product * alpha
        return product + (input if beta == 1 else input * beta)


def _einsum(state: CaptureState, equation: str, *operands: Any) -> Tensor:
    """Handler of ``torch.einsum`` of two operands."""
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    parameter = next(t for t in operands if state.target(t) is not None)
    if len(operands) != 2:
        state.refuse(parameter, "einsum", "only two operands have a rule; multiply them two at a time")
    is_right = _pair(state, *operands, "einsum")
    terms = _parse(equation, operands[0].dim(), operands[1].dim())
    if terms is None:
        state.refuse(parameter, "einsum", f"the equation {equation!r} does not fit its operands")
    left, right, out = terms
    if is_right:
        return contract(state, "einsum", (left, right, out), operands[0], operands[1])
    return contract(state, "einsum", (right, left, out), operands[1], operands[0])


def _parse(equation: str, *dims: int) -> tuple[str, str, str] | None:
    """The letters of both operands and of the output, with letters in place of an ellipsis."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    parts = inputs.split(",")
    if len(parts) != 2:
        return None
    spare = "".join(i for i in reversed(_LETTERS) if i not in equation)
    named = [
        dim - len(part.replace("...", "")) if "..." in part else 0
        for part, dim in zip(parts, dims, strict=True)
    ]
    longest = max(named)
    if min(named) < 0 or longest > len(spare):
        return None
    free = spare[:longest]
    terms = [part.replace("...", free[longest - n :]) for part, n in zip(parts, named, strict=True)]
    if any(len(term) != dim for term, dim in zip(terms, dims, strict=True)):
        return None
    if not arrow:
        letters = parts[0] + parts[1]
        once = sorted(i for i in set(letters) - {"."} if letters.count(i) == 1)
        return terms[0], terms[1], free + "".join(once)
    return terms[0], terms[1], out.replace("...", free)


def _tensordot(state: CaptureState, a: Tensor, b: Tensor, dims: Any = 2, out: Any = None) -> Tensor:
    """Handler of ``torch.tensordot``."""
    is_right = _pair(state, a, b, "tensordot")
    if out is not None or isinstance(dims, Tensor):
        state.refuse(
            b if is_right else a, "tensordot", "only a number or lists as dims, and no out=, have a rule"
        )
    if isinstance(dims, int):
        dims = list(range(a.dim() - dims, a.dim())), list(range(dims))
    left, right = list(_LETTERS[: a.dim()]), list(_LETTERS[a.dim() : a.dim() + b.dim()])
    sums = set()
    for i, j in zip(*dims, strict=True):
        right[j] = left[i]
        sums.add(left[i])
    made = "".join(i for i in left + right if i not in sums)
    first, second = "".join(left), "".join(right)
    if is_right:
        return contract(state, "tensordot", (first, second, made), a, b)
    return contract(state, "tensordot", (second, first, made), b, a)


def _outer(state: CaptureState, input: Tensor, vec2: Tensor) -> Tensor:
    """Handler of ``torch.outer``; the batch's axis is that of `input`."""
    is_right = _pair(state, input, vec2, "outer")
    if not is_right:
        state.refuse(input, "outer", "the first axis of its output is not that of data (the batch's)")
    return contract(state, "outer", ("a", "b", "ab"), input, vec2)


def _inner(state: CaptureState, input: Tensor, other: Tensor) -> Tensor:
    """Handler of ``torch.inner``."""
    is_right = _pair(state, input, other, "inner")
    left, right = _LETTERS[: input.dim() - 1], _LETTERS[input.dim() - 1 : input.dim() + other.dim() - 2]
    if is_right:
        return contract(state, "inner", (left + "z", right + "z", left + right), input, other)
    return contract(state, "inner", (right + "z", left + "z", left + right), other, input)


def _product(state: CaptureState, *operands: Tensor, **options: Tensor) -> Tensor:
    """`_matmul` by any of torch's names for its arguments."""
    parameter = next(t for t in (*operands, *options.values()) if state.target(t) is not None)
    if "out" in options:
        state.refuse(parameter, "matmul", "out= is not supported")
    return _matmul(state, *operands, *options.values())


_MATMULS = (
    *(torch.matmul, torch.mm, torch.bmm, torch.mv, torch.linalg.matmul),
    *(Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.mv, Tensor.__matmul__),
)

HANDLERS: dict[Any, Callable[..., Tensor]] = {
    **dict.fromkeys(_MATMULS, _product),
    Tensor.__rmatmul__: lambda state, right, left: _matmul(state, left, right),
    **dict.fromkeys((torch.addmm, Tensor.addmm), _addmm),
    **dict.fromkeys((torch.baddbmm, Tensor.baddbmm), _sum_of_product),
    torch.einsum: _einsum,
    torch.tensordot: _tensordot,
    **dict.fromkeys((torch.outer, Tensor.outer, torch.ger, Tensor.ger), _outer),
    **dict.fromkeys((torch.inner, Tensor.inner), _inner),
}
