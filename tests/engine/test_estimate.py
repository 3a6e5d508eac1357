"""Plans: what is told before a step is what the step then uses, and how it then measures."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from synthward.engine import ClipSpec, KeySchedule, PerfSpec, PrivacyPlan, PrivateTrainer, planner
from synthward.engine.contributions import Contributions
from synthward.engine.errors import ConfigError, UnsupportedOperationError
from synthward.engine.estimate import Built, Device, Setting, Workload, estimate, rehearse
from synthward.engine.estimate.cost import memory_of
from synthward.engine.estimate.rehearsal import shape_of
from synthward.engine.rates import measured_rates
from synthward.engine.rules import conv, linear, uses
from synthward.kernels import _select, planned_device
from synthward.kernels.conv import prefers_channels_last
from synthward.run.decoder import decoder_workload, parse_decoder
from tests.commandline import environment
from tests.distributed.launch import run_ranks
from tests.engine.used_memory import KINDS, ROOT

HERE = Device.here()
TINY = "layers=2,width=64,heads=4,vocab=96,times=32"


def told(name: str, units: int, clipping: str, keep: str, precision: str = "fp32") -> int:
    """Bytes that the plan tells for one rank."""
    work = KINDS[name]()
    setting = Setting(
        batch=units, clip=ClipSpec(1.0, clipping), perf=PerfSpec(keep=keep), precision=precision
    )
    return memory_of(shape_of(work), setting, HERE, rehearse(work, units, setting, HERE)).total


def used(name: str, units: int, clipping: str, keep: str, precision: str = "fp32") -> int:
    """Bytes that a process of its own uses for such steps."""
    words = [sys.executable, "-m", "tests.engine.used_memory", name, str(units), clipping, keep, precision]
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, check=True, timeout=600, env=environment()
    )
    return int(done.stdout)


SMALL_RUNS = [
    ("mlp", 1024, "flat", "full"),
    ("mlp", 1024, "per-layer", "full"),
    ("gpt", 8, "flat", "full"),
    ("unet", 32, "flat", "full"),
    ("decoder, recomputed", 8, "per-layer", "full"),
    ("diffusion", 2048, "flat", "full"),
]
MORE_RUNS = [
    ("mlp", 1024, "flat", "recompute"),
    ("gpt", 16, "per-layer", "full"),
    ("unet", 64, "per-layer", "full"),
    ("ehr", 16, "flat", "full"),
    ("decoder", 16, "per-layer", "full"),
    ("decoder", 16, "flat", "full"),
    ("decoder, recomputed", 16, "flat", "full"),
    ("decoder, recomputed", 16, "flat", "bf16"),
    ("gan", 2048, "per-layer", "full"),
    ("gan", 2048, "flat", "full"),
]


@pytest.mark.parametrize(
    ("name", "units", "clipping", "keep"),
    [*SMALL_RUNS, *(pytest.param(*run, marks=pytest.mark.slow) for run in MORE_RUNS)],
)
def test_a_small_run_uses_what_was_told(name, units, clipping, keep):
    expected, found = told(name, units, clipping, keep), used(name, units, clipping, keep)
    assert abs(expected - found) <= 0.15 * found, f"told {expected / 1e6:.1f} MB, used {found / 1e6:.1f} MB"


@pytest.mark.parametrize(
    ("name", "units", "keep"),
    [
        ("mlp", 1024, "full"),
        ("decoder", 8, "full"),
        pytest.param("decoder", 16, "bf16", marks=pytest.mark.slow),
    ],
)
def test_a_small_run_in_half_precision_uses_what_was_told(name, units, keep):
    expected, found = (of(name, units, "flat", keep, "bf16") for of in (told, used))
    assert abs(expected - found) <= 0.15 * found, f"told {expected / 1e6:.1f} MB, used {found / 1e6:.1f} MB"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "units", "parallel"),
    [("mlp", 256, "replicate"), ("decoder", 4, "replicate"), ("decoder", 4, "shard"), ("ehr", 2, "shard")],
)
def test_two_ranks_use_what_was_told_of_each(name, units, parallel):
    work, device = KINDS[name](), Device.here(2)
    setting = Setting(batch=2 * units, ranks=2, parallel=parallel)
    expected = memory_of(shape_of(work), setting, device, rehearse(work, units, setting, device)).total
    arguments = (name, units, "flat", "full", parallel)
    for found in run_ranks(2, "tests.engine.used_memory:main", *arguments, timeout=300.0):
        assert abs(expected - found) <= 0.15 * found, (
            f"told {expected / 1e6:.1f} MB, used {found / 1e6:.1f} MB"
        )


@pytest.mark.parametrize("clipping", ["flat", "per-layer"])
@pytest.mark.parametrize(
    ("name", "units"), [("mlp", 4), ("tiny", 4), ("unet", 4), ("diffusion", 8), ("gan", 8)]
)
def test_norms_are_taken_as_was_told(name, units, clipping):
    """The same planner on the same shapes: methods, operations and bytes, parameter by parameter."""
    work = decoder_workload(parse_decoder(TINY)) if name == "tiny" else KINDS[name]()
    setting = Setting(batch=units, clip=ClipSpec(1.0, clipping))
    planned = rehearse(work, units, setting, HERE).choices
    built = work.build()
    plan = PrivacyPlan(0.1, 1.0, 1.0, 10, float(units), clipping)
    trainer = PrivateTrainer(
        built.module, torch.optim.Adam(built.module.parameters()), plan, keys=KeySchedule.from_os()
    )
    data = work.data(units)
    with trainer.capture():
        losses = built.losses(*data)
    trainer.backward(losses, rows_per_unit=work.rows_per_unit)
    assert list(planned) == list(trainer.explain())


def test_a_gpu_s_norms_are_not_those_of_the_compiled_kernels():
    """Its kernels take the bias by itself, and its rates are others."""
    work = decoder_workload(parse_decoder(TINY))
    setting = Setting(batch=2)
    here, there = (rehearse(work, 2, setting, d).choices for d in (HERE, Device.gpu("fp32")))
    assert "with its weight" in {c.method for c in here}
    assert "with its weight" not in {c.method for c in there}


def test_operations_of_a_decoder_are_those_of_the_formula():
    shape = parse_decoder(TINY)
    found = rehearse(decoder_workload(shape), 3, Setting(batch=3), HERE)
    tokens, width = 3 * shape.times, shape.width
    weights = shape.layers * 12 * width**2 + shape.vocab * width
    pairs = 3 * shape.layers * shape.times**2 * width
    # Forward and input gradient; the weights' gradients are the sums. Attention: 2 products forward, 5 backward.
    # (A few of its biases are added up by small products.)
    assert found.counts.flops == pytest.approx(2 * 2 * tokens * weights + 7 * 2 * pairs, rel=1e-3)
    assert found.sum_flops == pytest.approx(2 * tokens * weights, rel=0.02)


def test_running_blocks_again_costs_their_forward_pass_and_saves_memory():
    shape = parse_decoder(TINY)
    # Per layer, since what flat clipping keeps is not what is recomputed.
    setting = Setting(batch=8, clip=ClipSpec(1.0, "per-layer"))
    plain, again = (
        rehearse(decoder_workload(shape, recomputes=recomputes), 8, setting, HERE)
        for recomputes in (False, True)
    )
    block = 2 * 8 * shape.times * shape.layers * (12 * shape.width**2 + 2 * shape.times * shape.width)
    # A block's last product is not run again: nothing needs its output.
    last = 2 * 8 * shape.times * shape.layers * 4 * shape.width**2
    assert block - last <= again.counts.flops - plain.counts.flops <= block
    assert again.memory["activations"] < plain.memory["activations"]


def test_ranks_divide_what_they_own():
    shape = shape_of(decoder_workload(parse_decoder(TINY)))
    work = decoder_workload(parse_decoder(TINY))
    one = Setting(batch=64)
    found = rehearse(work, 4, one, HERE)

    def parts(**changes):
        return memory_of(shape, replace(one, **changes), HERE, found)

    alone, copies, shards = parts(), parts(ranks=4), parts(ranks=4, parallel="shard")
    assert alone.parameters == alone.sums == 4 * shape.total and alone.moments == 8 * shape.total
    assert (alone.exchange, alone.host) == (0, 0)
    assert copies.parameters == copies.sums == alone.sums
    assert copies.moments == shards.moments == 2 * 4 * -(-shape.total // 4)
    assert shards.parameters == shards.sums == 4 * -(-shape.total // 4)
    assert copies.exchange > 0 and shards.exchange > 0
    offloaded = parts(ranks=4, parallel="shard", offload=True)
    assert (offloaded.parameters, offloaded.sums, offloaded.moments) == (0, 0, 0)
    assert offloaded.host == shards.parameters + shards.sums + shards.moments


def test_the_batch_that_fits_is_the_largest():
    work = decoder_workload(parse_decoder(TINY))
    setting = Setting(batch=200, clip=ClipSpec(1.0, "flat"))
    shape = shape_of(work)

    def total(size: int) -> int:
        return memory_of(shape, setting, HERE, rehearse(work, size, setting, HERE)).total

    device = replace(HERE, memory=float(total(37) + 1000))
    found = estimate(work, setting, device)
    most = found.largest_physical_batch_size
    assert total(most) <= device.memory < total(most + 1)
    assert found.fits and found.physical_batch_size <= most
    assert found.physical_batches * found.physical_batch_size >= 200


def test_what_does_not_fit_is_told_and_not_refused():
    found = estimate(
        decoder_workload(parse_decoder(TINY)), Setting(batch=8), replace(HERE, memory=float(1 << 20))
    )
    assert (found.fits, found.largest_physical_batch_size, found.physical_batch_size) == (False, 0, 1)


def test_days_are_of_all_steps_and_fall_with_ranks():
    work, setting = decoder_workload(parse_decoder(TINY)), Setting(batch=256, steps=500)
    device = Device.gpu("fp32")
    one, four = estimate(work, setting, device), estimate(work, replace(setting, ranks=4), device)
    assert one.days == pytest.approx(500 * one.step.seconds / 86400)
    assert one.step.exchange_seconds == 0.0 < four.step.exchange_seconds
    assert four.step.compute_seconds < 0.5 * one.step.compute_seconds
    # Each rank sends all but its own part of the sums, and as much of the parameters.
    assert four.step.exchanged_bytes == pytest.approx(2 * 4 * one.parameters * 3 / 4)


def test_half_precision_halves_what_the_network_keeps():
    work = decoder_workload(parse_decoder("layers=4,width=64,heads=4,vocab=96,times=64"))
    whole, half = (
        rehearse(work, 8, Setting(batch=8, precision=p, clip=ClipSpec(1.0, "per-layer")), Device.gpu(p))
        for p in ("fp32", "bf16")
    )
    assert 0.4 < half.memory["activations"] / whole.memory["activations"] < 0.85


def convolutions() -> Workload:
    def build() -> Built:
        layers = nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16 * 16, 8)
        network = nn.Sequential(*layers)
        return Built(network, lambda x: network(x).float().square().sum(1))

    return Workload("convolutions", build, lambda units: (torch.ones(units, 4, 8, 8),))


HAS_TRITON = importlib.util.find_spec("triton") is not None
HALF = {
    "mlp": KINDS["mlp"],
    "decoder": lambda: decoder_workload(parse_decoder(TINY)),
    "convolutions": convolutions,
}


@pytest.fixture
def held(monkeypatch) -> list[tuple[str, str, tuple[int, ...], torch.dtype]]:
    """What waits for the clip: family, name, shape and type of each matrix."""
    found: list[tuple[str, str, tuple[int, ...], torch.dtype]] = []
    hold = Contributions._hold

    def noted(self, group, items):
        hold(self, group, items)
        for _, use, _ in items:
            parts = ((n, v) for n, v in vars(use).items() if isinstance(v, torch.Tensor))
            family = type(use).__name__
            if isinstance(use, conv.ConvUse) and use.shape.channels_last:
                family = "ConvUse of channels last"
            found.extend((family, n, tuple(v.shape), v.dtype) for n, v in parts)

    monkeypatch.setattr(Contributions, "_hold", noted)
    return found


@pytest.mark.parametrize("keep", ["full", "bf16"])
@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_what_waits_for_the_clip_in_half_precision_is_what_was_told(monkeypatch, held, name, keep, place):
    """Of a real step, on a GPU's behalf with its choices: the same matrices, in the same types."""
    work, plan = HALF[name](), PrivacyPlan(0.1, 1.0, 1.0, 10, 4.0, "flat")
    device = HERE if place == "cpu" else replace(Device.gpu("bf16"), rates=HERE.norm_rates)
    setting = Setting(batch=4, precision="bf16", perf=PerfSpec(keep=keep))
    if place == "cuda":
        # The planner's choices are of the same rates, and a GPU does not interpret its kernels.
        monkeypatch.setattr(Device, "rates_of", lambda self, dtype: HERE.norm_rates)
        monkeypatch.setattr(_select, "_triton_found", lambda: HAS_TRITON)
    rehearse(work, 4, setting, device)
    planned = held.copy()
    held.clear()
    if place == "cuda":
        monkeypatch.setattr(uses, "place_of", lambda tensor: "cuda")
        monkeypatch.setattr(planner, "place_of", lambda tensor: "cuda")
        for rule in (linear, conv):
            monkeypatch.setattr(rule, "measured_type", lambda grads: grads.dtype)
        monkeypatch.setattr(conv, "prefers_channels_last", as_on_a_gpu)
    built, data = work.build(), work.data(4)
    optimizer = torch.optim.Adam(built.module.parameters())
    perf = PerfSpec(keep=keep)
    trainer = PrivateTrainer(built.module, optimizer, plan, keys=KeySchedule.from_os(), perf=perf)
    with torch.autocast("cpu", torch.bfloat16), trainer.capture():
        losses = built.losses(*data)
    trainer.backward(losses, rows_per_unit=work.rows_per_unit)
    assert planned == held
    products = {(family, dtype) for family, _, _, dtype in planned if family.startswith(("Outer", "Conv"))}
    assert {dtype for _, dtype in products} == {
        torch.float32 if (place, keep) == ("cpu", "full") else torch.bfloat16
    }
    has_moved = "ConvUse of channels last" in {family for family, _ in products}
    assert has_moved == (name == "convolutions" and place == "cuda" and HAS_TRITON)


