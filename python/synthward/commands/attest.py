"""``synthward sign`` and ``synthward verify``: who vouches for a run, its files and its epsilon."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from synthward.commands.common import Json, budget_line, emit, interruptible, remark

Cohorts = Annotated[
    list[Path] | None,
    typer.Option(
        "--cohort", help="A cohort (file or folder of parts) made from the run; may be given again."
    ),
]


@interruptible("run the command again")
def sign(
    run: Annotated[Path | None, typer.Argument(help="Folder of the run.")] = None,
    key: Annotated[Path | None, typer.Option("--key", help="Ed25519 private key (PEM).")] = None,
    new_key: Annotated[
        Path | None, typer.Option("--new-key", help="Make a key pair: this file, and .pub.pem beside it.")
    ] = None,
    cohort: Cohorts = None,
    json: Json = False,
) -> None:
    """Sign a finished run: hashes of its files and cohorts, and epsilon recomputed from its ledger."""
    from synthward.engine.errors import ConfigError
    from synthward.run import attest

    if new_key is not None and key is not None:
        raise ConfigError("--new-key: makes a key, --key names one; give one of them")
    if run is None and new_key is None:
        raise ConfigError("RUN: is missing; name the folder of a run, or make a key with --new-key")
    if run is None and cohort:
        raise ConfigError("--cohort: is signed with the run that it was made from; name its folder, RUN")
    result: dict[str, object] = {}
    if new_key is not None:
        result |= {"key": new_key, "public_key": attest.new_key(new_key)}
        key = new_key
    if run is not None:
        if key is None:
            raise ConfigError("--key: is missing; give a private key, or make one with --new-key")
        result |= {"run": run, "envelope": attest.sign_run(run, key, cohort or [])}
    if new_key is not None:
        remark(
            f"{new_key} is secret and has no passphrase: keep it away from the run; give others the .pub.pem"
        )
    emit(result, [f"{name}: {value}" for name, value in result.items()], as_json=json)


@interruptible("run the command again")
def verify(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    key: Annotated[Path | None, typer.Option("--key", help="The signer's public key (PEM).")] = None,
    cohort: Cohorts = None,
    json: Json = False,
) -> None:
    """Check a run's signature, the hashes of its files, and its epsilon against its ledger."""
    from synthward.run.attest import verify_run

    result = {"run": run, **verify_run(run, key, cohort or [])}
    if not result["signed"]:
        remark("warning: the signature was NOT checked; give the signer's public key with --key")
    epsilon = float(result["epsilon"])
    lines = [
        f"signature: good, by key {result['key_id']}" if result["signed"] else "signature: not checked",
        *(f"unchanged: {name}" for name in result["files"]),
        *(f"not signed: {name}" for name in result["not_signed"]),
        f"ledger head: {result['ledger']['head']}",
        budget_line(epsilon, result["delta"], result["unit"], private=result["private"]),
    ]
    emit(result, lines, as_json=json)
