"""Recorded passes keep what passes as they are promise: the bound on a unit, units apart, and noise made once."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from synthward.engine.errors import CheckpointError, PrivacyError, UnsupportedOperationError
from synthward.kernels import add_gaussian_noise_
from tests.engine.recorded import NETS, ROUNDS, assert_same, module_of, pair, record, take, trainer_of

KEY = bytes(range(32))


@pytest.mark.parametrize("name", NETS)
def test_no_unit_of_a_replay_adds_more_than_the_bound(name):
    make, batch = NETS[name]
    trainer, _ = pair(make)
    run = record(trainer)
    for round_ in range(ROUNDS):
        mask = torch.zeros(5, dtype=torch.bool)
        mask[round_ % 5] = True
        # Gradients of all sizes: some units are clipped, others are not.
        x = batch(round_) * (1.0 if name in ("mixed", "tied") else 10.0 ** (round_ % 4))
        run(x, unit_mask=mask)
        assert trainer._step.sums.flat.double().norm() <= 0.5
        trainer.apply()


class Gate(nn.Module):
    """Rows mix through a gate that is closed at first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("gate", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden + self.gate * hidden.mean(0, keepdim=True))


def test_a_gate_between_units_that_opens_later_is_noticed():
    torch.manual_seed(0)
    trainer = trainer_of(Gate())
    run, x = record(trainer), torch.randn(5, 4)
    for _ in range(5):
        run(x)
        trainer.apply()
    module_of(trainer).gate.fill_(1.0)
    with pytest.raises(UnsupportedOperationError, match="units mix"):
        for _ in range(3):
            run(x)
            trainer.apply()


def test_noise_is_not_made_in_a_trace():
    trainer = trainer_of(nn.Linear(4, 2))

    def release(flat: Tensor) -> Tensor:
        trainer.apply()
        return flat + 1

    with pytest.raises(PrivacyError, match="each replay would add the same noise again"):
        make_fx(release, tracing_mode="fake", _allow_non_fake_inputs=True)(torch.zeros(3))

    def add(flat: Tensor) -> Tensor:
        add_gaussian_noise_(flat, key=KEY, stream=1, step=0, start=0, noise_std=1.0)
        return flat

    with pytest.raises(NotImplementedError, match="can not be part of a traced step"):
        make_fx(add, tracing_mode="fake")(torch.zeros(3))


def test_noise_is_not_made_in_a_cuda_graph():
    trainer = trainer_of(nn.Linear(4, 2))
    before = [p.detach().clone() for p in module_of(trainer).parameters()]
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.is_current_stream_capturing", return_value=True),
        pytest.raises(PrivacyError, match="each replay would add the same noise again"),
    ):
        trainer.apply()
    assert all(torch.equal(p, q) for p, q in zip(module_of(trainer).parameters(), before, strict=True))


def test_no_noise_is_part_of_a_recording():
    for name, (make, batch) in NETS.items():
        trainer, _ = pair(make)
        run = record(trainer)
        for round_ in range(3):
            run(batch(round_))
        (recorded,) = run._recorded.values()
        targets = {str(node.target) for node in recorded.traced.graph.graph.nodes}
        assert not any(word in target for target in targets for word in ("noise", "noisy", "normal")), name


def test_a_recording_is_of_shapes_alone():
    """Tracing touches no number: neither those of the batch nor the sums."""
    make, batch = NETS["mixed"]
    trainer, _ = pair(make)
    run = record(trainer)
    run(batch(0))
    run(batch(1))
    before = trainer._step.sums.flat.clone()
    entry = next(iter(run._recorded.values()))
    entry.calls += 1
    run._record(entry, (torch.full((5, 3, 5), float("nan")),), torch.ones(5, dtype=torch.bool), 5)
    assert torch.equal(trainer._step.sums.flat, before)


