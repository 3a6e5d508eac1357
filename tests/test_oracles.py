"""The oracles themselves against published values and torch: an oracle that is wrong proves nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import oracles


def test_chacha20_block_of_rfc_8439():
    """RFC 8439 section 2.3.2."""
    key = bytes(range(32))
    words = oracles.chacha20_block(key, (1, 0x09000000, 0x4A000000, 0x00000000))
    assert words[:4] == [0xE4E7F110, 0x15593BD1, 0x1FDD0F50, 0xC47120A3]
    assert words[-4:] == [0xD19C12B5, 0xB94E16DE, 0xE883D0CB, 0x4E3C50A2]


@pytest.mark.parametrize("decoupled", [False, True])
def test_adam_reference_equals_torch(decoupled):
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(50, generator=generator, dtype=torch.float64)
    parameter = torch.nn.Parameter(start.clone())
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind([parameter], lr=0.01, weight_decay=0.1)
    reference = oracles.AdamReference(lr=0.01, weight_decay=0.1, decoupled=decoupled)
    expected = start.numpy().copy()
    for _ in range(5):
        parameter.grad = torch.randn(50, generator=generator, dtype=torch.float64)
        expected = reference.step(expected, parameter.grad.numpy())
        optimizer.step()
    np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "settings", [{}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "dampening": 0.3}]
)
def test_sgd_reference_equals_torch(settings):
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(50, generator=generator, dtype=torch.float64)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([parameter], lr=0.1, weight_decay=0.01, **settings)
    reference = oracles.SgdReference(lr=0.1, weight_decay=0.01, **settings)
    expected = start.numpy().copy()
    for _ in range(5):
        parameter.grad = torch.randn(50, generator=generator, dtype=torch.float64)
        expected = reference.step(expected, parameter.grad.numpy())
        optimizer.step()
    np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-12, atol=1e-14)


def test_clipped_sum_drops_the_unit_that_is_not_finite():
    gradients = [np.array([3.0, 4.0]), np.array([np.nan, 1.0]), np.array([0.1, 0.0])]
    np.testing.assert_allclose(oracles.clipped_sum(gradients, 1.0), [0.7, 0.8])
