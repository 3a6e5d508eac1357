"""Adapters on a frozen base and parametrized weights: exact sums, and no work for what is frozen."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine.measure import clipped_by_group, distance, group_norms, read_pass, unit_gradients
from tests.engine.nets import make_trainer, oracle, unit_losses
from tests.oracles import flat_parameters

TIMES, WIDTH, OUT, RANK = 3, 5, 7, 2
LAYOUTS = [[1] * 4, [3, 3], [2, 0, 3, 1]]


class LoraLinear(nn.Module):
    """A frozen linear layer plus ``scaling * B(A(dropout(x)))``, as PEFT's LoRA layer is built."""

    def __init__(self, base: nn.Linear, rank: int = RANK, alpha: float = 3.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_dropout = nn.ModuleDict({"default": nn.Dropout(dropout)})
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})
        self.scaling = alpha / rank
        # B starts at zero in PEFT; then A has no gradient, and a test would not see it.
        nn.init.normal_(self.lora_B["default"].weight, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        low = self.lora_A["default"](self.lora_dropout["default"](x))
        return result + self.lora_B["default"](low) * self.scaling


class LoraParameters(nn.Module):
    """The same of bare parameters, by matrix products or merged into the frozen weight."""

    def __init__(self, base: nn.Linear, merged: bool) -> None:
        super().__init__()
        self.base_layer, self.merged = base.requires_grad_(False), merged
        self.lora_A = nn.Parameter(torch.randn(RANK, base.in_features) / 2)
        self.lora_B = nn.Parameter(torch.randn(base.out_features, RANK) / 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            weight = self.base_layer.weight + 1.5 * (self.lora_B @ self.lora_A)
            return F.linear(x, weight, self.base_layer.bias)
        return self.base_layer(x) + (x @ self.lora_A.T @ self.lora_B.T) * 1.5


class Merge(nn.Module):
    """A low-rank update as a parametrization of the frozen weight itself."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(RANK, columns)), nn.Parameter(torch.randn(rows, RANK))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 0.5 * self.b @ self.a


class LoraEmbedding(nn.Module):
    """A frozen table plus a low-rank one, as PEFT does for an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Embedding(6, WIDTH).requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(RANK, 6))
        self.lora_B = nn.Parameter(torch.randn(WIDTH, RANK))

    def forward(self, x: Tensor) -> Tensor:
        ids = (3 * x[..., 0].abs()).long().clamp_max(5)
        return self.base_layer(ids) + F.embedding(ids, self.lora_A.T) @ self.lora_B.T


class LoraConv(nn.Module):
    """A frozen convolution plus one of `RANK` channels and one of a single place, as PEFT's LoRA for Conv1d."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Conv1d(TIMES, WIDTH, 3, padding=1).requires_grad_(False)
        self.lora_A = nn.Conv1d(TIMES, RANK, 3, padding=1, bias=False)
        self.lora_B = nn.Conv1d(RANK, WIDTH, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x)) * 1.5


def parametrized() -> nn.Module:
    layer = nn.Linear(WIDTH, OUT).requires_grad_(False)
    parametrize.register_parametrization(layer, "weight", Merge(OUT, WIDTH))
    layer.parametrizations.weight.original.requires_grad_(False)
    return layer


ADAPTERS = {
    "two linear layers": lambda: LoraLinear(nn.Linear(WIDTH, OUT)),
    "two parameters": lambda: LoraParameters(nn.Linear(WIDTH, OUT), merged=False),
    "merged": lambda: LoraParameters(nn.Linear(WIDTH, OUT), merged=True),
    "a parametrization": parametrized,
    "embedding": LoraEmbedding,
    "convolution": LoraConv,
}


class Around(nn.Module):
    """The adapter between frozen layers, the first of them before any parameter that is trained."""

    def __init__(self, adapter: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.norm = nn.LayerNorm(WIDTH).requires_grad_(False)
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.adapter(self.norm(self.stem(x))))


def build(name: str) -> Around:
    torch.manual_seed(0)
    return Around(ADAPTERS[name]())


def records(rows: int) -> Tensor:
    return torch.randn(rows, TIMES, WIDTH, generator=torch.Generator().manual_seed(1))


def assert_exact(net: nn.Module, x: Tensor, counts: list[int], loop: nn.Module | None = None) -> None:
    """Norms and unclipped sums to 1e-5 of the loop over `loop` (the network itself unless given), clipped sums to a
    little more: the factors cover the rounding of the norms."""
    gradients = unit_gradients(loop or net, x, counts)
    middle = float(np.median(np.linalg.norm(gradients, axis=1)))
    for bound, tolerance in ((1e4, 1e-5), (middle, 1e-4), (middle / 4, 1e-4)):
        found = read_pass(net, x, counts, bound)
        np.testing.assert_allclose(
            np.sqrt(found.sq_norms), group_norms(gradients, found.group_of), rtol=1e-5, atol=1e-9
        )
        clipped = clipped_by_group(gradients, found.group_of, found.bounds).sum(0)
        assert distance(found.sums, clipped) <= tolerance


@pytest.mark.parametrize("counts", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ADAPTERS)
def test_low_rank_adapters_are_exact(name, counts):
    assert_exact(build(name), records(sum(counts)), counts)


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_frozen_base_stays_bit_for_bit(name):
    net, x = build(name), records(6)
    frozen = {key: p.detach().clone() for key, p in net.named_parameters() if not p.requires_grad}
    trained = {key: p.detach().clone() for key, p in net.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    trainer = make_trainer(net, optimizer, max_grad_norm=0.1, noise_multiplier=1.0)
    for _ in range(2):
        with trainer.capture():
            losses = unit_losses(net, x, [2, 1, 3])
        trainer.backward(losses, offsets=torch.tensor([0, 2, 3, 6]))
        trainer.apply()
    assert len(frozen) >= 5
    for key, parameter in net.named_parameters():
        if key in frozen:
            assert torch.equal(parameter, frozen[key]) and parameter.grad is None, key
        else:
            assert not torch.equal(parameter, trained[key]), key


class Shapes(TorchDispatchMode):
    """Counts the shapes of all tensors that operations of a certain kind give."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            # Views and transposes of the weight itself are no new memory.
            if isinstance(value, Tensor) and not value._is_view() and not func.is_view:
                self.seen[tuple(value.shape)] += 1
        return out


@pytest.mark.parametrize("counts", LAYOUTS, ids=str)
def test_no_weight_gradient_is_formed_for_what_is_frozen(counts):
    """Nothing of the shape of the frozen weight, nor of its transpose, comes into being in the backward pass; the
    same watch sees both in plain autograd when the base is trained."""
    torch.manual_seed(0)
    inputs, outputs = 37, 41
    net = nn.Sequential(nn.Linear(WIDTH, inputs), LoraLinear(nn.Linear(inputs, outputs)))
    base, x = net[1].base_layer, records(sum(counts))
    shapes = {(outputs, inputs), (inputs, outputs), (outputs * inputs,)}
    trainer = make_trainer(
        net, torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0), max_grad_norm=0.1
    )
    with trainer.capture():
        losses = unit_losses(net, x, counts)
    with Shapes() as seen:
        trainer.backward(losses, offsets=torch.tensor([0, *counts]).cumsum(0))
    assert seen.seen[(sum(counts) * TIMES, inputs)] or seen.seen[(sum(counts), TIMES, inputs)], (
        "the input gradient goes on through the frozen layer"
    )
    assert not shapes & seen.seen.keys()
    assert base.weight.grad is None and base.bias.grad is None
    base.requires_grad_(True)
    with Shapes() as plain:
        unit_losses(copy.deepcopy(net), x, counts).sum().backward()
    assert shapes & plain.seen.keys()


