"""A training that is planned and not run: what it needs, and what noise its budget asks for."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from synthward.engine.accounting import calibrate_noise
from synthward.engine.accounting.events import check_count, check_sample_rate
from synthward.engine.errors import ConfigError
from synthward.engine.estimate import Device, Setting, Workload, estimate
from synthward.engine.spec import ClipSpec, PerfSpec, check_positive
from synthward.generators.registry import make_settings
from synthward.run.budget import plan_budget
from synthward.run.decoder import decoder_workload, parse_decoder
from synthward.run.estimate import generator_workload
from synthward.run.fit import FitOptions
from synthward.schema import Schema

# Rules whose groups need no names of parameters.
CLIPPINGS = ("flat", "per-layer", "automatic")
_GIB, _GIGA, _TERA = 1 << 30, 1e9, 1e12


@dataclass(frozen=True)
class Question:
    """What was asked. A schema (with a generator's name and settings) or a decoder (`parse_decoder`), not both.

    `device_memory` is in GiB, rates are in TFLOP/s and GB/s; None for the device's own (`Device`).
    """

    schema: Schema | None = None
    generator: str = "diffusion"
    settings: dict[str, Any] = field(default_factory=dict)
    decoder: str | None = None
    units: int | None = None
    sample_rate: float | None = None
    batch: float | None = None
    physical_batch_size: int | None = None
    steps: int = 1000
    ranks: int = 1
    parallel: str = "replicate"
    precision: str = "fp32"
    clipping: str = "flat"
    keep: str = "full"
    checkpoint: bool = False
    offload: bool = False
    device: str | None = None
    device_memory: float | None = None
    device_flops: float | None = None
    exact_flops: float | None = None
    bandwidth: float | None = None
    link: float | None = None
    epsilon: float | None = None
    delta: float | None = None
    accountant: str = "pld"


def plan_training(question: Question) -> dict[str, Any]:
    """The plan as plain values: model, parameters, batch, physical batches, memory of a rank in bytes, norm methods,
    operations and traffic of a step, days, privacy (None unless asked for) and what was assumed.

    Raises:
        ConfigError: an option is missing, superfluous or no training.
        UnsupportedOperationError: a layer without a rule.
    """
    if (question.schema is None) == (question.decoder is None):
        raise ConfigError("--schema, --decoder: give one of them: a generator's training or a decoder's")
    if question.clipping not in CLIPPINGS:
        raise ConfigError(f"--clipping: got {question.clipping!r}; choose one of {', '.join(CLIPPINGS)}")
    batch, rate = _batch(question)
    setting = Setting(
        batch=batch,
        steps=question.steps,
        ranks=question.ranks,
        parallel=question.parallel,
        precision=question.precision,
        clip=ClipSpec(1.0, question.clipping),
        perf=PerfSpec(keep=question.keep),
        offload=question.offload,
        physical_batch_size=question.physical_batch_size,
    )
    device, workload = _device(question), _workload(question)
    privacy = _privacy(question, rate)
    found = estimate(workload, setting, device)
    return {
        "model": workload.name,
        "parameters": found.parameters,
        **{name: getattr(question, name) for name in ("ranks", "parallel", "precision", "clipping", "keep")},
        "checkpoint": question.checkpoint,
        "offload": question.offload,
        "device": {k: v for k, v in asdict(device).items() if k != "rates"},
        "batch": batch,
        "physical_batch_size": found.physical_batch_size,
        "physical_batches": found.physical_batches,
        "largest_physical_batch_size": found.largest_physical_batch_size,
        "fits": found.fits,
        "memory": {**asdict(found.memory), "total": found.memory.total},
        "methods": [asdict(method) for method in found.methods],
        "step": {**asdict(found.step), "seconds": found.step.seconds},
        "steps": question.steps,
        "days": found.days,
        "privacy": privacy,
        "assumptions": list(found.assumptions),
    }


def _batch(question: Question) -> tuple[float, float | None]:
    """Expected units of a step, and the sampling rate if it is known."""
    if question.units is not None:
        check_count("--units", question.units)
    if question.sample_rate is not None:
        check_sample_rate(question.sample_rate)
    units, batch, rate = question.units, question.batch, question.sample_rate
    if batch is not None:
        check_positive(batch, "--batch")
        if rate is not None and units is not None:
            raise ConfigError(
                "--batch: is the sample rate times the units, which are both given; leave one out"
            )
        if rate is None and units is not None:
            if batch > units:
                raise ConfigError(f"--batch: {batch:g} is more than the {units} units")
            rate = batch / units
        return float(batch), rate
    if rate is None and question.schema is not None:
        rate = FitOptions.sample_rate
    if units is None or rate is None:
        raise ConfigError("--batch: is missing; give it, or --units (a public guess) and --sample-rate")
    return max(rate * units, 1.0), rate


def _workload(question: Question) -> Workload:
    if question.schema is not None:
        if question.checkpoint:
            raise ConfigError("--checkpoint: is for --decoder; the generators do not run their layers again")
        settings = make_settings(question.generator, question.settings)
        return generator_workload(question.schema, question.generator, settings)
    assert question.decoder is not None
    if question.settings:
        raise ConfigError("--set: is for --schema; a decoder's sizes stand in --decoder")
    shape = parse_decoder(question.decoder)
    return decoder_workload(shape, name=f"decoder {question.decoder}", recomputes=question.checkpoint)


def _device(question: Question) -> Device:
    """The kind's own, with what was given in its place."""
    kind = question.device or ("cpu" if question.schema is not None else "gpu")
    if kind not in ("cpu", "gpu"):
        raise ConfigError(f"--device: got {kind!r}; choose cpu or gpu")
    device = Device.here(question.ranks) if kind == "cpu" else Device.gpu(question.precision)
    given = {
        "memory": (question.device_memory, _GIB),
        "flops": (question.device_flops, _TERA),
        "exact_flops": (question.exact_flops, _TERA),
        "bandwidth": (question.bandwidth, _GIGA),
        "link": (question.link, _GIGA),
    }
    changed: dict[str, Any] = {k: value * unit for k, (value, unit) in given.items() if value is not None}
    if question.exact_flops is not None or question.bandwidth is not None:
        # The rates that were measured here are those of another machine.
        changed["rates"] = None
    return replace(device, **changed)


def _privacy(question: Question, rate: float | None) -> dict[str, Any] | None:
    """The noise that the budget asks for."""
    if question.epsilon is None and question.delta is None:
        return None
    if question.epsilon is None or question.delta is None:
        raise ConfigError("--epsilon, --delta: give both, or neither")
    if rate is None:
        raise ConfigError("--epsilon: needs the sample rate; give --sample-rate, or --units beside --batch")
    told = {
        "epsilon": question.epsilon,
        "delta": question.delta,
        "sample_rate": rate,
        "accountant": question.accountant,
    }
    if question.schema is None:
        noise = calibrate_noise(question.epsilon, question.delta, rate, question.steps, question.accountant)
        return {**told, "noise_multiplier": noise, "query_noise_multiplier": None}
    options = FitOptions(steps=question.steps, sample_rate=rate, accountant=question.accountant)
    mechanism = options.mechanism(question.epsilon, question.delta)
    budget = plan_budget(question.epsilon, question.delta, question.accountant, mechanism, question.steps)
    return {
        **told,
        "noise_multiplier": budget.noise_multiplier,
        "query_noise_multiplier": budget.query_noise_multiplier,
    }
