"""Products of a linear layer's forward pass and input gradient, by whoever is faster on this machine."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from synthward.engine.rates import measured_rates
from synthward.kernels import product

# Multiplications below which a call costs more than what is gained, and the shortest side that fills a panel.
_SMALLEST, _NARROWEST = 1 << 23, 16
# The own product is taken where it is faster by so much at least, so that the choice does not hang on noise.
_CLEARLY = 1.1


class Products:
    """Chooses between torch's library and the compiled kernel.

    Args:
        who: "auto" (by measured rates), "library" or "own".
    """

    def __init__(self, who: str = "auto") -> None:
        self._who = who

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ weight.T + bias``: x [..., d], weight [p, d], bias [p]."""
        if torch.is_autocast_enabled(x.device.type) or not self._is_own(x, weight, bias):
            return F.linear(x, weight, bias)
        flat = product(x.reshape(-1, x.shape[-1]), weight, bias, is_transposed=True, backend="cpp")
        return flat.view(*x.shape[:-1], len(weight))

    def input_grad(self, grad: Tensor, weight: Tensor) -> Tensor:
        """``grad @ weight``: grad [..., p], weight [p, d]."""
        if not self._is_own(grad, weight, None):
            return grad.matmul(weight.to(grad.dtype))
        flat = product(grad.reshape(-1, grad.shape[-1]), weight, backend="cpp")
        return flat.view(*grad.shape[:-1], weight.shape[1])

    def _is_own(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        if self._who == "library":
            return False
        fits = all(
            t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() and not t.is_neg()
            for t in (x, weight, *(() if bias is None else (bias,)))
        )
        if not fits or self._who == "own":
            return fits
        work = x.numel() * (weight.numel() // max(x.shape[-1], 1))
        if work < _SMALLEST or min(weight.shape) < _NARROWEST:
            return False
        rates = measured_rates(x.device)
        return rates.product > _CLEARLY * rates.library
