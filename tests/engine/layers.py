"""Every layer with a rule, in sizes and settings that hypothesis draws: the rows of the engine's test matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

Draw = Callable[[st.SearchStrategy[Any]], Any]

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSES = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
# Where a tensor's elements lie: as they come, with a hole behind each, or with the batch axis last in memory.
PLACES = ("contiguous", "with holes", "batch last")


def place(x: Tensor, how: str) -> Tensor:
    """The same values in another place."""
    if how == "with holes":
        return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]
    return x.movedim(0, -1).contiguous().movedim(-1, 0) if how == "batch last" else x


@dataclass(frozen=True)
class Drawn:
    """A layer and the shape of one row of its input, without the batch axis."""

    layer: nn.Module
    inner: tuple[int, ...]
    ids: int = 0
    """Number of categories, where the input are ids and not numbers."""


class Net(nn.Module):
    """A linear layer over the last axis (its norm shows the input gradient of what follows), then the layer under
    test, once or on two inputs."""

    def __init__(self, drawn: Drawn, *, twice: bool, places: tuple[str, str]) -> None:
        super().__init__()
        self.layer, self.ids = drawn.layer, drawn.ids
        self.stem = None if drawn.ids else nn.Linear(drawn.inner[-1], drawn.inner[-1])
        self.twice, self.places = twice, places
        if self.stem is not None:
            with torch.no_grad():
                self.stem.weight.add_(torch.eye(drawn.inner[-1]))

    def forward(self, x: Tensor) -> Tensor:
        before, after = self.places
        if self.ids:
            ids = place(x.long(), before)
            out = place(self.layer(ids), after)
            return out + torch.tanh(self.layer((ids + 1) % self.ids)) if self.twice else out
        h = place(self.stem(x), before)
        out = place(self.layer(h), after)
        return out + torch.tanh(self.layer(torch.sin(2 * h))) if self.twice else out


def make_inputs(drawn: Drawn, rows: int) -> Tensor:
    """Rows of the global generator: ids as floats, or numbers."""
    if drawn.ids:
        return torch.randint(0, drawn.ids, (rows, *drawn.inner)).float()
    return torch.randn(rows, *drawn.inner)


def times(draw: Draw) -> tuple[int, ...]:
    """Axes between the batch and the features."""
    return draw(st.sampled_from([(), (1,), (3,), (2, 4)]))


def settle(module: nn.Module) -> nn.Module:
    """Scales away from one and biases away from zero, where their gradients would hide a factor."""
    for parameter in module.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return module


def linear(draw: Draw) -> Drawn:
    inputs, outputs = draw(st.integers(1, 9)), draw(st.integers(1, 40))
    return Drawn(nn.Linear(inputs, outputs, bias=draw(st.booleans())), (*times(draw), inputs))


def conv(axes: int, transposed: bool) -> Callable[[Draw], Drawn]:
    def make(draw: Draw) -> Drawn:
        def each(low: int, high: int) -> list[int]:
            return [draw(st.integers(low, high)) for _ in range(axes)]

        groups = draw(st.sampled_from([1, 1, 2, 3]))
        inputs, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 4))
        kernel = each(1, 3 if axes < 3 else 2)
        options: dict[str, Any] = {"stride": each(1, 2), "dilation": each(1, 2), "groups": groups}
        options["bias"] = draw(st.booleans())
        if transposed:
            options["padding"] = each(0, 1)
            larger = zip(options["stride"], options["dilation"], strict=True)
            options["output_padding"] = [draw(st.integers(0, max(sizes) - 1)) for sizes in larger]
        else:
            options["padding_mode"] = draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
            options["padding"] = each(0, 2)
            if draw(st.booleans()):
                options |= {"padding": "same", "stride": 1}
        layer = (TRANSPOSES if transposed else CONVS)[axes](inputs, outputs, kernel, **options)
        return Drawn(layer, (inputs, *each(5, 8 if axes < 3 else 6)))

    return make


def embedding(draw: Draw) -> Drawn:
    count = draw(st.integers(2, 7))
    padding = draw(st.sampled_from([None, 0, -1]))
    table = nn.Embedding(count, draw(st.integers(1, 6)), padding_idx=padding)
    return Drawn(nn.Sequential(table, nn.Tanh()), times(draw) or (2,), ids=count)


class TiedTable(nn.Module):
    """A table that is looked up, and is the weight of the output."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(count, width), nn.Linear(width, width)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.mix(self.table(ids))), self.table.weight)


def tied_embedding(draw: Draw) -> Drawn:
    count = draw(st.integers(2, 7))
    return Drawn(TiedTable(count, draw(st.integers(1, 5))), times(draw) or (2,), ids=count)


def layer_norm(draw: Draw) -> Drawn:
    shape = draw(st.sampled_from([(5,), (8,), (3, 4)]))
    norm = nn.LayerNorm(shape, bias=draw(st.booleans()))
    return Drawn(settle(norm), (*times(draw), *shape))


