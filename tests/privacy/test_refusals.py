"""What would void the guarantee is refused, each in one clear line."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from synthward import PrivacyEngine
from synthward.engine import Ledger, PrivateTrainer
from synthward.engine.accounting import Accountant, PoissonGaussianEvent
from synthward.engine.errors import ConfigError, PrivacyError, SynthwardError, UnsupportedOperationError
from tests.commandline import run
from tests.privacy.harness import make_trainer, step
from tests.privacy.nets import CASES


def private(module=None, **changes):
    module = nn.Linear(4, 2) if module is None else module
    loader = DataLoader(TensorDataset(torch.randn(40, 4), torch.zeros(40, dtype=torch.int64)), batch_size=8)
    settings = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "sample_rate": 0.2}
    engine = changes.pop("engine", None) or PrivacyEngine()
    return engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=loader,
        **(settings | changes),
    )


def one_line(caught) -> str:
    text = str(caught.value)
    assert text and "\n" not in text
    return text


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, float("nan"), None])
def test_no_epsilon_without_a_delta(delta):
    accountant = Accountant()
    accountant.compose(PoissonGaussianEvent(0.1, 1.0, 10))
    with pytest.raises(TypeError):
        accountant.epsilon()
    with pytest.raises(TypeError):
        PrivacyEngine().get_epsilon()
    with pytest.raises((ConfigError, TypeError)) as caught:
        accountant.epsilon(delta)
    assert "delta" in one_line(caught)


def test_the_command_line_gives_no_epsilon_without_a_delta():
    outcome = run("account", "--noise-multiplier", 1.0, "--sample-rate", 0.1, "--steps", 10)
    assert outcome.code == 2 and "delta" in outcome.stderr and not outcome.stdout


def test_a_seed_is_refused_where_secret_keys_were_promised(tmp_path):
    with Ledger.create(
        tmp_path / "ledger.jsonl", run_id="r", unit="row", delta=1e-5, key_id="0" * 32, private=True
    ) as ledger:
        with pytest.raises(ConfigError) as caught:
            PrivacyEngine(ledger=ledger, seed=1)
        assert "seed" in one_line(caught)


def test_batch_norm_is_refused_by_name():
    with pytest.raises(UnsupportedOperationError) as caught:
        private(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    assert "BatchNorm1d" in one_line(caught)


@pytest.mark.parametrize(
    "claim",
    [{"sample_rate": 0.2}, {"sample_rate": None, "period": 2}, {"max_batch_size": 9, "max_units": 50}],
)
def test_a_loader_that_does_not_sample_claims_no_amplification(claim):
    with pytest.raises(ConfigError) as caught:
        private(poisson_sampling=False, **claim)
    one_line(caught)


def test_rows_of_units_need_their_ids():
    """A loader that draws patients hands out rows of them: without ids each row would be clipped apart."""
    module, optimizer, loader = private(unit_ids=torch.arange(40) // 4)
    for x, y in loader:
        if len(x):
            with pytest.raises(PrivacyError) as caught:
                nn.functional.cross_entropy(module(x), y).backward()
            assert "units" in one_line(caught)
            break
    optimizer.zero_grad()


def test_nothing_of_one_example_is_kept_or_logged(caplog):
    """No norm, loss, factor or gradient of a unit can be had from the engine, nor stands in a log."""
    case = CASES[0]
    module = case.module()
    trainer = make_trainer(module, noise_multiplier=1.0)
    with caplog.at_level(logging.DEBUG):
        step(trainer, module, [case.units([1, 2, 3])])
    assert not caplog.records
    public = [name for name in dir(PrivateTrainer) + dir(PrivacyEngine) if not name.startswith("_")]
    telling = ("norm", "loss", "factor", "grad_sample", "per_sample", "per_unit")
    assert not [name for name in public if any(word in name for word in telling)]
    for parameter in module.parameters():
        assert parameter.grad is None
        assert set(vars(parameter)) <= {"_backward_hooks", "_post_accumulate_grad_hooks"}, vars(parameter)


def test_every_refusal_is_of_one_family():
    """What a user can mend is one family of errors, which the command line prints as one line."""
    for kind in (ConfigError, PrivacyError, UnsupportedOperationError):
        assert issubclass(kind, SynthwardError)
