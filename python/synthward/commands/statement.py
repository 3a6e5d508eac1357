"""``synthward statement``: privacy statement, model card and datasheet of a run, without its records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from synthward.commands.common import Json, Overwrite, emit, interruptible

KINDS = (".html", ".json")


@interruptible("nothing was written; run the command again")
def statement(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="File to write, .html or .json; default: print the statement."),
    ] = None,
    budget: Annotated[
        Path | None,
        typer.Option("--budget", help="Budget file of the data set: adds what all releases cost together."),
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write a run's privacy statement, model card and datasheet; all in them is public or paid for."""
    from synthward.engine.errors import ConfigError
    from synthward.report import read_facts, render_documents, save_documents, write_documents
    from synthward.report.write import refuse_existing

    if out is not None:
        if out.suffix.lower() not in KINDS:
            raise ConfigError(f"--out: got {out}; name a file that ends in {' or '.join(KINDS)}")
        refuse_existing(out, overwrite)
    bundle = write_documents(read_facts(run, budget))
    if out is not None:
        write = save_documents if out.suffix.lower() == ".json" else render_documents
        write(bundle, out, overwrite=overwrite)
    if out is None:
        emit(bundle.model_dump(mode="json"), statement_lines(bundle), as_json=json)
        return
    found = bundle.statement
    emit(
        {"statement": out, "run": run, "private": found.private, "guarantee": _plain(found.guarantee)},
        [found.headline, f"statement: {out}"],
        as_json=json,
    )


def statement_lines(bundle: Any) -> list[str]:
    """The statement as text for a terminal."""
    found = bundle.statement
    lines = [found.headline, ""]
    for section in found.sections:
        lines += [section.heading.upper(), *section.paragraphs]
        lines += [f"  {fact.name}: {fact.value}" for fact in section.table] + [""]
    parts = (
        ("WHAT WAS HELD CONSTANT", found.held_constant),
        ("WHAT WAS ASSUMED", found.assumptions),
        ("WHAT IS NOT COVERED", found.not_covered),
        ("RESIDUAL RISKS", found.residual_risks),
    )
    for title, sentences in parts:
        lines += [title, *(f"  - {text}" for text in sentences), ""] if sentences else []
    return lines[:-1]


def _plain(guarantee: Any) -> dict[str, Any] | None:
    return None if guarantee is None else dict(guarantee.model_dump(mode="json"))
