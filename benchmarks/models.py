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

from synthward.run.decoder import Block as Block
from synthward.run.decoder import Decoder, DecoderShape, decoder_workload, row_losses


@dataclass(frozen=True)
class Workload:
    """A network, the size of its batch, and its data: ``data(batch)`` gives what the network takes and, last, targets;
    ``row_losses`` one loss per row of the batch."""

    build: Callable[[], nn.Module]
    batch: int
    data: Callable[[int], tuple[Tensor, ...]]
    row_losses: Callable[[Tensor, Tensor], Tensor]


def mlp(*widths: int) -> nn.Module:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for index, (wide, narrow) in enumerate(itertools.pairwise(widths)):
        layers += [nn.ReLU()] * (index > 0) + [nn.Linear(wide, narrow)]
    return nn.Sequential(*layers)


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


def squared(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().flatten(1).mean(1)


def vectors(inputs: int, outputs: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda batch: (torch.randn(batch, inputs), torch.randn(batch, outputs))


def decoder(shape: DecoderShape, batch: int) -> Workload:
    """The next token of each place of a batch of sequences."""
    made = decoder_workload(shape)
    return Workload(lambda: Decoder(shape), batch, made.data, row_losses)


def images(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 1, 28, 28), torch.randn(batch, 1, 28, 28)


WORKLOADS = {
    "gan": Workload(lambda: mlp(300, 512, 512, 512, 1), 2000, vectors(300, 1), squared),
    "mlp": Workload(lambda: mlp(256, 1024, 1024, 1024, 1024, 256), 1024, vectors(256, 256), squared),
    "gpt": decoder(DecoderShape(layers=6, width=384, heads=6, vocab=2048, times=128), 32),
    "unet": Workload(UNet, 64, images, squared),
    "ehr": decoder(DecoderShape(layers=2, width=256, heads=4, vocab=20000, times=64), 64),
}
