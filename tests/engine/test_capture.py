"""What is captured, what is left alone, what is refused; units that mix are found whatever the shapes say."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from synthward.engine.errors import ConfigError, PrivacyError, UnsupportedOperationError
from synthward.engine.independence import IndependenceProbe
from tests.engine.nets import Mixed, accumulate, make_trainer, mixed_inputs, oracle, released
from tests.oracles import flat_parameters


class Positions(nn.Module):
    """A sequence model whose position table is looked up once for the whole batch, or once for each row."""

    def __init__(self, times: int, share: bool) -> None:
        super().__init__()
        self.places = nn.Embedding(times, 5)
        self.head = nn.Linear(5, 2)
        self.times, self.share = times, share

    def forward(self, x):
        ids = torch.arange(self.times)
        if not self.share:
            ids = ids.expand(len(x), -1)
        return self.head(torch.tanh(x + self.places(ids)))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 4, 8])
def test_position_ids_shared_or_for_each_row_are_exact(rows, share):
    """Four positions and one, three, four (the same number) or eight rows."""
    module = Positions(4, share=share)
    x = torch.randn(rows, 4, 5, generator=torch.Generator().manual_seed(1))
    expected = oracle(copy.deepcopy(module), x, [1] * rows, 0.1)
    np.testing.assert_allclose(released(module, x, [1] * rows, 0.1), expected, atol=3e-6)


class Mixing(nn.Module):
    """A layer before the head in which rows of a batch see each other."""

    def __init__(self, mix) -> None:
        super().__init__()
        self.stem, self.head, self.mix = nn.Linear(5, 5), nn.Linear(5, 2), mix

    def forward(self, x):
        return self.head(self.mix(torch.tanh(self.stem(x))))


MIXES = {
    "batch mean": lambda h: h - h.mean(0),
    "attention over the batch": lambda h: torch.softmax(h @ h.T, 1) @ h,
    "a running sum": lambda h: h.cumsum(0),
    "a running sum from the end": lambda h: h.flip(0).cumsum(0).flip(0),
    "batch statistics": lambda h: F.normalize(h, dim=0),
    "a permuted batch": lambda h: h.flip(0),
    "a square batch, transposed": lambda h: h[: len(h)].T.contiguous() if h.shape[0] == h.shape[1] else h,
}


@pytest.mark.parametrize("name", MIXES)
def test_units_that_mix_are_refused(name):
    module, x = Mixing(MIXES[name]), torch.randn(5, 5)
    with pytest.raises(UnsupportedOperationError, match="units mix"):
        released(module, x, [1] * 5, 0.1)


def test_rows_of_one_unit_may_mix():
    """Attention inside a patient is no leak: the patient is the unit."""
    module = Mixing(lambda h: (h.view(-1, 3, 5) - h.view(-1, 3, 5).mean(1, keepdim=True)).view(-1, 5))
    x = torch.randn(6, 5)
    assert np.isfinite(released(module, x, [3, 3], 0.1)).all()


def test_a_first_step_without_gradient_does_not_end_the_probe():
    """A head of zeros hides what is behind it; as soon as it moves, the mixing is found."""
    module, x = Mixing(MIXES["batch mean"]), torch.randn(5, 5)
    nn.init.zeros_(module.head.weight)
    trainer = make_trainer(module, max_grad_norm=0.1)
    with pytest.raises(UnsupportedOperationError, match="units mix"):
        for _ in range(3):
            accumulate(trainer, module, x, [1] * 5)
            trainer.apply()


def test_torch_autograd_grad_takes_no_part():
    """An input gradient inside the forward pass is not the loss's gradient."""

    class Sensitive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(5, 4), nn.Linear(4, 2)

        def forward(self, x):
            hidden = torch.tanh(self.first(x))
            if hidden.dtype == torch.float32:
                torch.autograd.grad(hidden.sum(), hidden, retain_graph=True)
                torch.autograd.grad(self.head(hidden).sum(), hidden)
            return self.head(hidden)

    module, x = Sensitive(), torch.randn(4, 5)
    expected = oracle(copy.deepcopy(module), x, [1] * 4, 0.1)
    np.testing.assert_allclose(released(module, x, [1] * 4, 0.1), expected, atol=3e-6)


