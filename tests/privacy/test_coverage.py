"""Invariant 2: every trainable parameter is covered by capture, or the run stops and names it."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.oracles import clipped_sum, flat_parameters, per_unit_gradients
from tests.privacy.harness import dummy_loader, engine_step, make_private, make_trainer, step
from tests.privacy.nets import CASES, Case, stack, unit_loss


class WithBareParameter(nn.Module):
    """An MLP whose hidden layer meets `self.odd` in a way that is not a captured call."""

    def __init__(self, use, shape=(5,)) -> None:
        super().__init__()
        self.use = use
        self.first = nn.Linear(5, 5)
        self.odd = nn.Parameter(torch.full(shape, 0.5))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.use(F.silu(self.first(x)), self.odd))


ODD_USES = {
    "matmul": (lambda h, w: h @ w, (5, 5)),
    "einsum": (lambda h, w: torch.einsum("ni,ij->nj", h, w), (5, 5)),
    "prelu": (lambda h, w: F.prelu(h - 0.3, w), (5,)),
    "cdist": (lambda h, w: torch.cdist(h, w), (5, 5)),
    "atan2": (lambda h, w: torch.atan2(h, w), (5,)),
    "solve": (lambda h, w: torch.linalg.solve(w + torch.eye(5), h.mT).mT, (5, 5)),
    "power": (lambda h, w: torch.sigmoid(h) ** w, (5,)),
    "where": (lambda h, w: torch.where(h > 0, h * 1.0, w.expand_as(h)), (5,)),
    "sum_of_weights": (lambda h, w: h + w.sum(), (5,)),
    "multiply": (lambda h, w: h * w, (5,)),
    "add": (lambda h, w: h + w, (5,)),
    "in_place_add": (lambda h, w: h.clone().add_(w), (5,)),
    "derived_weight": (lambda h, w: F.linear(h, w * 2.0), (5, 5)),
    "transposed_weight": (lambda h, w: F.linear(h, w.t()), (5, 5)),
    "view_of_weight": (lambda h, w: F.linear(h, w.view(5, 5)), (25,)),
    "norm_scale": (lambda h, w: F.layer_norm(h, (5,), weight=w * 1.0), (5,)),
    "concatenated": (lambda h, w: torch.cat([h[:, :2], w[:3].expand(len(h), 3)], dim=1), (5,)),
}


@pytest.mark.parametrize("name", ODD_USES)
def test_an_odd_use_of_a_parameter_is_refused_by_name_or_exact(name):
    """Either the operation is supported (then it agrees with the loop) or the error names the parameter."""
    from synthward.engine.errors import UnsupportedOperationError

    use, shape = ODD_USES[name]
    case = Case(name, lambda: WithBareParameter(use, shape), CASES[0].make_inputs)
    module, units = case.module(), case.units([1] * 5)
    before = flat_parameters(module)
    try:
        actual = step(make_trainer(module, max_grad_norm=0.05), module, [units])
    except UnsupportedOperationError as error:
        assert "odd" in str(error)
        assert np.array_equal(before, flat_parameters(module)), "a refused step must not move parameters"
        return
    expected = clipped_sum(per_unit_gradients(case.module(), unit_loss, units), 0.05)
    np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["cdist", "solve"])
def test_the_refusal_names_parameter_and_operation(name):
    """What certainly has no rule; the message is for the user of a big network."""
    from synthward.engine.errors import UnsupportedOperationError

    use, shape = ODD_USES[name]
    case = Case(name, lambda: WithBareParameter(use, shape), CASES[0].make_inputs)
    units = case.units([1] * 5)
    inputs, targets, _ = stack(units)
    with pytest.raises(UnsupportedOperationError, match=rf"(?s)(odd.*{name}|{name}.*odd)"):
        engine_step(make_private(case.module(), units, 5), inputs, targets)


def test_a_convolution_is_refused_or_exact():
    from synthward.engine.errors import UnsupportedOperationError

    def build():
        return nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))

    case = Case("conv", build, lambda rows, g: torch.randn(rows, 6, generator=g))
    module, units = case.module(), case.units([1] * 4)
    try:
        actual = step(make_trainer(module), module, [units])
    except UnsupportedOperationError as error:
        assert "1.weight" in str(error) and "conv1d" in str(error)
        return
    expected = clipped_sum(per_unit_gradients(case.module(), unit_loss, units), 1.0)
    np.testing.assert_allclose(actual, expected, atol=1e-4)


class Tied(nn.Module):
    """An embedding whose table is also the weight of the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.mix = nn.Linear(8, 4)

    def forward(self, ids):
        return F.linear(F.silu(self.mix(self.table(ids).flatten(1))), self.table.weight)


