"""The user's own loop where records might be miscounted or mix unseen: outputs of many kinds, arguments that are
not the batch, gates that open late, updates that fail."""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from synthward import PrivacyEngine
from synthward.engine.errors import ConfigError, PrivacyError, UnsupportedOperationError
from tests.oracles import clipped_sum, flat_parameters, per_unit_gradients

ROWS = 8


def records(*shape: int) -> Tensor:
    return torch.randn(*(shape or (ROWS, 4)), generator=torch.Generator().manual_seed(3))


def private(module: nn.Module, x: Tensor | None = None, **changes: Any) -> tuple[Any, ...]:
    """(engine, module, optimizer, loader) of SGD at rate 1 without noise, whose draws hold every record."""
    x = records() if x is None else x
    settings = {"noise_multiplier": 0.0, "max_grad_norm": 0.1, "loss_reduction": "sum"} | changes
    if settings.get("poisson_sampling", True):
        settings |= {"sample_rate": 1.0}
    engine = PrivacyEngine()
    optimizer = settings.pop("optimizer", None) or torch.optim.SGD(module.parameters(), lr=1.0)
    made = engine.make_private(
        module=module,
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(x), batch_size=len(x)),
        expected_batch_size=1,
        **settings,
    )
    return (engine, *made)


class Body(nn.Module):
    """Two layers with something between; `give` makes the output of the hidden rows and the result."""

    def __init__(self, give=lambda hidden, out: out, mix=lambda hidden: hidden) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.give, self.mix = give, mix

    def forward(self, x):
        hidden = self.mix(torch.tanh(self.first(x)))
        return self.give(hidden, self.head(hidden))


def centred(hidden: Tensor) -> Tensor:
    return hidden - hidden.mean(0)


@dataclass
class Record:
    loss: Tensor
    logits: Tensor


class ModelOutput(OrderedDict):
    """As in transformers: entries are attributes, too."""

    def __getattr__(self, name):
        return self[name]


CONTAINERS = {
    "tuple": lambda loss, out: (loss, out),
    "list in a dictionary": lambda loss, out: {"loss": loss, "rest": [None, "name", (out,)]},
    "dataclass": lambda loss, out: Record(loss, out),
    "model output": lambda loss, out: ModelOutput(loss=loss, logits=out),
    "any object": lambda loss, out: SimpleNamespace(loss=loss, logits=out),
}


def loss_of(output: Any) -> Tensor:
    if isinstance(output, tuple):
        return output[0]
    return output["loss"] if isinstance(output, dict) else output.loss


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_module_that_returns_its_loss_beside_logits(kind):
    """Rows that mix are found behind the first output; those that do not are clipped one by one."""

    def give(hidden, out):
        return CONTAINERS[kind](out.square().sum(), out)

    _, module, optimizer, loader = private(Body(give))
    (x,) = next(iter(loader))
    before = flat_parameters(module)
    loss_of(module(x)).backward()
    optimizer.step()
    gradients = per_unit_gradients(Body(), lambda net, row: net(row.unsqueeze(0)).square().sum(), list(x))
    np.testing.assert_allclose(before - flat_parameters(module), clipped_sum(gradients, 0.1), atol=3e-6)

    _engine, module, _, loader = private(Body(give, centred))
    with pytest.raises(UnsupportedOperationError, match="units mix"):
        module(*next(iter(loader)))


class TwoHeads(nn.Module):
    """A second head behind rows that mix; `give` makes the outputs of both."""

    def __init__(self, give) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head, self.other, self.give = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 1), give

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        return self.give(self.head(hidden), self.other(centred(hidden)))


@pytest.mark.parametrize(
    "give",
    [
        lambda own, mixed: (own, mixed),
        lambda own, mixed: [own, {"aux": mixed}],
        lambda own, mixed: (own - mixed, own + mixed),
    ],
    ids=["second", "nested", "what one takes away the other adds"],
)
def test_every_output_is_looked_at(give):
    _engine, module, _, loader = private(TwoHeads(give))
    with pytest.raises(UnsupportedOperationError, match="units mix"):
        module(*next(iter(loader)))


def test_a_layer_that_only_a_loss_depends_on_is_refused():
    """No row shows whether its units mix (here they do)."""
    _engine, module, _, loader = private(TwoHeads(lambda own, mixed: (mixed.square().mean(), own)))
    with pytest.raises(UnsupportedOperationError, match=r"'other\.\w+'.*without a row"):
        module(*next(iter(loader)))


