"""Squared norms of a clipping group's units with the bound on their error, as the uses of its parameters bring them."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from synthward.engine.clipping import formed_error, product_error
from synthward.engine.layout import Length


class GroupNorms:
    """Adds up at the end, in a few operations over all parameters: each on its own is a dozen, on a vector of units.

    Args:
        units: U, of the physical batch.
        device: where norms are taken.
    """

    def __init__(self, units: int, device: torch.device) -> None:
        self._units, self._device = units, device
        # By the chains of additions that errors follow from.
        self._pairs: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        self._chains: dict[tuple[int, int], tuple[Length | None, Length]] = {}
        self.count = 0

    def new(self) -> Tensor:
        """Zeros [2, U] for one parameter: its squared norms, and the sums of the norms of its rows' own gradients."""
        return torch.zeros(2, self._units, device=self._device)

    def add(self, pair: Tensor, *, product: Length | None, formed: Length, uses: int) -> None:
        """Note what `new` was filled with.

        Args:
            pair: [2, U].
            product: longest chain of additions of the inner products that the norms were taken by (`product_error`), or
                None if gradients were formed.
            formed: longest chain of a gradient that is formed, for the norm or in the sum (`formed_error`).
            uses: how many uses the norms are of.
        """
        chains = (product, formed)
        key = (_key(product), _key(formed))
        self._pairs[key].append(pair)
        self._chains[key] = chains
        self.count += uses

    def complete(self) -> tuple[Tensor, Tensor]:
        """Squared norms and the bound on their error, float32 [U] each."""
        sq_norms = [torch.zeros(self._units, device=self._device)]
        errors = list(sq_norms)
        for key, pairs in self._pairs.items():
            product, formed = self._chains[key]
            squares, row_sums = torch.stack(pairs, 1)
            error = torch.zeros_like(squares) if product is None else product_error(product, row_sums)
            # The gradient itself may be longer than the norm that was taken.
            error = error + formed_error(formed, squares + error, row_sums)
            sq_norms.append(squares.sum(0))
            errors.append(error.sum(0))
        if len(sq_norms) == 2:
            return sq_norms[1], errors[1]
        return torch.stack(sq_norms).sum(0), torch.stack(errors).sum(0)


def _key(chain: Length | None) -> int:
    """Equal for equal numbers; chains that differ from unit to unit are held, so that each has its own."""
    if chain is None:
        return -1
    return chain if isinstance(chain, int) else -2 - id(chain)
