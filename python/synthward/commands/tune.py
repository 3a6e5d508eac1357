"""``synthward tune``: choose a generator's settings, and pay for the choice."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from synthward.commands.common import Device, Json, budget_line, emit, interruptible, remark
from synthward.commands.fit import check_bands, load_declared, spent_budget
from synthward.progress import make_progress

STOPPED = "what had begun is charged whole and can not go on; the trials were deleted, and a new selection costs anew"


@interruptible(STOPPED)
def tune(
    data: Annotated[Path, typer.Argument(help="Records: .csv, .csv.gz, .parquet or a folder of parts.")],
    schema: Annotated[Path, typer.Option("--schema", help="Schema of the records (TOML).")],
    epsilon: Annotated[float, typer.Option("--epsilon", help="Privacy budget of the whole, per unit.")],
    delta: Annotated[float, typer.Option("--delta", help="Failure probability; well below 1 / patients.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the best trial's run.")],
    generator: Annotated[str, typer.Option("--generator", help="diffusion or gan.")] = "diffusion",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=V1,V2,...", help="Values to choose a setting from; repeat it."),
    ] = None,
    grid: Annotated[
        Path | None, typer.Option("--grid", help="The same as a TOML file: hidden = [64, 256].")
    ] = None,
    mean_trials: Annotated[
        float, typer.Option("--mean-trials", help="Trials on average; their number is random.")
    ] = 10.0,
    shape: Annotated[
        str, typer.Option("--shape", help="Law of their number: 0 (logarithmic), 1 (geometric) or poisson.")
    ] = "0",
    unit: Annotated[
        str | None, typer.Option("--unit", help="Column of the privacy unit; default: the schema's.")
    ] = None,
    holdout: Annotated[
        float | None, typer.Option("--holdout", help="Share of the units kept out of training [0.2].")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Refused: a selection can not go on.")] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Delete the run in --out, its ledger included, and begin anew."),
    ] = False,
    steps: Annotated[int | None, typer.Option("--steps", help="Training steps of each trial.")] = None,
    sample_rate: Annotated[
        float | None, typer.Option("--sample-rate", help="Probability of a unit to be in a step's batch.")
    ] = None,
    physical_batch_size: Annotated[
        int | None,
        typer.Option("--physical-batch-size", help="Units at once in memory; no effect on privacy."),
    ] = None,
    max_grad_norm: Annotated[
        float | None, typer.Option("--max-grad-norm", help="Clipping bound, if it is not in the grid.")
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
    budget: Annotated[
        Path | None,
        typer.Option("--budget", help="Budget file of the records: the whole cost is reserved there first."),
    ] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Run a random number of trials with settings drawn from a grid, and release the best of them alone."""
    from synthward.engine.errors import ConfigError
    from synthward.run import FitOptions
    from synthward.run.tune import tune_run

    if resume:
        raise ConfigError(
            "--resume: a selection can not go on: what a second one sees of the records is not paid for by the first; "
            "begin another one, at a cost of its own"
        )
    check_bands(noise, bands)
    given = {
        "steps": steps,
        "sample_rate": sample_rate,
        "physical_batch_size": physical_batch_size,
        "max_grad_norm": max_grad_norm,
        "holdout": holdout,
        "noise": noise,
        "bands": bands,
        "arithmetic": arithmetic,
    }
    options = FitOptions(
        generator=generator,
        device=device,
        **{k: v for k, v in given.items() if v is not None},  # type: ignore[arg-type]
    )
    choices, law = parse_grid(settings or [], grid), parse_shape(shape)
    with make_progress() as progress:
        folder = tune_run(
            data,
            load_declared(schema, unit),
            epsilon=epsilon,
            delta=delta,
            out=out,
            grid=choices,
            mean_trials=mean_trials,
            shape=law,
            options=options,
            overwrite=overwrite,
            budget_file=budget,
            progress=progress,
        )
    spent, info = spent_budget(folder), folder.info
    chosen = {name: info["settings"].get(name, info.get(name)) for name in choices}
    # No time taken: it tells how many trials there were.
    result = {"run": folder.path, **spent, "chosen": chosen, "selection": info["selection"]}
    lines = [
        f"run: {folder.path}",
        "chosen: " + ", ".join(f"{name}={value}" for name, value in chosen.items()),
        f"score: {info['selection']['score']:.4g} (mean distance of pairs of columns, noisy and paid for)",
        budget_line(spent["epsilon"], delta, spent["unit"], private=spent["private"]),
    ]
    emit(result, lines, as_json=json)
    remark("the time that this took tells how many trials there were: keep it with the records")


def parse_grid(pairs: list[str], file: Path | None) -> dict[str, list[Any]]:
    """Values by setting, of ``KEY=V1,V2,...`` and of a TOML file of lists; the generator checks them."""
    from synthward.engine.errors import ConfigError

    found = {} if file is None else _read_grid(file)
    for pair in pairs:
        key, separator, text = pair.partition("=")
        key, values = key.strip(), [value.strip() for value in text.split(",")]
        if not separator or not key or not all(values):
            raise ConfigError(f"--set: got {pair!r}; write KEY=V1,V2,..., for example --set hidden=64,256")
        if key in found:
            raise ConfigError(f"--set: setting {key!r} is given twice; write all of its values in one place")
        found[key] = values
    return found


def parse_shape(text: str) -> float:
    """The shape of `SelectionEvent`."""
    from synthward.engine.errors import ConfigError

    if text == "poisson":
        return math.inf
    try:
        shape = float(text)
    except ValueError:
        shape = math.nan
    if not 0.0 <= shape < math.inf:
        raise ConfigError(f"--shape: got {text!r}; give 0 (logarithmic), 1 (geometric) or poisson")
    return shape


def _read_grid(file: Path) -> dict[str, list[Any]]:
    from synthward.engine.errors import ConfigError

    try:
        data = tomllib.loads(file.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: is no TOML file ({error})") from None
    for key, values in data.items():
        plain = isinstance(values, list) and all(
            isinstance(value, int | float | str) and not isinstance(value, bool) for value in values
        )
        if not plain:
            raise ConfigError(f"{file}: {key!r} is no list of values; write for example hidden = [64, 256]")
    return data
