"""`PrivacyEngine` in the user's own loop: what it accepts, and what it refuses because the accounting would
be
wrong."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from synthward import PrivacyEngine
from synthward.engine.errors import CheckpointError, ConfigError, PrivacyError
from tests.oracles import clipped_sum, flat_parameters, per_unit_gradients

LOSS = nn.CrossEntropyLoss()


def data(rows: int = 48, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(rows, 5, generator=generator), torch.randint(0, 3, (rows,), generator=generator)
    )


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3))


def private(engine=None, module=None, rows: int = 48, batch: int = 8, optimizer=None, **changes):
    """(engine, module, optimizer, loader) with SGD at rate 1 and no noise unless changed."""
    module = module or network()
    engine = engine or PrivacyEngine()
    optimizer = optimizer or torch.optim.SGD(module.parameters(), lr=1.0)
    settings = {"noise_multiplier": 0.0, "max_grad_norm": 1.0} | changes
    loader = DataLoader(data(rows), batch_size=batch)
    made = engine.make_private(module=module, optimizer=optimizer, data_loader=loader, **settings)
    return (engine, *made)


def drawn(loader, least: int = 2):
    """The next batch of at least `least` rows."""
    while True:
        for batch in loader:
            if len(batch[1]) >= least:
                return batch


def row_gradients(x, y):
    units = [(a.unsqueeze(0), b.unsqueeze(0)) for a, b in zip(x, y, strict=True)]
    return per_unit_gradients(network(), lambda net, unit: LOSS(net(unit[0]), unit[1]), units)


def test_the_loop_of_the_design():
    _, module, optimizer, loader = private()
    for x, y in loader:
        before = flat_parameters(module)
        reference = copy.deepcopy(nn.Sequential(*module))
        optimizer.zero_grad()
        LOSS(module(x), y).backward()
        optimizer.step()
        units = [(a.unsqueeze(0), b.unsqueeze(0)) for a, b in zip(x, y, strict=True)]
        gradients = per_unit_gradients(reference, lambda net, unit: LOSS(net(unit[0]), unit[1]), units)
        expected = clipped_sum(gradients, 1.0) / 8 if gradients else np.zeros_like(before)
        np.testing.assert_allclose(before - flat_parameters(module), expected, atol=3e-6)


def test_the_module_is_the_same_object_and_a_copy_is_free():
    _, module, optimizer, loader = private()
    twin = copy.deepcopy(module)
    x, y = drawn(loader)
    LOSS(twin(x), y).backward()
    assert all(p.grad is not None for p in twin.parameters())
    assert all(p.grad is None for p in module.parameters())
    optimizer.step()
    module.eval()
    with torch.no_grad():
        module(x)


def test_one_step_a_draw():
    """Two steps on one draw, or a batch from elsewhere: the sampling that is accounted did not happen."""
    _, module, optimizer, loader = private(noise_multiplier=1.0)
    x, y = drawn(loader)
    LOSS(module(x), y).backward()
    optimizer.step()
    with pytest.raises(PrivacyError, match="fresh batch"):
        LOSS(module(x), y).backward()
    fresh = private()
    with pytest.raises(PrivacyError, match="fresh batch"):
        LOSS(fresh[1](x), y).backward()


def test_two_draws_in_one_step_are_refused():
    _, module, _, loader = private(batch=24)
    batches = iter(loader)
    x, y = next(batches)
    LOSS(module(x), y).backward()
    x, y = next(batches)
    with pytest.raises(PrivacyError, match="two draws"):
        LOSS(module(x), y).backward()


def test_a_draw_in_parts_is_one_step():
    _, module, optimizer, loader = private(batch=24, loss_reduction="sum")
    before = flat_parameters(module)
    x, y = drawn(loader, 6)
    for part in (slice(0, 2), slice(2, None)):
        nn.CrossEntropyLoss(reduction="sum")(module(x[part]), y[part]).backward()
    optimizer.step()
    expected = clipped_sum(row_gradients(x, y), 1.0) / 24
    np.testing.assert_allclose(before - flat_parameters(module), expected, atol=3e-6)


def test_a_row_is_used_once_in_a_step():
    _, module, _, loader = private(batch=24)
    x, y = drawn(loader, 6)
    LOSS(module(x), y).backward()
    with pytest.raises(PrivacyError, match="more rows"):
        LOSS(module(x[:2]), y[:2]).backward()


def test_one_forward_is_for_one_backward():
    _, module, _, _ = private(poisson_sampling=False)
    x, y = data().tensors
    loss = LOSS(module(x[:8]), y[:8])
    loss.backward(retain_graph=True)
    with pytest.raises(PrivacyError, match="second backward"):
        loss.backward()


def test_two_forwards_in_one_backward_need_units():
    """Whether row i of both is one person is not for the engine to guess."""
    engine, module, optimizer, _ = private(poisson_sampling=False)
    x, y = data().tensors
    with pytest.raises(PrivacyError, match="several forward"):
        (LOSS(module(x[:4]), y[:4]) + LOSS(module(x[4:8]), y[4:8])).backward()
    optimizer.zero_grad()
    before = flat_parameters(module)
    with engine.units(torch.arange(4)):
        (LOSS(module(x[:4]), y[:4]) + LOSS(module(x[4:8]), y[4:8])).backward()
    optimizer.step()
    assert 0 < np.linalg.norm(before - flat_parameters(module)) <= 4 / 8 + 1e-6


def test_zero_grad_drops_what_was_accumulated():
    _, module, optimizer, _ = private(poisson_sampling=False)
    before = flat_parameters(module)
    x, y = data().tensors
    LOSS(module(x[:8]), y[:8]).backward()
    optimizer.zero_grad()
    optimizer.step()
    assert np.array_equal(before, flat_parameters(module))


def test_a_closure_and_a_scheduler():
    _, module, optimizer, _ = private(poisson_sampling=False)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    x, y = data().tensors
    updates = []
    for _ in range(2):
        with torch.no_grad():
            for p, value in zip(module.parameters(), network().parameters(), strict=True):
                p.copy_(value)
        start = flat_parameters(module)

        def closure():
            optimizer.zero_grad()
            loss = LOSS(module(x[:8]), y[:8])
            loss.backward()
            return loss

        assert optimizer.step(closure).item() > 0
        updates.append(start - flat_parameters(module))
        schedule.step()
    np.testing.assert_allclose(updates[1], updates[0] / 2, atol=3e-7)


def test_optimizer_state_goes_to_plain_torch_and_back():
    """The private optimizer's state is Adam's own: plain Adam loads it, and it loads plain Adam's."""
    module = network()
    _, _, optimizer, _ = private(
        module=module, optimizer=torch.optim.Adam(module.parameters()), poisson_sampling=False
    )
    x, y = data().tensors
    LOSS(module(x[:8]), y[:8]).backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    plain = torch.optim.Adam(network().parameters())
    plain.load_state_dict(state)
    assert float(plain.state_dict()["state"][0]["step"]) == 1.0
    optimizer.load_state_dict(state)
    torch.testing.assert_close(optimizer.state_dict()["state"], state["state"])
    assert isinstance(optimizer, torch.optim.Optimizer)
    with pytest.raises(PrivacyError):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


