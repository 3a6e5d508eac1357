"""``synthward schema``: a first draft of a schema, for a person to edit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from synthward.commands.common import Json, Overwrite, emit, interruptible, remark


@interruptible("nothing was written")
def schema(
    data: Annotated[Path, typer.Argument(help="Records: .csv, .csv.gz, .parquet or a folder of parts.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="TOML file to write; default: standard output.")
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Draft a schema by looking at the records. The draft is NOT private: edit it before use."""
    from synthward.data import draft_schema
    from synthward.report.write import refuse_existing, write_new_file

    if out is not None:
        refuse_existing(out, overwrite)
    text, warnings = draft_schema(data)
    for warning in warnings:
        remark(f"warning: {warning}")
    if out is not None:
        write_new_file(out, text.encode(), overwrite=overwrite)
    result: dict[str, Any] = {"schema": out, "private": False, "warnings": warnings}
    if out is None:
        result["toml"] = text
    lines = [text.rstrip("\n")] if out is None else [f"draft: {out} (edit it: it is not private yet)"]
    emit(result, lines, as_json=json)