def rms_norm(draw: Draw) -> Drawn:
    shape = draw(st.sampled_from([(5,), (8,), (3, 4)]))
    # By default torch's eps is that of the input's precision, which would not be the loop's in float64.
    return Drawn(settle(nn.RMSNorm(shape, eps=1e-5)), (*times(draw), *shape))


def group_norm(draw: Draw) -> Drawn:
    groups, each = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    space = draw(st.sampled_from([(6,), (3, 3), (2, 2, 2)]))
    return Drawn(settle(nn.GroupNorm(groups, groups * each)), (groups * each, *space))


def instance_norm(draw: Draw) -> Drawn:
    axes, channels = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    space = {1: (7,), 2: (3, 4), 3: (2, 3, 2)}[axes]
    kind = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[axes]
    return Drawn(settle(kind(channels, affine=True)), (channels, *space))


class Recurrent(nn.Module):
    """Output and last states of a recurrent layer over rows [times, features]."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        out, states = self.rnn(x)
        last = sum(states) if isinstance(states, tuple) else states
        return out.flatten(1) + last.transpose(0, 1).mean((1, 2)).unsqueeze(1)


def recurrent(kind: type[nn.RNNBase]) -> Callable[[Draw], Drawn]:
    def make(draw: Draw) -> Drawn:
        width = draw(st.integers(1, 4))
        options = {
            "num_layers": draw(st.integers(1, 2)),
            "bias": draw(st.booleans()),
            "bidirectional": draw(st.booleans()),
        }
        if kind is nn.RNN:
            options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
        rnn = kind(width, draw(st.integers(2, 5)), batch_first=True, **options)
        return Drawn(Recurrent(rnn), (draw(st.integers(1, 5)), width))

    return make


class Attention(nn.Module):
    """Heads of scaled dot products between linear projections of rows [times, features]."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


def attention(draw: Draw) -> Drawn:
    heads = draw(st.integers(1, 3))
    width = heads * draw(st.integers(2, 3))
    return Drawn(Attention(width, heads, draw(st.booleans())), (draw(st.integers(1, 5)), width))


class Bare(nn.Module):
    """An operation of the input and one parameter."""

    def __init__(self, shape: tuple[int, ...], operation: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.p, self.operation = nn.Parameter(torch.empty(shape).uniform_(0.5, 1.5)), operation

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(x, self.p)


def broadcast(operation: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Draw], Drawn]:
    """The parameter has some of the last axes of a row, any of them of length one."""

    def make(draw: Draw) -> Drawn:
        inner = (*times(draw), draw(st.integers(1, 5)))
        kept = draw(st.integers(0, len(inner)))
        shape = [1 if draw(st.booleans()) else n for n in inner[len(inner) - kept :]]
        if kept == len(inner) and draw(st.booleans()):
            shape = [1, *shape]
        return Drawn(Bare(tuple(shape), lambda x, p: operation(torch.tanh(x), p)), inner)

    return make


def matmul(draw: Draw) -> Drawn:
    inputs, outputs = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    inner = (*times(draw), inputs)
    if len(inner) > 1 and draw(st.booleans()):
        return Drawn(Bare((outputs, inner[-2]), lambda x, p: p @ x), inner)
    return Drawn(Bare((inputs, outputs), lambda x, p: x @ p), inner)


EQUATIONS = (
    "btd,dp->btp",
    "btd,dp->bpt",
    "btd,dhp->bhtp",
    "btd,td->bd",
    "btd,td->bdt",
    "btd,tdp->bp",
    "btd,tdp->btp",
    "btd,d->btd",
    "btd,p->bp",
)


def einsum(draw: Draw) -> Drawn:
    sizes = {letter: draw(st.integers(1, 5)) for letter in "tdph"}
    equation = draw(st.sampled_from(EQUATIONS))
    terms = equation.partition("->")[0].partition(",")[2]
    shape = tuple(sizes[letter] for letter in terms)
    return Drawn(Bare(shape, lambda x, p: torch.einsum(equation, x, p)), (sizes["t"], sizes["d"]))


LAYERS: dict[str, Callable[[Draw], Drawn]] = {
    "linear": linear,
    **{f"conv{axes}d": conv(axes, False) for axes in (1, 2, 3)},
    **{f"conv_transpose{axes}d": conv(axes, True) for axes in (1, 2, 3)},
    "embedding": embedding,
    "tied embedding": tied_embedding,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "group_norm": group_norm,
    "instance_norm": instance_norm,
    "lstm": recurrent(nn.LSTM),
    "gru": recurrent(nn.GRU),
    "rnn": recurrent(nn.RNN),
    "attention": attention,
    "add": broadcast(torch.add),
    "multiply": broadcast(torch.mul),
    "matmul": matmul,
    "einsum": einsum,
}
