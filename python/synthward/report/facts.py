"""What is known of a run for its documents: declared, chosen, or charged. Nothing here is read off the records."""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthward.engine.accounting import Event, SelectionEvent
from synthward.engine.errors import CheckpointError, LedgerError
from synthward.engine.ledger import Ledger
from synthward.report.audited import read_audit
from synthward.report.budgets import read_data_set
from synthward.report.documents import Audit, AuditCheck, DataSetBudget, Guarantee, Relation, Unit
from synthward.report.mechanisms import QUERIES, flatten
from synthward.report.settings import setting_text, settings_table
from synthward.schema import Schema, load_schema

if TYPE_CHECKING:
    from synthward.evaluate.result import EvaluationResult

# As synthward.run names them; importing that would load torch.
RUN_FILE, SCHEMA_FILE, LEDGER_FILE = "run.json", "schema.toml", "ledger.jsonl"
ENCODER_FILE, AUDIT_FILE, ATTESTATION_FILE = "encoder.json", "audit.json", "attestation.dsse.json"

SEEDED = (
    "Its random numbers were made from a seed so that it can be repeated exactly. Whoever knows or guesses the seed "
    "can take the noise away again, so the noise protects nobody."
)
NO_NOISE = "No noise was added, or too little to bound anything: epsilon is infinite."
NOT_SAID = "It did not record that its random numbers were secret, so nothing can be said for it."
NO_DELTA = "No delta was given, and an epsilon means nothing without one."


@dataclass(frozen=True)
class LedgerFacts:
    """The ledger as an anchor: hash of its last line, and its lines by what they are."""

    head: str
    lines: int
    keys: int
    recovered: int


@dataclass(frozen=True)
class RunFacts:
    """What a run recorded that is public or paid for.

    Attributes:
        unit: the unit of privacy.
        relation: which data sets are neighbours.
        guarantee: None where the run is not private; then ``not_private`` says why.
        budget: the guarantee that the run was planned for.
        data_set: the budget file of the data set, where one was given.
        adaptive: noise and rates could follow from what was released before, under a filter fixed before the run.
        signed: there is an attestation in the folder (it is not checked here).
        events: everything charged, equal mechanisms together; () where no ledger was given.
        notes: what charged queries were for, as the ledger notes it.
        ledger: None where no ledger was given.
        settings: choices made before the records were read, as (name, text).
        selected: settings that a charged selection chose among those of ``grid``, as (name, text).
        score: the noisy score of the trial that was selected, charged with the selection.
        budget_id: of the budget file that the run draws on, whether or not it was given.
        schema: the declared schema.
        run_id, created, status, generator, arithmetic: as recorded, or None.
        holdout: share of the units that took no part in training, or None where nothing was recorded.
        units, records: noisy numbers of units and of records that a charged query gave, else None.
        audit: what an audit left in the folder, as far as it may be released.
        custodian_checks: checks of that audit that used real records; in no document.
        software: name -> version of what computed these documents.
        assumptions, not_covered: sentences given by the caller.
    """

    unit: Unit
    relation: Relation
    guarantee: Guarantee | None
    not_private: str | None
    budget: Guarantee | None = None
    data_set: DataSetBudget | None = None
    adaptive: bool = False
    signed: bool = False
    events: tuple[Event, ...] = ()
    notes: tuple[str, ...] = ()
    ledger: LedgerFacts | None = None
    settings: tuple[tuple[str, str], ...] = ()
    selected: tuple[tuple[str, str], ...] = ()
    grid: tuple[tuple[str, str], ...] = ()
    score: float | None = None
    budget_id: str | None = None
    schema: Schema | None = None
    run_id: str | None = None
    created: str | None = None
    status: str | None = None
    generator: str | None = None
    arithmetic: str | None = None
    holdout: float | None = None
    units: float | None = None
    records: float | None = None
    audit: Audit | None = None
    custodian_checks: tuple[AuditCheck, ...] = ()
    software: Mapping[str, str] = field(default_factory=dict)
    assumptions: tuple[str, ...] = ()
    not_covered: tuple[str, ...] = ()

    @property
    def is_private(self) -> bool:
        """Whether anything at all may be claimed."""
        return self.guarantee is not None

    @property
    def is_complete(self) -> bool:
        """Whether the run says that it ended."""
        return self.status == "complete"

    def without_guarantee(self) -> RunFacts:
        """The same run with nothing claimed: where two sources differ on whether it is private, it is not."""
        if self.guarantee is None:
            return self
        claims = ("guarantee", "budget", "data_set", "units", "records", "score")
        nothing: dict[str, None] = dict.fromkeys(claims)
        return replace(self, not_private=NOT_SAID, **nothing)  # type: ignore[arg-type]