def test_what_is_frozen_is_in_no_plan_and_no_buffer():
    net, x = build("two linear layers"), records(4)
    trainer = make_trainer(
        net, torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0), max_grad_norm=0.1
    )
    with trainer.capture():
        losses = unit_losses(net, x, [1] * 4)
    trainer.backward(losses, rows_per_unit=1)
    measured = str(trainer.explain())
    assert "lora_A" in measured and "lora_B" in measured
    assert "base_layer" not in measured and "stem" not in measured
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert sum(total.numel() for total in trainer._step.flat.sums) == trained


def test_dropout_before_an_adapter():
    """The mask is drawn once for the batch: the loop gets the rows that the network dropped."""
    torch.manual_seed(0)
    net, x, counts = Around(LoraLinear(nn.Linear(WIDTH, OUT), dropout=0.5)), records(5), [2, 3]

    def losses(module, rows, units):
        torch.manual_seed(7)
        return unit_losses(module, rows, units)

    found = read_pass(net, x, counts, 1e4, losses_of=losses)
    twin = copy.deepcopy(net)
    each = [
        torch.autograd.grad(loss, [p for p in twin.parameters() if p.requires_grad], retain_graph=True)
        for loss in losses(twin, x, counts)
    ]
    gradients = np.stack([torch.cat([g.double().flatten() for g in unit]).numpy() for unit in each])
    np.testing.assert_allclose(np.sqrt(found.sq_norms[0]), np.linalg.norm(gradients, axis=1), rtol=1e-5)
    assert distance(found.sums, gradients.sum(0)) <= 1e-5
    assert distance(read_pass(net, x, counts, 1e4).sums, gradients.sum(0)) > 1e-2, "no dropout was drawn"


