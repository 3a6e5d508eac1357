"""A decoder of tokens, as a shape to plan with: what a large model of records would be."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from synthward.engine.errors import ConfigError
from synthward.engine.estimate import Built, Workload


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder of pre-norm blocks; the MLP of a block is four times as wide as the block."""

    layers: int
    width: int
    heads: int
    vocab: int
    times: int
    tied: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "tied" else 1
            if value < least:
                raise ConfigError(
                    f"decoder {field.name}: got {value}; give a whole number of at least {least}"
                )
        if self.width % self.heads:
            raise ConfigError(
                f"decoder width: {self.width} is no multiple of {self.heads} heads; give a width that is"
            )


DECODERS = {
    "gpt2-small": DecoderShape(12, 768, 12, 50257, 1024, tied=1),
    "gpt2-medium": DecoderShape(24, 1024, 16, 50257, 1024, tied=1),
    "1.3b": DecoderShape(24, 2048, 16, 50257, 2048),
    "10b": DecoderShape(32, 5120, 40, 50257, 2048),
}


def parse_decoder(text: str) -> DecoderShape:
    """A preset by name, or ``layers=24,width=2048,...``; parts that are left out are those of gpt2-small."""
    name, _, rest = text.partition(",")
    if name in DECODERS:
        base, pairs = DECODERS[name], rest
    else:
        base, pairs = replace(DECODERS["gpt2-small"], tied=0), text
    known = [field.name for field in fields(DecoderShape)]
    given: dict[str, int] = {}
    for pair in filter(None, pairs.split(",")):
        key, _, value = pair.partition("=")
        if key.strip() not in known or not value.strip().isdigit():
            raise ConfigError(
                f"--decoder: got {pair!r}; give one of {', '.join(DECODERS)}, or whole numbers for "
                f"{', '.join(known)}, such as layers=24,width=2048,heads=16,vocab=50257,times=1024"
            )
        given[key.strip()] = int(value)
    return replace(base, **given)


class Block(nn.Module):
    """Causal attention, then an MLP of four times the width, each after a LayerNorm and beside a residual path."""

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
    """Tokens int64 [B, T] to logits [B, T, vocab]; with `recomputes`, blocks are run again in the backward pass."""

    def __init__(self, shape: DecoderShape, *, recomputes: bool = False) -> None:
        super().__init__()
        self.recomputes = recomputes
        width = shape.width
        self.tokens, self.places = nn.Embedding(shape.vocab, width), nn.Embedding(shape.times, width)
        self.blocks = nn.ModuleList([Block(width, shape.heads) for _ in range(shape.layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, shape.vocab, bias=False)
        if shape.tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids).contiguous()
        x = self.tokens(ids) + self.places(places)
        for block in self.blocks:
            # Nothing in a block is random.
            x = (
                checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
                if self.recomputes
                else block(x)
            )
        out: Tensor = self.head(self.norm(x))
        return out


def row_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of each row: logits [B, T, vocab], targets int64 [B, T] -> [B]."""
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).mean(1)


def decoder_workload(shape: DecoderShape, *, name: str = "decoder", recomputes: bool = False) -> Workload:
    """One sequence for each privacy unit, the next token at every place."""

    def build() -> Built:
        network = Decoder(shape, recomputes=recomputes)
        return Built(network, lambda ids, targets: row_losses(network(ids), targets), list(network.blocks))

    def data(units: int) -> tuple[Tensor, ...]:
        ids = torch.randint(0, shape.vocab, (units, shape.times + 1))
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    told = [f"one sequence of {shape.times} tokens for each privacy unit"]
    if recomputes:
        told.append("each block is run again in the backward pass (activation checkpointing)")
    return Workload(name, build, data, 1, tuple(told))