def read_facts(run: Path, budget: Path | None = None) -> RunFacts:
    """Facts of a run folder; no record is needed, and nothing is written.

    Args:
        run: the folder.
        budget: the budget file of the data set, which has to know the run.

    Raises:
        CheckpointError: ``run`` is no run folder, or a file of it is damaged.
        LedgerError: the ledger is missing, broken, or not of the run that run.json or the budget file describes.
        SchemaError: the schema is missing or damaged.
    """
    run = Path(run)
    info = _read_json(run / RUN_FILE)
    if info is None:
        raise CheckpointError(f"{run}: no run here ({RUN_FILE} is missing); make one with `synthward fit`")
    with Ledger.open(run / LEDGER_FILE, expected_head=info.get("ledger_head"), readonly=True) as ledger:
        header, events = ledger.header, tuple(ledger.events())
        epsilon, is_private = ledger.epsilon(), ledger.is_private and info.get("private") is True
        lines, head = ledger.lines, ledger.head
    _same_run(run, info, header, events)
    data_set = None if budget is None else read_data_set(budget, header["run_id"], head)
    schema = load_schema(run / SCHEMA_FILE)
    if info.get("schema_fingerprint") not in (None, schema.fingerprint()):
        raise CheckpointError(f"{run}: {SCHEMA_FILE} is not the one that the run was begun with; put it back")
    unit = _unit(header["unit"])
    guarantee, why_not = _guarantee(epsilon, header, unit, private=is_private)
    # Noisy numbers are public only where a query for them was charged, and where its noise is secret.
    counted = guarantee is not None and any(isinstance(event, QUERIES) for event in flatten(events))
    encoder = (_read_json(run / ENCODER_FILE) or {}) if counted else {}
    audit, checks = read_audit(run / AUDIT_FILE, header["run_id"])
    target = header["target_epsilon"]
    kinds = [line["kind"] for line in lines]
    return RunFacts(
        unit=unit,
        relation=header["relation"],
        guarantee=guarantee,
        not_private=why_not,
        budget=guarantee.model_copy(update={"epsilon": float(target)}) if guarantee and target else None,
        data_set=data_set if guarantee else None,
        adaptive="filter" in lines[0],
        signed=(run / ATTESTATION_FILE).is_file(),
        events=events,
        notes=tuple(dict.fromkeys(str(line["note"]) for line in lines if line.get("note"))),
        ledger=LedgerFacts(
            head, len(lines), kinds.count("header") + kinds.count("key"), kinds.count("recovered")
        ),
        schema=schema,
        units=_count(encoder, "units"),
        records=_count(encoder, "records"),
        audit=audit,
        custodian_checks=checks,
        software=software(),
        **_recorded(info, told=guarantee is not None),
    )


def _recorded(info: Mapping[str, Any], *, told: bool) -> dict[str, Any]:
    """What run.json says of choices and of how the run went; ``told``: whether its noise protects what is noisy."""
    selection = info.get("selection")
    selection = selection if isinstance(selection, Mapping) else {}
    grid = selection.get("grid")
    grid = grid if isinstance(grid, Mapping) else {}
    mechanism = info.get("mechanism")
    steps = mechanism if isinstance(mechanism, Mapping) else info
    chosen = {place for name in grid for place in (str(name), f"settings.{name}")}
    settings = settings_table(_chosen(info), releasable=True)
    return {
        "settings": tuple(row for row in settings if row[0] not in chosen),
        "selected": tuple(row for row in settings if row[0] in chosen),
        "grid": tuple((str(name), setting_text(values)) for name, values in grid.items()),
        "score": _count(selection, "score") if told else None,
        "budget_id": _text(info, "budget_id"),
        **{name: _text(info, name) for name in ("run_id", "created", "status", "generator")},
        "arithmetic": _text(steps, "arithmetic"),
        "holdout": _holdout(info),
    }


