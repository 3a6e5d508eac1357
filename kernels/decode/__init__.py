"""What a sampler of tables does for its rows at each step: features of a residual network, and tokens drawn from them.

A row's results do not depend on which rows there are beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from synthward.kernels import _check
from synthward.kernels._select import Backend, choose
from synthward.kernels.decode import cpp_impl, reference
from synthward.kernels.product import product


@dataclass(frozen=True)
class ResidualWeights:
    """Layers of a residual network of width p behind its first product: B blocks ``x + silu(linear(norm(x)))``, a norm.

    Attributes:
        weights: float32 [B, p, p], outputs first.
        biases: float32 [B, p].
        scales: float32 [B + 1, p], of the layer norms; the last is the one behind the blocks.
        shifts: float32 [B + 1, p].
        eps: added to their variances.
    """

    weights: Tensor
    biases: Tensor
    scales: Tensor
    shifts: Tensor
    eps: float

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In the order of the class."""
        return self.weights, self.biases, self.scales, self.shifts


def residual_features(
    sums: Tensor,
    common: Tensor,
    values: Tensor,
    value_weights: Tensor,
    network: ResidualWeights,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Last norm of the network, float32 [N, p]; the first layer is ``silu(sums + common + values value_weights)``.

    That layer's product with an input of ones and zeros is a sum of its weight's rows, so whoever knows which ones
    have come since the last step adds those alone to `sums` (`draw_tokens` does).

    Args:
        sums: [N, p].
        common: [p], of all rows.
        values: [N, c].
        value_weights: [c, p].
        network: the other layers.
        backend: who executes.

    Guarantees: a row that is not finite is alone in that.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _check.matrix(sums, "sums")
    _check.matrix(values, "values")
    rows, width = sums.shape
    blocks = len(network.weights)
    _check.same_rows(values, rows, "values")
    for name, tensor, shape in (
        ("common", common, (width,)),
        ("value_weights", value_weights, (values.shape[1], width)),
        ("weights", network.weights, (blocks, width, width)),
        ("biases", network.biases, (blocks, width)),
        ("scales", network.scales, (blocks + 1, width)),
        ("shifts", network.shifts, (blocks + 1, width)),
    ):
        _check.shape(tensor, shape, name)
    chosen = choose(backend, sums, common, values, value_weights, *network.tensors())
    if chosen == "cpp":
        return cpp_impl.residual_features(sums, common, values, value_weights, network)
    if chosen == "triton":
        from synthward.kernels.decode import triton_impl

        return triton_impl.residual_features(sums, common, values, value_weights, network)
    if chosen == "shapes":
        return torch.empty_like(sums)
    return reference.residual_features(sums, common, values, value_weights, network)


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor, *, backend: Backend = "auto") -> Tensor:
    """``x weight^T + bias`` float32 [N, q]: `synthward.kernels.product` for samplers.

    Where that is a library's, as on GPUs, how many rows there are decides in which order a row's terms are added up; by
    the compiled kernels here it does not.

    Args:
        x: [N, p].
        weight: [q, p].
        bias: [q].
        backend: who executes.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _check.matrix(x, "x")
    _check.matrix(weight, "weight")
    _check.shape(weight, (len(weight), x.shape[1]), "weight")
    _check.shape(bias, (len(weight),), "bias")
    chosen = choose(backend, x, weight, bias)
    if chosen == "triton":
        from synthward.kernels.decode import triton_impl

        return triton_impl.linear_rows(x, weight, bias)
    return product(x, weight, bias, is_transposed=True, backend="cpp" if chosen == "cpp" else "reference")


def draw_tokens(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    offsets: Tensor,
    columns: Tensor,
    uniforms: Tensor,
    *,
    added: Tensor | None = None,
    sums: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Tokens int64 [N, k] of the `columns` of each row, each from the softmax of its column's part of a linear head.

    A token is the first whose cumulated share exceeds the uniform number; one with a bias of minus infinity is never
    drawn, if its column has another. Of the head, only the rows of the columns that are asked for are computed.

    Args:
        features: [N, p].
        weight: [V, p], the head: the tokens of all columns, one column after the other.
        bias: [V].
        offsets: int64 [C + 1]: column c has tokens ``offsets[c] .. offsets[c + 1]``, at least one.
        columns: int64 [N, k].
        uniforms: float32 [N, k] in [0, 1).
        added: [V, q]: the row of every token that is drawn is added to the row of `sums`.
        sums: written, [N, q].
        backend: who executes.

    Returns:
        Tokens, counted from the first of their column. The Triton kernel, for which nobody looks at `offsets` and
        `columns` on a device, gives -1 for what is no column, and adds nothing.

    Raises:
        TypeError, ValueError: naming the argument; `added` without `sums` or the reverse.
    """
    _check.matrix(features, "features")
    rows, width = features.shape
    _check.matrix(weight, "weight")
    _check.shape(weight, (len(weight), width), "weight")
    _check.shape(bias, (len(weight),), "bias")
    for name, tensor in (("offsets", offsets), ("columns", columns)):
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name}: has dtype {tensor.dtype}, expected torch.int64")
    if columns.ndim != 2 or len(columns) != rows:
        raise ValueError(f"columns: has shape {list(columns.shape)}, expected [{rows}, k]")
    _check.shape(uniforms, tuple(columns.shape), "uniforms")
    if (added is None) != (sums is None):
        raise ValueError("added: goes with sums, and sums with added")
    if added is not None and sums is not None:
        _check.matrix(sums, "sums")
        _check.same_rows(sums, rows, "sums")
        _check.shape(added, (len(weight), sums.shape[1]), "added")
    inputs = (features, weight, bias, offsets, columns, uniforms)
    chosen = choose(backend, *inputs, added, written=(sums,))
    if chosen == "shapes":
        return torch.empty_like(columns)
    if chosen != "triton" or columns.device.type == "cpu":
        _check_columns(offsets, columns, len(weight))
    else:
        # To look at what is on a device would be to wait for it.
        _check.unit_count(offsets, len(weight))
    if chosen == "cpp":
        return cpp_impl.draw_tokens(*inputs, added, sums)
    if chosen == "triton":
        from synthward.kernels.decode import triton_impl

        return triton_impl.draw_tokens(*inputs, added, sums)
    return reference.draw_tokens(*inputs, added, sums)


def _check_columns(offsets: Tensor, columns: Tensor, tokens: int) -> None:
    kinds = _check.unit_count(offsets, tokens)
    if bool((offsets[1:] == offsets[:-1]).any()):
        raise ValueError("offsets: name a column without tokens")
    if columns.numel() and not 0 <= int(columns.min()) <= int(columns.max()) < kinds:
        raise ValueError(f"columns: name a column outside 0 .. {kinds - 1}")
