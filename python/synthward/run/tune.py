"""``tune``: private choice of settings. The best of a random number of trials is released, and nothing of the others.

A trial draws its settings at random, fits a generator within a trial's share of the budget and pays for its own score.
All trials are this one mechanism, run independently; their number is drawn before a record is read, from a law that the
records do not alter. Releasing the best one whole (settings, generator, score) then costs what `SelectionEvent` says
(Papernot & Steinke 2022). That the number of trials stays unknown is part of it: no line, file, name or order of
random numbers tells it. What does is the time that the selection takes: so no file keeps the time of its end.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from synthward.data import Records
from synthward.encoding import TableEncoder
from synthward.engine import KeySchedule, Ledger, QueryMechanism
from synthward.engine.accounting import Event, GaussianEvent, calibrate_noise
from synthward.engine.accounting.accountant import merge_events
from synthward.engine.accounting.tuning import TrialBudget, calibrate_trial, draw_trials
from synthward.engine.device import choose_device, describe
from synthward.engine.errors import ConfigError, PrivacyError
from synthward.generators import Generator
from synthward.generators.registry import make_settings
from synthward.progress import NullProgress, Progress
from synthward.run.budget import QUERY_SHARE
from synthward.run.claim import Claim
from synthward.run.cohort import CohortSampler
from synthward.run.fit import (
    RELATION,
    FitOptions,
    check_options,
    check_out,
    read_training_records,
    train_run,
)
from synthward.run.folder import ENCODER_FILE, MODEL_FILE, RunFolder
from synthward.run.mechanism import Mechanism
from synthward.run.score import SAMPLES, Score, tables_of
from synthward.schema import Schema

# Only RDP tells what a selection costs.
ACCOUNTANT = "rdp"
# Share of a trial's epsilon that its score would cost by itself; composed with the rest it costs far less.
SCORE_SHARE = 0.2
# What may differ between trials beside the generator's settings: it does not change what a trial costs.
CLIP = "max_grad_norm"
# Inside the run folder, so that a selection that is killed leaves nothing elsewhere.
TRIALS_FOLDER = ".trials"

Grid = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class TunePlan:
    """What a selection may spend, decided before any record is read.

    Attributes:
        trial: noise of each trial's steps, what a trial is charged as, and the event of the whole selection.
        mechanism: of a trial's steps.
        query_noise_multiplier, score_noise_multiplier: of a trial's histograms and of its score.
    """

    trial: TrialBudget
    mechanism: Mechanism
    query_noise_multiplier: float
    score_noise_multiplier: float


@dataclass(frozen=True)
class Trial:
    """A trial that has paid for all that is in it. Of two, the one with the lesser rank is better."""

    folder: RunFolder
    distance: float
    # A draw settles ties, so that which trial came first never matters.
    lot: int

    @property
    def rank(self) -> tuple[float, int]:
        return (self.distance, self.lot)


def tune_run(
    data: Path,
    schema: Schema,
    *,
    epsilon: float,
    delta: float,
    out: Path,
    grid: Grid,
    mean_trials: float = 10.0,
    shape: float = 0.0,
    options: FitOptions | None = None,
    overwrite: bool = False,
    budget_file: Path | None = None,
    progress: Progress | None = None,
) -> RunFolder:
    """Choose settings within (epsilon, delta) per privacy unit and write the best trial's run folder.

    Args:
        grid: values to choose from, by setting of the generator or "max_grad_norm".
        mean_trials, shape: law of the number of trials, as in `SelectionEvent`.
        options: of every trial; its accountant is not used, and a seed is refused.
        budget_file: budget of the data set, on which the whole selection is reserved first.

    Raises:
        ConfigError: unusable options, or an epsilon that does not pay for a choice among so many.
        DataError: records that contradict the schema. OutputError: ``out`` holds a run.
        BudgetExceededError: the data set's budget does not cover it.
        PrivacyError: nothing can be released, after the whole was charged (see `_no_trial`).
    """
    options, progress, out = options or FitOptions(), progress or NullProgress(), Path(out)
    grid = _checked(options, grid)
    device = choose_device(options.device)
    check_out(out, overwrite=overwrite)
    trials = draw_trials(mean_trials, shape)
    plan = plan_selection(epsilon, delta, options, mean_trials, shape)
    run_id, unit = secrets.token_hex(8), schema.unit or "row"
    claim = Claim(budget_file, run_id, unit, RELATION)
    salt = secrets.token_hex(8)
    with claim.reserved([plan.trial.selection]):
        train = read_training_records(data, schema, options.holdout, salt, progress)
        if overwrite and out.exists():
            shutil.rmtree(out)
    info = {
        **_plan_info(plan, options, schema),
        "version": 1,
        "run_id": run_id,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "unit": unit,
        "holdout": {"fraction": options.holdout, "salt": salt},
        "epsilon": float(epsilon),
        "delta": float(delta),
        "budget_id": claim.budget_id,
        "ledger_head": None,
        "selection": _selection_info(plan, grid),
    }
    folder = RunFolder.create(out, info, schema)
    _charge(folder, plan.trial.selection, claim)
    progress.note(f"device: {describe(device)}")
    progress.note("selecting among trials: how many there are, and so how long it takes, is not told")
    best = _best_trial(folder, train, plan, grid, options, trials)
    if best is None or not math.isfinite(best.distance):
        raise _no_trial(folder, best)
    _release(folder, best)
    return folder


def plan_selection(
    epsilon: float, delta: float, options: FitOptions, mean_trials: float, shape: float
) -> TunePlan:
    """Calibrate the noise of a trial: its queries to their shares, then its steps to what the selection may cost."""
    steps = options.steps
    if steps < 1:
        raise ConfigError(f"steps: got {steps}; give a whole number of at least 1")
    # What a trial may cost is nearly the same whatever mechanism spends it.
    alone = calibrate_trial(lambda noise: GaussianEvent(noise, 1), epsilon, delta, mean_trials, shape)
    query, score = (
        calibrate_noise(share * alone.trial_epsilon, delta, 1.0, 1, ACCOUNTANT)
        for share in (QUERY_SHARE, SCORE_SHARE)
    )

    mechanism = replace(options, accountant=ACCOUNTANT).mechanism(alone.trial_epsilon, delta)

    def trial(noise: float) -> list[Event]:
        return [GaussianEvent(query, 1), mechanism.event(noise, steps), GaussianEvent(score, 1)]

    return TunePlan(calibrate_trial(trial, epsilon, delta, mean_trials, shape), mechanism, query, score)


def run_trial(
    place: Path,
    info: dict[str, Any],
    schema: Schema,
    train: Records,
    score: Score,
    keys: KeySchedule,
    device: str = "cpu",
) -> Trial:
    """One run of the base mechanism: fit as ``info`` says, then ask for the score, both under a trial's own ledger.

    Args:
        place: a folder to make the run in.
        info: of a run; its epsilon is what the trial may cost, ``score_noise_multiplier`` the noise of its score.
        keys: of this trial alone.
        device: where it is trained, as of `FitOptions`.

    Raises:
        PrivacyError: the trial was charged something else than the plan says.
    """
    folder = RunFolder.create(place, info, schema)
    train_run(folder, train, keys, _ledger(folder, keys, info["epsilon"]), NullProgress(), device=device)
    encoder = folder.load_encoder()
    generator = folder.load_generator(encoder)
    is_finite = all(bool(t.isfinite().all()) for t in generator.state(resume=False).values())
    samples = _samples(schema, encoder, generator, info["seed"]) if is_finite else None
    with folder.open_ledger() as ledger:
        queries = QueryMechanism(ledger, keys)
        # A generator that diverged is asked about as well, as if it had not: every trial is charged alike.
        distance = score.ask(samples, queries, info["score_noise_multiplier"])
        charged = ledger.events()
    expected = merge_events(_trial_events(info))
    if sorted(map(repr, charged)) != sorted(map(repr, expected)):
        raise PrivacyError("a trial was charged something else than the selection says; nothing is released")
    return Trial(folder, distance if is_finite else math.inf, secrets.randbits(64))


def _best_trial(
    folder: RunFolder, train: Records, plan: TunePlan, grid: Grid, options: FitOptions, trials: int
) -> Trial | None:
    """Run the trials, one after the other; only the best so far is kept, in a folder that no one else can read."""
    score, schema = Score(train), folder.schema
    place = folder.path / TRIALS_FOLDER
    place.mkdir(mode=0o700)
    best: Trial | None = None
    try:
        for _ in range(trials):
            settings, clip = draw_settings(grid, options)
            info = {
                **folder.info,
                "run_id": secrets.token_hex(8),
                "epsilon": plan.trial.trial_epsilon,
                "settings": settings,
                CLIP: clip,
                "score_noise_multiplier": plan.score_noise_multiplier,
                "ledger_head": None,
            }
            with _silent(), _fresh_torch():
                made, keys = place / info["run_id"], KeySchedule.from_os()
                trial = run_trial(made, info, schema, train, score, keys, options.device)
            best, worse = (trial, best) if best is None or trial.rank < best.rank else (best, trial)
            if worse is not None:
                shutil.rmtree(worse.folder.path)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    return best


def draw_settings(grid: Grid, options: FitOptions) -> tuple[dict[str, Any], float]:
    """Settings of one trial and its clipping bound, uniform over the grid, from the operating system's randomness."""
    drawn = {name: values[secrets.randbelow(len(values))] for name, values in grid.items()}
    clip = float(drawn.pop(CLIP, options.max_grad_norm))
    return asdict(make_settings(options.generator, {**options.settings, **drawn})), clip


