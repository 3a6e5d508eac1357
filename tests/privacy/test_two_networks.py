"""A step of two networks: an engine each, one ledger that is charged for both; a GAN in the user's own loop."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from tests.privacy.test_ledger import DELTA, create

SIGMAS, RATE = (2.0, 3.0), 0.25


def network(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, outputs))


def private(ledger, module, sigma, data, engine=None, **settings):
    from synthward import PrivacyEngine

    engine = engine or PrivacyEngine(ledger=ledger)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=len(data) // 4)
    made = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.01),
        data_loader=loader,
        noise_multiplier=sigma,
        max_grad_norm=1.0,
        sample_rate=RATE,
        **settings,
    )
    return engine, *made


def composed(steps: tuple[int, int]) -> float:
    from synthward.engine.accounting import PoissonGaussianEvent, epsilon_of

    events = [PoissonGaussianEvent(RATE, s, n) for s, n in zip(SIGMAS, steps, strict=True) if n]
    return epsilon_of(events, DELTA)


@pytest.mark.parametrize("shares_engine", [False, True])
def test_one_ledger_is_charged_for_both(tmp_path, shares_engine):
    from synthward.engine import Ledger

    torch.manual_seed(0)
    data = torch.randn(40, 4)
    ledger = create(tmp_path / "ledger.jsonl")
    encoder, decoder = network(4, 3), network(3, 4)
    first = private(ledger, encoder, SIGMAS[0], data)
    second = private(ledger, decoder, SIGMAS[1], data, first[0] if shares_engine else None)
    taken = [0, 0]
    for turn in range(5):
        for index, (engine, module, optimizer, loader) in enumerate((first, second)):
            if index == 1 and turn % 2:
                continue  # the second is trained less often
            for (x,) in loader:
                optimizer.zero_grad()
                module(x if index == 0 else x[:, :3]).square().sum(1).mean().backward()
                optimizer.step()
                taken[index] += 1
                break
            assert engine is first[0] or not shares_engine
    assert taken == [5, 3]
    first[0].close()
    second[0].close()
    ledger.close()
    with Ledger.open(tmp_path / "ledger.jsonl", readonly=True) as found:
        assert found.epsilon() == pytest.approx(composed((5, 3)), rel=1e-9)
        assert {line.get("part", "") for line in found.lines if line["kind"] == "lease"} == {"", "2"}


def test_leases_that_nobody_closed_are_charged_whole(tmp_path):
    from synthward.engine import Ledger
    from synthward.engine.accounting import PoissonGaussianEvent

    ledger = create(tmp_path / "ledger.jsonl")
    parts = [ledger.new_part(), ledger.new_part()]
    for part, sigma in zip(parts, SIGMAS, strict=True):
        ledger.lease(PoissonGaussianEvent(RATE, sigma, 1), 0, 10, part=part)
    event = PoissonGaussianEvent(RATE, SIGMAS[0], 1)
    assert ledger.covers(3, event, part="") and not ledger.covers(3, event, part="2")
    ledger.close_lease(4, part="")
    ledger.close()
    with Ledger.open(tmp_path / "ledger.jsonl") as found:
        assert found.epsilon() == pytest.approx(composed((4, 10)), rel=1e-9)
        assert not found.covers(5, PoissonGaussianEvent(RATE, SIGMAS[1], 1), part="2"), "another process's"


def test_a_target_holds_for_both_together(tmp_path):
    from synthward.engine.accounting import PoissonGaussianEvent
    from synthward.engine.errors import BudgetExceededError

    ledger = create(tmp_path / "ledger.jsonl", target_epsilon=composed((10, 9)) * 1.0001)
    ledger.lease(PoissonGaussianEvent(RATE, SIGMAS[0], 1), 0, 10, part=ledger.new_part())
    with pytest.raises(BudgetExceededError):
        ledger.lease(PoissonGaussianEvent(RATE, SIGMAS[1], 1), 0, 10, part="2")
    ledger.lease(PoissonGaussianEvent(RATE, SIGMAS[1], 1), 0, 9, part="2")


def test_a_gan_in_the_user_s_own_loop(tmp_path):
    """A row is a record beside a fake one; the critic alone sees records, and the generator learns from it as it is
    after its private step: post-processing, which costs nothing."""
    torch.manual_seed(1)
    data = torch.randn(40, 4)
    ledger = create(tmp_path / "ledger.jsonl")
    critic = nn.Sequential(spectral_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 1))
    generator = network(2, 4)
    engine, critic, optimizer, loader = private(ledger, critic, SIGMAS[0], data)
    for (x,) in loader:
        optimizer.zero_grad()
        fake = generator(torch.randn(len(x), 2))
        scores = critic(torch.stack([x, fake.detach()], dim=1))
        (scores[:, 1] - scores[:, 0]).mean().backward()
        optimizer.step()
        after = [p.detach().clone() for p in critic.parameters()]
        critic.requires_grad_(False)
        (-critic(fake)).mean().backward()
        critic.requires_grad_(True)
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in generator.parameters())
        assert all(torch.equal(p, q) for p, q in zip(critic.parameters(), after, strict=True))
        break
    assert engine.get_epsilon(DELTA) == pytest.approx(composed((1, 0)), rel=1e-9)


def test_a_gradient_penalty_is_refused_with_the_alternative(tmp_path):
    from synthward.engine.errors import UnsupportedOperationError

    data = torch.randn(40, 4)
    _, critic, optimizer, loader = private(create(tmp_path / "ledger.jsonl"), network(4, 1), 1.0, data)
    before = [p.detach().clone() for p in critic.parameters()]
    for (x,) in loader:
        x.requires_grad_()
        out = critic(x)
        with pytest.raises(UnsupportedOperationError, match="spectral_norm"):
            grads = torch.autograd.grad(out.sum(), x, create_graph=True)[0]
            (out.mean() + (grads.norm(dim=1) - 1).square().mean()).backward()
        break
    optimizer.zero_grad()
    for parameter, value in zip(critic.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
