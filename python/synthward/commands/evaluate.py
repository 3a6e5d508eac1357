"""``synthward evaluate``: compare a cohort with the real records, and write the report."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from synthward.commands.common import Json, Overwrite, budget_line, emit, interruptible
from synthward.commands.fit import spent_budget
from synthward.progress import Progress, make_progress

CURVE_POINTS = 16
COHORT_FILE, COHORT_FOLDER = "cohort.parquet", "cohort"


@interruptible("nothing was written; run the command again")
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    real: Annotated[Path, typer.Option("--real", help="The records that the run was fitted to.")],
    out: Annotated[Path, typer.Option("--out", help="HTML file to write.")],
    holdout: Annotated[
        Path | None,
        typer.Option("--holdout", help="Records of other units; default: those that the run held out."),
    ] = None,
    synthetic: Annotated[
        Path | None,
        typer.Option(
            "--synthetic", help="Cohort; default: cohort.parquet or cohort/ in RUN, else one is sampled."
        ),
    ] = None,
    releasable: Annotated[
        bool, typer.Option("--releasable", help="Leave out all that is computed from real records.")
    ] = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write a report of utility and privacy. Unless --releasable, it is for the records' custodian only."""
    begin = time.perf_counter()
    with make_progress() as progress:
        result = write_report(
            run,
            real,
            out,
            holdout=holdout,
            synthetic=synthetic,
            releasable=releasable,
            overwrite=overwrite,
            progress=progress,
        )
    result["seconds"] = round(time.perf_counter() - begin, 1)
    budget = budget_line(result["epsilon"], result["delta"], result["unit"], private=result["private"])
    emit(
        result,
        [*summary_lines(result), budget, f"report: {out}", f"documents: {result['documents']}"],
        as_json=json,
    )


def write_report(
    run: Path,
    real: Path,
    out: Path,
    *,
    holdout: Path | None,
    synthetic: Path | None,
    releasable: bool,
    overwrite: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Evaluate a run's cohort and write the report; returns the facts that the command prints."""
    from synthward.data import read_records, split_records
    from synthward.engine import Ledger
    from synthward.engine.accounting import epsilon_curve
    from synthward.evaluate import evaluate_records
    from synthward.report import documents_path, read_facts, render_report, save_documents, write_documents
    from synthward.report.write import refuse_existing
    from synthward.run import RunFolder

    folder = RunFolder(run)
    refuse_existing(out, overwrite)
    refuse_existing(documents_path(out), overwrite)
    schema, info, known = folder.schema, folder.info, read_facts(run)
    spent = spent_budget(folder)
    with Ledger.open(folder.ledger_path, readonly=True) as ledger:
        header, head = ledger.header, ledger.head
        curve = epsilon_curve(
            ledger.events(), header["delta"], CURVE_POINTS, header["accountant"], header["relation"]
        )
    with _counting(progress, "read") as count:
        train = read_records(real, schema, progress=count)
    split = info["holdout"]
    kept = None
    if holdout is not None:
        with _counting(progress, "read holdout") as count:
            kept = read_records(holdout, schema, progress=count)
    elif split["fraction"]:
        train, kept = split_records(train, holdout_fraction=split["fraction"], salt=split["salt"])
    with _cohort(folder, synthetic, progress) as cohort:
        made = read_records(cohort, schema.cohort())
    task = progress.task("evaluate", 100)
    try:
        result = evaluate_records(
            schema,
            train,
            kept,
            made,
            privacy=_privacy(spent, info, head),
            settings=info,
            epsilon_curve=curve,
            progress=lambda stage, share: task.at(round(100 * share), stage=stage),
        )
    finally:
        task.close()
    documents = save_documents(write_documents(known), documents_path(out), overwrite=overwrite)
    try:
        render_report(result, out, facts=known, releasable=releasable, overwrite=overwrite)
    except BaseException:
        # Both files or none: the documents are of the report beside them.
        documents.unlink(missing_ok=True)
        raise
    facts = {"report": out, "documents": documents, "run": folder.path, "releasable": releasable, **spent}
    if not releasable:
        facts |= {"custodian_only": True, "summary": result.summary()}
    return facts


def summary_lines(result: dict[str, Any]) -> list[str]:
    """The figures that matter most, for a person; none when the report is to be released."""
    figures = result.get("summary")
    if figures is None:
        return []
    lines = [f"mean 2-way total variation: {figures['two_way_tv_mean']:.4f}"]
    if figures.get("two_way_tv_mean_floor") is not None:
        lines[0] += f" (fresh real records: {figures['two_way_tv_mean_floor']:.4f})"
    for key, value in figures.items():
        if key.startswith("tstr_auroc_") and value is not None:
            model = key.removeprefix("tstr_auroc_")
            on_real = figures[f"trtr_auroc_{model}"]
            lines.append(f"AUROC trained on synthetic ({model}): {value:.3f}, on real: {on_real:.3f}")
    return [*lines, "these figures compare with real records: for their custodian's eyes only"]


@contextlib.contextmanager
def _counting(progress: Progress, name: str) -> Iterator[Callable[[int], None]]:
    task = progress.task(name)
    try:
        yield task.at
    finally:
        task.close()


@contextlib.contextmanager
def _cohort(folder: Any, synthetic: Path | None, progress: Progress) -> Iterator[Path]:
    """The cohort to evaluate: the given one, the run's own, or one that is sampled for the occasion."""
    from synthward.run import sample_run

    own = [place for name in (COHORT_FILE, COHORT_FOLDER) if (place := folder.path / name).exists()]
    if synthetic is not None or own:
        yield synthetic or own[0]
        return
    with tempfile.TemporaryDirectory(prefix="synthward-") as temporary:
        path = Path(temporary) / COHORT_FILE
        sample_run(folder.path, None, path, progress=progress)
        yield path


def _privacy(spent: dict[str, Any], info: dict[str, Any], head: str) -> dict[str, Any]:
    unit = None if info["unit"] == "row" else info["unit"]
    more = {"relation": info["relation"], "seed": info["seed"], "ledger_head": head}
    return {**spent, "unit": unit, **more}
