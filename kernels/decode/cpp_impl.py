"""Compiled kernels of samplers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from synthward import _C
from synthward.kernels._select import maybe_view, threads, view, written

if TYPE_CHECKING:
    from synthward.kernels.decode import ResidualWeights


def residual_features(
    sums: Tensor, common: Tensor, values: Tensor, value_weights: Tensor, network: ResidualWeights
) -> Tensor:
    out = torch.empty_like(sums)
    _C.residual_features(
        view(sums),
        view(common),
        view(values),
        view(value_weights),
        view(network.weights),
        view(network.biases),
        view(network.scales),
        view(network.shifts),
        network.eps,
        view(out),
        threads(),
    )
    return out


def draw_tokens(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    offsets: Tensor,
    columns: Tensor,
    uniforms: Tensor,
    added: Tensor | None,
    sums: Tensor | None,
) -> Tensor:
    tokens = torch.empty_like(columns)
    _C.draw_tokens(
        view(features),
        view(weight),
        view(bias),
        view(offsets),
        view(columns),
        view(uniforms),
        view(tokens),
        maybe_view(added),
        maybe_view(sums),
        threads(),
    )
    written(sums)
    return tokens