class SequenceFirst(nn.Module):
    def __init__(self, pool: bool) -> None:
        super().__init__()
        self.layer, self.pool = nn.Linear(4, 3), pool

    def forward(self, x):  # [time, batch, 4]
        made = torch.tanh(self.layer(x))
        return made.mean(0) if self.pool else made


@pytest.mark.parametrize(
    ("module", "people"),
    [
        (SequenceFirst(pool=True), 8),
        (SequenceFirst(pool=True), 1),
        (Body(lambda hidden, out: out.mean()), 8),
        (Body(lambda hidden, out: out.mean(0)), 1),
        (Body(lambda hidden, out: (out.mean(), out.detach())), 8),
    ],
    ids=[
        "sequence-first",
        "sequence-first, one person",
        "a loss",
        "a mean of one row",
        "rows without gradient",
    ],
)
def test_outputs_without_rows_are_refused(module, people):
    x = records(people, 6, 4).transpose(0, 1) if isinstance(module, SequenceFirst) else records(people, 4)
    _engine, module, _, _ = private(module, poisson_sampling=False)
    with pytest.raises(UnsupportedOperationError, match="first axis"):
        module(x)


def test_a_loss_that_goes_past_the_outputs_is_refused():
    class Aside(Body):
        def forward(self, x):
            out = super().forward(x)
            self.loss = centred(out).square().sum()
            return out.detach()

    _engine, module, _, loader = private(Aside())
    module(*next(iter(loader)))
    with pytest.raises(UnsupportedOperationError, match="past its outputs"):
        module.loss.backward()


def test_as_many_time_steps_as_people_is_no_batch():
    """Layers of another axis first are told apart by passes in which they are not as many as the records."""

    def give(hidden, out):
        return out, hidden.mean(0).expand(3, -1)

    _, module, optimizer, _ = private(Body(give), poisson_sampling=False)
    for rows in (5, 3, 4):
        module(records(rows, 4))[0].sum().backward()
        optimizer.step()
    _engine, module, _, _ = private(Body(give), poisson_sampling=False)
    with pytest.raises(UnsupportedOperationError, match="units mix"):
        module(records(3, 4))


# arguments


class Timed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)

    def forward(self, time, x):
        return self.layer(x * time[0])


@pytest.mark.parametrize("times", [1, 2], ids=["one", "sizes"])
def test_a_first_argument_that_is_not_the_batch(times):
    """The loader's draw says how many records there are."""
    _, module, optimizer, loader = private(Timed())
    (x,) = next(iter(loader))
    before = flat_parameters(module)
    (100 * module(torch.ones(times), x)).sum().backward()
    optimizer.step()
    gradients = per_unit_gradients(
        Timed(), lambda net, row: 100 * net(torch.ones(1), row.unsqueeze(0)).sum(), list(x)
    )
    np.testing.assert_allclose(before - flat_parameters(module), clipped_sum(gradients, 0.1), atol=3e-6)


def test_arguments_that_disagree_are_not_guessed():
    engine, module, optimizer, _ = private(Timed(), poisson_sampling=False)
    x = records()
    with pytest.raises(ConfigError, match=r"1 \('0'\), 8 \('x'\)"):
        module(torch.ones(1), x=x)
    optimizer.zero_grad()
    before = flat_parameters(module)
    with engine.units(torch.arange(ROWS)):
        (100 * module(torch.ones(1), x)).sum().backward()
    optimizer.step()
    one_unit = 0.1
    assert np.linalg.norm(before - flat_parameters(module)) > 1.5 * one_unit


class Graph(nn.Module):
    """Rows are nodes, and neighbours see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, edges, x=None):
        x = self.nodes if x is None else x
        hidden = torch.tanh(self.first(x))
        return self.head(hidden.index_add(0, edges[1], hidden[edges[0]]))


def test_edges_before_nodes():
    edges = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    _engine, module, _, loader = private(Graph())
    (x,) = next(iter(loader))
    with pytest.raises(UnsupportedOperationError, match="units mix"):
        module(edges, x)
    module.nodes = x
    with pytest.raises(UnsupportedOperationError, match="took 2 rows"):
        module(edges)


def test_a_batch_in_a_dictionary_is_counted():
    class Named(Body):
        def forward(self, batch):
            return super().forward(batch["x"])

    _, module, optimizer, loader = private(Named())
    (x,) = next(iter(loader))
    module({"x": x}).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "feed", [lambda x: x.transpose(0, 1), lambda x: x[:5]], ids=["time steps for people", "rows left out"]
)
def test_fewer_rows_than_were_drawn_are_no_step(feed):
    """Six time steps of eight people: everybody is in each of six 'units'."""
    engine, module, optimizer, loader = private(SequenceFirst(pool=False), records(ROWS, 6, 4))
    (x,) = next(iter(loader))
    module(feed(x)).sum().backward()
    before = flat_parameters(module)
    with pytest.raises(PrivacyError, match="rows went through backward where the loader drew 8"):
        optimizer.step()
    assert np.array_equal(before, flat_parameters(module)) and not engine.accountant.events
    optimizer.zero_grad()
    module(x).sum().backward()
    optimizer.step()


def test_a_module_may_call_itself():
    """Under the outer call's capture, which goes on after it (self-conditioning, say)."""

    class Twice(Body):
        def forward(self, x, again=True):
            if again:
                with torch.no_grad():
                    x = x + self(x, again=False).sum(1, keepdim=True)
            return super().forward(x)

    _, module, optimizer, loader = private(Twice())
    (x,) = next(iter(loader))
    before = flat_parameters(module)
    module(x).sum().backward()
    optimizer.step()
    gradients = per_unit_gradients(Twice(), lambda net, row: net(row.unsqueeze(0)).sum(), list(x))
    np.testing.assert_allclose(before - flat_parameters(module), clipped_sum(gradients, 0.1), atol=3e-6)