def _release(folder: RunFolder, best: Trial) -> None:
    """Make the best trial the run; its ledger is deleted, the selection's covers it."""
    info = best.folder.info
    encoder = best.folder.load_encoder()
    for name in (ENCODER_FILE, MODEL_FILE):
        (best.folder.path / name).replace(folder.path / name)
    shutil.rmtree(folder.path / TRIALS_FOLDER)
    share = best.distance / max(encoder.units, 1.0)
    folder.update(
        status="complete",
        settings=info["settings"],
        max_grad_norm=info[CLIP],
        expected_batch_size=info["expected_batch_size"],
        steps_taken=info["steps_taken"],
        selection={**folder.info["selection"], "score": min(max(share, 0.0), 1.0)},
    )
    # When the best trial was made, and when the last one ended, would tell how many there were.
    begin = datetime.datetime.fromisoformat(info["created"]).timestamp()
    for path in (*folder.path.iterdir(), folder.path):
        os.utime(path, (begin, begin))


def _no_trial(folder: RunFolder, best: Trial | None) -> PrivacyError:
    """Why nothing is released: no trial was drawn (Poisson only), or the best one's generator is not finite."""
    shutil.rmtree(folder.path / TRIALS_FOLDER, ignore_errors=True)
    why = "no trial was drawn, as a Poisson number may be 0"
    if best is not None:
        why = "the best trial's generator diverged; give smaller learning rates"
    return PrivacyError(f"{folder.path}: {why}; nothing is released, and the budget is spent all the same")