def facts_of_result(result: EvaluationResult) -> RunFacts:
    """Facts of an evaluation without a run folder: what its caller said in ``privacy`` and ``settings``."""
    said = result.privacy
    unit = _unit(said.get("unit") or "row")
    header = {
        "delta": result.delta,
        "relation": said.get("relation", "add_or_remove_one"),
        "accountant": said.get("accountant", "not given"),
    }
    guarantee, why_not = _guarantee(result.epsilon, header, unit, private=said.get("private") is True)
    if "private" not in said:
        why_not = NOT_SAID
    target = said.get("target_epsilon")
    head = said.get("ledger_head")
    return RunFacts(
        unit=unit,
        relation=header["relation"],
        guarantee=guarantee,
        not_private=why_not,
        budget=guarantee.model_copy(update={"epsilon": float(target)}) if guarantee and target else None,
        ledger=None if head is None else LedgerFacts(str(head), 0, 0, 0),
        settings=tuple(settings_table(_chosen(result.settings), releasable=True)),
        generator=_text(result.settings, "generator"),
        arithmetic=_text(said, "arithmetic"),
        holdout=_holdout(result.settings),
        software=software(),
        assumptions=tuple(str(line) for line in said.get("assumptions", ())),
        not_covered=tuple(str(line) for line in said.get("not_covered", ())),
    )


def software() -> dict[str, str]:
    """Versions of what computes epsilon and writes the documents."""
    from synthward import __version__

    found = {"synthward": __version__}
    try:
        found["dp-accounting"] = importlib.metadata.version("dp-accounting")
    except importlib.metadata.PackageNotFoundError:
        found["dp-accounting"] = "unknown"
    return found


def _guarantee(
    epsilon: float, header: Mapping[str, Any], unit: Unit, *, private: bool
) -> tuple[Guarantee | None, str | None]:
    """The guarantee, or why there is none."""
    delta = float(header["delta"])
    if not private:
        return None, SEEDED
    if not math.isfinite(epsilon):
        return None, NO_NOISE
    if not 0.0 < delta < 1.0:
        return None, NO_DELTA
    return (
        Guarantee(
            epsilon=epsilon,
            delta=delta,
            unit=unit,
            relation=header["relation"],
            accountant=str(header["accountant"]),
        ),
        None,
    )


def _same_run(
    run: Path, info: Mapping[str, Any], header: Mapping[str, Any], events: tuple[Event, ...]
) -> None:
    """Both files have to tell of one run: run.json can be edited, the ledger's lines can not."""
    for name in ("run_id", "unit", "delta", "relation", "accountant"):
        if name in info and info[name] != header[name]:
            raise LedgerError(
                f"{run}: {RUN_FILE} says {name} {info[name]!r}, its ledger {header[name]!r}; one of them is of "
                "another run or was changed"
            )
    if "selection" in info and not any(isinstance(event, SelectionEvent) for event in events):
        raise LedgerError(
            f"{run}: {RUN_FILE} tells of a selection among trials that its ledger does not charge"
        )


def _unit(name: str) -> Unit:
    return Unit(column=None if name == "row" else str(name))


def _chosen(info: Mapping[str, Any]) -> dict[str, Any]:
    # The rate that a mechanism of groups or of correlated noise was made from is not the one that its steps have.
    rate = ("sample_rate",) if isinstance(info.get("mechanism"), Mapping) else ()
    # Epsilons stand in a guarantee, never alone in a list of settings; so does what says whether it is one. The batch
    # size that was expected is no choice, but a charged answer times the sampling rate.
    told = (
        *rate,
        *("epsilon", "target_epsilon", "delta", "unit", "relation", "private", "accountant", "seed"),
        *("run_id", "created", "generator", "version", "expected_batch_size", "selection"),
    )
    return {name: value for name, value in info.items() if name not in told}


def _holdout(info: Mapping[str, Any]) -> float | None:
    split = info.get("holdout")
    share = split.get("fraction") if isinstance(split, Mapping) else info.get("holdout_fraction")
    return float(share) if isinstance(share, (int, float)) and not isinstance(share, bool) else None


def _text(info: Mapping[str, Any], name: str) -> str | None:
    value = info.get(name)
    return None if value is None else str(value)


def _count(encoder: Mapping[str, Any], name: str) -> float | None:
    value = encoder.get(name)
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None  # type: ignore[arg-type]


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no such file."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: can not be read ({error})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: is damaged (holds no object)")
    return data