# parametrized weights

LAYERS = {
    "linear": (lambda: nn.Linear(WIDTH, OUT), lambda x: x),
    "conv1d": (lambda: nn.Conv1d(TIMES, 4, 2), lambda x: x),
    "conv2d": (lambda: nn.Conv2d(1, 4, 2), lambda x: x.unsqueeze(1)),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(TIMES, 4, 2), lambda x: x),
}


class Parametrized(nn.Module):
    """A layer, some of whose weights are computed, behind another whose norm shows its input gradient."""

    def __init__(self, name: str, register) -> None:
        super().__init__()
        make, self.shape = LAYERS[name]
        self.stem, self.layer = nn.Linear(WIDTH, WIDTH), register(make())

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.shape(self.stem(x))))


@pytest.mark.parametrize("counts", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_weight_norm(name, counts):
    torch.manual_seed(0)
    net = Parametrized(name, parametrizations.weight_norm)
    with torch.no_grad():
        net.layer.parametrizations.weight.original0.mul_(1.7)
    assert_exact(net, records(sum(counts)), counts)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("counts", LAYOUTS, ids=str)
def test_weight_norm_by_hooks(counts):
    """The older form, which computes the weight before each forward pass."""
    torch.manual_seed(0)
    with torch.no_grad():  # else the weight would have a graph, which no copy can have
        net = Parametrized("linear", nn.utils.weight_norm)
    assert_exact(net, records(sum(counts)), counts)


@pytest.mark.parametrize("counts", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_spectral_norm_of_fixed_vectors(name, counts):
    torch.manual_seed(0)
    net = Parametrized(name, parametrizations.spectral_norm).eval()
    assert_exact(net, records(sum(counts)), counts)


@pytest.mark.parametrize("counts", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_spectral_norm_that_iterates(name, counts):
    """One power iteration in a forward pass, of the weight alone: the loop takes the vectors that it gave."""
    torch.manual_seed(0)
    net = Parametrized(name, parametrizations.spectral_norm)
    loop = copy.deepcopy(net)
    loop(records(1))
    assert_exact(net, records(sum(counts)), counts, loop.eval())


def test_power_iterations_are_those_of_plain_training():
    """One for each forward pass and none in the backward; the buffers never see a record."""
    torch.manual_seed(0)
    net = Parametrized("linear", parametrizations.spectral_norm)
    plain, trainer, x = copy.deepcopy(net), make_trainer(net, max_grad_norm=0.1), records(4)
    with trainer.capture():
        losses = unit_losses(net, x, [1] * 4)
    trainer.backward(losses, rows_per_unit=1)
    plain(100 * x)
    for name, value in plain.named_buffers():
        assert torch.equal(net.get_buffer(name), value), name


def test_the_update_of_an_adapter_is_the_clipped_sum():
    """End to end through the update: parameters moved by the clipped sum, no more and no less."""
    net, x = build("two linear layers"), records(5)
    expected = oracle(copy.deepcopy(net), x, [2, 3], 0.1)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0)
    trainer, before = make_trainer(net, optimizer, max_grad_norm=0.1), flat_parameters(net)
    with trainer.capture():
        losses = unit_losses(net, x, [2, 3])
    trainer.backward(losses, offsets=torch.tensor([0, 2, 5]))
    trainer.apply()
    np.testing.assert_allclose(before - flat_parameters(net), expected, rtol=2e-4, atol=2e-6)