def _ledger(folder: RunFolder, keys: KeySchedule, target: float) -> Ledger:
    info = folder.info
    return Ledger.create(
        folder.ledger_path,
        run_id=info["run_id"],
        unit=info["unit"],
        relation=info["relation"],
        delta=info["delta"],
        key_id=keys.key_id,
        private=keys.is_private,
        target_epsilon=target,
        accountant=ACCOUNTANT,
    )


def _charge(folder: RunFolder, selection: Event, claim: Claim) -> None:
    """Charge the whole selection, on the disk before the first trial touches a record.

    Nothing is added later, not even to the budget of the data set: lines have times, and that of the end would tell how
    many trials there were. The ledger's key makes no noise: each trial draws one of its own.
    """
    tables = len(tables_of(folder.schema))
    claim.start()
    with _ledger(folder, KeySchedule.from_os(), folder.info["epsilon"]) as ledger:
        ledger.append_event(
            selection,
            note=f"the best of a random number of trials: one-way histograms, steps, and a score in {tables} tables",
        )
        folder.update(ledger_head=ledger.head)
        claim.settle(ledger)


def _samples(schema: Schema, encoder: TableEncoder, generator: Generator, seed: int | None) -> dict[str, Any]:
    """Rows that a trial is judged by: of each a random row of a random unit, as the records are weighed."""
    sampler = CohortSampler(schema, encoder, generator)
    sampler.context_mass = sampler.context_mass / (1.0 + torch.arange(len(sampler.context_mass)).numpy())
    return sampler.chunk(secrets.randbits(62) if seed is None else seed, 0, SAMPLES)


