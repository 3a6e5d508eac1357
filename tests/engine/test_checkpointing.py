"""Activation checkpointing: the same sums as without, or a refusal that says what to use."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)
from torch.utils.data import DataLoader, TensorDataset

from synthward import PrivacyEngine
from synthward.engine import PerfSpec
from synthward.engine.errors import PrivacyError
from tests.engine.measure import clipped_by_group, distance, read_pass, unit_gradients
from tests.engine.nets import make_trainer, row_losses, unit_losses
from tests.oracles import flat_parameters

TIMES, WIDTH = 4, 6
COUNTS = [2, 0, 3, 1]


def plainly(function, *args):
    return function(*args)


def recomputed(function, *args):
    return checkpoint(function, *args, use_reentrant=False)


def re_entrant(function, *args):
    return checkpoint(function, *args, use_reentrant=True)


class Block(nn.Module):
    """Convolution over features, linear layers over times, norms, a residual sum and dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.group = nn.LayerNorm(WIDTH), nn.GroupNorm(2, TIMES)
        self.conv = nn.Conv1d(TIMES, TIMES, 3, padding=1)
        self.up, self.down = nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH, bias=False)
        self.scale, self.dropout = nn.Parameter(torch.rand(WIDTH) + 0.5), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(self.dropout(F.gelu(self.up(self.norm(x)))))
        return x + self.scale * torch.tanh(self.conv(self.group(h)))


class Net(nn.Module):
    """Blocks, each run by `run`; the second one twice, so that its weights have several uses."""

    def __init__(self, run=plainly, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.first, self.second = Block(dropout), Block(dropout)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        h = self.run(self.first, self.stem(x))
        h = self.run(self.second, h)
        return self.head(self.run(self.second, h))


def build(run, **options) -> Net:
    torch.manual_seed(0)
    return Net(run, **options)


def records(rows: int = sum(COUNTS)) -> Tensor:
    return torch.randn(rows, TIMES, WIDTH, generator=torch.Generator().manual_seed(1))


def nested(function, *args):
    def inner(*values):
        return torch.sin(recomputed(function, *values))

    return recomputed(inner, *args)


def nested_plainly(function, *args):
    return torch.sin(function(*args))


def saving_products(function, *args):
    """Products are kept, the rest is computed again."""
    kept = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    return checkpoint(
        function,
        *args,
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(kept),
    )


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("clipping", ["flat", "per-layer"])
@pytest.mark.parametrize("bound", [0.1, 1e4])
def test_the_same_bits_as_without(bound, clipping, early_stop):
    with set_checkpoint_early_stop(early_stop):
        found, expected = (
            read_pass(build(run), records(), COUNTS, bound, clipping=clipping)
            for run in (recomputed, plainly)
        )
    for name in ("sums", "sq_norms", "factors", "upper"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
    assert np.count_nonzero(found.sums) > 0.9 * len(found.sums)


@pytest.mark.parametrize("counts", [[1] * 4, COUNTS, [6]], ids=str)
@pytest.mark.parametrize("bound", [0.1, 1e4])
def test_the_sum_is_that_of_the_loop(bound, counts):
    net, x = build(recomputed), records(sum(counts))
    gradients = unit_gradients(net, x, counts)
    found = read_pass(net, x, counts, bound)
    expected = clipped_by_group(gradients, found.group_of, found.bounds).sum(0)
    assert distance(found.sums, expected) <= (1e-5 if bound == 1e4 else 1e-4)


@pytest.mark.parametrize("name", ["nested", "sequential", "recompute", "bf16", "autocast"])
def test_other_ways_to_the_same_sum(name):
    x, options = records(), {}
    run, plain = (nested, nested_plainly) if name == "nested" else (recomputed, plainly)
    if name == "sequential":
        run, plain = (
            (lambda block, h: checkpoint_sequential([block, torch.sin, block], 2, h, use_reentrant=False)),
            (lambda block, h: block(torch.sin(block(h)))),
        )
    if name in ("recompute", "bf16"):
        options["perf"] = PerfSpec(keep=name)
    if name == "autocast":
        options["autocast"] = torch.bfloat16
    found, expected = (read_pass(build(r), x, COUNTS, 0.1, **options) for r in (run, plain))
    assert distance(found.sums, expected.sums) <= 1e-6
    np.testing.assert_allclose(found.factors, expected.factors, rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 4])
def test_selective_checkpoints_are_exact_or_an_error(rows):
    """torch lets a region of theirs go backward once, and the probe for units that mix may come first."""
    x = records(rows)
    try:
        found = read_pass(build(saving_products), x, [1] * rows, 0.1)
    except RuntimeError as error:
        assert "selective activation checkpoint" in str(error)
        return
    assert np.array_equal(found.sums, read_pass(build(plainly), x, [1] * rows, 0.1).sums)


def test_dropout_is_the_one_of_the_forward_pass():
    """The random state is kept, so that what is computed again is what the loss has seen."""

    def losses(net, x, counts):
        torch.manual_seed(3)
        return unit_losses(net, x, counts)

    found, expected = (
        read_pass(build(run, dropout=0.4), records(), COUNTS, 0.1, losses_of=losses)
        for run in (recomputed, plainly)
    )
    assert np.array_equal(found.sums, expected.sums)
    assert distance(found.sums, read_pass(build(plainly), records(), COUNTS, 0.1).sums) > 1e-2


def test_whole_networks():
    """The loss's own forward pass, head and all, is computed again."""
    net, x = build(plainly), records()
    found = read_pass(
        net, x, COUNTS, 0.1, losses_of=lambda n, rows, counts: recomputed(unit_losses, n, rows, counts)
    )
    assert np.array_equal(found.sums, read_pass(net, x, COUNTS, 0.1).sums)


def test_two_physical_batches_in_one_step():
    """Nothing of the first one's recomputation is taken for the second's."""
    sums = []
    for run in (recomputed, plainly):
        net, x = build(run), records()
        trainer, before = make_trainer(net, max_grad_norm=0.1), flat_parameters(net)
        for part, counts in ((x[:2], [2]), (x[2:], [3, 1])):
            with trainer.capture():
                losses = unit_losses(net, part, counts)
            trainer.backward(losses, offsets=torch.tensor([0, *counts]).cumsum(0))
        trainer.apply()
        sums.append(before - flat_parameters(net))
    assert np.array_equal(*sums)


def in_a_users_loop(net: nn.Module, x: Tensor) -> np.ndarray:
    """The update of one step with make_private, SGD at rate 1."""
    before = flat_parameters(net)
    module, optimizer, _ = PrivacyEngine().make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=1.0),
        data_loader=DataLoader(TensorDataset(x), batch_size=len(x)),
        noise_multiplier=0.0,
        max_grad_norm=0.1,
        poisson_sampling=False,
    )
    optimizer.zero_grad()
    row_losses(module, x).mean().backward()
    optimizer.step()
    return before - flat_parameters(net)


