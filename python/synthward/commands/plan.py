"""``synthward plan``: what a training will need, before anything is allocated."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from synthward.commands.common import Json, emit, interruptible


@interruptible("run the command again")
def plan(
    schema: Annotated[
        Path | None, typer.Option("--schema", help="Schema of the records: plan a generator.")
    ] = None,
    generator: Annotated[str, typer.Option("--generator", help="diffusion or gan.")] = "diffusion",
    unit: Annotated[
        str | None, typer.Option("--unit", help="Column of the privacy unit; default: the schema's.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the generator.")
    ] = None,
    decoder: Annotated[
        str | None,
        typer.Option(
            "--decoder",
            help="Or a decoder: gpt2-small, gpt2-medium, 1.3b, 10b or layers=24,width=2048,heads=16,vocab=50257,"
            "times=1024.",
        ),
    ] = None,
    units: Annotated[
        int | None, typer.Option("--units", help="Public guess of the number of privacy units.")
    ] = None,
    sample_rate: Annotated[
        float | None, typer.Option("--sample-rate", help="Probability of a unit to be in a step's batch.")
    ] = None,
    batch: Annotated[
        float | None, typer.Option("--batch", help="Expected units of a step, instead of rate times units.")
    ] = None,
    physical_batch_size: Annotated[
        int | None,
        typer.Option("--physical-batch-size", help="Units at once on a rank [the most that fit]."),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Training steps.")] = 1000,
    ranks: Annotated[int, typer.Option("--ranks", help="Processes, one device each.")] = 1,
    parallel: Annotated[str, typer.Option("--parallel", help="replicate, or shard (FSDP2).")] = "replicate",
    precision: Annotated[str, typer.Option("--precision", help="fp32, or bf16 by autocast.")] = "fp32",
    clipping: Annotated[str, typer.Option("--clipping", help="flat, per-layer or automatic.")] = "flat",
    keep: Annotated[
        str, typer.Option("--keep", help="What waits for the clip: full, bf16 or recompute.")
    ] = "full",
    checkpoint: Annotated[
        bool, typer.Option("--checkpoint", help="Activation checkpointing of the decoder's blocks.")
    ] = False,
    offload: Annotated[
        bool, typer.Option("--offload", help="Parameters, sums and optimizer's state on the host.")
    ] = False,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu (this machine) or gpu [cpu; for a decoder gpu].")
    ] = None,
    device_memory: Annotated[float | None, typer.Option("--device-memory", help="GiB.")] = None,
    device_flops: Annotated[
        float | None, typer.Option("--device-flops", help="TFLOP/s that the network's products reach.")
    ] = None,
    exact_flops: Annotated[
        float | None,
        typer.Option("--exact-flops", help="TFLOP/s of products of fp32, for norms and sums of it."),
    ] = None,
    bandwidth: Annotated[float | None, typer.Option("--bandwidth", help="GB/s to and from memory.")] = None,
    link: Annotated[float | None, typer.Option("--link", help="GB/s from one rank to the others.")] = None,
    epsilon: Annotated[float | None, typer.Option("--epsilon", help="Solve for the noise as well.")] = None,
    delta: Annotated[float | None, typer.Option("--delta", help="Failure probability.")] = None,
    accountant: Annotated[str, typer.Option("--accountant", help="pld, rdp or prv.")] = "pld",
    json: Json = False,
) -> None:
    """Memory per rank, norm methods, operations and days of a training, before anything is allocated."""
    from synthward.run.plan import Question, plan_training

    question = Question(
        schema=None if schema is None else _schema(schema, unit),
        generator=generator,
        settings=_settings(settings or []),
        decoder=decoder,
        units=units,
        sample_rate=sample_rate,
        batch=batch,
        physical_batch_size=physical_batch_size,
        steps=steps,
        ranks=ranks,
        parallel=parallel,
        precision=precision,
        clipping=clipping,
        keep=keep,
        checkpoint=checkpoint,
        offload=offload,
        device=device,
        device_memory=device_memory,
        device_flops=device_flops,
        exact_flops=exact_flops,
        bandwidth=bandwidth,
        link=link,
        epsilon=epsilon,
        delta=delta,
        accountant=accountant,
    )
    result = plan_training(question)
    emit(result, _lines(result), as_json=json)


def _schema(path: Path, unit: str | None) -> Any:
    from synthward.commands.fit import load_declared

    return load_declared(path, unit)


def _settings(pairs: list[str]) -> dict[str, Any]:
    from synthward.commands.fit import parse_settings

    return parse_settings(pairs)


def _lines(result: dict[str, Any]) -> list[str]:
    """The plan for people."""
    memory, step, privacy = result["memory"], result["step"], result["privacy"]
    parts = [(name, size) for name, size in memory.items() if name not in ("total", "host") and size]
    most = result["largest_physical_batch_size"]
    lines = [
        f"model: {result['model']}, {result['parameters']:,} parameters",
        f"batch: {result['batch']:g} units a step on {result['ranks']} rank(s), in {result['physical_batches']} "
        f"physical batch(es) of {result['physical_batch_size']} units on each",
        f"fits: {'yes' if result['fits'] else 'NO'} ({_size(memory['total'])} of {_size(result['device']['memory'])}; "
        f"the largest physical batch that fits: {most or 'none'})",
        "memory of a rank:",
        *(f"  {name:14} {_size(size):>12}" for name, size in parts),
        f"  {'total':14} {_size(memory['total']):>12}",
    ]
    if memory["host"]:
        lines.append(f"  {'on the host':14} {_size(memory['host']):>12}")
    lines.append("norms by:")
    lines += [f"  {m['kind']:28} {m['method']:15} x {m['parameters']}" for m in result["methods"]]
    lines += [
        f"step of a rank: {step['flops'] / 1e12:.4g} TFLOP ({step['norm_flops'] / 1e12:.3g} of it for norms), "
        f"{step['bytes'] / 1e9:.4g} GB of memory traffic, {step['exchanged_bytes'] / 1e9:.4g} GB to other ranks",
        f"time: {step['seconds']:.4g} s a step, {result['days']:.4g} days for {result['steps']} steps",
    ]
    if privacy is not None:
        lines.append(
            f"privacy: noise multiplier {privacy['noise_multiplier']:.5g} at rate {privacy['sample_rate']:g} for "
            f"epsilon {privacy['epsilon']:g}, delta {privacy['delta']:g}"
        )
    return [*lines, "assumed:", *(f"  {line}" for line in result["assumptions"])]


def _size(count: float) -> str:
    """Bytes for people."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count / 1024:.1f} KiB"
