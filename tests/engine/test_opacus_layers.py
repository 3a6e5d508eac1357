"""Opacus (hooks) and the engine clip and sum alike, layer by layer, where Opacus is right."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from synthward import PrivacyEngine
from tests.engine.layers import settle
from tests.engine.measure import distance

opacus = pytest.importorskip("opacus")

ROWS = 7
# The layer, and the shape of one row of its input.
LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (6,)),
    "linear over times": (lambda: nn.Linear(6, 5), (4, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (2, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (4, 9)),
    "conv1d of groups": (lambda: nn.Conv1d(4, 6, 2, dilation=2, groups=2, bias=False), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (3, 2), padding=(1, 0)), (3, 6, 7)),
    "conv2d of groups": (lambda: nn.Conv2d(4, 8, 3, stride=2, dilation=2, padding=2, groups=4), (4, 8, 7)),
    "conv2d, same": (lambda: nn.Conv2d(3, 4, 3, padding="same"), (3, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=1), (2, 3, 4, 5)),
    "conv3d of groups": (lambda: nn.Conv3d(4, 4, (1, 2, 2), groups=2), (4, 2, 4, 3)),
    "embedding": (lambda: nn.Embedding(5, 4), (3,)),
    "layer_norm": (lambda: nn.LayerNorm(6), (4, 6)),
    "layer_norm of two axes": (lambda: nn.LayerNorm((4, 6)), (4, 6)),
    "rms_norm": (lambda: nn.RMSNorm(6, eps=1e-5), (4, 6)),
    "group_norm": (lambda: nn.GroupNorm(2, 6), (6, 3, 4)),
    "instance_norm1d": (lambda: nn.InstanceNorm1d(4, affine=True), (4, 7)),
    "instance_norm2d": (lambda: nn.InstanceNorm2d(4, affine=True), (4, 3, 4)),
    "instance_norm3d": (lambda: nn.InstanceNorm3d(4, affine=True), (4, 3, 2, 2)),
}


class Net(nn.Module):
    """A linear layer over the last axis, the layer, and a head; ids go to the layer at once."""

    def __init__(self, layer: nn.Module, inner: tuple[int, ...]) -> None:
        super().__init__()
        takes_ids = isinstance(layer, nn.Embedding)
        self.stem = nn.Identity() if takes_ids else nn.Linear(inner[-1], inner[-1])
        self.layer = layer
        with torch.no_grad():
            sample = torch.zeros((2, *inner), dtype=torch.int64 if takes_ids else torch.float32)
            width = layer(sample).flatten(1).shape[1]
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(self.stem(x))).flatten(1))


def clipped_sum(library: str, net: nn.Module, x: torch.Tensor, y: torch.Tensor, bound: float) -> np.ndarray:
    """The sum over rows of clipped gradients [P], as the library has it before it divides by their number."""
    net = copy.deepcopy(net)
    with warnings.catch_warnings():
        if library == "opacus":
            warnings.simplefilter("ignore")
        engine = opacus.PrivacyEngine() if library == "opacus" else PrivacyEngine()
        module, optimizer, _ = engine.make_private(
            module=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=1.0),
            data_loader=DataLoader(TensorDataset(x, y), batch_size=ROWS),
            noise_multiplier=0.0,
            max_grad_norm=bound,
            poisson_sampling=False,
        )
        nn.functional.cross_entropy(module(x), y).backward()
        if library == "synthward":
            parts = optimizer.session.core.flat.sums
        else:
            optimizer.step()
            parts = [p.grad * ROWS for p in module.parameters()]
    return torch.cat([part.flatten() for part in parts]).double().numpy()


@pytest.mark.parametrize("bound", [0.05, 1.0, 100.0])
@pytest.mark.parametrize("name", LAYERS)
def test_clipped_sums_agree(name, bound):
    torch.manual_seed(0)
    make, inner = LAYERS[name]
    layer = make()
    if "norm" in name:
        settle(layer)
    net = Net(layer, inner)
    x = torch.randint(0, 5, (ROWS, *inner)) if name == "embedding" else torch.randn(ROWS, *inner)
    y = torch.randint(0, 3, (ROWS,))
    expected, found = (clipped_sum(library, net, x, y, bound) for library in ("opacus", "synthward"))
    assert distance(found, expected) <= 1e-4