def test_double_backward_is_refused():
    module, x = nn.Linear(3, 2), torch.randn(4, 3, requires_grad=True)
    trainer = make_trainer(module)
    with pytest.raises(UnsupportedOperationError, match=r"'linear'.*create_graph"), trainer.capture():
        torch.autograd.grad(torch.tanh(module(x)).sum(), x, create_graph=True)


def test_networks_of_others_pass_through():
    """A generator run inside the capture, with and without gradients: its own, untouched."""
    other, module = nn.Sequential(nn.Linear(3, 5), nn.PReLU(), nn.Linear(5, 5)), nn.Linear(5, 2)
    trainer = make_trainer(module)
    noise = torch.randn(4, 3)
    with trainer.capture():
        with torch.no_grad():
            fake = other(noise)
        losses = module(fake).square().sum(1) + module(other(noise)).sum(1)
    trainer.backward(losses, rows_per_unit=1)
    trainer.apply()
    assert all(p.grad is not None for p in other.parameters())
    assert all(p.grad is None for p in module.parameters())


def test_gradients_through_the_module_outside_the_capture():
    """After a step, as a generator network trains on the discriminator: allowed by autograd.grad, and by
    freezing."""
    module, z = nn.Linear(5, 2), torch.randn(4, 5, requires_grad=True)
    trainer = make_trainer(module)
    (slope,) = torch.autograd.grad(module(z).sum(), z)
    assert slope.shape == z.shape
    module.requires_grad_(False)
    module(z).sum().backward()
    module.requires_grad_(True)
    accumulate(trainer, module, torch.randn(3, 5), [1] * 3)
    trainer.apply()


def test_reading_a_parameter_is_no_operation():
    """Shapes, norms for a log, copies: nothing that carries a gradient."""

    class Curious(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 2)

        def forward(self, x):
            assert self.layer.weight.shape == (2, 5) and self.layer.weight.dtype in (
                torch.float32,
                torch.float64,
            )
            with torch.no_grad():
                self.layer.weight.norm()
            self.layer.weight.detach().abs().sum().item()
            return self.layer(x.to(self.layer.weight))

    assert np.isfinite(released(Curious(), torch.randn(3, 5), [1] * 3, 0.1)).all()


@pytest.mark.parametrize("name", ["lstm", "gru", "attention"])
def test_whole_functions_without_a_batch_axis_are_refused_by_name(name):
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = {
                "lstm": nn.LSTM(5, 3),
                "gru": nn.GRU(5, 3),
                "attention": nn.MultiheadAttention(5, 1),
            }[name]

        def forward(self, x):
            x = x.unsqueeze(1)
            return (self.inner(x, x, x) if name == "attention" else self.inner(x))[0][:, 0]

    operation = "linear" if name == "attention" else name
    with pytest.raises(
        UnsupportedOperationError, match=rf"inner\.\S+' in operation '{operation}': its input has 1 "
    ):
        released(Wrapped(), torch.randn(4, 5), [1] * 4, 0.1)


def test_item_assignment_of_a_parameter_is_refused():
    class Assigns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.head = nn.Parameter(torch.ones(5)), nn.Linear(5, 2)

        def forward(self, x):
            x = x.clone()
            x[:, :] = self.token
            return self.head(x)

    with pytest.raises(UnsupportedOperationError, match=r"token.*setitem"):
        released(Assigns(), torch.randn(4, 5), [1] * 4, 0.1)


def test_a_gradient_past_the_capture_stops_the_step():
    module, x = Mixed(), mixed_inputs(4)
    trainer, before = make_trainer(module, noise_multiplier=1.0), flat_parameters(module)
    accumulate(trainer, module, x, [1] * 4)
    module.head.weight.square().sum().backward()
    with pytest.raises(PrivacyError, match=r"head\.weight"):
        trainer.apply()
    assert np.array_equal(before, flat_parameters(module))


def test_losses_without_capture_are_refused():
    module = nn.Linear(5, 2)
    trainer = make_trainer(module)
    with pytest.raises(PrivacyError, match="capture"):
        trainer.backward(torch.zeros(3), rows_per_unit=1)
    trainer.discard()
    trainer.backward(module(torch.randn(3, 5)).sum(1), rows_per_unit=1)
    with pytest.raises(PrivacyError, match="weight"):
        trainer.apply()


