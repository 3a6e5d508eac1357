"""What a replay reads is what it is given and what the module holds now, never what was there when it was recorded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from synthward.engine.errors import UnsupportedOperationError
from tests.engine.nets import row_losses
from tests.engine.recorded import NETS, UNITS, assert_same, module_of, pair, record, take

ROUNDS = 8
BATCH = NETS["rows"][1]


def linear() -> nn.Module:
    return nn.Linear(4, 2)


class Scaled(nn.Linear):
    """Its output times what it holds under `scale`: a buffer, or a plain attribute."""

    def __init__(self, *, is_buffer: bool = True) -> None:
        super().__init__(4, 2)
        if is_buffer:
            self.register_buffer("scale", torch.ones(UNITS, 2))
        else:
            self.scale = torch.ones(UNITS, 2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def replaced(module: nn.Module, value: Tensor) -> None:
    module.scale = value


def replaced_where_it_was(module: nn.Module, value: Tensor) -> None:
    """The new tensor may well have the id of the old one."""
    module.scale = None
    module.scale = value


def moved(module: nn.Module, value: Tensor) -> None:
    module.scale.data = value


def turned(module: nn.Module, value: Tensor) -> None:
    """The same memory by other strides."""
    module.scale.copy_(value)
    module.scale.data = module.scale.reshape(2, UNITS).t()


def assert_equal_rounds(make: Callable[[], nn.Module], before: Callable[[nn.Module, int], object]) -> None:
    """Pass by pass, of a trainer that records and one that does not."""
    plain, recorded = pair(make)
    run = record(recorded)
    for round_ in range(ROUNDS):
        for trainer in (plain, recorded):
            before(module_of(trainer), round_)
        x = BATCH(round_)
        take(plain, x)
        run(x)
        assert_same(plain, recorded)
        plain.apply()
        recorded.apply()


@pytest.mark.parametrize("is_buffer", [True, False])
@pytest.mark.parametrize("how", [replaced, replaced_where_it_was, moved, turned])
def test_what_the_module_holds_is_read_as_it_is_now(how, is_buffer):
    """Records under an attribute, say: those of one batch must not come back in the steps of others."""

    def before(module: nn.Module, round_: int) -> None:
        if round_ % 2 == 0:
            how(module, torch.randn(UNITS, 2, generator=torch.Generator().manual_seed(round_)))

    assert_equal_rounds(lambda: Scaled(is_buffer=is_buffer), before)


def test_a_frozen_parameter_whose_memory_was_replaced():
    def before(module: nn.Module, round_: int) -> None:
        module[0].weight.data = torch.full((3, 4), round_ + 1.0)

    assert_equal_rounds(NETS["frozen"][0], before)


def other_layer(module: nn.Module) -> None:
    module[1] = nn.Tanh()


def a_hook(module: nn.Module) -> None:
    module[1].register_forward_hook(lambda layer, given, out: 3.0 * out)


def a_hook_before(module: nn.Module) -> None:
    module[1].register_forward_pre_hook(lambda layer, given: 3.0 * given[0])


@pytest.mark.parametrize("change", [other_layer, a_hook, a_hook_before])
def test_layers_and_their_hooks_belong_to_the_form(change):
    assert_equal_rounds(NETS["rows"][0], lambda module, round_: change(module) if round_ == 4 else None)


def test_a_fixed_tensor_whose_memory_was_replaced():
    plain, recorded = pair(linear)
    scale = torch.ones(2)

    def losses(module: nn.Module, x: Tensor) -> Tensor:
        return (module(x) * scale).square().sum(1)

    module = module_of(recorded)
    run = recorded.compile(lambda x: losses(module, x), fixed=[scale])
    for round_ in range(ROUNDS):
        scale.data = torch.full((2,), round_ + 1.0)
        x = BATCH(round_)
        with plain.capture():
            found = losses(module_of(plain), x)
        plain.backward(found, rows_per_unit=1)
        run(x)
        assert_same(plain, recorded)
        plain.apply()
        recorded.apply()


def test_tensors_that_are_replaced_are_said_aloud_once(caplog):
    trainer, _ = pair(Scaled)
    run, x = record(trainer), BATCH(0)
    for round_ in range(ROUNDS):
        module_of(trainer).scale.data = torch.full((UNITS, 2), round_ + 1.0)
        run(x)
    assert caplog.text.count("holds other tensors than were recorded") == 1


def test_one_tensor_that_stood_for_two_arguments():
    plain, recorded = pair(linear)

    def losses(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return row_losses(module, x) * y[:, 0].exp()

    module = module_of(recorded)
    run = recorded.compile(lambda x, y: losses(module, x, y))
    for round_ in range(ROUNDS):
        x = BATCH(round_)
        y = x if round_ < 4 else BATCH(round_ + 100)
        with plain.capture():
            found = losses(module_of(plain), x, y)
        plain.backward(found, rows_per_unit=1)
        assert torch.equal(run(x, y), found)
        assert_same(plain, recorded)
        plain.apply()
        recorded.apply()


def test_a_mask_that_was_an_argument_too_still_leaves_units_out():
    """Else padding would weigh something."""
    trainer, _ = pair(linear)
    module, seen = module_of(trainer), torch.ones(UNITS, dtype=torch.bool)
    run = trainer.compile(lambda x, seen: row_losses(module, x) * seen)
    for _ in range(4):
        run(BATCH(0), seen, unit_mask=seen)
        trainer.apply()
    for _ in range(3):
        run(BATCH(0), seen, unit_mask=~seen)
        assert not trainer._step.sums.flat.any()
        trainer.apply()


def test_a_number_of_the_batch_that_is_no_argument_is_refused():
    trainer, _ = pair(linear)
    module, batch = module_of(trainer), {}
    run = trainer.compile(lambda x: row_losses(module, x) * batch["mean"])
    with pytest.raises(UnsupportedOperationError, match=r"of shape \[\] that is neither an argument nor"):
        for round_ in range(3):
            batch["mean"] = BATCH(round_).mean()
            run(BATCH(round_))


def test_numbers_that_the_losses_write_down_are_no_batch():
    trainer, _ = pair(linear)
    module = module_of(trainer)
    run = trainer.compile(lambda x: row_losses(module, x) * torch.tensor(0.5))
    for round_ in range(4):
        run(BATCH(round_))
        trainer.apply()


def test_a_table_of_the_module_is_looked_up_by_numbers_of_the_batch():
    class Table(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 2)
            self.register_buffer("table", torch.arange(12.0).view(3, 4))
            self.register_buffer("order", torch.tensor([2, 0, 1]))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.table[self.order][(x[:, 0] > 0).long()])

    assert_equal_rounds(Table, lambda module, round_: None)


class Counts(nn.Linear):
    """Writes a constant into a buffer in each pass."""

    def __init__(self) -> None:
        super().__init__(4, 2)
        self.register_buffer("passes", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return super().forward(x) / self.passes


def test_a_trace_writes_nothing():
    plain, recorded = pair(Counts)
    run = record(recorded)
    for round_ in range(ROUNDS):
        x = BATCH(round_)
        take(plain, x)
        run(x)
        assert torch.equal(module_of(recorded).passes, torch.full((2,), round_ + 1.0))
        assert_same(plain, recorded)
        plain.apply()
        recorded.apply()


class Looks(nn.Linear):
    """Units mix, as soon as a number of a buffer says so."""

    def __init__(self, look: Callable[[Tensor], object]) -> None:
        super().__init__(4, 2)
        self.look = look
        self.register_buffer("gate", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out + out.mean(0) if self.look(self.gate) else out


@pytest.mark.parametrize(
    "look",
    [
        bool,
        float,
        Tensor.item,
        Tensor.tolist,
        lambda gate: gate.numpy() > 0,
        lambda gate: len(gate.nonzero()),
    ],
)
def test_numbers_of_the_module_are_not_looked_at_either(look):
    trainer, _ = pair(lambda: Looks(look))
    run = record(trainer)
    with pytest.raises(UnsupportedOperationError, match="looks at a tensor's numbers"):
        for round_ in range(3):
            run(BATCH(round_))


def test_a_network_beside_the_private_one_takes_no_gradient_of_records():
    trainer, _ = pair(linear)
    module, beside = module_of(trainer), nn.Linear(4, 4)
    before = torch.ones(4, 4)
    beside.weight.grad = before
    with torch.no_grad():
        frozen = trainer.compile(lambda x: row_losses(module, x), fixed=list(beside.parameters()))
    for round_ in range(4):
        frozen(BATCH(round_))
    assert beside.weight.grad is before and torch.equal(before, torch.ones(4, 4))
    run = trainer.compile(lambda x: row_losses(module, beside(x)), fixed=list(beside.parameters()))
    with pytest.raises(UnsupportedOperationError, match="gets a gradient of single records"):
        for round_ in range(3):
            run(BATCH(round_))
    assert type(beside.weight.grad) is Tensor and type(beside.bias.grad) is Tensor


@pytest.mark.parametrize("name", ["rows", "many rows", "attention", "recurrent"])
def test_batches_of_other_strides_are_another_form(name):
    """What is contiguous is copied nowhere in a trace, and the bound on rounding is that of contiguous rows."""
    make, batch = NETS[name]
    plain, recorded = pair(make)
    run = record(recorded)
    for round_ in range(ROUNDS):
        x = batch(round_)
        if round_ in (4, 5):
            x = x.movedim(0, -1).contiguous().movedim(-1, 0)
        take(plain, x)
        run(x)
        assert_same(plain, recorded)
        plain.apply()
        recorded.apply()


def test_offsets_of_any_stride():
    plain, recorded = pair(NETS["rows"][0])
    module, x, owner = module_of(recorded), BATCH(0), torch.tensor([0, 0, 1, 2, 2])

    def losses(module: nn.Module, x: Tensor) -> Tensor:
        return torch.zeros(3).index_add(0, owner, row_losses(module, x))

    run = recorded.compile(lambda x: losses(module, x), rows_per_unit=None, fixed=[owner])
    offsets = torch.tensor([0, 2, 3, 5])
    for round_ in range(ROUNDS):
        with plain.capture():
            found = losses(module_of(plain), x)
        plain.backward(found, offsets=offsets)
        run(x, offsets=offsets if round_ < 4 else torch.stack([offsets, offsets], 1)[:, 0])
        assert_same(plain, recorded)
        plain.apply()
        recorded.apply()
