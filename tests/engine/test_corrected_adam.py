"""DPAdamBC and correlated noise in the updates: against float64, group by group, with saved and restored state."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from synthward.engine import DPAdamBC
from synthward.engine.errors import CheckpointError, ConfigError
from synthward.engine.flat import FlatParameters
from synthward.engine.optim import Noise, Updater, load_optimizer_tensors, make_updater, optimizer_tensors
from synthward.kernels import Correlation, add_gaussian_noise_, gaussian_noise
from tests.engine.nets import make_trainer
from tests.oracles import flat_parameters

KEY, STREAM = bytes(range(32)), 4
BETAS = (0.8, 0.95)
TAPS = (1.0, -0.5, 0.25)
# Standard deviations that change from step to step, as under adaptive clipping.
STDS = (0.3, 0.3, 0.5, 0.2, 0.4)
SCALE = 0.25


def built(kind: type[torch.optim.Optimizer] = DPAdamBC, **options: object) -> tuple[FlatParameters, Updater]:
    """Two groups; the second learns three times as fast and has its own averages."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    second = {"params": module[1].parameters(), "lr": 0.03}
    if kind is DPAdamBC:
        second |= {"betas": (0.7, 0.9), "min_second_moment": 0.01}
        options = {"betas": BETAS, "weight_decay": 0.1, "min_second_moment": 0.002, **options}
    optimizer = kind([{"params": module[0].parameters()}, second], lr=0.01, **options)
    flat = FlatParameters(module, optimizer)
    return flat, make_updater(flat, optimizer)


def sums(flat: FlatParameters, step: int) -> Tensor:
    """What the units brought in a step."""
    generator = torch.Generator().manual_seed(step)
    return torch.cat([torch.randn(span.parameter.numel(), generator=generator) for span in flat])


def update(flat: FlatParameters, updater: Updater, step: int, *, is_correlated: bool) -> None:
    brought = sums(flat, step).split([span.parameter.numel() for span in flat])
    for total, part in zip(flat.sums, brought, strict=True):
        total.copy_(part.view_as(total))
    correlation = Correlation(TAPS) if is_correlated else None
    variance = STDS[step] ** 2 * float(np.square(TAPS[: step + 1]).sum()) if is_correlated else None
    noise = Noise(KEY, STREAM, step, STDS[step], correlation, variance)
    with torch.no_grad():
        updater.update(noise, SCALE)


def noise_of(flat: FlatParameters, step: int, *, is_correlated: bool) -> Tensor:
    """That of every place of the flat buffer, float64."""
    taps = TAPS[: step + 1] if is_correlated else (1.0,)
    drawn = [
        tap * gaussian_noise(len(flat.data), key=KEY, stream=STREAM, step=step - j).double()
        for j, tap in enumerate(taps)
    ]
    return STDS[step] * torch.stack(drawn).sum(0)


class Oracle:
    """One group's part in float64, written out from the paper."""

    def __init__(self, x: Tensor, lr: float, betas: tuple[float, float], floor: float) -> None:
        self.x, self.lr, self.betas, self.floor = x.double(), lr, betas, floor
        self.m, self.v, self.bias = torch.zeros_like(self.x), torch.zeros_like(self.x), 0.0
        self.floored = 0

    def step(self, t: int, mean: Tensor, variance: float) -> None:
        beta1, beta2 = self.betas
        g = mean + 0.1 * self.x
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g * g
        self.bias = beta2 * self.bias + (1 - beta2) * variance
        rest = (self.v - self.bias) / (1 - beta2**t)
        self.floored += int((rest < self.floor).sum())
        self.x = self.x - self.lr * self.m / (1 - beta1**t) / rest.clamp(min=self.floor).sqrt()


@pytest.mark.parametrize("is_correlated", [False, True])
def test_it_is_the_papers_update(is_correlated):
    """What the averaged second moment holds of the noise is taken off, though its variance changes."""
    flat, updater = built()
    oracles = [
        (start, end, Oracle(flat.data[start:end], *options))
        for (start, end), options in zip(
            flat.group_ranges, [(0.01, BETAS, 0.002), (0.03, (0.7, 0.9), 0.01)], strict=True
        )
    ]
    used = torch.zeros(len(flat.data), dtype=torch.bool)
    for span in flat:
        used[span.start : span.start + span.parameter.numel()] = True
    for step in range(5):
        update(flat, updater, step, is_correlated=is_correlated)
        brought = torch.zeros(len(flat.data), dtype=torch.float64)
        brought[used] = sums(flat, step).double()
        mean = (brought + noise_of(flat, step, is_correlated=is_correlated)) * SCALE
        squares = float(np.square(TAPS[: step + 1]).sum()) if is_correlated else 1.0
        for start, end, oracle in oracles:
            oracle.step(step + 1, mean[start:end], (STDS[step] * SCALE) ** 2 * squares)
            mine = used[start:end]
            torch.testing.assert_close(
                flat.data[start:end].double()[mine], oracle.x[mine], rtol=1e-4, atol=1e-5
            )
    assert all(oracle.floored for _, _, oracle in oracles)


