"""Opacus (hooks) and the engine release the same update where Opacus is right: an MLP without noise."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from synthward import PrivacyEngine
from tests.oracles import flat_parameters

opacus = pytest.importorskip("opacus")


def make(engine, module, dataset, clip):
    return engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9),
        data_loader=DataLoader(dataset, batch_size=16),
        noise_multiplier=0.0,
        max_grad_norm=clip,
        poisson_sampling=False,
    )


@pytest.mark.parametrize("clip", [0.05, 1.0, 100.0])
def test_the_same_three_updates(clip):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.LayerNorm(8), nn.Linear(8, 3))
    x, y = torch.randn(48, 6), torch.randint(0, 3, (48,))
    ends = []
    for library in ("opacus", "synthward"):
        module = copy.deepcopy(base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine = opacus.PrivacyEngine() if library == "opacus" else PrivacyEngine()
            wrapped, optimizer, loader = make(engine, module, TensorDataset(x, y), clip)
            for features, labels in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(wrapped(features), labels).backward()
                optimizer.step()
        ends.append(flat_parameters(module))
    np.testing.assert_allclose(ends[1], ends[0], atol=2e-5 * min(1.0, clip) + 1e-6)
