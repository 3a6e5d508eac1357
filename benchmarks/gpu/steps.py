"""Whole steps of training: plain PyTorch, eager and compiled, and this engine in all its ways, in bf16 and fp32.

A step is forward, backward and Adam; a private one clips each row's gradient and adds noise of the cipher. All variants
begin with the same weights and train on the same batch. Ratios are to plain eager PyTorch with its fused Adam.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.ceilings import rates
from benchmarks.gpu.clock import timed
from benchmarks.gpu.models import workloads
from benchmarks.gpu.section import Job, Options, Section
from benchmarks.gpu.side_by_side import PLAIN, PRIVATE, Made, Setup, Variant, compare
from synthward.engine import KeySchedule, PrivacyPlan, PrivateTrainer

PER_LAYER, RECORDED, FUSED = "private per-layer", "private recorded", "private fused"
PLAIN_COMPILED, PLAIN_RECORDED = "plain compiled", "plain reduce-overhead"
# A step that is not compiled by then says so.
COMPILE_LIMIT = 60.0
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

Batch = tuple[Tensor, ...]


def plain(setup: Setup, batch: Batch, *, compile_mode: str | None = None) -> Made:
    """Forward, backward of the mean loss, Adam; `compile_mode`: of `torch.compile`."""
    network = setup.network()
    optimizer = setup.optimizer_of(network, fused=True)

    def mean_loss(*batch: Tensor) -> Tensor:
        return setup.losses(network, batch).mean()

    loss: Callable[..., Tensor] = mean_loss
    if compile_mode is not None:
        torch._dynamo.reset()
        loss = torch.compile(mean_loss, mode=compile_mode, dynamic=False)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(*batch).backward()
        optimizer.step()

    return Made(step, network)


def make_trainer(setup: Setup, clipping: str) -> PrivateTrainer:
    """Over the setup's network; its plan pays for any number of steps."""
    network = setup.network()
    plan = PrivacyPlan(
        sample_rate=0.01,
        noise_multiplier=setup.noise,
        max_grad_norm=setup.clip,
        steps=10**6,
        expected_batch_size=setup.batch,
        clipping=clipping,
    )
    optimizer = setup.optimizer_of(network, fused=False)
    return PrivateTrainer(network, optimizer, plan, keys=KeySchedule.from_os(), ledger=None)


def private(setup: Setup, batch: Batch, *, clipping: str = "flat") -> Made:
    trainer = make_trainer(setup, clipping)
    network = trainer._step.module

    def step() -> None:
        with trainer.capture():
            losses = setup.losses(network, batch)
        trainer.backward(losses, rows_per_unit=1)
        trainer.apply()

    return Made(step, network, functools.partial(_methods, trainer))


def recorded(setup: Setup, batch: Batch, *, clipping: str = "flat", fuse: bool = False) -> Made:
    """Its passes recorded (`PrivateTrainer.compile`): CUDA graphs; `fuse`: through torch's compiler as well."""
    trainer = make_trainer(setup, clipping)
    network = trainer._step.module
    run = trainer.compile(lambda *batch: setup.losses(network, batch), fuse=fuse)

    def step() -> None:
        run(*batch)
        trainer.apply()

    return Made(step, network, functools.partial(_methods, trainer))


def _methods(trainer: PrivateTrainer) -> list[dict[str, Any]]:
    """What the planner has chosen, added up by kind of parameter and method."""
    kinds = {
        f"{prefix}.{name}" if prefix else name: f"{type(layer).__name__}.{name}"
        for prefix, layer in trainer._step.module.named_modules()
        for name, _ in layer.named_parameters(recurse=False)
    }
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for choice in trainer.explain():
        key = (kinds[choice.parameter], choice.method)
        row = found.setdefault(key, {"parameters": 0, "flops": 0.0, "bytes": 0.0, "extra_bytes": 0.0})
        row["parameters"] += 1
        row["flops"] += choice.flops
        row["bytes"] += choice.bytes
        row["extra_bytes"] += choice.memory
    return [{"kind": kind, "method": method, **row} for (kind, method), row in found.items()]


