"""The five models of the step benchmark: a critic, an MLP, a decoder, a U-Net, a decoder of medical codes.

Each comes with a batch and a loss per row, so that plain PyTorch, this engine and its peers train the same thing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Workload:
    """A network, the size of its batch, and its data: ``data(batch)`` gives inputs and targets, ``row_losses``
    one loss per row of the batch."""

    build: Callable[[], nn.Module]
    batch: int
    data: Callable[[int], tuple[Tensor, Tensor]]
    row_losses: Callable[[Tensor, Tensor], Tensor]


def mlp(*widths: int) -> nn.Module:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for index, (wide, narrow) in enumerate(itertools.pairwise(widths)):
        layers += [nn.ReLU()] * (index > 0) + [nn.Linear(wide, narrow)]
    return nn.Sequential(*layers)


class Block(nn.Module):
    """A pre-norm decoder block: causal attention, then an MLP of four times the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, width]."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """A decoder over `vocab` tokens of sequences of `times`."""

    def __init__(self, vocab: int, width: int, layers: int, heads: int, times: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab, width), nn.Embedding(times, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [B, T] -> logits [B, T, vocab]."""
        # One row of positions for each row of the batch: peers know no other form.
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids).contiguous()
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.places(places))))


class ResBlock(nn.Module):
    """Two 3x3 convolutions with GroupNorm and a residual path."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, inputs), nn.GroupNorm(8, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class UNet(nn.Module):
    """A residual U-Net for 28 x 28 images."""

    def __init__(self, widths: tuple[int, int, int] = (32, 64, 128)) -> None:
        super().__init__()
        a, b, c = widths
        self.stem = nn.Conv2d(1, a, 3, padding=1)
        self.down1, self.down2 = ResBlock(a, a), ResBlock(a, b)
        self.to2, self.to3 = nn.Conv2d(a, a, 3, 2, 1), nn.Conv2d(b, b, 3, 2, 1)
        self.middle = ResBlock(b, c)
        self.up2, self.up1 = ResBlock(c + b, b), ResBlock(b + a, a)
        self.norm, self.head = nn.GroupNorm(8, a), nn.Conv2d(a, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 1, 28, 28] -> the same shape."""
        one = self.down1(self.stem(x))
        two = self.down2(self.to2(one))
        three = self.middle(self.to3(two))
        two = self.up2(torch.cat([F.interpolate(three, scale_factor=2.0), two], 1))
        one = self.up1(torch.cat([F.interpolate(two, scale_factor=2.0), one], 1))
        return self.head(F.silu(self.norm(one)))


def _squared(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().flatten(1).mean(1)


def _next_token(logits: Tensor, target: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    return losses.view(target.shape).mean(1)


def _vectors(inputs: int, outputs: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda batch: (torch.randn(batch, inputs), torch.randn(batch, outputs))


def _tokens(vocab: int, times: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    def data(batch: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(0, vocab, (batch, times + 1))
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    return data


def _images(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 1, 28, 28), torch.randn(batch, 1, 28, 28)


WORKLOADS = {
    "gan": Workload(lambda: mlp(300, 512, 512, 512, 1), 2000, _vectors(300, 1), _squared),
    "mlp": Workload(lambda: mlp(256, 1024, 1024, 1024, 1024, 256), 1024, _vectors(256, 256), _squared),
    "gpt": Workload(lambda: Decoder(2048, 384, 6, 6, 128), 32, _tokens(2048, 128), _next_token),
    "unet": Workload(UNet, 64, _images, _squared),
    "ehr": Workload(lambda: Decoder(20000, 256, 2, 4, 64), 64, _tokens(20000, 64), _next_token),
}
