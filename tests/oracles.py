"""Slow, plain twins of what the engine computes: the ground truth of the tests.

Everything here is written for reading: float64, one privacy unit at a time, Python integers for the cipher.
Nothing here imports `synthward`, so that a mistake in the engine cannot be repeated by its oracle.
"""

from __future__ import annotations

import copy
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

UnitLoss = Callable[[nn.Module, object], Tensor]


# per-unit gradients, clipping and the released sum


def per_unit_gradients(module: nn.Module, unit_loss: UnitLoss, units: Sequence[object]) -> list[np.ndarray]:
    """The gradient of each unit's own loss, alone, in float64.

    `unit_loss(module, unit)` returns the scalar loss of one unit (all its rows and nobody else's). Returns
    one float64 vector [P] per unit: all trainable parameters, flattened in the order of
    `module.parameters()`; a parameter without gradient counts as zeros.
    """
    twin = copy.deepcopy(module).double()
    trainable = [p for p in twin.parameters() if p.requires_grad]
    gradients = []
    for unit in units:
        for parameter in trainable:
            parameter.grad = None
        unit_loss(twin, to_float64(unit)).backward()
        flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainable]
        gradients.append(torch.cat([g.flatten() for g in flat]).numpy().copy())
    return gradients


def to_float64(value: object) -> object:
    """Casts the floating tensors of a (nested) tuple, list or dict to float64; leaves indices alone."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(to_float64(v) for v in value)
    if isinstance(value, dict):
        return {k: to_float64(v) for k, v in value.items()}
    return value


def clip_vector(gradient: np.ndarray, max_grad_norm: float) -> np.ndarray:
    """`gradient * min(1, C / ||gradient||)`; a gradient with NaN or Inf in it contributes zero."""
    norm = float(np.linalg.norm(gradient))
    if not math.isfinite(norm):
        return np.zeros_like(gradient)
    return gradient if norm <= max_grad_norm else gradient * (max_grad_norm / norm)


def clipped_sum(gradients: Sequence[np.ndarray], max_grad_norm: float) -> np.ndarray:
    """Sum over units of the clipped gradients, float64 [P]."""
    return np.sum([clip_vector(g, max_grad_norm) for g in gradients], axis=0)


def flat_parameters(module: nn.Module) -> np.ndarray:
    """All trainable parameters as one float64 vector [P], in the order of `module.parameters()`."""
    with torch.no_grad():
        parts = [p.detach().double().flatten() for p in module.parameters() if p.requires_grad]
        return torch.cat(parts).cpu().numpy().copy()


# optimizers


@dataclass
class AdamReference:
    """Adam (`decoupled=False`, L2 in the gradient) or AdamW (`decoupled=True`), as in Kingma and Ba 2015,
    Loshchilov and Hutter 2019."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False
    step_count: int = 0
    first: np.ndarray | None = None
    second: np.ndarray | None = None

    def step(self, parameter: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        """One update; returns the new parameter vector, float64."""
        if self.first is None or self.second is None:
            self.first, self.second = np.zeros_like(parameter), np.zeros_like(parameter)
        self.step_count += 1
        if self.decoupled:
            parameter = parameter * (1 - self.lr * self.weight_decay)
        else:
            gradient = gradient + self.weight_decay * parameter
        self.first = self.beta1 * self.first + (1 - self.beta1) * gradient
        self.second = self.beta2 * self.second + (1 - self.beta2) * gradient**2
        mean = self.first / (1 - self.beta1**self.step_count)
        scale = np.sqrt(self.second / (1 - self.beta2**self.step_count)) + self.eps
        return parameter - self.lr * mean / scale


@dataclass
class SgdReference:
    """torch.optim.SGD's rule: weight decay in the gradient, momentum with dampening, Nesterov; the first
    step seeds the buffer."""

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    buffer: np.ndarray | None = None

    def step(self, parameter: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        """One update; returns the new parameter vector, float64."""
        gradient = gradient + self.weight_decay * parameter
        if self.momentum:
            if self.buffer is None:
                self.buffer = gradient.copy()
            else:
                self.buffer = self.momentum * self.buffer + (1 - self.dampening) * gradient
            gradient = gradient + self.momentum * self.buffer if self.nesterov else self.buffer
        return parameter - self.lr * gradient


# ChaCha20 (RFC 8439 section 2.3; the state's last four words are counter and nonce)

_MASK = 0xFFFFFFFF
_CONSTANTS = struct.unpack("<4I", b"expand 32-byte k")


def _rotate(value: int, bits: int) -> int:
    return ((value << bits) | (value >> (32 - bits))) & _MASK


def _quarter_round(state: list[int], a: int, b: int, c: int, d: int) -> None:
    state[a] = (state[a] + state[b]) & _MASK
    state[d] = _rotate(state[d] ^ state[a], 16)
    state[c] = (state[c] + state[d]) & _MASK
    state[b] = _rotate(state[b] ^ state[c], 12)
    state[a] = (state[a] + state[b]) & _MASK
    state[d] = _rotate(state[d] ^ state[a], 8)
    state[c] = (state[c] + state[d]) & _MASK
    state[b] = _rotate(state[b] ^ state[c], 7)


def chacha20_block(key: bytes, tail: Sequence[int]) -> list[int]:
    """One block: 16 words. `tail` is the last row of the state: RFC 8439 puts (counter, nonce 0..2), the
    original puts (counter low, counter high, nonce 0, nonce 1)."""
    start = [*_CONSTANTS, *struct.unpack("<8I", key), *tail]
    state = list(start)
    for _ in range(10):
        for column in range(4):
            _quarter_round(state, column, 4 + column, 8 + column, 12 + column)
        _quarter_round(state, 0, 5, 10, 15)
        _quarter_round(state, 1, 6, 11, 12)
        _quarter_round(state, 2, 7, 8, 13)
        _quarter_round(state, 3, 4, 9, 14)
    return [(x + y) & _MASK for x, y in zip(state, start, strict=True)]


def chacha20_words(key: bytes, *, stream: int, step: int, start: int, count: int) -> list[int]:
    """`count` words from word index `start` of the (stream, step) sequence: 64-bit block counter, 64-bit
    nonce = stream(16) | step(48)."""
    nonce = (stream << 48) | step
    words: list[int] = []
    for block in range(start // 16, (start + count + 15) // 16):
        words += chacha20_block(key, (block & _MASK, block >> 32, nonce & _MASK, nonce >> 32))
    offset = start % 16
    return words[offset : offset + count]


# neighbours


def without_unit(units: Sequence[object], index: int) -> list[object]:
    """The add/remove neighbour of a data set of units: all but unit `index`."""
    return [unit for i, unit in enumerate(units) if i != index]