# A way to take a step is one line here. Recorded passes run as they are at their 1st, 2nd, 4th and 8th call.
VARIANTS: dict[str, Variant] = {
    PLAIN: Variant(plain),
    PRIVATE: Variant(private),
    PER_LAYER: Variant(functools.partial(private, clipping="per-layer")),
    RECORDED: Variant(recorded, warm_up=8),
    f"{RECORDED} per-layer": Variant(functools.partial(recorded, clipping="per-layer"), warm_up=8),
    PLAIN_COMPILED: Variant(functools.partial(plain, compile_mode="default"), limit=COMPILE_LIMIT),
    PLAIN_RECORDED: Variant(functools.partial(plain, compile_mode="reduce-overhead"), 5, COMPILE_LIMIT),
    FUSED: Variant(functools.partial(recorded, fuse=True), 8, COMPILE_LIMIT),
}
EAGER = (PLAIN, PRIVATE, PER_LAYER, RECORDED, f"{RECORDED} per-layer")
COMPILED = (PLAIN, PLAIN_COMPILED, PLAIN_RECORDED, RECORDED, FUSED)
SWEPT = (PLAIN, PRIVATE, PER_LAYER, RECORDED)


def plain_flops(setup: Setup) -> float:
    """Floating-point operations of the products of one plain step, counted as they run."""
    batch = setup.data()
    network = setup.network()
    with FlopCounterMode(display=False) as counter:
        setup.losses(network, batch).mean().backward()
    return float(counter.get_total_flops())


def measure(name: str, dtype: str, variants: tuple[str, ...], options: Options) -> dict[str, Any]:
    """The row of a model, a type of numbers and some variants."""
    work = workloads(options.small)[name]
    setup = Setup(work, work.batch, DTYPES[dtype], options.device)
    base = [other for other in (PLAIN, PLAIN_COMPILED) if other in variants]
    named = {variant: VARIANTS[variant] for variant in variants}
    row: dict[str, Any] = {"model": name, **compare(setup, named, base=base, must=EAGER[:3])}
    row["flops"] = plain_flops(replace(setup, batch=row["batch"]))
    add_rates(row, options)
    return row


def add_rates(row: dict[str, Any], options: Options) -> None:
    """The share of the measured matrix rate that each variant reaches, by the plain step's operations."""
    if timed():
        rate = rates(options)[row["dtype"]]
        for found in row["variants"].values():
            if "seconds" in found:
                found["of_rate"] = row["flops"] / found["seconds"] / rate


# Seconds that a job takes besides its steps, and on an H200 those of one step in bf16 and fp32, roughly.
_BESIDES, _COMPILES = 8.0, 45.0
_STEP = {"gpt2-medium": (0.1, 0.8), "gpt2-small": (0.08, 0.6), "1.3b": (0.3, 2.5), "1.3b lora": (0.2, 1.8)}
_STEPS_TAKEN = 50


def _jobs(options: Options) -> list[Job]:
    """First what is eager, in bf16 and then fp32; what has to be compiled last."""
    names = [*workloads(options.small)]
    swept = [name for name in names if name.startswith("stack")]
    if not timed():
        # One of each kind, and nothing compiled: on a CPU that would take minutes.
        few = [name for name in names if name not in swept[2:]]
        return [
            *(_job(name, "bf16", "", EAGER[:3], options) for name in few),
            _job("gpt", "fp32", "", EAGER, options),
        ]
    eager = [
        _job(name, dtype, "", EAGER[:4] if name in swept else EAGER, options)
        for dtype in DTYPES
        for name in names
    ]
    compiled = [
        _job(name, dtype, " compiled", COMPILED, options)
        for dtype in DTYPES
        for name in names
        if name not in swept
    ]
    return eager + compiled