# units of several rows

IDS = torch.arange(48) // 3 * 7


def unit_loop(with_ids):
    """A data set whose batches tell their ids, drawn by unit."""
    engine, module = PrivacyEngine(), network()
    x, y = data().tensors
    loader = DataLoader(TensorDataset(x, y, IDS), batch_size=4)
    made = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
        data_loader=loader,
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        unit_ids=IDS,
    )
    before = flat_parameters(module)
    x, y, ids = drawn(made[2], 6)
    with engine.units(ids if with_ids else None):
        LOSS(module(x), y).backward()
    made[1].step()
    return before - flat_parameters(module), x, y, ids


@pytest.mark.parametrize("with_ids", [True, False], ids=["ids", "the loader's own"])
def test_whole_patients_are_drawn_and_clipped(with_ids):
    update, x, y, ids = unit_loop(with_ids)
    counts = torch.unique(ids, return_counts=True)[1]
    assert (counts == 3).all(), "a drawn patient comes with all rows"
    units = [(x[ids == i], y[ids == i]) for i in torch.unique(ids)]
    gradients = per_unit_gradients(
        network(), lambda net, unit: nn.CrossEntropyLoss(reduction="sum")(net(unit[0]), unit[1]), units
    )
    np.testing.assert_allclose(update, clipped_sum(gradients, 1.0) / 4, atol=3e-6)


def test_patients_need_a_loader_that_draws_patients():
    engine, module, _, loader = private()
    x, y = drawn(loader)
    with pytest.raises(PrivacyError, match="unit_ids"), engine.units(torch.zeros(len(x), dtype=torch.int64)):
        LOSS(module(x), y).backward()


def test_a_loader_that_draws_patients_needs_their_ids():
    engine, module, _, loader = private(unit_ids=IDS)
    x, y = drawn(loader)
    with pytest.raises(PrivacyError, match="units"):
        LOSS(module(x), y).backward()
    x, y = drawn(loader, 3)
    with pytest.raises(PrivacyError, match="not those"), engine.units(torch.arange(len(x))):
        LOSS(module(x), y).backward()


def test_a_patient_is_in_one_physical_batch_of_a_step():
    engine, module, _, _ = private(poisson_sampling=False)
    x, y = data().tensors
    with engine.units(torch.tensor([1, 1, 2])):
        LOSS(module(x[:3]), y[:3]).backward()
    with pytest.raises(PrivacyError, match="two physical"), engine.units(torch.tensor([3, 2])):
        LOSS(module(x[3:5]), y[3:5]).backward()


