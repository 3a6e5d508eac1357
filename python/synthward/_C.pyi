"""Types of the compiled extension: NumPy views, checked and never converted."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_F = NDArray[np.float32]
_L = NDArray[np.int64]

LONGEST_GRAM: int

def outer_sq_norms(activations: _F, output_grads: _F, offsets: _L | None, out: _F, threads: int) -> int: ...
def diagonal_sq_norms(rows: _F, factors: _F | None, offsets: _L | None, out: _F, threads: int) -> None: ...
def scatter_sq_norms(ids: _L, output_grads: _F, offsets: _L | None, out: _F, threads: int) -> None: ...
def scale_rows(rows: _F, row_weights: _F, out: _F, threads: int) -> None: ...
def diagonal_weighted_sum(rows: _F, factors: _F | None, row_weights: _F, out: _F, threads: int) -> None: ...
def scatter_weighted_sum(ids: _L, output_grads: _F, row_weights: _F, out: _F, threads: int) -> None: ...
def gram_norms(
    activations: _F, output_grads: _F, offsets: _L, out: _F, row_sums: _F, with_bias: bool, threads: int
) -> None: ...
def tile_norms(
    activations: _F, output_grads: _F, offsets: _L, out: _F, row_sums: _F, grads: _F | None, threads: int
) -> None: ...
def rank1_norms(
    activations: _F, output_grads: _F, out: _F, row_sums: _F, bias_out: _F | None, threads: int
) -> None: ...
def outer_sum(
    activations: _F, output_grads: _F, row_weights: _F, out: _F, bias: _F | None, threads: int
) -> None: ...
def product(x: _F, weight: _F, bias: _F | None, is_transposed: bool, out: _F, threads: int) -> None: ...
def conv_norms(
    shape: list[int],
    images: _F,
    output_grads: _F,
    offsets: _L,
    order: _L | None,
    out: _F | None,
    row_sums: _F | None,
    grads: _F | None,
    threads: int,
) -> None: ...
def conv_gram_norms(
    shape: list[int], images: _F, output_grads: _F, out: _F, row_sums: _F, threads: int
) -> None: ...
def conv_sum(
    shape: list[int], images: _F, output_grads: _F, row_weights: _F, out: _F, threads: int
) -> None: ...
def layer_norm_backward(
    x: _F,
    output_grads: _F,
    mean: _F | None,
    rstd: _F,
    weight: _F | None,
    offsets: _L | None,
    order: _L | None,
    dx: _F | None,
    scale: _F | None,
    bias: _F | None,
    threads: int,
) -> None: ...
def group_norm_backward(
    x: _F,
    output_grads: _F,
    mean: _F,
    rstd: _F,
    weight: _F | None,
    dx: _F | None,
    scale: _F,
    bias: _F,
    threads: int,
) -> None: ...
def residual_features(
    sums: _F,
    common: _F,
    values: _F,
    value_weights: _F,
    weights: _F,
    biases: _F,
    scales: _F,
    shifts: _F,
    eps: float,
    out: _F,
    threads: int,
) -> None: ...
def draw_tokens(
    features: _F,
    weight: _F,
    bias: _F,
    offsets: _L,
    columns: _L,
    uniforms: _F,
    tokens: _L,
    added: _F | None,
    sums: _F | None,
    threads: int,
) -> None: ...
def chacha20_words(key: bytes, stream: int, step: int, start: int, count: int) -> NDArray[np.uint32]: ...
def chacha20_block(state: NDArray[np.uint32]) -> NDArray[np.uint32]: ...
def gaussian_noise(out: _F, key: bytes, stream: int, step: int, start: int, threads: int) -> None: ...
def add_gaussian_noise(
    tensor: _F,
    key: bytes,
    stream: int,
    step: int,
    start: int,
    noise_std: float,
    threads: int,
    taps: Sequence[float] = ...,
    weights: Sequence[float] = ...,
    decays: Sequence[float] = ...,
    gains: Sequence[float] = ...,
    state: _F | None = ...,
) -> None: ...
def wide_normals(
    radius: NDArray[np.uint64], angle: NDArray[np.uint64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...
def rounded_gaussian(
    out: _L, key: bytes, stream: int, step: int, start: int, scale: float, threads: int
) -> None: ...
def discrete_release(
    sums: NDArray[np.float64],
    out: _F,
    key: bytes,
    stream: int,
    step: int,
    start: int,
    grid: float,
    noise_std: float,
    threads: int,
) -> None: ...
def noisy_adam(
    param: _F,
    summed_grad: _F,
    exp_avg: _F,
    exp_avg_sq: _F,
    key: bytes,
    stream: int,
    step: int,
    start: int,
    noise_std: float,
    grad_scale: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    bias1: float,
    bias2: float,
    threads: int,
    bias_variance: float | None = ...,
    min_second_moment: float = ...,
    taps: Sequence[float] = ...,
    weights: Sequence[float] = ...,
    decays: Sequence[float] = ...,
    gains: Sequence[float] = ...,
    state: _F | None = ...,
) -> None: ...
def noisy_sgd(
    param: _F,
    summed_grad: _F,
    momentum_buffer: _F | None,
    key: bytes,
    stream: int,
    step: int,
    start: int,
    noise_std: float,
    grad_scale: float,
    lr: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    weight_decay: float,
    first_step: bool,
    threads: int,
    taps: Sequence[float] = ...,
    weights: Sequence[float] = ...,
    decays: Sequence[float] = ...,
    gains: Sequence[float] = ...,
    state: _F | None = ...,
) -> None: ...
def reuse_freed_blocks(library: str) -> bool: ...
def cpu_isa() -> str: ...
def available_isas() -> list[str]: ...
def force_isa(name: str) -> bool: ...