def _job(name: str, dtype: str, kind: str, variants: tuple[str, ...], options: Options) -> Job:
    step = _STEP.get(name, (0.03, 0.2))[dtype == "fp32"]
    seconds = _BESIDES + _STEPS_TAKEN * step + (_COMPILES if kind else 0.0)
    return Job(f"{name} {dtype}{kind}", seconds, functools.partial(measure, name, dtype, variants, options))


_COLUMNS = {
    "private": (PRIVATE, "ratio"),
    "memory": (PRIVATE, "peak_ratio"),
    "layer": (PER_LAYER, "ratio"),
    "memory ": (PER_LAYER, "peak_ratio"),
    "recorded": (RECORDED, "ratio"),
    "layer ": (f"{RECORDED} per-layer", "ratio"),
    "plain compiled": (PLAIN_COMPILED, "ratio"),
    "graphs": (PLAIN_RECORDED, "ratio"),
    "fused": (FUSED, "ratio"),
    "over comp": (FUSED, f"over {PLAIN_COMPILED}"),
}


def _table(rows: dict[str, dict[str, Any]]) -> str:
    """A line for each model and type of numbers: ratios to the plain step; the sweep in one line."""
    models: dict[str, dict[str, Any]] = {}
    for job, row in rows.items():
        name = job.removesuffix(" compiled")
        have = models.setdefault(name, {**row, "variants": {}})
        # What both jobs have measured is told from the one that compiles nothing.
        have["variants"] = (
            {**row["variants"], **have["variants"]}
            if job != name
            else {**have["variants"], **row["variants"]}
        )
    head = f"{'over plain eager':18}{'batch':>6}{'plain ms':>9}{'rate':>5}"
    lines = [head + "".join(f"{title:>{len(title) + 2}}" for title in _COLUMNS)]
    sweep: dict[str, list[str]] = {}
    for name, row in models.items():
        if name.startswith("stack"):
            dtype = name.split()[-1]
            sweep.setdefault(dtype, []).append(f"{name.split()[2]}: {_figure(row, PRIVATE, 'ratio')}")
        else:
            lines.append(_line(name, row))
    lines += [f"stack, private {dtype} by T: {', '.join(found)}" for dtype, found in sweep.items()]
    return "\n".join([*lines, *_failures(models)])


def _line(name: str, row: dict[str, Any]) -> str:
    found = row["variants"].get(PLAIN, {})
    milliseconds = f"{1e3 * found['seconds']:.2f}" if "seconds" in found else "ran"
    share = f"{100 * found['of_rate']:.0f}%" if "of_rate" in found else "-"
    batch = f"{row['batch']}{'*' if row['halved'] else ''}"
    figures = [f"{_figure(row, *where):>{len(title) + 2}}" for title, where in _COLUMNS.items()]
    return f"{name:18}{batch:>6}{milliseconds:>9}{share:>5}{''.join(figures)}"


def _figure(row: dict[str, Any], variant: str, key: str) -> str:
    found = row["variants"].get(variant, {})
    if "failed" in found:
        return "failed"
    value = found.get(key)
    return "-" if value is None else f"{value:.3f}"


def _failures(models: dict[str, dict[str, Any]]) -> list[str]:
    """Variants that could not be measured, by reason; batches that were halved."""
    said: dict[str, list[str]] = {}
    for name, row in models.items():
        for variant, found in row["variants"].items():
            if "failed" in found:
                said.setdefault(f"{variant}: {found['failed']}", []).append(name)
    lines = [f"{', '.join(names)}: {why}" for why, names in said.items()]
    halved = [name for name, row in models.items() if row["halved"]]
    return [*lines, *([f"* halved, for lack of memory: {', '.join(halved)}"] if halved else [])]


SECTION = Section("steps", "whole steps, private over plain", _jobs, _table)
