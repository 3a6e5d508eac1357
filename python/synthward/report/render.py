"""The report: one HTML file without scripts and without anything fetched from elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from synthward.engine.errors import PrivacyError
from synthward.evaluate.result import CUSTODIAN_ONLY, EvaluationResult
from synthward.report import plots
from synthward.report.bundle import write_documents
from synthward.report.documents import PrivacyDocuments
from synthward.report.facts import RunFacts, facts_of_result
from synthward.report.figures import Image, figure_style
from synthward.report.numbers import format_delta, format_epsilon
from synthward.report.settings import settings_table
from synthward.report.statement import outcome
from synthward.report.write import refuse_existing, write_new_file

BADGE = CUSTODIAN_ONLY
NOT_PRIVATE = "reproducible, not private"

MAX_MARGINAL_FIGURES = 60
"""Above this many columns, the figures of those that differ most are shown and the table lists all."""

MAX_TABLE_ROWS = 400
NOTHING = "\u2013"  # an en dash, for a figure that does not exist


@dataclass(frozen=True)
class _Card:
    name: str
    kind: str
    tv: float | None
    floor: float | None
    image: Image


def render_report(
    result: EvaluationResult,
    out: Path | str,
    *,
    facts: RunFacts | None = None,
    releasable: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write the report of an evaluation as one self-contained HTML file.

    Args:
        result: what ``evaluate_records`` returned.
        out: path of the file.
        facts: what the run folder recorded (`read_facts`); by default what ``result.privacy`` says.
        releasable: keep only what the privacy budget covers: no figure computed from real records, no count
            of records, no setting that tells about them.
        overwrite: replace an existing file.

    Returns:
        the path.

    Raises:
        OutputError: the path exists and ``overwrite`` is False, or it cannot be written.
        PrivacyError: ``releasable`` for a run that is not private, of which nothing is covered.
    """
    path = Path(out)
    refuse_existing(path, overwrite)
    facts = facts_of_result(result) if facts is None else facts
    if not result.is_private:
        facts = facts.without_guarantee()
    if releasable and not facts.is_private:
        raise PrivacyError("this run is not private, so no part of its report can be released")
    with figure_style():
        context = _public_context(result, facts, releasable)
        context["real"] = None if releasable else _real_context(result, facts)
    page = _environment().get_template("report.html.j2").render(context)
    return write_new_file(path, page.encode("utf-8"), overwrite=overwrite)


