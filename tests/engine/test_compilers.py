"""`torch.compile` around modules: private passes run as written, with the same result, or are refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from synthward import PrivacyEngine
from synthward.engine.errors import ConfigError
from tests.engine.recorded import NETS, assert_same, module_of, pair, take, trainer_of

X, Y = torch.randn(8, 6), torch.randn(8, 2)
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # The compiler says so of what it leaves out, before the error comes.
    pytest.mark.filterwarnings("ignore:Dynamo does not know:UserWarning"),
]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 2))


def private(module: nn.Module, own: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=8)
    module, optimizer, _ = PrivacyEngine().make_private(
        module=module,
        optimizer=torch.optim.SGD(own.parameters(), lr=0.1),
        data_loader=loader,
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    return module, optimizer


def train(module: nn.Module, optimizer: torch.optim.Optimizer, own: nn.Module) -> Tensor:
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(module(X), Y).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in own.parameters()])


@pytest.mark.parametrize("how", ["method", "layer", "wrapper"])
def test_what_was_compiled_before_runs_as_written(how):
    plain, own = network(), network()
    expected = train(*private(plain, plain), plain)
    module = own
    if how == "wrapper":
        module = torch.compile(own)
    else:
        (own if how == "method" else own[0]).compile()
    assert torch.equal(train(*private(module, own), own), expected)


@pytest.mark.parametrize("how", ["method", "wrapper"])
def test_a_compiler_around_a_private_module_is_refused(how):
    own = network()
    before = copy.deepcopy(own.state_dict())
    module, optimizer = private(own, own)
    if how == "wrapper":
        module = torch.compile(module)
    else:
        module.compile()
    with pytest.raises(ConfigError, match=r"torch.compile around a private module"):
        train(module, optimizer, own)
    assert all(torch.equal(before[name], value) for name, value in own.state_dict().items())


def test_a_compiled_layer_is_captured_by_a_trainer():
    plain, twin = pair(NETS["mixed"][0])
    module = module_of(twin)
    module.head = torch.compile(module.head)
    again = trainer_of(copy.deepcopy(module))
    for trainer in (plain, again):
        take(trainer, NETS["mixed"][1](0))
    assert_same(plain, again)
