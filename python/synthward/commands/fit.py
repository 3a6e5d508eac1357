"""``synthward fit``: train a generator on records under a privacy budget."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from synthward.commands.common import Device, Json, budget_line, emit, interruptible, on_ranks, remark
from synthward.progress import make_progress

RESUME = "the same command with --resume goes on from the last checkpoint; what was spent stays spent"


@interruptible(RESUME)
@on_ranks
def fit(
    data: Annotated[Path, typer.Argument(help="Records: .csv, .csv.gz, .parquet or a folder of parts.")],
    schema: Annotated[Path, typer.Option("--schema", help="Schema of the records (TOML).")],
    epsilon: Annotated[float, typer.Option("--epsilon", help="Privacy budget per privacy unit.")],
    delta: Annotated[float, typer.Option("--delta", help="Failure probability; well below 1 / patients.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the run.")],
    generator: Annotated[str, typer.Option("--generator", help="diffusion or gan.")] = "diffusion",
    unit: Annotated[
        str | None, typer.Option("--unit", help="Column of the privacy unit; default: the schema's.")
    ] = None,
    holdout: Annotated[
        float | None, typer.Option("--holdout", help="Share of the units kept out of training [0.2].")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Delete the run in --out, its ledger included, and begin anew."),
    ] = False,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Reproducible run. NOT PRIVATE: the noise follows from it.")
    ] = None,
    accountant: Annotated[str | None, typer.Option("--accountant", help="pld, rdp or prv [pld].")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Training steps.")] = None,
    sample_rate: Annotated[
        float | None, typer.Option("--sample-rate", help="Probability of a unit to be in a step's batch.")
    ] = None,
    physical_batch_size: Annotated[
        int | None,
        typer.Option("--physical-batch-size", help="Units at once in memory; no effect on privacy."),
    ] = None,
    max_grad_norm: Annotated[
        float | None, typer.Option("--max-grad-norm", help="Clipping bound of a unit's gradient.")
    ] = None,
    noise: Annotated[
        str | None,
        typer.Option(
            "--noise",
            help="independent, or correlated over steps: banded, blt, banded-inverse [independent].",
        ),
    ] = None,
    bands: Annotated[int | None, typer.Option("--bands", help="Bands of correlated noise [8].")] = None,
    arithmetic: Annotated[
        str | None,
        typer.Option("--arithmetic", help="float, or discrete: integer releases, slower [float]."),
    ] = None,
    max_units: Annotated[
        int | None,
        typer.Option("--max-units", help="Public bound on the number of units: batches of one static size."),
    ] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate")] = None,
    budget: Annotated[
        Path | None,
        typer.Option("--budget", help="Budget file of the records: the run's cost is reserved there first."),
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option("--tensorboard", help="Folder for TensorBoard's event files.")
    ] = None,
    parallel: Annotated[
        str | None,
        typer.Option("--parallel", help="Of several processes: replicate, or shard (FSDP2) [replicate]."),
    ] = None,
    device: Device = "auto",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the generator.")
    ] = None,
    json: Json = False,
) -> None:
    """Train a generator so that what it learns is within (epsilon, delta) per privacy unit."""
    from synthward.engine.distributed.ranks import Ranks
    from synthward.engine.errors import CheckpointError
    from synthward.run import FitOptions, fit_run
    from synthward.run.folder import RUN_FILE

    if resume and not (out / RUN_FILE).is_file():
        raise CheckpointError(f"{out}: holds no run to resume; leave --resume away to begin one")
    declared = load_declared(schema, unit)
    chosen = parse_settings(settings or [])
    if learning_rate is not None:
        chosen["learning_rate"] = learning_rate
    check_bands(noise, bands)
    given = {
        "accountant": accountant,
        "steps": steps,
        "sample_rate": sample_rate,
        "physical_batch_size": physical_batch_size,
        "max_grad_norm": max_grad_norm,
        "holdout": holdout,
        "noise": noise,
        "bands": bands,
        "arithmetic": arithmetic,
        "max_units": max_units,
        "tensorboard": tensorboard,
        "parallel": parallel,
    }
    options = FitOptions(
        generator=generator,
        seed=seed,
        device=device,
        settings=chosen,
        **{k: v for k, v in given.items() if v is not None},  # type: ignore[arg-type]
    )
    if seed is not None:
        remark("warning: --seed makes this run reproducible and NOT PRIVATE; never release what it makes")
    begin = time.perf_counter()
    with make_progress() as progress:
        if max_units is not None and not resume:
            progress.note("choosing the noise and a static batch size; this takes some seconds")
        folder = fit_run(
            data,
            declared,
            epsilon=epsilon,
            delta=delta,
            out=out,
            options=options,
            resume=resume,
            overwrite=overwrite,
            budget_file=budget,
            progress=progress,
            ranks=Ranks.current(),
        )
    say_head_room(folder.info)
    spent = spent_budget(folder)
    result = {"run": folder.path, **spent, "seconds": round(time.perf_counter() - begin, 1)}
    lines = [
        f"run: {folder.path}",
        budget_line(spent["epsilon"], delta, spent["unit"], private=spent["private"]),
    ]
    emit(result, lines, as_json=json)


def check_bands(noise: str | None, bands: int | None) -> None:
    """Refuse bands for noise that has none, so that nobody believes to have what was left out."""
    from synthward.engine.errors import ConfigError

    if bands is not None and noise not in ("banded", "banded-inverse"):
        raise ConfigError(
            f"--bands: has no meaning with --noise {noise or 'independent'}; leave it out, or give --noise banded"
        )


def say_head_room(info: dict[str, Any]) -> None:
    """What batches of one static size cost, if the run has them."""
    from synthward.run.mechanism import Mechanism

    room = Mechanism.from_info(info).head_room(
        info["noise_multiplier"], info["steps"], info["delta"], info["accountant"]
    )
    if room is not None:
        remark(f"note: of the training steps, {room}")


def load_declared(path: Path, unit: str | None) -> Any:
    """The schema, with another privacy unit if one is given."""
    from synthward.schema import load_schema

    declared = load_schema(path)
    return declared if unit is None else declared.with_unit(unit)


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """``KEY=VALUE`` pairs as a dictionary of texts; the generator converts and checks them."""
    from synthward.engine.errors import ConfigError

    chosen = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--set: got {pair!r}; write KEY=VALUE, for example --set hidden=512")
        chosen[key.strip()] = value.strip()
    return chosen


def spent_budget(folder: Any) -> dict[str, Any]:
    """What the run's ledger says was spent, beside the plan that it was spent on."""
    from synthward.run.mechanism import Mechanism

    info = folder.info
    with folder.open_ledger(readonly=True) as ledger:
        epsilon = ledger.epsilon(info["delta"], info["accountant"])
    keys = ("run_id", "generator", "delta", "unit", "accountant", "private", "steps", "sample_rate")
    plan = {key: info[key] for key in (*keys, "noise_multiplier")}
    # A rate is that of a unit of the group whose turn it is.
    plan["period"] = Mechanism.from_info(info).period
    return {"epsilon": float(epsilon), "target_epsilon": info["epsilon"], **plan}