def test_a_tied_weight_is_refused_or_exact():
    """The cross term of embedding and linear is where other engines are wrong."""
    from synthward.engine.errors import UnsupportedOperationError

    embedding = next(c for c in CASES if c.name == "embedding")
    case = Case("tied", Tied, embedding.make_inputs)
    module, units = case.module(), case.units([2] * 5)
    try:
        actual = step(make_trainer(module, max_grad_norm=0.1), module, [units])
    except UnsupportedOperationError as error:
        assert "table.weight" in str(error)
        return
    expected = clipped_sum(per_unit_gradients(case.module(), unit_loss, units), 0.1)
    np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize("options", [{"padding_idx": 2}, {"max_norm": 0.5}, {"scale_grad_by_freq": True}])
def test_embedding_options_are_refused_or_exact(options):
    """Frequency scaling couples units through the batch; renormalisation changes a table outside the
    release."""
    from synthward.engine.errors import SynthwardError

    def build():
        return nn.Sequential(nn.Embedding(7, 4, **options), nn.Flatten(), nn.Linear(8, 3))

    embedding = next(c for c in CASES if c.name == "embedding")
    case = Case("embedding_options", build, embedding.make_inputs)
    module, units = case.module(), case.units([2] * 5)
    try:
        actual = step(make_trainer(module, max_grad_norm=0.1), module, [units])
    except SynthwardError as error:
        assert "0.weight" in str(error) or next(iter(options)) in str(error)
        return
    assert "padding_idx" in options, f"{options} must be refused"
    expected = clipped_sum(per_unit_gradients(case.module(), unit_loss, units), 0.1)
    np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(5), nn.SyncBatchNorm(5), nn.InstanceNorm1d(5, track_running_stats=True)], ids=str
)
def test_layers_that_mix_units_are_refused_with_the_replacement(norm):
    from synthward.engine.errors import PrivacyError

    module = nn.Sequential(nn.Linear(5, 5), nn.Sequential(norm), nn.Linear(5, 3))
    case = CASES[0]
    units = case.units([1] * 4)
    inputs, targets, _ = stack(units)
    with pytest.raises(PrivacyError) as caught:
        engine_step(make_private(module, units, 4), inputs, targets)
    assert type(norm).__name__ in str(caught.value)
    if not isinstance(norm, nn.InstanceNorm1d):
        assert "GroupNorm" in str(caught.value)


def test_functional_batch_norm_is_refused_as_well():
    from synthward.engine.errors import PrivacyError

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(5, 3)

        def forward(self, x):
            return F.batch_norm(self.first(x), None, None, training=True)

    module, units = Hidden(), CASES[0].units([1] * 4)
    with pytest.raises(PrivacyError, match=r"(?i)batch_?norm"):
        step(make_trainer(module), module, [units])


def test_a_frozen_parameter_stays_as_it_is():
    case = CASES[0]
    module = case.module()
    module[0].weight.requires_grad_(False)
    frozen = module[0].weight.detach().clone()
    units = case.units([1] * 4)
    actual = step(make_trainer(module, noise_multiplier=1.0), module, [units])
    assert torch.equal(module[0].weight, frozen)
    assert len(actual) == sum(p.numel() for p in module.parameters()) - frozen.numel()
    assert np.count_nonzero(actual) > 0.99 * len(actual)


