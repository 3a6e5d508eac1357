"""Product of two matrices: the forward pass and the input gradient of a linear layer.

Torch's own library does this well where it knows the processor, and at half of its rate elsewhere (MKL uses AVX2 on
processors of another maker). The engine measures both and takes the faster one (`synthward.engine.rates`).
"""

from __future__ import annotations

from torch import Tensor

from synthward.kernels import _check
from synthward.kernels._select import Backend, use_cpp
from synthward.kernels.product import cpp_impl, reference


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    is_transposed: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """``x @ weight + bias`` [N, q], or ``x @ weight.T + bias`` if `is_transposed`.

    Args:
        x: [N, k].
        weight: [k, q]; [q, k] if `is_transposed`.
        bias: [q], or None.
        is_transposed: as above.
        backend: who executes; "reference" is torch's own product.

    Returns:
        A new tensor; float32 sums in an order that shapes alone fix.
    """
    _check.matrix(x, "x")
    _check.matrix(weight, "weight")
    inner, outputs = weight.shape if not is_transposed else weight.shape[::-1]
    if x.shape[1] != inner:
        raise ValueError(f"weight: takes rows of {inner}, x has rows of {x.shape[1]}")
    if bias is not None:
        _check.shape(bias, (outputs,), "bias")
    if use_cpp(backend, x, weight, bias):
        return cpp_impl.product(x, weight, bias, is_transposed=is_transposed)
    return reference.product(x, weight, bias, is_transposed=is_transposed)
