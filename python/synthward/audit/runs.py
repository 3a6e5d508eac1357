"""The audit of a run folder: what is checked, and where each finding may go."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from synthward.audit.membership import membership_attacks
from synthward.audit.onerun import CANARIES, OneRun, audit_canaries, audit_split, draw_cohort
from synthward.audit.whitebox import SIGNIFICANCE, Check, audit_step
from synthward.data import read_records, split_records
from synthward.encoding.compare import may_be_of
from synthward.engine import KeySchedule, Ledger, PrivacyPlan
from synthward.engine.errors import ConfigError, DataError, OutputError
from synthward.run import RunFolder
from synthward.run.folder import write_atomic
from synthward.run.mechanism import Mechanism

AUDIT_FILE = "audit.json"
Say = Callable[[str], None]


def audit_run(
    run: Path,
    *,
    data: Path | None = None,
    runs: int = 0,
    canaries: int = CANARIES,
    records_out: Path | None = None,
    overwrite: bool = False,
    progress: Say | None = None,
) -> dict[str, Any]:
    """Audit a run and write what needs no records to its ``audit.json``; returns everything that was found.

    Args:
        run: the folder. data: the records that it was fitted to; without them only the white-box checks run.
        runs: runs to be made for the audit, each with `canaries` canary records among the real ones.
        records_out: file for what is computed from records, outside the run folder; None writes it nowhere.

    Raises:
        ConfigError: options that do not fit each other. OutputError: `records_out` exists or is in the run folder.
        DataError: `data` are not the records of the run (`may_be_of`); what needs none is written before.
    """
    say = progress or (lambda stage: None)
    if data is None and (runs or records_out is not None):
        raise ConfigError("audit: --runs and --out-records need the records; give --data")
    if runs < 0 or canaries < 1:
        raise ConfigError(
            f"audit: got {runs} runs of {canaries} canaries; give no negative number, and a canary"
        )
    folder = RunFolder(run)
    if records_out is not None:
        _check_records_out(folder, Path(records_out), overwrite)
    with Ledger.open(folder.ledger_path, readonly=True) as ledger:
        info = folder.info
        claimed = float(ledger.epsilon(info["delta"], info["accountant"]))
        charged = ledger.events()
    plan = plan_of(folder)
    checks = [_ledger_check(plan, charged), *audit_step(plan, info["delta"], progress=say)]
    facts = {
        "version": 1,
        "run_id": info["run_id"],
        "claimed_epsilon": claimed,
        "delta": info["delta"],
        "accountant": info["accountant"],
        "unit": info["unit"],
        "relation": info["relation"],
        "private": info["private"],
    }
    passed = all(check.passed is not False for check in checks)
    released = {**facts, "passed": passed, "checks": [check.to_dict() for check in checks]}
    write_atomic(folder.path / AUDIT_FILE, _dump(released))
    if data is None:
        return released
    found = _audit_records(folder, data, claimed, runs, canaries, say)
    kept = {**facts, "custodian_only": True, "checks": [check.to_dict() for check in found]}
    if records_out is not None:
        write_atomic(Path(records_out), _dump(kept))
    return {**released, "custodian_only": True, "checks": [*released["checks"], *kept["checks"]]}


def plan_of(folder: RunFolder) -> PrivacyPlan:
    """The plan that a run trains by, from its own record."""
    info, expected = folder.info, folder.info.get("expected_batch_size")
    units = folder.load_encoder().units if expected is None else 1.0
    plan = Mechanism.from_info(info).plan(
        info["noise_multiplier"], info["max_grad_norm"], info["steps"], units
    )
    return plan if expected is None else replace(plan, expected_batch_size=expected)


def _ledger_check(plan: PrivacyPlan, charged: list[Any]) -> Check:
    """Whether the steps in the ledger are those of the plan that is audited, and no more of them."""
    # Of a selection, the released trial is one of those that its event covers.
    each = [inner for event in charged for inner in (event.inner if event.kind == "selection" else [event])]
    steps = [event for event in each if event.kind == plan.event(1).kind]
    others = [event for event in steps if event.with_steps(1) != plan.event(1)]
    taken = sum(event.steps for event in steps)
    details = {"steps_charged": taken, "steps_planned": plan.steps}
    is_same = bool(steps) and not others and taken <= plan.steps
    return Check("plan of the ledger", None, None, is_same, details=details)


def _audit_records(
    folder: RunFolder, data: Path, claimed: float, runs: int, canaries: int, say: Say
) -> list[Check]:
    """What is computed from records: never a gate, and for their custodian's eyes only."""
    schema, info = folder.schema, folder.info
    rng = np.random.default_rng(int.from_bytes(KeySchedule.from_os().key("canaries"), "little"))
    say("read records")
    train = read_records(data, schema)
    checks: list[Check] = []
    split = info["holdout"]
    if split["fraction"]:
        train, others = split_records(train, holdout_fraction=split["fraction"], salt=split["salt"])
    encoder = folder.load_encoder()
    if not may_be_of(encoder, train, info["query_noise_multiplier"]):
        raise DataError(
            f"{data}: are not the records of {folder.path}: its noisy counts are further from theirs than its noise "
            "goes; give the records that the run was fitted to"
        )
    if split["fraction"]:
        say("samples")
        cohort = draw_cohort(schema, encoder, folder.load_generator(encoder), rng)
        say("membership inference")
        for attack in membership_attacks(train, others, cohort, rng):
            figures = asdict(attack)
            name = f"membership: {figures.pop('name')}"
            checks.append(Check(name, None, None, None, True, figures))
        say("one run, held-out units")
        found = audit_split(folder, train, others, cohort, rng)
        checks.append(_one_run("one run: held-out units", found, claimed, info["delta"]))
    if runs:
        made: list[OneRun] = []
        for number in range(runs):
            say(f"one run, canaries {number + 1}/{runs}")
            scores, claimed = audit_canaries(folder, train, rng, canaries)
            made.append(scores)
        pooled = OneRun(
            np.concatenate([run.included for run in made]), np.concatenate([_ranks(run) for run in made])
        )
        checks.append(_one_run("one run: canaries", pooled, claimed, info["delta"], runs=runs))
    return checks


def _ranks(run: OneRun) -> np.ndarray:
    """Scores as shares of the run's own, so that those of several runs may be put together."""
    return np.asarray(np.argsort(np.argsort(run.scores, kind="stable"), kind="stable") / len(run.scores))


def _one_run(name: str, found: OneRun, claimed: float, delta: float, **more: Any) -> Check:
    bounds = found.bounds(delta, SIGNIFICANCE)
    details = {"guessed_units": len(found.scores), "confidence": 1.0 - SIGNIFICANCE, **bounds, **more}
    return Check(name, bounds["one_run"], claimed, None, True, details)


def _check_records_out(folder: RunFolder, out: Path, overwrite: bool) -> None:
    if folder.path.resolve() in out.resolve().parents:
        raise OutputError(
            f"{out}: lies in the run folder, which holds nothing but what the budget paid for; give another place"
        )
    if out.exists() and not overwrite:
        raise OutputError(f"{out}: exists; give another file, or --overwrite it")


def _dump(data: dict[str, Any]) -> bytes:
    from synthward.commands.common import json_ready

    return (json.dumps(json_ready(data), indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
