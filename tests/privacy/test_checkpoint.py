"""Invariant 7, second half: a checkpoint holds no statistic of the records that was not noised."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.oracles import clipped_sum, per_unit_gradients
from tests.privacy.harness import accumulate, make_plan, make_trainer, step
from tests.privacy.nets import CASES, unit_loss

FORBIDDEN_NAMES = ("sum", "grad_sample", "gradient", "norm_sq", "sample_norm", "activation", "batch", "drawn")


def leaves(value, path=""):
    """(path, leaf) of nested dicts, lists and tuples."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}.{index}")
    else:
        yield path, value


def adam_trainer(module, **plan):
    from synthward.engine import KeySchedule, PrivateTrainer

    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    return PrivateTrainer(module, optimizer, make_plan(**plan), keys=KeySchedule.from_os(), ledger=None)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_no_tensor_of_a_checkpoint_is_an_un_noised_sum(case):
    """Compared by value with the oracle's sums, whole and parameter by parameter, and by shape with the
    units."""
    module, units = case.module(), case.units([2] * 23)
    sums = clipped_sum(per_unit_gradients(case.module(), unit_loss, units), 1.0)
    trainer = adam_trainer(module, noise_multiplier=1.0)
    step(trainer, module, [units])
    sizes = [p.numel() for p in module.parameters()]
    wanted = [sums, *np.split(sums, np.cumsum(sizes)[:-1])]
    for path, leaf in leaves(trainer.state_dict()):
        if not isinstance(leaf, torch.Tensor) or leaf.numel() < 3:
            continue
        flat = leaf.detach().double().flatten().numpy()
        assert 23 not in leaf.shape and 46 not in leaf.shape, f"{path} has one entry per unit or row"
        for sum_ in wanted:
            if len(sum_) <= len(flat):
                windows = flat[: len(sum_)]
                assert not np.allclose(windows, sum_, rtol=1e-3, atol=1e-6), path


@pytest.mark.parametrize("case", CASES[:1], ids=lambda c: c.name)
def test_the_names_in_a_checkpoint_are_parameters_moments_and_counters(case):
    module = case.module()
    trainer = adam_trainer(module, noise_multiplier=1.0)
    step(trainer, module, [case.units([1] * 5)])
    for path, _ in leaves(trainer.state_dict()):
        assert not any(name in path.lower() for name in FORBIDDEN_NAMES), path


def test_the_numbers_in_a_checkpoint_do_not_depend_on_the_records():
    """Scalars (counters, settings) of two runs on different records and batch sizes are the same."""
    case, scalars = CASES[0], []
    for count in (5, 11):
        module = case.module()
        trainer = adam_trainer(module, noise_multiplier=1.0)
        step(trainer, module, [case.units([1] * count, seed=count)])
        found = {p: v for p, v in leaves(trainer.state_dict()) if isinstance(v, int | float | str | bool)}
        scalars.append({p: v for p, v in found.items() if "key" not in p})
    assert scalars[0] == scalars[1]


def test_a_checkpoint_in_the_middle_of_a_step_is_refused():
    """Between physical batches the buffer holds an un-noised sum."""
    from synthward.engine.errors import SynthwardError

    case = CASES[0]
    module = case.module()
    trainer = make_trainer(module, noise_multiplier=1.0)
    accumulate(trainer, module, case.units([1] * 4))
    with pytest.raises(SynthwardError):
        trainer.state_dict()
    trainer.apply()
    assert trainer.state_dict()


def test_no_sum_is_left_behind_after_the_step():
    """After the update the next step starts from nothing: a second, silent step releases no old gradient."""
    case = CASES[0]
    module = case.module()
    trainer = make_trainer(module)
    step(trainer, module, [case.units([1] * 4)])
    accumulate(trainer, module, case.units([1] * 4), [False] * 4)
    before = [p.detach().clone() for p in module.parameters()]
    trainer.apply()
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_per_unit_gradients_are_not_left_on_parameters(case):
    """Neither `.grad` nor an attribute of a parameter or module carries what a unit contributed."""
    module = case.module()
    trainer = make_trainer(module, noise_multiplier=1.0)
    step(trainer, module, [case.units([1] * 4)])
    for name, parameter in module.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name
        assert not {k for k in vars(parameter) if "grad" in k or "norm" in k}, name


def test_a_resumed_trainer_continues_where_it_stopped():
    """Parameters, moments and step counter: without noise the resumed run equals the uninterrupted one."""
    case = CASES[0]
    units = case.units([1] * 6)
    whole = case.module()
    trainer = adam_trainer(whole)
    for _ in range(4):
        step(trainer, whole, [units])
    half = case.module()
    first = adam_trainer(half)
    for _ in range(2):
        step(first, half, [units])
    saved = first.state_dict()
    rest = case.module(seed=9)
    second = adam_trainer(rest)
    second.load_state_dict(saved)
    for _ in range(2):
        step(second, rest, [units])
    for a, b in zip(whole.parameters(), rest.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
