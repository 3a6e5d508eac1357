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
from synthward.engine.accounting import Event, GaussianEvent, StepsEvent
from synthward.engine.distributed.ranks import Ranks
from synthward.engine.errors import CheckpointError, ConfigError, OutputError
from synthward.generators.registry import make_settings
from synthward.observe import Observer, TrainingObserver, check_tensorboard
from synthward.progress import NullProgress, Progress
from synthward.run.budget import plan_budget
from synthward.run.claim import Claim
from synthward.run.folder import CHECKPOINT_FOLDER, ENCODER_FILE, RUN_FILE, RunFolder
from synthward.run.mechanism import Mechanism
from synthward.run.shared import await_start, device_for, leading
from synthward.run.training import Training
from synthward.schema import Schema

# What several processes hold of the parameters.
PARALLEL = ("replicate", "shard")
# Which data sets are neighbours.
RELATION = "add_or_remove_one"


@dataclass(frozen=True)
class FitOptions:
    """Options of a fit that have safe defaults.

    ``sample_rate`` is the Poisson probability per unit and step, public and never derived from the data.
    ``noise``, ``bands``, ``max_units`` and ``arithmetic`` choose the mechanism (`Mechanism.choose`).
    ``parallel`` says what several processes hold: "replicate" (all parameters) or "shard" (a part, FSDP2).
    ``device`` is where networks are: "auto" (a GPU where torch sees one), "cpu", "cuda" or "cuda:N"; no matter of
    privacy, and a run may go on on another one.
    ``tensorboard`` is a folder for event files, which hold no more than the run's log (`synthward.observe`).
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
    bands: int | None = None
    max_units: int | None = None
    arithmetic: str = "float"
    seed: int | None = None
    tensorboard: Path | None = None
    parallel: str = "replicate"
    device: str = "auto"
    settings: dict[str, Any] = field(default_factory=dict)

    def mechanism(self, epsilon: float, delta: float) -> Mechanism:
        """The mechanism of the training steps."""
        return Mechanism.choose(
            self.sample_rate,
            self.steps,
            epsilon=epsilon,
            delta=delta,
            accountant=self.accountant,
            noise=self.noise,
            bands=self.bands,
            max_units=self.max_units,
            arithmetic=self.arithmetic,
        )


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
    budget_file: Path | None = None,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> RunFolder:
    """Train a generator on ``data`` within (epsilon, delta) per privacy unit and write a run folder.

    Args:
        budget_file: the budget of the data set (`DatasetBudget`): all that the run may cost is reserved there before a
            record is read, and settled when it has ended. A run that was killed stays reserved.
        ranks: the processes that train together; rank 0 calls this, the others `follow_run`.

    Raises `ConfigError` for unusable options, `DataError` for records that contradict the schema,
    `OutputError` when ``out`` holds a run, `BudgetExceededError` when nothing may be spent any more.
    """
    options, progress, out = options or FitOptions(), progress or NullProgress(), Path(out)
    ranks = ranks or Ranks.alone()
    with leading(ranks):
        check_parallel(options.parallel, ranks)
        device_for(options.device, ranks)
        if options.tensorboard is not None:
            check_tensorboard()
        if resume and (out / RUN_FILE).is_file():
            folder = RunFolder(out)
            claim = Claim.of_run(budget_file, folder.info)
            return _resume(folder, data, schema, epsilon, delta, options, claim, progress, ranks)
        return _fit_anew(data, schema, epsilon, delta, out, options, overwrite, budget_file, progress, ranks)


def follow_run(ranks: Ranks) -> None:
    """A process's part of a run that rank 0 leads (`fit_run`): it trains, and writes its part of checkpoints.

    Raises:
        SynthwardError: what ended the run; rank 0 has said so.
    """
    found = await_start(ranks)
    if found is None:
        return
    start, keys = found
    folder, encoder = RunFolder(start.path), TableEncoder.from_dict(start.encoder)
    with TrainingObserver(folder.path, is_main=False) as observer:
        Training(folder, encoder, None, start.plan, keys, None, NullProgress(), ranks, start, observer).run()


def _fit_anew(
    data: Path,
    schema: Schema,
    epsilon: float,
    delta: float,
    out: Path,
    options: FitOptions,
    overwrite: bool,
    budget_file: Path | None,
    progress: Progress,
    ranks: Ranks,
) -> RunFolder:
    check_options(options)
    settings = make_settings(options.generator, options.settings)
    mechanism = options.mechanism(epsilon, delta)
    budget = plan_budget(epsilon, delta, options.accountant, mechanism, options.steps)
    check_out(out, overwrite=overwrite)
    run_id, unit = secrets.token_hex(8), schema.unit or "row"
    salt = secrets.token_hex(8) if options.seed is None else f"seed-{options.seed}"
    claim = Claim(budget_file, run_id, unit, RELATION)
    with claim.reserved(_planned({**asdict(budget), "mechanism": mechanism.to_dict()})):
        train = read_training_records(data, schema, options.holdout, salt, progress)
        mechanism.check_units(train.num_units)
        if overwrite and out.exists():
            shutil.rmtree(out)
        keys = _new_keys(options.seed)
        info = {
            "version": 1,
            "run_id": run_id,
            "status": "started",
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "generator": options.generator,
            "settings": asdict(settings),
            "unit": unit,
            "relation": RELATION,
            "private": keys.is_private,
            "holdout": {"fraction": options.holdout, "salt": salt},
            "schema_fingerprint": schema.fingerprint(),
            "max_grad_norm": options.max_grad_norm,
            "physical_batch_size": options.physical_batch_size,
            "seed": options.seed,
            "device": device_for(options.device, ranks).type,
            **asdict(budget),
            "mechanism": mechanism.to_dict(),
            "budget_id": claim.budget_id,
            "ledger_head": None,
        }
        folder = RunFolder.create(out, info, schema)
    return train_run(
        folder,
        train,
        keys,
        _new_ledger(folder, keys, claim),
        progress,
        claim=claim,
        ranks=ranks,
        observer=_observer(folder, options, progress),
        parallel=options.parallel,
        device=options.device,
    )


def _observer(
    folder: RunFolder, options: FitOptions, progress: Progress, *, resumed: bool = False
) -> Observer:
    return TrainingObserver(
        folder.path,
        resumed=resumed,
        tensorboard=options.tensorboard,
        remark=lambda text: progress.note(f"note: {text}"),
    )


def _new_ledger(folder: RunFolder, keys: KeySchedule, claim: Claim) -> Ledger:
    info = folder.info
    claim.start()
    ledger = Ledger.create(
        folder.ledger_path,
        run_id=info["run_id"],
        unit=info["unit"],
        relation=info["relation"],
        delta=info["delta"],
        key_id=keys.key_id,
        private=keys.is_private,
        target_epsilon=info["epsilon"],
        accountant=info["accountant"],
    )
    folder.update(ledger_head=ledger.head)
    return ledger


def _resume(
    folder: RunFolder,
    data: Path,
    schema: Schema,
    epsilon: float,
    delta: float,
    options: FitOptions,
    claim: Claim,
    progress: Progress,
    ranks: Ranks,
) -> RunFolder:
    """Go on with an unfinished run: same data and schema, fresh keys, only the steps not charged yet."""
    info = folder.info
    if "selection" in info:
        raise ConfigError(
            f"--resume: {folder.path} is of `synthward tune`, and a selection that stopped can not go on: what it "
            "spent stays spent; begin another one"
        )
    if folder.is_complete:
        with folder.open_ledger(readonly=True) as ledger:
            claim.settle(ledger)
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
    train = read_training_records(data, schema, holdout["fraction"], holdout["salt"], progress)
    folder.save_schema(schema)
    folder.update(device=device_for(options.device, ranks).type)
    keys = _new_keys(info["seed"])
    spent = _has_spent(folder)
    if not spent:
        claim.reserve(_planned(info))
    return train_run(
        folder,
        train,
        keys,
        folder.open_ledger() if spent else _new_ledger(folder, keys, claim),
        progress,
        resumed=spent,
        claim=claim,
        ranks=ranks,
        observer=_observer(folder, options, progress, resumed=True),
        parallel=options.parallel,
        device=options.device,
    )


def _has_spent(folder: RunFolder) -> bool:
    """False for a run that was killed before it had a ledger: it has charged and kept nothing.

    Raises:
        CheckpointError: it had one, and it is gone.
    """
    has_ledger = folder.ledger_path.is_file() and folder.ledger_path.stat().st_size > 0
    kept = [name for name in (ENCODER_FILE, CHECKPOINT_FOLDER) if (folder.path / name).exists()]
    # A run.json of before heads were kept does not tell.
    if not has_ledger and (kept or folder.info.get("ledger_head", "unknown") is not None):
        raise CheckpointError(f"{folder.path}: the ledger is missing; a run without its ledger can not go on")
    return has_ledger


def _planned(info: dict[str, Any]) -> list[Event]:
    """All that a run is going to charge."""
    steps = Mechanism.from_info(info).event(info["noise_multiplier"], info["steps"])
    return [GaussianEvent(info["query_noise_multiplier"], 1), steps]


def train_run(
    folder: RunFolder,
    train: Records,
    keys: KeySchedule,
    ledger: Ledger,
    progress: Progress,
    *,
    resumed: bool = False,
    claim: Claim | None = None,
    ranks: Ranks | None = None,
    observer: Observer | None = None,
    parallel: str = "replicate",
    device: str = "cpu",
) -> RunFolder:
    """Fit what ``folder`` describes to records in memory, and pay for it in ``ledger``, which is closed.

    With several `ranks` rank 0 calls this; the others take part by `follow_run`.
    """
    ranks, observer = ranks or Ranks.alone(), observer or Observer()
    claim = claim or Claim(None, folder.info["run_id"], folder.info["unit"], folder.info["relation"])
    with ledger, observer:
        if resumed:
            ledger.add_key(keys.key_id, private=keys.is_private)
        encoder = _fit_encoder(folder, train, keys, ledger, claim)
        info = folder.info
        mechanism = Mechanism.from_info(info)
        plan = mechanism.plan(info["noise_multiplier"], info["max_grad_norm"], info["steps"], encoder.units)
        if resumed:
            charged = ledger.events()
            taken = sum(event.steps for event in charged if isinstance(event, StepsEvent))
            claim.reserve([*charged, plan.event(max(plan.steps - taken, 0))])
        training = Training(
            *(folder, encoder, train, plan, keys, ledger, progress, ranks),
            observer=observer,
            parallel=parallel,
            device=device,
        )
        training.run()
        folder.update(
            status="complete",
            expected_batch_size=plan.expected_batch_size,
            steps_taken=training.steps_done,
            ledger_head=ledger.head,
        )
        claim.settle(ledger)
        observer.finished(training.steps_done, float(ledger.epsilon(info["delta"], info["accountant"])))
    return folder


def _fit_encoder(
    folder: RunFolder, train: Records, keys: KeySchedule, ledger: Ledger, claim: Claim
) -> TableEncoder:
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
        claim.reserve([*lost, *_planned(folder.info)])
    queries = QueryMechanism(ledger, keys)
    encoder = TableEncoder.fit(train, queries, folder.info["query_noise_multiplier"])
    folder.save_encoder(encoder)
    folder.update(ledger_head=ledger.head)
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


def read_training_records(
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


def check_parallel(parallel: str, ranks: Ranks) -> None:
    if parallel not in PARALLEL:
        raise ConfigError(f"parallel: got {parallel!r}; choose one of {', '.join(PARALLEL)}")
    if parallel == "shard" and ranks.world_size == 1:
        raise ConfigError("parallel: 'shard' needs several processes; start them by torchrun")


def check_options(options: FitOptions) -> None:
    if not 0.0 <= options.holdout < 1.0:
        raise ConfigError(f"holdout: got {options.holdout}; give a share of at least 0 and below 1")
    if not 0.0 < options.sample_rate <= 1.0:
        raise ConfigError(f"sample rate: got {options.sample_rate}; give a probability above 0 and at most 1")
    if not (options.max_grad_norm > 0 and np.isfinite(options.max_grad_norm)):
        raise ConfigError(f"max_grad_norm: got {options.max_grad_norm}; give a positive number")
    if options.physical_batch_size < 1:
        raise ConfigError(f"physical batch size: got {options.physical_batch_size}; give at least 1")


def check_out(out: Path, *, overwrite: bool) -> None:
    """Refuse an output folder before any record is read, so that nothing is lost or spent."""
    if (out / RUN_FILE).exists() and not overwrite:
        raise OutputError(f"{out}: holds a run already; give another --out, --resume it, or --overwrite it")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: is a file; --out names a folder")
    # A run that was killed before it had a name has left half of its first file.
    left = [] if not out.is_dir() else [file for file in out.iterdir() if file.name != f".{RUN_FILE}.tmp"]
    if left and not (out / RUN_FILE).exists():
        raise OutputError(f"{out}: is not empty and holds no run; give a new folder")
    parent = next(p for p in [out, *out.absolute().parents] if p.exists())
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{parent}: is not writable; give another --out")