def as_on_a_gpu(shape, images, grads) -> bool:
    token = planned_device.set("cuda")
    try:
        with FakeTensorMode() as mode:
            return prefers_channels_last(shape, mode.from_tensor(images), mode.from_tensor(grads))
    finally:
        planned_device.reset(token)


def test_a_gpu_s_operands_of_half_precision_wait_as_they_are():
    """The output gradients alone are new; a CPU copies both matrices of a layer to fp32."""
    layers, width, units = 6, 256, 512

    def build() -> Built:
        network = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
        return Built(network, lambda x: network(x).float().square().sum(1))

    work = Workload("layers", build, lambda n: (torch.zeros(n, width),))
    setting = Setting(batch=units, precision="bf16")
    on_cpu, on_gpu = (rehearse(work, units, setting, d).memory for d in (HERE, Device.gpu("bf16")))
    matrix = units * width
    assert on_cpu["gradients"] == pytest.approx(2 * layers * 4 * matrix, rel=0.1)
    assert on_gpu["gradients"] == pytest.approx(layers * 2 * matrix, rel=0.02)
    kept = replace(setting, perf=PerfSpec(keep="bf16"))
    assert rehearse(work, units, kept, Device.gpu("bf16")).memory == on_gpu, "there is nothing to round"


def test_a_gpu_s_norms_and_sums_of_half_precision_are_as_fast_as_its_network():
    """But sums of rows of several weights, which are more products than one."""
    device = Device.gpu("bf16")
    work = decoder_workload(parse_decoder(TINY))
    half = rehearse(work, 4, Setting(batch=4, precision="bf16"), device)
    # Units of 32 rows: `half_sums="auto"` is two products.
    assert half.sum_seconds == pytest.approx(2 * half.sum_flops / device.flops, rel=0.1)
    long = rehearse(
        decoder_workload(parse_decoder(TINY + ",times=64")), 4, Setting(batch=4, precision="bf16"), device
    )
    assert long.sum_seconds == pytest.approx(long.sum_flops / device.flops, rel=0.1)
    whole = rehearse(work, 4, Setting(batch=4), device)
    assert whole.sum_seconds == pytest.approx(whole.sum_flops / device.exact_flops)
    assert half.norm_seconds < 0.5 * whole.norm_seconds
    here = rehearse(work, 4, Setting(batch=4, precision="bf16"), HERE)
    assert here.sum_seconds == pytest.approx(here.sum_flops / HERE.exact_flops)


