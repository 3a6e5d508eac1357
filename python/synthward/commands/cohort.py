"""``synthward cohort``: the main job in one command: records, fit, sample, evaluate.

A job lives in a folder of its own, ``OUT/NAME``, and is found again by what determines its model (records,
schema, budget, generator, settings). The same command run again therefore goes on with an unfinished job and
shows a finished one again; it spends nothing twice. Any other command gets the next free folder (``NAME-2``),
so that nothing is ever replaced.
"""

from __future__ import annotations

import json as jsonlib
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from synthward import __version__
from synthward.commands.common import Device, Json, budget_line, emit, interruptible, remark
from synthward.commands.evaluate import summary_lines, write_report
from synthward.commands.fit import load_declared, parse_settings, spent_budget
from synthward.progress import Progress, make_progress

JOB_FILE, RUN_FOLDER, LEDGER = "job.json", "run", "ledger.jsonl"
COHORT, REPORT = "cohort.parquet", "report.html"
SIMULATED, SIMULATED_SCHEMA = "hospital.csv", "hospital.toml"


@interruptible("the same command goes on where it stopped; what was spent stays spent")
def cohort(
    data: Annotated[
        Path | None, typer.Option("--data", help="Records; default: an invented hospital is simulated.")
    ] = None,
    schema: Annotated[Path | None, typer.Option("--schema", help="Schema of the records (TOML).")] = None,
    epsilon: Annotated[float, typer.Option("--epsilon", help="Privacy budget per privacy unit.")] = 3.0,
    delta: Annotated[
        float, typer.Option("--delta", help="Failure probability; well below 1 / patients.")
    ] = 1e-6,
    generator: Annotated[str, typer.Option("--generator", help="diffusion or gan.")] = "diffusion",
    rows: Annotated[
        int | None, typer.Option("--rows", help="Rows of the cohort; default: the noisy number of records.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of all jobs.")] = Path("out"),
    patients: Annotated[
        int, typer.Option("--patients", help="Patients to simulate without --data.")
    ] = 20_000,
    unit: Annotated[str | None, typer.Option("--unit", help="Column of the privacy unit.")] = None,
    accountant: Annotated[str, typer.Option("--accountant", help="pld, rdp or prv.")] = "pld",
    steps: Annotated[int | None, typer.Option("--steps", help="Training steps.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the generator.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin anew although the job was done; spends a second budget.")
    ] = False,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Do the whole job: (simulate,) fit, sample and evaluate. Run it again to go on, or to see it again."""
    from synthward.engine.errors import CheckpointError, SynthwardError

    source = _source(data, schema)
    request: dict[str, Any] = {
        "synthward": __version__,
        **source,
        "patients": patients if data is None else None,
        "epsilon": epsilon,
        "delta": delta,
        "generator": generator,
        "unit": unit,
        "accountant": accountant,
        "steps": steps,
        "settings": parse_settings(settings or []),
    }
    name = "hospital" if data is None else data.name.split(".")[0] or "records"
    job = find_job(out, name, request, fresh=fresh)
    if job.found:
        remark(
            f"{job.folder}: the same job; what is done is kept, nothing is spent twice (--fresh begins anew)"
        )
    begin = time.perf_counter()
    with make_progress() as progress:
        try:
            result = _work(job, data, schema, rows, device, progress)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; --fresh (make cohort FRESH=1) begins anew, and spends anew"
            ) from None
        except SynthwardError:
            if not job.found and not (job.folder / RUN_FOLDER / LEDGER).exists():
                # Refused before anything was spent: the folder is as new as the mistake.
                shutil.rmtree(job.folder, ignore_errors=True)
            raise
    result["seconds"] = round(time.perf_counter() - begin, 1)
    budget = budget_line(result["epsilon"], result["delta"], result["unit"], private=result["private"])
    files = [f"cohort: {result['cohort']}", f"report: {result['report']}"]
    emit(result, [*summary_lines(result), budget, *files], as_json=json)


@dataclass
class Job:
    """A job folder with what was asked (``request``) and what is known of its outputs (``results``)."""

    folder: Path
    request: dict[str, Any]
    results: dict[str, Any]
    found: bool

    def save(self) -> None:
        """Write the job file in one move."""
        from synthward.report.write import write_new_file

        self.folder.mkdir(parents=True, exist_ok=True)
        document = {"request": self.request, "results": self.results}
        text = jsonlib.dumps(document, indent=1, default=str) + "\n"
        write_new_file(self.folder / JOB_FILE, text.encode(), overwrite=True)


def find_job(out: Path, name: str, request: dict[str, Any], *, fresh: bool) -> Job:
    """The latest job with the same request, or a new one in the first free folder after all others."""
    latest: Job | None = None
    number, folder = 1, out / name
    while folder.exists():
        document = _read_job(folder)
        if document is not None and document["request"] == jsonlib.loads(jsonlib.dumps(request, default=str)):
            latest = Job(folder, request, document["results"], found=True)
        number += 1
        folder = out / f"{name}-{number}"
    return latest if latest is not None and not fresh else Job(folder, request, {}, found=False)


def _read_job(folder: Path) -> dict[str, Any] | None:
    try:
        document = jsonlib.loads((folder / JOB_FILE).read_text())
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) and {"request", "results"} <= document.keys() else None


def _source(data: Path | None, schema: Path | None) -> dict[str, Any]:
    """What identifies the records: the file and when it changed, and the schema's content."""
    from synthward.engine.errors import ConfigError, DataError

    if data is None:
        if schema is not None:
            raise ConfigError("--schema: is given without --data; the simulated hospital has its own schema")
        return {"data": None}
    if schema is None:
        raise ConfigError(
            f"--schema: is missing; draft one with `synthward schema {data} -o schema.toml`, edit it"
        )
    fingerprint = load_declared(schema, None).fingerprint()
    if not data.exists():
        raise DataError(f"{data}: does not exist")
    return {"data": str(data.resolve()), "changed": data.stat().st_mtime_ns, "schema": fingerprint}


def _work(
    job: Job, data: Path | None, schema: Path | None, rows: int | None, device: str, progress: Progress
) -> dict[str, Any]:
    """Do what is left of the job; every finished part is found again by its file."""
    from synthward.run import RunFolder

    job.save()
    if data is None or schema is None:
        data, schema = _simulate(job, progress)
    run = job.folder / RUN_FOLDER
    _fit(job, data, schema, run, device, progress)
    cohort, report = _outputs(job, rows)
    if not cohort.is_file():
        from synthward.run import sample_run

        report.unlink(missing_ok=True)
        sample_run(run, rows, cohort, resume=True, device=device, progress=progress)
    if not report.is_file():
        facts = write_report(
            run,
            data,
            report,
            holdout=None,
            synthetic=cohort,
            releasable=False,
            # Nothing is lost: without its report, the documents beside it are of a report that is gone.
            overwrite=True,
            progress=progress,
        )
        job.results[report.name] = facts["summary"]
        job.save()
    files = {"run": run, "data": data, "cohort": cohort, "report": report}
    result: dict[str, Any] = {**files, **spent_budget(RunFolder(run))}
    summary = job.results.get(report.name)
    return result if summary is None else {**result, "custodian_only": True, "summary": summary}


def _simulate(job: Job, progress: Progress) -> tuple[Path, Path]:
    from synthward.commands.simulate import write_hospital

    data, schema = job.folder / SIMULATED, job.folder / SIMULATED_SCHEMA
    if not (data.is_file() and schema.is_file()):
        write_hospital(data, schema, job.request["patients"], seed=1, overwrite=True, progress=progress)
    return data, schema


def _fit(job: Job, data: Path, schema: Path, run: Path, device: str, progress: Progress) -> None:
    from synthward.run import FitOptions, RunFolder, fit_run
    from synthward.run.folder import CHECKPOINT_FOLDER, ENCODER_FILE, LEDGER_FILE, MODEL_FILE, RUN_FILE

    # Killed before its ledger existed, a run has spent nothing and kept nothing: it begins anew.
    if not any((run / file).exists() for file in (LEDGER_FILE, ENCODER_FILE, CHECKPOINT_FOLDER, MODEL_FILE)):
        shutil.rmtree(run, ignore_errors=True)
    begun = (run / RUN_FILE).is_file()
    if begun and RunFolder(run).is_complete:
        return
    asked = job.request
    steps = {} if asked["steps"] is None else {"steps": asked["steps"]}
    progress.note(
        f"fit: planning the noise for epsilon {asked['epsilon']:g} ({asked['accountant']} accountant)"
    )
    fit_run(
        data,
        load_declared(schema, asked["unit"]),
        epsilon=asked["epsilon"],
        delta=asked["delta"],
        out=run,
        options=FitOptions(
            generator=asked["generator"],
            accountant=asked["accountant"],
            settings=asked["settings"],
            device=device,
            **steps,
        ),
        resume=begun,
        progress=progress,
    )


def _outputs(job: Job, rows: int | None) -> tuple[Path, Path]:
    """The job's cohort and report; a later request for another number of rows gets files of its own."""
    first = job.results.setdefault("rows", {"asked": rows})["asked"]
    job.save()
    if rows == first:
        return job.folder / COHORT, job.folder / REPORT
    suffix = "default" if rows is None else str(rows)
    return job.folder / f"cohort-{suffix}.parquet", job.folder / f"report-{suffix}.html"
