"""What is trained on a GPU: the models of `benchmarks.models` at batches that fill the device, and large ones.

"small" forms have the same layers and few numbers, so that all code runs on a CPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models import WORKLOADS, UNet, Workload, decoder, mlp, squared, vectors
from synthward.run.decoder import DECODERS, Decoder, DecoderShape

SWEPT = (1, 16, 128, 1024, 4096, 32768)
# Rows of the linear stack in every batch of the sweep.
STACK_ROWS, STACK_WIDTH, STACK_LAYERS = 65536, 1024, 8
RANK, ALPHA = 16, 32.0

BILLION = replace(DECODERS["1.3b"], times=1024, tied=1)
_SMALL = DecoderShape(layers=2, width=16, heads=2, vocab=50, times=6, tied=1)


def initialise_decoder(network: Decoder) -> Decoder:
    """As GPT-2 is (Radford et al. 2019, section 2.3): normal weights of 0.02, those that end a residual path by the
    root of their number less."""
    residual = 0.02 / math.sqrt(2 * len(network.blocks))
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            ends = name.endswith((".out", ".down"))
            nn.init.normal_(layer.weight, std=residual if ends else 0.02)
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return network


class LowRank(nn.Module):
    """A frozen linear layer and what is trained beside it: ``base(x) + alpha / rank up(down(x))`` (Hu et al. 2021)."""

    def __init__(self, base: nn.Linear, rank: int = RANK) -> None:
        super().__init__()
        self.base, self.scaling = base.requires_grad_(False), ALPHA / rank
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs]."""
        return self.base(x) + self.up(self.down(x)) * self.scaling


def adapt(network: Decoder) -> Decoder:
    """Adapters on all projections of attention and MLP; nothing else is trained."""
    network.requires_grad_(False)
    for block in network.blocks:
        for name in ("qkv", "out", "up", "down"):
            setattr(block, name, LowRank(getattr(block, name)))
    return network


@dataclass(frozen=True)
class ImageShape:
    """Sizes of a diffusion transformer over latent images of `size` x `size` x `channels`."""

    size: int = 32
    channels: int = 4
    patch: int = 2
    width: int = 768
    layers: int = 12
    heads: int = 12
    classes: int = 1000


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class ImageBlock(nn.Module):
    """Attention and MLP whose norms are shifted, scaled and gated by the condition (adaLN-zero)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.condition = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        """x [B, T, width], given [B, width]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.condition(F.silu(given)).chunk(6, dim=1)
        h = _modulated(x, shift1, scale1)
        q, k, v = self.qkv(h).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate1.unsqueeze(1) * self.out(mixed)
        h = F.gelu(self.up(_modulated(x, shift2, scale2)), approximate="tanh")
        return x + gate2.unsqueeze(1) * self.down(h)


class ImageTransformer(nn.Module):
    """Predicts the noise of a latent image from its time and class (Peebles and Xie 2023, "DiT", section 3.2)."""

    def __init__(self, shape: ImageShape) -> None:
        super().__init__()
        self.shape, width = shape, shape.width
        patches = (shape.size // shape.patch) ** 2
        self.patches = nn.Conv2d(shape.channels, width, shape.patch, shape.patch)
        self.times = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        # One more for "no class", which classifier-free guidance needs.
        self.classes = nn.Embedding(shape.classes + 1, width)
        self.register_buffer("places", _waves(torch.arange(patches), width))
        self.blocks = nn.ModuleList([ImageBlock(width, shape.heads) for _ in range(shape.layers)])
        self.condition = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, shape.patch**2 * shape.channels)
        self._initialise()

    def _initialise(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.classes.weight, std=0.02)
        for layer in (*(block.condition for block in self.blocks), self.condition, self.head):
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, times: Tensor, classes: Tensor) -> Tensor:
        """x [B, channels, size, size], times float [B] in 0 to 1000, classes int64 [B] -> the shape of x."""
        given = self.times(_waves(times, 256)) + self.classes(classes)
        h = self.patches(x).flatten(2).transpose(1, 2) + self.places
        for block in self.blocks:
            h = block(h, given)
        shift, scale = self.condition(F.silu(given)).chunk(2, dim=1)
        h = self.head(_modulated(h, shift, scale))
        side, patch = self.shape.size // self.shape.patch, self.shape.patch
        h = h.unflatten(1, (side, side)).unflatten(3, (patch, patch, -1))
        return h.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