@pytest.mark.parametrize(
    ("kind", "keep", "mention"),
    [
        ("cpu", "full", "in fp32, as a CPU measures it"),
        ("gpu", "full", "in bf16 where the network multiplies in it"),
        ("gpu", "bf16", "what waits for the clip is in bf16;"),
    ],
)
def test_what_waits_is_told(kind, keep, mention):
    device = HERE if kind == "cpu" else Device.gpu("bf16")
    setting = Setting(batch=4, precision="bf16", perf=PerfSpec(keep=keep))
    told = estimate(decoder_workload(parse_decoder(TINY)), setting, device).assumptions
    assert sum(mention in line for line in told) == 1


def test_a_layer_without_a_rule_is_refused_by_name():
    def build() -> Built:
        network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        return Built(network, lambda x: network(x).sum(1))

    work = Workload("normalised", build, lambda units: (torch.zeros(units, 4),))
    with pytest.raises(UnsupportedOperationError, match="BatchNorm1d"):
        estimate(work, Setting(batch=4), HERE)


def test_a_plan_needs_no_rates_of_another_machine(monkeypatch):
    """Those of the device that is planned for are given, not measured here."""

    def fail(device):
        raise AssertionError("measured")

    monkeypatch.setattr("synthward.engine.planner.measured_rates", fail)
    estimate(decoder_workload(parse_decoder(TINY)), Setting(batch=4), Device.gpu("bf16"))


def test_this_machine_s_rates_are_the_measured_ones():
    rates = measured_rates(torch.device("cpu"))
    assert HERE.norm_rates == rates and HERE.bandwidth == rates.bytes
    assert Device.here(2).memory == HERE.memory / 2


@pytest.mark.parametrize(
    ("changes", "mention"),
    [
        ({"batch": 0.0}, "batch"),
        ({"ranks": 0}, "ranks"),
        ({"steps": True}, "steps"),
        ({"parallel": "tensor"}, "parallel"),
        ({"precision": "fp8"}, "precision"),
        ({"offload": True}, "offload"),
        ({"physical_batch_size": 0}, "physical batch size"),
    ],
)
def test_what_is_no_training_is_refused(changes, mention):
    with pytest.raises(ConfigError, match=mention):
        replace(Setting(batch=8.0), **changes)


@pytest.mark.parametrize(
    ("changes", "mention"), [({"kind": "tpu"}, "device"), ({"link": 0.0}, "device link")]
)
def test_what_is_no_device_is_refused(changes, mention):
    with pytest.raises(ConfigError, match=mention):
        replace(HERE, **changes)