# gates


class Gated(Body):
    """Rows mix by as much as a parameter says."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1, 4))

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        return self.head(hidden + hidden.mean(0, keepdim=True).expand_as(hidden) * self.gate)


def test_a_gate_of_zeros_hides_mixing_for_one_step():
    _, module, optimizer, loader = private(Gated())
    for taken in range(2):
        (x,) = next(iter(loader))
        if taken:
            assert module.gate.detach().abs().min() > 0
            with pytest.raises(UnsupportedOperationError, match="units mix"):
                module(x)
        else:
            module(x).sum().backward()
            optimizer.step()


@pytest.mark.parametrize("opened", [3, 20])
def test_a_gate_that_opens_later_is_found_by_the_next_power_of_two(opened):
    _engine, module, _, _ = private(Gated(), poisson_sampling=False)
    for _ in range(opened):
        module(records())
    with torch.no_grad():
        module.gate.fill_(0.1)
    due = 1 << opened.bit_length()
    for _ in range(opened + 1, due):
        module(records())
    with pytest.raises(UnsupportedOperationError, match="units mix"):
        module(records())


# updates that fail


class Failing(torch.optim.RMSprop):
    """Moves the parameters and then fails, once."""

    has_failed = False

    def step(self, closure=None):
        super().step(closure)
        if not self.has_failed:
            self.has_failed = True
            raise RuntimeError("late failure")


def test_a_draw_is_released_once_even_if_the_update_fails():
    module = Body()
    optimizer = Failing(module.parameters(), lr=0.1)
    engine, module, optimizer, loader = private(module, noise_multiplier=1.0, optimizer=optimizer)
    (x,) = next(iter(loader))
    module(x).sum().backward()
    before = flat_parameters(module)
    with pytest.raises(RuntimeError, match="late"):
        optimizer.step()
    assert not np.array_equal(before, flat_parameters(module))
    with pytest.raises(PrivacyError, match="fresh batch"):
        module(x).sum().backward()
    assert optimizer.session.steps_done == sum(event.steps for event in engine.accountant.events) == 1
    optimizer.zero_grad()
    (x,) = next(iter(loader))
    module(x).sum().backward()
    optimizer.step()
    assert optimizer.session.steps_done == sum(event.steps for event in engine.accountant.events) == 2


def test_a_failed_update_leaves_no_sum(monkeypatch):
    """A fused update that fails half way has not emptied the sum; it is not released later."""
    _, module, optimizer, _ = private(Body(), poisson_sampling=False)
    core = optimizer.session.core
    module(records()).sum().backward()

    def fail(*rest):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(core.updater, "update", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            optimizer.step()
    before = flat_parameters(module)
    optimizer.step()
    assert np.array_equal(before, flat_parameters(module)) and optimizer.session.steps_done == 2


def test_accumulation_without_draws_or_ids_is_said_aloud_once(caplog):
    engine, module, optimizer, _ = private(Body(), poisson_sampling=False)
    caplog.set_level(logging.WARNING)
    with engine.units(torch.arange(4)):
        module(records()[:4]).sum().backward()
    with engine.units(torch.arange(4, 8)):
        module(records()[4:]).sum().backward()
    optimizer.step()
    module(records()).sum().backward()
    optimizer.step()
    assert "counts twice" not in caplog.text
    for _ in range(3):
        module(records()).sum().backward()
    optimizer.step()
    assert caplog.text.count("counts twice") == 1
