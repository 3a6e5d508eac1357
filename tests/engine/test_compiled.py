"""Recorded passes: the sums of the passes that they stand for, bit for bit, and what can not be recorded is refused."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from synthward.engine import ClipSpec, PerfSpec
from synthward.engine.errors import ConfigError, UnsupportedOperationError
from synthward.engine.tracing import _check_randomness
from tests.engine.nets import row_losses
from tests.engine.recorded import CLIPS, NETS, ROUNDS, UNITS, assert_same, module_of, pair, record, take


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("name", NETS)
def test_the_sums_are_those_of_the_pass_bit_for_bit(name, clip):
    make, batch = NETS[name]
    plain, recorded = pair(make, clip=CLIPS[clip])
    run = record(recorded)
    mask = torch.ones(UNITS, dtype=torch.bool)
    for round_ in range(ROUNDS):
        # Fresh batches, masks and parameters in each: none of them may be that of the trace.
        mask[round_ % UNITS] = round_ % 3 == 0
        x = batch(round_)
        losses = take(plain, x, mask)
        assert torch.equal(losses, run(x, unit_mask=mask))
        assert_same(plain, recorded)
        plain.apply()
        recorded.apply()
    for mine, other in zip(module_of(plain).parameters(), module_of(recorded).parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("arithmetic", ["float", "discrete"])
def test_physical_batches_add_up_in_one_step(arithmetic):
    make, batch = NETS["mixed"]
    plain, recorded = pair(make, arithmetic=arithmetic)
    run = record(recorded)
    for step in range(4):
        for part in range(3):
            take(plain, batch(10 * step + part))
            run(batch(10 * step + part), is_last=part == 2)
        assert_same(plain, recorded)
        plain.apply()
        recorded.apply()


def test_units_of_several_rows():
    make, batch = NETS["rows"]
    plain, recorded = pair(make)
    module = module_of(recorded)
    run = recorded.compile(lambda x: row_losses(module, x).view(-1, 5).sum(1), rows_per_unit=5)
    for round_ in range(6):
        x = torch.cat([batch(round_), batch(round_ + 100)])
        with plain.capture():
            losses = row_losses(module_of(plain), x).view(-1, 5).sum(1)
        plain.backward(losses, rows_per_unit=5)
        run(x)
        assert_same(plain, recorded)
        plain.apply()
        recorded.apply()


def losses_of(module: nn.Module, x: Tensor, owner: Tensor) -> Tensor:
    """Of three units, whose rows `owner` tells."""
    return torch.zeros(3).index_add(0, owner, row_losses(module, x))


@pytest.mark.parametrize("name", ["rows", "mixed", "many rows", "images"])
def test_units_of_unequal_numbers_of_rows(name):
    make, batch = NETS[name]
    plain, recorded = pair(make)
    module = module_of(recorded)

    run = recorded.compile(lambda x, owner: losses_of(module, x, owner), rows_per_unit=None)
    for round_, offsets in enumerate(
        ([0, 2, 2, 5], [0, 1, 4, 5], [0, 0, 5, 5], [0, 3, 4, 5], [0, 2, 4, 5], [0, 5, 5, 5])
    ):
        x, offsets, mask = batch(round_), torch.tensor(offsets), torch.tensor([True, round_ != 3, True])
        owner = torch.repeat_interleave(torch.arange(3), offsets.diff())
        with plain.capture():
            losses = losses_of(module_of(plain), x, owner)
        plain.backward(losses, offsets=offsets, unit_mask=mask)
        run(x, owner, offsets=offsets, unit_mask=mask)
        assert_same(plain, recorded)
        plain.apply()
        recorded.apply()


def test_a_tied_table_under_units_of_unequal_numbers_of_rows_is_refused():
    """Its cross term pads units to the longest one, which is a number."""
    trainer, _ = pair(NETS["tied"][0])
    module, x, owner = module_of(trainer), NETS["tied"][1](0), torch.tensor([0, 0, 1, 2, 2])
    run = trainer.compile(lambda x, owner: losses_of(module, x, owner), rows_per_unit=None)
    with pytest.raises(UnsupportedOperationError, match="looks at a tensor's numbers"):
        for _ in range(3):
            run(x, owner, offsets=torch.tensor([0, 2, 3, 5]))


def test_offsets_that_do_not_fit_are_refused():
    trainer, _ = pair(NETS["rows"][0])
    module, x = module_of(trainer), NETS["rows"][1](0)
    ragged = trainer.compile(lambda x: row_losses(module, x)[:3], rows_per_unit=None)
    for offsets, what in (
        (None, "give offsets"),
        (torch.tensor([0, 1, 2, 4]), "describe 4 rows, the batch has 5"),
        (torch.tensor([0, 3, 2, 5]), "never decrease"),
        (torch.tensor([0.0, 5.0]), "int64"),
    ):
        with pytest.raises(ConfigError, match=what):
            ragged(x, offsets=offsets)
    with pytest.raises(ConfigError, match="one of both"):
        record(trainer)(x, offsets=torch.tensor([0, 5]))


def test_a_loss_scale_and_half_precision():
    make, batch = NETS["mixed"]
    plain, recorded = pair(make)
    module = module_of(recorded)
    run = recorded.compile(lambda x: row_losses(module, x), loss_scale=64.0)
    for round_ in range(6):
        x = batch(round_)
        with torch.autocast("cpu", torch.bfloat16):
            with plain.capture():
                losses = row_losses(module_of(plain), x)
            plain.backward(losses, rows_per_unit=1, loss_scale=64.0)
            run(x)
        assert_same(plain, recorded)
        plain.apply()
        recorded.apply()


def test_a_unit_that_is_not_finite_is_left_out():
    make, batch = NETS["many rows"]
    plain, recorded = pair(make)
    run = record(recorded)
    for round_ in range(4):
        x = batch(round_)
        if round_ == 2:
            x[1] = float("nan")
        take(plain, x)
        run(x)
        assert_same(plain, recorded)
        assert recorded._step.sums.flat.isfinite().all()
        plain.apply()
        recorded.apply()


def test_python_runs_where_passes_are_looked_at_and_in_the_trace_alone():
    make, batch = NETS["rows"]
    (trainer, _), rounds = pair(make), []
    module = module_of(trainer)
    module.register_forward_pre_hook(lambda *_: rounds.append(round_))
    run = record(trainer)
    for round_ in range(1, ROUNDS + 1):
        run(batch(round_))
        trainer.apply()
    assert rounds == [1, 2, 3, 4, 8]


def test_passes_that_are_looked_at_are_probed(monkeypatch):
    """All of them, also where the pattern of calls came as often as makes it due no more."""
    trainer, _ = pair(NETS["rows"][0])
    run, x, probed = record(trainer), NETS["rows"][1](0), []
    look = trainer._probe._probe
    run(x)
    (entry,) = run._recorded.values()
    monkeypatch.setattr(trainer._probe, "_probe", lambda *args: probed.append(entry.calls) or look(*args))
    for _ in range(15):
        run(x)
        trainer._step.discard()
    assert sorted(set(probed)) == [2, 4, 8, 16]


def test_replays_take_exact_products():
    trainer, _ = pair(NETS["rows"][0])
    run, x, place = record(trainer), NETS["rows"][1](0), torch.backends.mkldnn.matmul
    for _ in range(4):
        run(x)
    (entry,) = run._recorded.values()
    seen, graph = [], entry.run
    entry.run = lambda *args: seen.append(place.fp32_precision) or graph(*args)
    before = place.fp32_precision
    place.fp32_precision = "bf16"
    try:
        run(x)
        assert place.fp32_precision == "bf16"
    finally:
        place.fp32_precision = before
    assert seen == ["ieee"]


def test_another_form_is_another_recording():
    make, batch = NETS["rows"]
    plain, recorded = pair(make)
    run = record(recorded)
    for round_ in range(8):
        x = batch(round_)[: 5 - round_ % 2]
        take(plain, x)
        run(x)
        assert_same(plain, recorded)
        plain.apply()
        recorded.apply()


def test_training_mode_and_frozen_parameters_belong_to_the_form():
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.999999), nn.Linear(8, 2))

    trainer, _ = pair(make)
    run, x = record(trainer), NETS["rows"][1](0)
    for _ in range(3):
        run(x)
        trainer.apply()
    module_of(trainer).eval()
    assert torch.equal(run(x), row_losses(module_of(trainer), x))


def test_dropout_is_drawn_anew_in_each_replay():
    trainer, _ = pair(lambda: nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 2)))
    run, x = record(trainer), NETS["rows"][1](0)
    found = []
    for _ in range(7):
        found.append(run(x))
        trainer._step.discard()
    assert len({tuple(losses.tolist()) for losses in found}) == 7


def test_many_forms_run_as_they_are(caplog):
    trainer, plain = pair(NETS["rows"][0])
    run = record(trainer)
    for size in range(1, 12):
        x = torch.randn(size, 4)
        run(x)
        take(plain, x)
        assert_same(plain, trainer)
    assert caplog.text.count("more than 8 forms") == 1


# What is refused


class Peeks(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out if float(self.weight.detach().sum()) > -1e9 else -out


class Keeps(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


class Picks(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return super().forward(x[order])[order.argsort()]


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: Peeks(4, 2), "looks at a tensor's numbers"),
        (lambda: Keeps(4, 2), "Keeps keeps a tensor"),
        (lambda: Picks(4, 2), "rows are picked by what the data say"),
        (
            lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 2)), nn.Linear(2, 2)),
            "a weight is computed from one parameter alone",
        ),
    ],
)
def test_what_can_not_be_recorded_is_refused_and_nothing_is_lost(make, what):
    trainer, plain = pair(make)
    run, x = record(trainer), NETS["rows"][1](0)
    with pytest.raises(UnsupportedOperationError, match=what):
        for _ in range(3):
            run(x)
            trainer.apply()
    # The step is dropped, and passes as they are go on.
    assert not trainer._step.sums.flat.any()
    if what.startswith("rows are picked"):
        return
    for done in range(2):
        take(plain, x)
        plain.apply()
        assert done < 2
    take(plain, x)
    take(trainer, x)
    assert_same(plain, trainer)


def test_a_batch_that_is_no_argument_is_refused():
    trainer, _ = pair(NETS["rows"][0])
    module, x = module_of(trainer), NETS["rows"][1](0)
    run = trainer.compile(lambda rows: row_losses(module, rows) * x[:, 0].exp())
    run(x)
    run(x)
    with pytest.raises(UnsupportedOperationError, match="neither an argument nor a parameter or buffer"):
        run(x)


def test_numbers_are_no_arguments():
    trainer, _ = pair(NETS["rows"][0])
    module = module_of(trainer)
    run = trainer.compile(lambda x, k: k * row_losses(module, x))
    with pytest.raises(ConfigError, match="argument 1 is a float"):
        run(NETS["rows"][1](0), 2.0)


def test_settings_that_look_at_numbers_are_refused():
    adaptive, _ = pair(NETS["rows"][0], clip=ClipSpec(0.5, "adaptive", count_noise=5.0))
    with pytest.raises(ConfigError, match="adaptive"):
        record(adaptive)
    recomputed, _ = pair(NETS["rows"][0], perf=PerfSpec(keep="recompute"))
    with pytest.raises(ConfigError, match="recompute"):
        record(recomputed)


def test_masks_and_rows_that_do_not_fit_are_refused():
    trainer, _ = pair(NETS["rows"][0])
    run, x = record(trainer), NETS["rows"][1](0)
    for _ in range(3):
        run(x)
    with pytest.raises(ConfigError, match=r"unit_mask: expected bool \[5\]"):
        for _ in range(2):
            run(x, unit_mask=torch.ones(4, dtype=torch.bool))


class Checkpointed(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False))


def test_checkpoints_are_recorded_with_their_second_run():
    plain, recorded = pair(lambda: Checkpointed(0.0))
    run = record(recorded)
    for round_ in range(6):
        x = NETS["rows"][1](round_)
        take(plain, x)
        run(x)
        assert_same(plain, recorded)
        plain.apply()
        recorded.apply()
    (entry,) = run._recorded.values()
    calls = [str(node.target) for node in entry.traced.graph.graph.nodes]
    assert calls.count("aten.tanh.default") == 2


def test_a_random_checkpoint_is_refused():
    trainer, _ = pair(lambda: Checkpointed(0.5))
    run, x = record(trainer), NETS["rows"][1](0)
    run(x)
    run(x)
    with pytest.raises(UnsupportedOperationError, match="activation checkpoints"):
        run(x)


@pytest.mark.parametrize(
    "name",
    ["flash_attention", "efficient_attention", "cudnn_attention", "efficient_attention_backward"],
)
def test_attention_in_a_checkpoint_is_random_by_its_dropout(name):
    """torch marks these kernels as random whatever their dropout is."""
    operation = getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default
    names = [argument.name for argument in operation._schema.arguments]
    step = SimpleNamespace(state=SimpleNamespace(has_checkpoint=True))
    for dropout, refused in ((0.0, False), (0.1, True)):
        graph = torch.fx.Graph()
        given = [dropout if argument == "dropout_p" else graph.placeholder(argument) for argument in names]
        graph.call_function(operation, tuple(given))
        with pytest.raises(UnsupportedOperationError) if refused else nullcontext():
            _check_randomness(step, torch.fx.GraphModule(nn.Module(), graph))