def _waves(places: Tensor, width: int) -> Tensor:
    """Sines and cosines of geometric wave lengths, float [len(places), width]."""
    exponents = torch.arange(width // 2, device=places.device) / (width // 2)
    angles = places.float().unsqueeze(1) * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _noisy_images(shape: ImageShape) -> Callable[[int], tuple[Tensor, ...]]:
    def data(batch: int) -> tuple[Tensor, ...]:
        images, noise = (torch.randn(batch, shape.channels, shape.size, shape.size) for _ in range(2))
        times = torch.rand(batch)
        angle = (0.5 * math.pi * times).view(-1, 1, 1, 1)
        classes = torch.randint(0, shape.classes, (batch,))
        return angle.cos() * images + angle.sin() * noise, 1000.0 * times, classes, noise

    return data


def _language_model(shape: DecoderShape, batch: int, *, recomputes: bool = False) -> Workload:
    return replace(
        decoder(shape, batch), build=lambda: initialise_decoder(Decoder(shape, recomputes=recomputes))
    )


def _low_rank(shape: DecoderShape, batch: int) -> Workload:
    return replace(decoder(shape, batch), build=lambda: adapt(initialise_decoder(Decoder(shape))))


def _images(shape: ImageShape, batch: int) -> Workload:
    return Workload(lambda: ImageTransformer(shape), batch, _noisy_images(shape), squared)


def _stack(times: int, rows: int, width: int, layers: int) -> Workload:
    def data(batch: int) -> tuple[Tensor, Tensor]:
        return torch.randn(batch, times, width), torch.randn(batch, times, width)

    return Workload(lambda: mlp(*[width] * (layers + 1)), max(1, rows // times), data, squared)


def _full() -> dict[str, Workload]:
    return {
        "gan": replace(WORKLOADS["gan"], batch=65536),
        "mlp": replace(WORKLOADS["mlp"], batch=65536),
        "gpt": replace(WORKLOADS["gpt"], batch=512),
        "unet": replace(WORKLOADS["unet"], batch=2048),
        "ehr": replace(WORKLOADS["ehr"], batch=1024),
        "gpt2-small": _language_model(DECODERS["gpt2-small"], 16),
        "gpt2-medium": _language_model(DECODERS["gpt2-medium"], 8),
        "1.3b": _language_model(BILLION, 8, recomputes=True),
        "dit-b/2": _images(ImageShape(), 128),
        "1.3b lora": _low_rank(BILLION, 8),
        **{f"stack T {times}": _stack(times, STACK_ROWS, STACK_WIDTH, STACK_LAYERS) for times in SWEPT},
    }


def _small() -> dict[str, Workload]:
    untied = replace(_SMALL, tied=0)
    return {
        "gan": Workload(lambda: mlp(7, 9, 1), 8, vectors(7, 1), squared),
        "mlp": Workload(lambda: mlp(6, 8, 8, 6), 8, vectors(6, 6), squared),
        "gpt": decoder(untied, 4),
        "unet": replace(WORKLOADS["unet"], build=lambda: UNet((8, 8, 16)), batch=2),
        "ehr": decoder(replace(untied, vocab=90), 4),
        "gpt2-small": _language_model(_SMALL, 4),
        "gpt2-medium": _language_model(replace(_SMALL, layers=3), 4),
        "1.3b": _language_model(_SMALL, 4, recomputes=True),
        "dit-b/2": _images(ImageShape(8, 3, 2, width=16, layers=2, heads=2, classes=5), 4),
        "1.3b lora": _low_rank(_SMALL, 4),
        **{f"stack T {times}": _stack(min(times, 24), 48, 8, 2) for times in SWEPT},
    }


@functools.cache
def workloads(small: bool) -> dict[str, Workload]:
    """All of them by name, in the order in which they are measured."""
    return _small() if small else _full()


def shape_text(work: Workload, batch: int) -> str:
    """What one batch is, for people: shapes and types of its tensors."""
    with torch.device("meta"):
        made = work.data(batch)
    return ", ".join(f"{[*tensor.shape]} {str(tensor.dtype).removeprefix('torch.')}" for tensor in made)


def parameter_counts(work: Workload) -> tuple[int, int]:
    """Numbers that are trained, and all of them; none is made."""
    with torch.device("meta"):
        parameters = [*work.build().parameters()]
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def losses_of(work: Workload, network: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Loss of each row of a batch."""
    return work.row_losses(network(*batch[:-1]), batch[-1])