def test_a_parameter_that_no_record_reaches_gets_noise_or_is_refused():
    """Whether a parameter is used may depend on the records: without noise its silence would be a release."""
    from synthward.engine.errors import PrivacyError

    module = nn.ModuleDict({"used": nn.Linear(5, 3), "idle": nn.Linear(200, 200)})
    trainer_module = Branch(module)
    units = CASES[0].units([1] * 4)
    try:
        step(make_trainer(trainer_module, noise_multiplier=2.0), trainer_module, [units])
    except PrivacyError as error:
        assert "idle" in str(error)
        return
    moved = trainer_module.start - trainer_module.parts["idle"].weight.detach().double()
    assert abs(float(moved.std()) / 2.0 - 1) < 6.2 / (2 * 40_000) ** 0.5


class Branch(nn.Module):
    """Uses only one of its two layers."""

    def __init__(self, parts) -> None:
        super().__init__()
        self.parts = parts
        self.start = parts["idle"].weight.detach().clone().double()

    def forward(self, x):
        return self.parts["used"](x)


@pytest.mark.parametrize("change", ["late_unfrozen", "added"])
def test_parameters_that_become_trainable_after_wrapping_are_refused(change):
    from synthward.engine.errors import PrivacyError

    case = CASES[0]
    module, units = case.module(), case.units([1] * 4)
    inputs, targets, _ = stack(units)
    module[0].weight.requires_grad_(change != "late_unfrozen")
    private = make_private(module, units, 4)
    if change == "late_unfrozen":
        module[0].weight.requires_grad_(True)
    else:
        module[2] = nn.Linear(8, 8)
    with pytest.raises(
        PrivacyError, match=r"0\.weight" if change == "late_unfrozen" else r"2\.(weight|bias)"
    ):
        engine_step(private, inputs, targets)


def test_a_gradient_from_outside_the_capture_cannot_reach_the_parameters():
    """A penalty on the weights, or a second loss computed without the engine, has no per-unit bound."""
    from synthward.engine.errors import PrivacyError

    case = CASES[0]
    units = case.units([1] * 4)
    inputs, targets, _ = stack(units)
    _, module, optimizer, _ = make_private(case.module(), units, 4)
    before = flat_parameters(module)
    optimizer.zero_grad()
    penalty = sum(p.pow(2).sum() for p in module.parameters())
    clipped = engine_step(make_private(case.module(), units, 4), inputs, targets)
    try:
        (F.cross_entropy(module(inputs), targets) + 1e3 * penalty).backward()
        optimizer.step()
    except PrivacyError:
        assert np.array_equal(before, flat_parameters(module))
        return
    np.testing.assert_allclose(before - flat_parameters(module), clipped, atol=1e-4)


def test_a_step_without_any_private_backward_does_not_apply_raw_gradients():
    """`optimizer.step()` after a gradient set by hand: refused, or the gradient is ignored."""
    from synthward.engine.errors import SynthwardError

    case = CASES[0]
    units = case.units([1] * 4)
    _, module, optimizer, _ = make_private(case.module(), units, 4)
    before = flat_parameters(module)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    with contextlib.suppress(SynthwardError):
        optimizer.step()
    assert np.array_equal(before, flat_parameters(module))


def test_an_optimizer_of_other_parameters_is_refused():
    """The optimizer must hold exactly the trainable parameters of the module."""
    from synthward import PrivacyEngine
    from synthward.engine.errors import SynthwardError

    case = CASES[0]
    inputs, targets, _ = stack(case.units([1] * 4))
    stranger = torch.optim.SGD(case.module().parameters(), lr=1.0)
    with pytest.raises(SynthwardError):
        PrivacyEngine().make_private(
            module=case.module(),
            optimizer=stranger,
            data_loader=dummy_loader(inputs, targets, 4),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