@pytest.mark.parametrize("ids_first", [True, False])
def test_ids_in_some_batches_of_a_step_alone_are_refused(ids_first):
    """A row without one may be of a unit that has its id in the other batch."""
    engine, module, optimizer, _ = private(poisson_sampling=False)
    x, y = data().tensors
    before = [p.detach().clone() for p in module.parameters()]
    for has_ids in (ids_first, not ids_first):
        with engine.units(torch.tensor([1, 1, 2])) if has_ids else nullcontext():
            LOSS(module(x[:3]), y[:3]).backward()
    with pytest.raises(PrivacyError, match="others have none"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_ids_of_another_length_are_refused():
    engine, module, _, _ = private(poisson_sampling=False)
    with pytest.raises(ConfigError, match="3 ids"), engine.units(torch.arange(3)):
        module(torch.randn(4, 5))


# checkpoints and settings


def test_a_checkpoint_carries_parameters_moments_and_budget(tmp_path):
    def adam(module):
        return torch.optim.Adam(module.parameters(), lr=0.1)

    module = network()
    engine, _, optimizer, loader = private(module=module, optimizer=adam(module), noise_multiplier=1.0)
    for _ in loader:
        optimizer.step()
    engine.save_checkpoint(tmp_path / "c.safetensors")
    spent = engine.get_epsilon(1e-5)
    other = network()
    resumed, _, optimizer_again, _ = private(module=other, optimizer=adam(other), noise_multiplier=1.0)
    resumed.load_checkpoint(tmp_path / "c.safetensors")
    assert resumed.get_epsilon(1e-5) == spent > 0
    assert np.array_equal(flat_parameters(module), flat_parameters(other))
    optimizer.step()
    optimizer_again.step()
    assert resumed.get_epsilon(1e-5) > spent
    assert np.abs(flat_parameters(module) - flat_parameters(other)).max() > 1e-3, "keys are fresh ones"


def test_a_damaged_checkpoint_is_one_clear_line(tmp_path):
    engine = private()[0]
    path = tmp_path / "c.safetensors"
    with pytest.raises(CheckpointError):
        engine.load_checkpoint(path)
    engine.save_checkpoint(path)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(CheckpointError, match="damaged"):
        engine.load_checkpoint(path)


def test_no_checkpoint_in_the_middle_of_a_step(tmp_path):
    engine, module, _, _ = private(poisson_sampling=False)
    x, y = data().tensors
    LOSS(module(x[:8]), y[:8]).backward()
    with pytest.raises(CheckpointError):
        engine.save_checkpoint(tmp_path / "c.safetensors")
    assert not list(tmp_path.iterdir())


def test_steps_are_in_the_ledger_before_they_are_released(tmp_path):
    from synthward.engine import Ledger

    ledger = Ledger.create(tmp_path / "l.jsonl", run_id="r", unit="row", delta=1e-5, key_id="0", private=True)
    engine = PrivacyEngine(ledger=ledger)
    _, _, optimizer, loader = private(engine, noise_multiplier=1.0)
    assert ledger.epsilon() == 0.0
    taken = 0
    for _ in range(2):
        for _ in loader:
            optimizer.step()
            taken += 1
            assert sum(event.steps for event in ledger.events()) >= taken
    engine.close()
    assert ledger.epsilon() == engine.get_epsilon(1e-5)
    assert sum(event.steps for event in ledger.events()) == taken
    alone = ledger.epsilon()
    _, _, second, _ = private(engine, noise_multiplier=1.0)
    second.step()
    engine.close()
    assert ledger.epsilon() == engine.get_epsilon(1e-5) > alone


def test_two_modules_of_one_engine_add_up():
    engine = PrivacyEngine()
    _, _, first, _ = private(engine, noise_multiplier=1.0)
    _, _, second, _ = private(engine, noise_multiplier=2.0)
    first.step()
    alone = engine.get_epsilon(1e-5)
    second.step()
    assert engine.get_epsilon(1e-5) > alone > 0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"loss_reduction": "none"}, "loss_reduction"),
        ({"clipping": "per-row"}, "clipping"),
        ({"sample_rate": 2.0}, "sample_rate"),
        ({"sample_rate": 0.1, "poisson_sampling": False}, "sample_rate"),
        ({"expected_batch_size": 0}, "expected_batch_size"),
        ({"unit_ids": torch.arange(5)}, "unit_ids"),
    ],
)
def test_settings_that_do_not_fit(changes, match):
    with pytest.raises(ConfigError, match=match):
        private(**changes)


def test_a_module_is_made_private_once():
    module = network()
    private(module=module)
    with pytest.raises(ConfigError, match="already"):
        private(module=module)


def test_a_rate_that_is_not_given_is_said_aloud(caplog):
    private()
    assert "public" in caplog.text
    caplog.clear()
    private(sample_rate=0.1)
    assert caplog.text == ""
