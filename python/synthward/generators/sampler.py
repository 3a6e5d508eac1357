"""A generator's network as its sampler runs it: what is known of a row is added up, not multiplied out."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from synthward.encoding.layout import Layout
from synthward.generators.networks import ResidualMLP
from synthward.kernels import ResidualWeights, draw_tokens, linear_rows, residual_features


class Sampler:
    """A `ResidualMLP` cut between its layers, with a head of token logits followed by continuous outputs.

    Every row's results are a function of that row's arguments alone, to the bit, whatever rows are computed with it.

    Args:
        network: its weights are copied.
        layout: of the tokens and continuous columns that the head gives.
        shift: float32 [vocabulary], added to the token logits.
        allowed: bool [size] masks of token columns: other tokens of these are never drawn.
    """

    def __init__(
        self, network: ResidualMLP, layout: Layout, shift: Tensor, allowed: dict[int, Tensor] | None = None
    ) -> None:
        vocabulary = layout.vocabulary
        device = network.head.weight.device
        self.offsets = torch.from_numpy(layout.offsets).to(device)
        norms, hidden = [*network.norms, network.norm], network.stem.out_features
        self._network = ResidualWeights(
            _stacked(network.blocks, "weight", hidden, hidden).to(device),
            _stacked(network.blocks, "bias", hidden).to(device),
            _stacked(norms, "weight", hidden),
            _stacked(norms, "bias", hidden),
            network.norm.eps,
        )
        weight, bias = network.head.weight.detach(), network.head.bias.detach()
        self._head = weight[:vocabulary].contiguous()
        self._head_bias = bias[:vocabulary] + shift
        for column, mask in (allowed or {}).items():
            start = int(layout.offsets[column])
            self._head_bias[start : start + len(mask)].masked_fill_(~mask.to(device), -torch.inf)
        self._further, self._further_bias = weight[vocabulary:].contiguous(), bias[vocabulary:].contiguous()
        self._columns = network.stem.weight.detach().T.contiguous()
        self.bias = network.stem.bias.detach().clone()

    def inputs(self, first: int, count: int) -> Tensor:
        """Rows [count, hidden] of the first layer: what a unit of the inputs ``first ..`` adds to its sum."""
        return self._columns[first : first + count]

    def features(self, sums: Tensor, common: Tensor, values: Tensor, value_weights: Tensor) -> Tensor:
        """What the head is applied to, [R, hidden]; arguments as `synthward.kernels.residual_features` has them."""
        return residual_features(sums, common, values, value_weights, self._network)

    def draw(
        self,
        features: Tensor,
        columns: Tensor,
        uniforms: Tensor,
        added: Tensor | None = None,
        sums: Tensor | None = None,
    ) -> Tensor:
        """Tokens int64 [R, k] of ``columns`` int64 [R, k]; the row of ``added`` of each is added to ``sums``."""
        return draw_tokens(
            *(features, self._head, self._head_bias, self.offsets, columns, uniforms), added=added, sums=sums
        )

    def further(self, features: Tensor) -> Tensor:
        """The continuous outputs, [R, continuous]."""
        return linear_rows(features, self._further, self._further_bias)


def _stacked(modules: Iterable[nn.Module], name: str, *shape: int) -> Tensor:
    """A parameter of every module, [modules, *shape]."""
    found = [module.get_parameter(name).detach() for module in modules]
    return torch.stack(found) if found else torch.zeros(0, *shape)
