"""Mixed precision: half-precision operands, sums in fp32, loss scales undone before the clip."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from synthward import PrivacyEngine
from synthward.engine.errors import PrivacyError
from tests.engine.nets import make_trainer, oracle
from tests.oracles import flat_parameters


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 4))


def trained(net, x, dtype, bound, loss_scale=1.0):
    """The released sum of one noiseless step under autocast."""
    trainer, before = make_trainer(net, max_grad_norm=bound), flat_parameters(net)
    with torch.autocast("cpu", dtype=dtype), trainer.capture():
        out = net(x).float().flatten(1)
        losses = torch.sin(out).sum(1) + out.square().mean(1)
    trainer.backward(losses, rows_per_unit=1, loss_scale=loss_scale)
    trainer.apply()
    return before - flat_parameters(net)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("bound", [0.3, 1e3])
def test_autocast_is_near_the_loop(dtype, tolerance, bound):
    x = torch.randn(9, 6)
    expected = oracle(network(), x, [1] * 9, bound)
    found = trained(network(), x, dtype, bound)
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


def test_a_loss_scale_is_undone_before_the_clip():
    x = torch.randn(9, 6)
    plain = trained(network(), x, torch.float16, 0.3)
    scaled = trained(network(), x, torch.float16, 0.3, loss_scale=1024.0)
    assert np.linalg.norm(scaled - plain) <= 3e-3 * np.linalg.norm(plain)


def test_one_unit_in_half_precision_releases_at_most_c():
    for seed in range(6):
        net, x = network(), torch.randn(1, 6, generator=torch.Generator().manual_seed(seed)) * 30
        norm = np.linalg.norm(trained(net, x, torch.bfloat16, 0.05))
        assert norm <= 0.05 * (1 + 1e-6)


def with_scaler(scaler, known: bool):
    net, x = network(), torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=8)
    module, optimizer, _ = PrivacyEngine().make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=1.0),
        data_loader=loader,
        noise_multiplier=0.0,
        max_grad_norm=0.3,
        poisson_sampling=False,
        grad_scaler=scaler if known else None,
    )
    before = flat_parameters(net)
    with torch.autocast("cpu", dtype=torch.float16):
        out = module(x).float().flatten(1)
    loss = (torch.sin(out).sum(1) + out.square().mean(1)).mean()
    if scaler is None:
        loss.backward()
        optimizer.step()
    else:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return before - flat_parameters(net), net, x


def test_grad_scaler():
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    found, _, x = with_scaler(scaler, known=True)
    expected = oracle(network(), x, [1] * 8, 0.3) / 8
    assert np.linalg.norm(found - expected) <= 5e-3 * np.linalg.norm(expected)
    assert scaler.get_scale() == 512.0


def test_a_scale_that_overflows_leaves_units_out_and_stays():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    found, _, _ = with_scaler(scaler, known=True)
    assert np.count_nonzero(found) == 0
    assert scaler.get_scale() == 2.0**40, "a scale that follows overflows would couple units"


def test_a_scaler_that_the_engine_does_not_know_is_refused():
    with pytest.raises(PrivacyError, match="grad_scaler"):
        with_scaler(torch.amp.GradScaler("cpu"), known=False)