def test_state_survives_a_round_trip():
    """Three steps, saved, two more; and the same two from the saved state in a fresh network."""
    flat, updater = built()
    for step in range(3):
        update(flat, updater, step, is_correlated=True)
    saved = optimizer_tensors(flat, updater._optimizer, updater)
    parameters = flat.data.clone()
    again, fresh = built()
    again.data.copy_(parameters)
    load_optimizer_tensors(again, fresh._optimizer, fresh, copy.deepcopy(saved))
    for step in (3, 4):
        update(flat, updater, step, is_correlated=True)
        update(again, fresh, step, is_correlated=True)
    assert np.array_equal(flat_parameters(again.module), flat_parameters(flat.module))
    without = {name: value for name, value in saved.items() if not name.startswith("noise_variance.")}
    with pytest.raises(CheckpointError, match="noise_variance"):
        load_optimizer_tensors(again, fresh._optimizer, fresh, without)


def test_of_pure_noise_nothing_is_left():
    """The law: with no gradient the corrected moment is zero on average, whatever the noise of each step was."""
    module = nn.Linear(400, 500, bias=False)
    with torch.no_grad():
        module.weight.zero_()
    optimizer = DPAdamBC(module.parameters(), lr=0.0, betas=(0.9, 0.6))
    flat = FlatParameters(module, optimizer)
    updater = make_updater(flat, optimizer)
    for step, std in enumerate(STDS):
        variance = std**2 * float(np.square(TAPS[: step + 1]).sum())
        with torch.no_grad():
            updater.update(Noise(KEY, STREAM, step, std, Correlation(TAPS), variance), 1.0)
    updater.export_state()
    state = optimizer.state[module.weight]
    squares, held = state["exp_avg_sq"].double(), float(state["noise_variance"])
    deviation = float(squares.std()) / squares.numel() ** 0.5
    # Outside of that by chance once in 1e9 keys, and the key is fixed.
    assert abs(float(squares.mean()) - held) < 6.2 * deviation
    assert deviation < 0.01 * held


OTHERS = {
    "adam": (torch.optim.Adam, {}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "rmsprop": (torch.optim.RMSprop, {}),
}


@pytest.mark.parametrize("name", [*OTHERS, "adam_bc"])
def test_correlated_noise_reaches_every_updater(name):
    """With a state over the whole buffer: the same as handing the optimizer noise that was made beforehand."""
    kind, options = OTHERS.get(name, (DPAdamBC, {}))
    (flat, updater), (plain, silent) = built(kind, **options), built(kind, **options)
    states = [torch.zeros(2, len(flat.data)) for _ in range(2)]
    recipes = [Correlation((1.0,), (0.4, 0.2), (0.9, 0.5), (1.0, 1.0), state) for state in states]
    for step in range(4):
        for one in (flat, plain):
            one.summed_grad.fill_(0.5)
        add_gaussian_noise_(
            plain.summed_grad,
            key=KEY,
            stream=STREAM,
            step=step,
            noise_std=0.7,
            correlation=recipes[1],
        )
        with torch.no_grad():
            updater.update(Noise(KEY, STREAM, step, 0.7, recipes[0], 0.5), 0.1)
            silent.update(Noise(KEY, STREAM, step, 0.0, None, 0.5), 0.1)
        assert torch.equal(states[0], states[1])
    assert states[0].abs().min() > 0
    torch.testing.assert_close(flat.data, plain.data, rtol=1e-5, atol=1e-6)


def test_correlated_noise_must_say_its_variance():
    flat, updater = built()
    before = flat.data.clone()
    with pytest.raises(ValueError, match=r"^variance: "), torch.no_grad():
        updater.update(Noise(KEY, STREAM, 0, 1.0, Correlation(TAPS)), 1.0)
    assert torch.equal(flat.data, before)


def test_in_a_private_run():
    """The trainer's own noise: its second moment's average is the variance that the plan gives it."""
    module = nn.Linear(3, 2)
    optimizer = DPAdamBC(module.parameters(), lr=0.01)
    trainer = make_trainer(
        module, optimizer, noise_multiplier=2.0, max_grad_norm=3.0, expected_batch_size=4.0
    )
    before = flat_parameters(module)
    for _ in range(3):
        trainer.apply()
    assert not np.array_equal(before, flat_parameters(module))
    average = trainer.state_dict()["optimizer.noise_variance.weight"]
    assert float(average) == pytest.approx((2.0 * 3.0 / 4.0) ** 2 * (1 - 0.999**3), rel=1e-12)


def test_it_takes_no_step_of_its_own():
    module = nn.Linear(3, 2)
    optimizer = DPAdamBC(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    before = flat_parameters(module)
    with pytest.raises(ConfigError, match="make_private"):
        optimizer.step()
    assert np.array_equal(before, flat_parameters(module))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e-40, True, "small", None])
def test_a_floor_that_is_none_is_refused(value):
    with pytest.raises(ConfigError, match=r"^min_second_moment: "):
        DPAdamBC(nn.Linear(2, 2).parameters(), min_second_moment=value)
    with pytest.raises(ConfigError, match=r"^min_second_moment: "):
        DPAdamBC([{"params": nn.Linear(2, 2).parameters(), "min_second_moment": value}])


def test_options_that_the_update_lacks_are_refused():
    class Other(DPAdamBC):
        pass

    with pytest.raises(ConfigError, match="DPAdamBC"):
        built(Other)
    module = nn.Linear(2, 2)
    optimizer = DPAdamBC(module.parameters())
    optimizer.param_groups[0]["maximize"] = True
    with pytest.raises(ConfigError, match="maximize"):
        make_updater(FlatParameters(module, optimizer), optimizer)
