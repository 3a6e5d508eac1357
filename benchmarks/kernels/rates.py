"""What one thread of this machine does in a second: the rates by which floors are set. Medians of several."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from synthward.kernels import outer_sum

ROUNDS = 7
# Bytes moved by the smallest and the largest copy; the blocks of the largest are larger than the caches.
SMALLEST, LARGEST = 1 << 14, 1 << 29


class Rates:
    """Rates of one thread.

    flops: of the best product that the machine shows: torch.mm or this package's outer_sum, on 512^3 or 1024^3.
    bytes: read and written by torch's copy, by the bytes that it moves. What fits into a cache is moved faster, for a
        kernel as for a copy, so that a floor comes from a copy of as many bytes. Reads alone can be faster still.
    """

    def __init__(self) -> None:
        self.flops = max(_product_rate(size) for size in (512, 1024))
        self.bytes: dict[int, float] = {}

    def floors(self, amounts: dict[str, int]) -> dict[str, float]:
        """Seconds that the named amounts take: of flops and of bytes. Others, as elements of noise, have no floor."""
        found = {}
        if "flops" in amounts:
            found["flops"] = amounts["flops"] / self.flops
        if "bytes" in amounts:
            found["bytes"] = amounts["bytes"] / self._of_copy(amounts["bytes"])
        return found

    def _of_copy(self, moved: int) -> float:
        size = min(max(1 << (moved - 1).bit_length(), SMALLEST), LARGEST)
        if size not in self.bytes:
            here = torch.ones(size // 8)
            there = torch.ones_like(here)
            self.bytes[size] = size / median_seconds(lambda: there.copy_(here))
        return self.bytes[size]


def seconds(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def median_seconds(call: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """After one call to warm up."""
    call()
    return statistics.median(seconds(call) for _ in range(rounds))


def _product_rate(size: int) -> float:
    a, g, weights = torch.randn(size, size), torch.randn(size, size), torch.ones(size)
    out = torch.zeros(size, size)
    products = (lambda: torch.mm(g, a, out=out), lambda: outer_sum(a, g, weights, out=out))
    return 2 * size**3 / min(median_seconds(product) for product in products)
