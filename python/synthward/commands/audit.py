"""``synthward audit``: what an attacker achieves against a run, beside what the run claims."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from synthward.commands.common import Json, Overwrite, budget_line, emit, interruptible, remark
from synthward.progress import make_progress

FAILED = 3


@interruptible("the run itself is as it was; run the command again")
def audit(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    data: Annotated[
        Path | None,
        typer.Option("--data", help="The records that the run was fitted to; adds attacks on real records."),
    ] = None,
    runs: Annotated[
        int, typer.Option("--runs", help="Runs to make for the audit, with canaries among the records.")
    ] = 0,
    canaries: Annotated[int, typer.Option("--canaries", help="Canary records of each such run.")] = 1000,
    out_records: Annotated[
        Path | None,
        typer.Option("--out-records", help="File for what is computed from records, outside the run folder."),
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Check noise, clipping and sampling of a run's mechanism; exit code 3 where they fail their claim."""
    from synthward.audit.runs import audit_run

    begin = time.perf_counter()
    with make_progress() as progress:
        task = progress.task("audit")
        try:
            result = audit_run(
                run,
                data=data,
                runs=runs,
                canaries=canaries,
                records_out=out_records,
                overwrite=overwrite,
                progress=lambda stage: task.advance(1, stage=stage),
            )
        finally:
            task.close()
    result["seconds"] = round(time.perf_counter() - begin, 1)
    claim = budget_line(result["claimed_epsilon"], result["delta"], result["unit"], private=result["private"])
    emit(result, [claim, *map(check_line, result["checks"])], as_json=json)
    if result.get("custodian_only"):
        remark("checks marked * are computed from real records: for their custodian's eyes only")
    if not result["passed"]:
        raise typer.Exit(FAILED)


def check_line(check: Mapping[str, Any]) -> str:
    """One check in one line."""
    verdict = {True: "passed", False: "FAILED", None: "reported"}[check["passed"]]
    line = f"{verdict:>8}  {check['name']}{'' if check['releasable'] else ' *'}: "
    if check["claimed"] is not None:
        sure = ""
        if "gate" in check:
            # A tight claim lies below its own 95 % bound in one audit of twenty: that one decides nothing.
            sure = f" ({check['gate']:.3f} beyond doubt, which decides)"
        shown = f"epsilon of at least {check['lower_bound']:.3f} shown at 95%{sure}"
        return line + f"{shown}, {check['claimed']:.3f} claimed"
    if "auroc" in check:
        auroc, tpr = check["auroc"], check["tpr"]
        return line + (
            f"AUROC {auroc['value']:.3f} ({auroc['low']:.3f} to {auroc['high']:.3f}), finds {tpr['value']:.1%} "
            f"({tpr['low']:.1%} to {tpr['high']:.1%}) at 1% false alarms"
        )
    if "noise_over_claim" in check:
        return line + (
            f"{check['noise_over_claim']:.4f} of its claim, tolerance {check['tolerance']:.4f}, least p-value "
            f"{min(check['p_values'].values()):.2g}"
        )
    return line + f"{check['steps_charged']} steps charged of {check['steps_planned']} planned"
