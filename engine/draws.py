"""Random numbers of numbered rows: what a row is given depends on its number, never on who computes it with whom."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from synthward.engine.device import CPU
from synthward.kernels import gaussian_noise, uniform_noise

_DOMAIN = b"synthward/v1/sampling/"


def sampling_key(seed: int) -> bytes:
    """The key of a user's seed, 32 bytes. Whoever knows the seed knows it: for post-processing alone."""
    return hashlib.sha256(_DOMAIN + str(int(seed)).encode()).digest()


class Draws:
    """Random numbers of rows ``first, first + 1, ...``, call by call.

    Element e of row r of call c (counted from 0 over both kinds) is a function of (key, ``stream + c``, step,
    ``(first + r) * k + e``), k elements a row. So whoever makes the same calls for a row gets the same numbers,
    whatever the rows before it, the batch and the number of processes; other calls, steps and keys are independent
    of it (ChaCha20, see `synthward.kernels.chacha20_words`).

    Args:
        key: 32 bytes.
        stream: of the first call, below 2^15 with all that follow.
        step: below 2^48.
        first: number of the first row.
        device: where the numbers are made; they are the same on all.

    Raises:
        TypeError, ValueError: naming the argument, at the first call that it does not fit.
    """

    def __init__(
        self, key: bytes, stream: int = 0, step: int = 0, first: int = 0, device: torch.device = CPU
    ) -> None:
        self._key, self._stream, self._step, self._first = key, stream, step, first
        self._device = device

    def to(self, device: torch.device) -> Draws:
        """From here on numbers are put on a device; returns this object."""
        self._device = device
        return self

    def uniform(self, rows: int, k: int) -> Tensor:
        """Float32 [rows, k], multiples of 2^-24 in [0, 1)."""
        return self._made(uniform_noise, rows, k)

    def normal(self, rows: int, k: int) -> Tensor:
        """Standard normal float32 [rows, k]."""
        return self._made(gaussian_noise, rows, k)

    def _made(self, noise: Callable[..., Tensor], rows: int, k: int) -> Tensor:
        place = {"key": self._key, "stream": self._next(), "step": self._step, "start": self._first * k}
        return noise(rows * k, **place, device=self._device).view(rows, k)

    def _next(self) -> int:
        self._stream += 1
        return self._stream - 1