def render_documents(bundle: PrivacyDocuments, out: Path | str, *, overwrite: bool = False) -> Path:
    """Write statement, model card and datasheet as one self-contained HTML file that needs no records.

    Raises:
        OutputError: the path exists and ``overwrite`` is False, or it cannot be written.
    """
    title = f"Privacy statement: {bundle.model_card.title.partition(': ')[2]}"
    context = {"title": title, "bundle": bundle, "not_private": NOT_PRIVATE}
    page = _environment().get_template("statement.html.j2").render(context)
    return write_new_file(Path(out), page.encode("utf-8"), overwrite=overwrite)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("synthward.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"share": _share, "figure": _figure, "signed": _signed, "count": _count}
    return environment


def _public_context(result: EvaluationResult, facts: RunFacts, releasable: bool) -> dict[str, Any]:
    """What is computed without real records, or paid for from the budget."""
    guarantee = facts.guarantee
    curve = result.epsilon_curve if guarantee else ()
    finite = [(step, epsilon) for step, epsilon in curve if math.isfinite(epsilon)]
    target = facts.budget.epsilon if facts.budget else None
    public = result.public_marginals[:MAX_MARGINAL_FIGURES] if releasable else ()
    return {
        "title": f"Synthetic cohort report: {result.schema_name}",
        "schema_name": result.schema_name,
        "columns": len(result.columns),
        "created": datetime.now(UTC).strftime("%Y-%m-%d"),
        "badge": BADGE,
        "not_private": NOT_PRIVATE,
        "is_private": guarantee is not None,
        "epsilon": "none" if guarantee is None else format_epsilon(guarantee.epsilon),
        "delta": "none" if guarantee is None else format_delta(guarantee.delta),
        "source": "spent, as given" if facts.ledger is None else "spent, by the ledger",
        "unit": facts.unit.column or "row",
        "relation": facts.relation.replace("_", " "),
        "bundle": write_documents(facts),
        "settings": settings_table(result.settings, releasable=releasable),
        "epsilon_plot": plots.epsilon_image(finite, target) if finite else None,
        "releasable": releasable,
        "public_marginals": [_Card(m.column, m.kind, None, None, plots.marginal_image(m)) for m in public],
        "public_skipped": result.skipped.get("releasable marginals"),
        "numeric_bins": result.numeric_bins,
    }


def _real_context(result: EvaluationResult, facts: RunFacts) -> dict[str, Any]:
    """Everything computed from real records; never called for a released report."""
    found = result.comparison
    floor = found.one_way_floor or {}
    ordered = sorted(found.marginals, key=lambda m: -found.one_way[m.column])
    shown = {m.column for m in ordered[:MAX_MARGINAL_FIGURES]}
    cards = [
        _Card(m.column, m.kind, found.one_way[m.column], floor.get(m.column), plots.marginal_image(m))
        for m in found.marginals
        if m.column in shown
    ]
    return {
        "sizes": found.sizes,
        "headline": _headline(result),
        "legend": plots.legend_image(found.one_way_floor is not None),
        "marginals": cards,
        "hidden_marginals": len(found.marginals) - len(cards),
        "one_way": [
            (m.column, m.kind, found.one_way[m.column], floor.get(m.column), m.train[-1], m.synthetic[-1])
            for m in ordered[:MAX_TABLE_ROWS]
        ],
        "pairs": found.pairs,
        "pairs_floor": found.pairs_floor,
        "pairs_matched": found.pairs_matched,
        "heatmap": plots.pair_heatmap_image(found) if found.pairs.values.size else None,
        "panels": [(p, plots.panel_image(p)) for p in found.panels],
        "utility": found.utility,
        "utility_plot": plots.utility_image(found.utility) if found.utility else None,
        "copies": found.copies,
        "audit": [(check.name, outcome(check)) for check in facts.custodian_checks],
        "audit_delta": format_delta(facts.audit.delta) if facts.audit else None,
        "ingest": _ingest_rows(found.ingest),
        "ingest_read": {name: entry["rows"] for name, entry in found.ingest.items()},
        "skipped": {k: v for k, v in result.skipped.items() if k != "releasable marginals"},
    }


def _headline(result: EvaluationResult) -> list[tuple[str, str, str]]:
    """Tiles under the header: (name, figure, what to compare it with)."""
    found = result.comparison
    fresh = "" if found.pairs_floor is None else f"fresh real rows: {_figure(found.pairs_floor.mean)}"
    tiles = [("Mean pair total variation", _figure(found.pairs.mean), fresh)]
    if found.utility is not None:
        best = max(found.utility.models, key=lambda m: m.tstr.value)
        tiles.append(
            (f"TSTR AUROC ({best.model})", _figure(best.tstr.value), f"on real: {_figure(best.trtr.value)}")
        )
    repeated = found.copies.holdout_in_train
    chance = "" if repeated is None else f"unseen real rows: {_share(repeated)}"
    tiles.append(("Rows equal to a training row", _share(found.copies.synthetic_in_train), chance))
    return tiles


def _ingest_rows(ingest: dict[str, dict[str, Any]]) -> list[tuple[str, str, str, int]]:
    words = {
        "clipped": "clipped to the declared bounds",
        "other": "put into the declared other",
        "missing": "missing",
        "violations": "rows that break the constraint",
    }
    rows = []
    for table, entry in ingest.items():
        for part, text in words.items():
            rows += [(table, name, text, n) for name, n in entry.get(part, {}).items() if n]
    return rows[:MAX_TABLE_ROWS]


def _share(value: float | None) -> str:
    if value is None or math.isnan(value):
        return NOTHING
    return f"{100 * value:.1f} %" if value >= 0.0005 or value == 0 else f"{100 * value:.2g} %"


def _figure(value: float | None) -> str:
    return NOTHING if value is None or math.isnan(value) else f"{value:.3f}"


def _signed(value: float | None) -> str:
    return NOTHING if value is None or math.isnan(value) else f"{value:+.3f}"


def _count(value: int) -> str:
    return f"{value:,}"
