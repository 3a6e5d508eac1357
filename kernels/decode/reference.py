"""Plain torch: the whole head, and shares cumulated in double."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from synthward.kernels.decode import ResidualWeights


def residual_features(
    sums: Tensor, common: Tensor, values: Tensor, value_weights: Tensor, network: ResidualWeights
) -> Tensor:
    x = F.silu(sums + common + values @ value_weights)
    norms = list(zip(network.scales, network.shifts, strict=True))
    for weight, bias, (scale, shift) in zip(network.weights, network.biases, norms[:-1], strict=True):
        x = x + F.silu(F.linear(F.layer_norm(x, scale.shape, scale, shift, network.eps), weight, bias))
    return F.layer_norm(x, x.shape[1:], *norms[-1], network.eps)


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
    if not columns.numel():
        return columns.clone()
    logits = F.linear(features, weight, bias).double()
    sizes = offsets[1:] - offsets[:-1]
    place = torch.arange(int(sizes.max()), device=offsets.device)
    is_there = place < sizes[columns, None]
    index = (offsets[columns, None] + place).clamp(max=len(weight) - 1)
    chosen = logits.gather(1, index.flatten(1)).view(index.shape)
    share = torch.softmax(chosen.masked_fill(~is_there, -torch.inf), dim=-1)
    cumulated = share.cumsum(-1)
    drawn = (cumulated <= uniforms.double().unsqueeze(-1) * cumulated[..., -1:]).sum(-1)
    # A sum that rounding leaves below the uniform number belongs to the last token that has a share.
    last = torch.where(share > 0, place, 0).amax(-1)
    tokens = torch.minimum(drawn, last)
    if sums is not None and added is not None:
        sums += F.embedding_bag(offsets[columns] + tokens, added, mode="sum")
    return tokens