@pytest.mark.parametrize(
    "where",
    [
        {},
        {"rows_per_unit": 1, "offsets": torch.tensor([0, 4])},
        {"offsets": torch.tensor([0, 2])},
        {"rows_per_unit": 0},
    ],
    ids=str,
)
def test_layouts_that_do_not_fit_are_refused(where):
    module = nn.Linear(5, 2)
    trainer = make_trainer(module)
    with trainer.capture():
        losses = module(torch.randn(4, 5)).sum(1)
    with pytest.raises((ConfigError, UnsupportedOperationError)):
        trainer.backward(losses, **where)


def test_an_error_leaves_nothing_of_the_batch_behind():
    module, x = Mixed(), mixed_inputs(4)
    trainer, before = make_trainer(module), flat_parameters(module)
    with trainer.capture():
        losses = module(x).sum(1)
    with pytest.raises(UnsupportedOperationError):
        trainer.backward(losses.repeat(3), offsets=torch.arange(13))
    with pytest.raises(PrivacyError, match="failed"):
        trainer.apply()
    trainer.discard()
    trainer.apply()
    assert np.array_equal(before, flat_parameters(module))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_refused_by_name(dtype):
    with pytest.raises(ConfigError, match=r"'weight' is torch\."):
        make_trainer(nn.Linear(3, 2).to(dtype))


class Packed(nn.Module):
    """Sequences of unequal length without their padding, as rows of one product."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(2, 3), nn.Linear(3, 1)

    def forward(self, x):
        is_there = x[..., 0] != 0.0
        rows = torch.arange(len(x)).unsqueeze(1).expand_as(is_there)[is_there]
        made = torch.tanh(self.layer(x[is_there]))
        return self.head(torch.zeros(len(x), 3).index_add(0, rows, made))


def _packed(*lengths: int) -> torch.Tensor:
    x = torch.randn(len(lengths), 4, 2, generator=torch.Generator().manual_seed(0))
    for row, length in enumerate(lengths):
        x[row, length:] = 0.0
    return x


@pytest.mark.parametrize("lengths", [(1, 3), (2, 1, 3, 2), (3, 2, 1)], ids=str)
def test_rows_that_the_data_pick_are_looked_at_in_every_batch(lengths):
    """A batch of equal lengths shows nothing; the next one must be refused, however often the first was fine."""
    torch.manual_seed(0)
    net = Packed()
    trainer = make_trainer(net)
    for _ in range(12):
        accumulate(trainer, net, _packed(*[2] * len(lengths)), [1] * len(lengths))
    with pytest.raises(UnsupportedOperationError, match="units mix"):
        for _ in range(len(lengths)):
            accumulate(trainer, net, _packed(*lengths), [1] * len(lengths))


def test_other_operations_between_the_same_calls_are_looked_at_anew():
    class Turning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head, self.turned = nn.Linear(5, 2), nn.Linear(2, 2), False

        def forward(self, x):
            made = self.layer(x)
            return self.head(torch.flip(made, [0]) if self.turned else made * 1.0)

    net = Turning()
    trainer = make_trainer(net)
    for _ in range(9):
        accumulate(trainer, net, mixed_inputs(4), [1] * 4)
    net.turned = True
    with pytest.raises(UnsupportedOperationError, match="units mix"):
        accumulate(trainer, net, mixed_inputs(4), [1] * 4)


def test_a_choice_by_constants_is_looked_at_ever_more_rarely(monkeypatch):
    """The last time of each row, say: the rows stay where they are."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, x):
            last = (x[..., 0] != 0.0).sum(1) - 1
            return self.layer(x[torch.arange(len(x)), last])

    net = Last()
    trainer, probed = make_trainer(net), []
    real = IndependenceProbe._probe
    monkeypatch.setattr(
        IndependenceProbe, "_probe", lambda self, *rest: probed.append(1) or real(self, *rest)
    )
    looks = []
    for _ in range(8):
        probed.clear()
        accumulate(trainer, net, _packed(1, 3, 2), [1] * 3)
        looks.append(bool(probed))
    assert looks == [True, True, False, True, False, False, False, True]