@pytest.mark.parametrize("arithmetic", ["float", "discrete"])
def test_an_interrupted_replay_leaves_nothing_of_its_step(arithmetic):
    """Nor of the physical batches before it: `apply` would release a part of a batch."""
    make, batch = NETS["rows"]
    trainer, _ = pair(make, arithmetic=arithmetic)
    run = record(trainer)
    for round_ in range(5):
        run(batch(round_))
    (entry,) = run._recorded.values()
    graph = entry.run

    def cut_short(*args: Tensor) -> None:
        graph(*args)
        raise KeyboardInterrupt

    entry.run = cut_short
    with pytest.raises(KeyboardInterrupt):
        run(batch(5))
    assert not trainer._step.sums.flat.any() and not trainer._step.has_sum
    if trainer._step.discrete is not None:
        assert trainer._step.discrete._units == trainer._step.discrete._rows == 0


def test_a_step_of_replays_alone_is_under_way():
    """Its sums have no noise yet, so they are in no checkpoint, and another step does not begin with them."""
    make, batch = NETS["rows"]
    trainer, _ = pair(make)
    run = record(trainer)
    for round_ in range(4):
        run(batch(round_))
        trainer.apply()
    run(batch(4))
    with pytest.raises(CheckpointError, match="under way"):
        trainer.state_dict()
    trainer._step.discard()
    assert not trainer._step.sums.flat.any()


def test_replays_count_for_the_grid_as_passes_do():
    make, batch = NETS["many rows"]
    plain, recorded = pair(make, arithmetic="discrete")
    run = record(recorded)
    for round_ in range(6):
        take(plain, batch(round_))
        run(batch(round_))
    assert recorded._step.discrete._units == plain._step.discrete._units > 0
    assert recorded._step.discrete._rows == plain._step.discrete._rows > 0


def test_a_parameter_that_was_moved_after_the_recording_is_noticed():
    make, batch = NETS["rows"]
    trainer, _ = pair(make)
    run = record(trainer)
    for round_ in range(5):
        run(batch(round_))
        trainer.apply()
    weight = module_of(trainer)[0].weight
    weight.data = weight.data.clone()
    with pytest.raises(PrivacyError, match="moved or replaced"):
        run(batch(5))
        trainer.apply()


def test_a_parameter_that_was_frozen_or_replaced_after_the_recording_is_noticed():
    make, batch = NETS["rows"]
    for change, what in (
        (lambda layer: layer.weight.requires_grad_(False), "was frozen"),
        (lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(16, 4))), "became trainable"),
    ):
        trainer, _ = pair(make)
        run = record(trainer)
        for round_ in range(5):
            run(batch(round_))
            trainer.apply()
        change(module_of(trainer)[0])
        with pytest.raises(PrivacyError, match=what):
            run(batch(5))
            trainer.apply()


def test_autocast_belongs_to_the_form():
    make, batch = NETS["rows"]
    plain, recorded = pair(make)
    run = record(recorded)
    for round_ in range(12):
        with torch.autocast("cpu", torch.bfloat16, enabled=round_ % 3 == 2):
            take(plain, batch(round_))
            run(batch(round_))
        assert_same(plain, recorded)
        plain.apply()
        recorded.apply()
    assert len(run._recorded) == 2


def test_a_recording_goes_on_from_a_checkpoint():
    make, batch = NETS["mixed"]
    plain, recorded = pair(make)
    run, kept = record(recorded), {}
    for round_ in range(10):
        if round_ == 2:
            kept = {id(trainer): trainer.state_dict() for trainer in (plain, recorded)}
        if round_ == 6:
            plain.load_state_dict(kept[id(plain)])
            recorded.load_state_dict(kept[id(recorded)])
        take(plain, batch(round_))
        run(batch(round_))
        assert_same(plain, recorded)
        plain.apply()
        recorded.apply()


def test_two_recordings_and_a_pass_as_it_is_add_up_in_one_step():
    make, batch = NETS["rows"]
    plain, recorded = pair(make)
    one, other = record(recorded), record(recorded)
    for round_ in range(6):
        masks = [torch.arange(5) % 2 == part for part in (0, 1)]
        for part, who in ((0, one), (1, other)):
            take(plain, batch(10 * round_ + part), masks[part])
            who(batch(10 * round_ + part), unit_mask=masks[part])
        take(plain, batch(1000 + round_))
        take(recorded, batch(1000 + round_))
        assert_same(plain, recorded)
        plain.apply()
        recorded.apply()
