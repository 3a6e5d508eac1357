"""``fit``: from records and a schema to a private run folder."""

from __future__ import annotations

import datetime
import os
import secrets
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from synthward.data import Records, read_records, split_records
from synthward.encoding import TableEncoder
from synthward.engine import KeySchedule, Ledger, QueryMechanism
from synthward.engine.accounting import Event
from synthward.engine.errors import CheckpointError, ConfigError, OutputError
from synthward.generators.registry import make_settings
from synthward.progress import NullProgress, Progress
from synthward.run.budget import plan_budget
from synthward.run.folder import ENCODER_FILE, RUN_FILE, RunFolder
from synthward.run.mechanism import Mechanism
from synthward.run.training import Training
from synthward.schema import Schema


@dataclass(frozen=True)
class FitOptions:
    """Options of a fit that have safe defaults.

    ``sample_rate`` is the Poisson probability per unit and step, public and never derived from the data.
    ``noise``, ``bands``, ``max_units`` and ``arithmetic`` choose the mechanism (`Mechanism.choose`).
    ``seed`` makes the run reproducible and NOT private: the noise could be recomputed from it.
    """

    generator: str = "diffusion"
    accountant: str = "pld"
    steps: int = 1000
    sample_rate: float = 0.036
    max_grad_norm: float = 1.0
    physical_batch_size: int = 4096
    holdout: float = 0.2
    noise: str = "independent"
    bands: int = 8
    max_units: int | None = None
    arithmetic: str = "float"
    seed: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def fit_run(
    data: Path,
    schema: Schema,
    *,
    epsilon: float,
    delta: float,
    out: Path,
    options: FitOptions | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> RunFolder:
    """Train a generator on ``data`` within (epsilon, delta) per privacy unit and write a run folder.

    Raises `ConfigError` for unusable options, `DataError` for records that contradict the schema,
    `OutputError` when ``out`` holds a run, `BudgetExceededError` when nothing may be spent any more.
    """
    options = options or FitOptions()
    progress = progress or NullProgress()
    out = Path(out)
    if resume and (out / RUN_FILE).is_file():
        return _resume(RunFolder(out), data, schema, epsilon, delta, options, progress)
    _check_options(options)
    settings = make_settings(options.generator, options.settings)
    mechanism = Mechanism.choose(
        options.sample_rate,
        options.steps,
        epsilon=epsilon,
        delta=delta,
        accountant=options.accountant,
        noise=options.noise,
        bands=options.bands,
        max_units=options.max_units,
        arithmetic=options.arithmetic,
    )
    budget = plan_budget(epsilon, delta, options.accountant, mechanism, options.steps)
    _check_out(out, overwrite=overwrite)
    salt = secrets.token_hex(8) if options.seed is None else f"seed-{options.seed}"
    train = _read_training_records(data, schema, options.holdout, salt, progress)
    if overwrite and out.exists():
        shutil.rmtree(out)
    keys = _new_keys(options.seed)
    info = {
        "version": 1,
        "run_id": secrets.token_hex(8),
        "status": "started",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "generator": options.generator,
        "settings": asdict(settings),
        "unit": schema.unit or "row",
        "relation": "add_or_remove_one",
        "private": keys.is_private,
        "holdout": {"fraction": options.holdout, "salt": salt},
        "schema_fingerprint": schema.fingerprint(),
        "max_grad_norm": options.max_grad_norm,
        "physical_batch_size": options.physical_batch_size,
        "seed": options.seed,
        **asdict(budget),
        "mechanism": mechanism.to_dict(),
    }
    folder = RunFolder.create(out, info, schema)
    ledger = Ledger.create(
        folder.ledger_path,
        run_id=info["run_id"],
        unit=info["unit"],
        delta=delta,
        key_id=keys.key_id,
        private=keys.is_private,
        target_epsilon=epsilon,
        accountant=options.accountant,
    )
    return train_run(folder, train, keys, ledger, progress)


def _resume(
    folder: RunFolder,
    data: Path,
    schema: Schema,
    epsilon: float,
    delta: float,
    options: FitOptions,
    progress: Progress,
) -> RunFolder:
    """Go on with an unfinished run: same data and schema, fresh keys, only the steps not charged yet."""
    info = folder.info
    if folder.is_complete:
        return folder
    same = {
        "schema": (info["schema_fingerprint"], schema.fingerprint()),
        "epsilon": (info["epsilon"], epsilon),
        "delta": (info["delta"], delta),
        "generator": (info["generator"], options.generator),
        "seed": (info["seed"], options.seed),
    }
    for name, (then, now) in same.items():
        if then != now:
            raise ConfigError(
                f"--resume: the run in {folder.path} was begun with {name} {then!r}, not {now!r}"
            )
    holdout = info["holdout"]
    train = _read_training_records(data, schema, holdout["fraction"], holdout["salt"], progress)
    keys = _new_keys(info["seed"])
    if not folder.ledger_path.is_file():
        raise CheckpointError(f"{folder.path}: the ledger is missing; a run without its ledger can not go on")
    return train_run(folder, train, keys, folder.open_ledger(), progress, resumed=True)


def train_run(
    folder: RunFolder,
    train: Records,
    keys: KeySchedule,
    ledger: Ledger,
    progress: Progress,
    *,
    resumed: bool = False,
) -> RunFolder:
    """Fit what ``folder`` describes to records in memory, and pay for it in ``ledger``, which is closed."""
    with ledger:
        if resumed:
            ledger.add_key(keys.key_id, private=keys.is_private)
        encoder = _fit_encoder(folder, train, keys, ledger)
        info = folder.info
        mechanism = Mechanism.from_info(info)
        plan = mechanism.plan(info["noise_multiplier"], info["max_grad_norm"], info["steps"], encoder.units)
        training = Training(folder, encoder, train, plan, keys, ledger, progress)
        training.run()
        folder.update(
            status="complete", expected_batch_size=plan.expected_batch_size, steps_taken=training.steps_done
        )
    return folder


def _fit_encoder(folder: RunFolder, train: Records, keys: KeySchedule, ledger: Ledger) -> TableEncoder:
    """The run's encoder: loaded if it was paid for before, else learned by the charged query."""
    if (folder.path / ENCODER_FILE).is_file():
        return folder.load_encoder()
    lost = ledger.events()
    if any(hasattr(event, "steps") for event in lost):
        raise CheckpointError(
            f"{folder.path}: has been trained, but its {ENCODER_FILE} is missing; put it back, or start a new run"
        )
    if lost:
        _plan_again(folder, tuple(lost))
    queries = QueryMechanism(ledger, keys)
    encoder = TableEncoder.fit(train, queries, folder.info["query_noise_multiplier"])
    folder.save_encoder(encoder)
    return encoder


def _plan_again(folder: RunFolder, lost: tuple[Event, ...]) -> None:
    """Killed between paying for the histograms and keeping them: pay again, out of the steps' share."""
    info = folder.info
    budget = plan_budget(
        info["epsilon"],
        info["delta"],
        info["accountant"],
        Mechanism.from_info(info),
        info["steps"],
        lost=lost,
    )
    folder.update(noise_multiplier=budget.noise_multiplier)


def _read_training_records(
    data: Path, schema: Schema, holdout: float, salt: str, progress: Progress
) -> Records:
    task = progress.task("read")
    try:
        records = read_records(data, schema, progress=task.at)
    finally:
        task.close()
    train = split_records(records, holdout_fraction=holdout, salt=salt)[0] if holdout else records
    if train.num_units == 0:
        raise ConfigError(
            f"{data}: no record is left to train on after holding out {holdout:.0%}; lower --holdout"
        )
    return train


def _new_keys(seed: int | None) -> KeySchedule:
    return KeySchedule.from_os() if seed is None else KeySchedule.reproducible(seed)


def _check_options(options: FitOptions) -> None:
    if not 0.0 <= options.holdout < 1.0:
        raise ConfigError(f"holdout: got {options.holdout}; give a share of at least 0 and below 1")
    if not 0.0 < options.sample_rate <= 1.0:
        raise ConfigError(f"sample rate: got {options.sample_rate}; give a probability above 0 and at most 1")
    if not (options.max_grad_norm > 0 and np.isfinite(options.max_grad_norm)):
        raise ConfigError(f"max_grad_norm: got {options.max_grad_norm}; give a positive number")
    if options.physical_batch_size < 1:
        raise ConfigError(f"physical batch size: got {options.physical_batch_size}; give at least 1")


def _check_out(out: Path, *, overwrite: bool) -> None:
    """Refuse an output folder before any record is read, so that nothing is lost or spent."""
    if (out / RUN_FILE).exists() and not overwrite:
        raise OutputError(f"{out}: holds a run already; give another --out, --resume it, or --overwrite it")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: is a file; --out names a folder")
    if out.is_dir() and not (out / RUN_FILE).exists() and any(out.iterdir()):
        raise OutputError(f"{out}: is not empty and holds no run; give a new folder")
    parent = next(p for p in [out, *out.absolute().parents] if p.exists())
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{parent}: is not writable; give another --out")