def _trial_events(info: dict[str, Any]) -> list[Event]:
    steps = Mechanism.from_info(info).event(info["noise_multiplier"], info["steps"])
    asked = [GaussianEvent(info[f"{name}_noise_multiplier"], 1) for name in ("query", "score")]
    return [*asked, steps]


def _plan_info(plan: TunePlan, options: FitOptions, schema: Schema) -> dict[str, Any]:
    """What run.json says of the plan, for the run and for each trial."""
    return {
        "status": "started",
        "generator": options.generator,
        "settings": {},
        "relation": RELATION,
        "private": True,
        "schema_fingerprint": schema.fingerprint(),
        "max_grad_norm": options.max_grad_norm,
        "physical_batch_size": options.physical_batch_size,
        "seed": None,
        "device": choose_device(options.device).type,
        "accountant": ACCOUNTANT,
        "sample_rate": plan.mechanism.sample_rate,
        "mechanism": plan.mechanism.to_dict(),
        "steps": options.steps,
        "query_noise_multiplier": plan.query_noise_multiplier,
        "noise_multiplier": plan.trial.noise_multiplier,
    }


def _selection_info(plan: TunePlan, grid: Grid) -> dict[str, Any]:
    law = plan.trial.selection.to_dict()
    return {
        "mean_trials": law["mean_trials"],
        "shape": law["shape"],
        "grid": {name: list(values) for name, values in grid.items()},
        "score_noise_multiplier": plan.score_noise_multiplier,
    }


def _checked(options: FitOptions, grid: Grid) -> Grid:
    """The grid with its values as the settings' own types; what can not be is refused, before anything is read."""
    if options.seed is not None:
        raise ConfigError("seed: a selection whose trials follow from a seed is not private; leave it out")
    if options.max_units is not None:
        # What a static batch cuts off costs a delta; a selection's price is known for RDP alone.
        raise ConfigError("max_units: what it adds to delta has no price in a selection; leave it out")
    check_options(options)
    if not grid:
        raise ConfigError("grid: names no setting to choose; give one, for example --set hidden=64,256")
    found: dict[str, list[Any]] = {}
    for name, values in grid.items():
        if not values:
            raise ConfigError(f"grid: setting {name!r} has no value to choose from")
        if name == CLIP:
            found[name] = [_number(value) for value in values]
            for value in found[name]:
                check_options(replace(options, max_grad_norm=value))
        else:
            tried = [make_settings(options.generator, {**options.settings, name: value}) for value in values]
            found[name] = [getattr(settings, name) for settings in tried]
    return found


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{CLIP}: got {value!r}; give a positive number") from None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Nothing that a trial prints, warnings and logs included, is shown: its lines could be counted."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _fresh_torch() -> Iterator[None]:
    """Torch's own generator begins anew from the operating system's randomness.

    It starts at the same seed in every process: the first weights of the best trial would tell its number.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(secrets.randbits(62))
        yield