def test_make_private():
    found, expected = (in_a_users_loop(build(run), records()) for run in (recomputed, plainly))
    assert np.array_equal(found, expected)
    net, x = build(recomputed), records()
    gradients = unit_gradients(net, x, [1] * len(x))
    clipped = clipped_by_group(gradients, np.zeros(gradients.shape[1], dtype=int), [0.1]).sum(0) / len(x)
    assert distance(found, clipped) <= 1e-4


def a_trainer(net: nn.Module, x: Tensor) -> np.ndarray:
    """The update of one step with PrivateTrainer, a unit a row."""
    trainer, before = (
        make_trainer(net, max_grad_norm=0.1, expected_batch_size=float(len(x))),
        flat_parameters(net),
    )
    with trainer.capture():
        losses = row_losses(net, x)
    trainer.backward(losses, rows_per_unit=1)
    trainer.apply()
    return before - flat_parameters(net)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("step", [a_trainer, in_a_users_loop])
def test_re_entrant_checkpoints_are_refused_and_move_nothing(step, rows):
    """Their blocks run unseen, so parameters would get gradients past the engine. With one unit no probe runs before
    the backward pass; the refusal must not rest on it."""
    net, x = build(re_entrant), records(rows)
    before = copy.deepcopy(net.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((PrivacyError, RuntimeError), match=r"use_reentrant|first\.|second\."):
            step(net, x)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("step", [a_trainer, in_a_users_loop])
def test_a_re_entrant_checkpoint_of_frozen_blocks_is_exact_or_refused(step):
    """No parameter in it is trained, so nothing can go past the engine."""
    updates = []
    for run in (re_entrant, plainly):
        net = build(run)
        net.first.requires_grad_(False)
        net.second.requires_grad_(False)
        trained = Frozen(net)
        try:
            updates.append(step(trained, records(4)))
        except (PrivacyError, RuntimeError) as error:
            assert run is re_entrant and "use_reentrant" in str(error)
            return
    assert np.array_equal(*updates)


class Frozen(nn.Module):
    """The network with its trainable parameters only, as the helpers build their optimizer of all."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.stem, self.head = net.stem, net.head
        self.blocks = [net.first, net.second]
        self.run = net.run

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = self.run(block, h)
        return self.head(h)
