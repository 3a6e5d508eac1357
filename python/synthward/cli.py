"""The command line: ``synthward COMMAND ...``.

What a user can mend ends in one line on standard error and exit code 2; an interruption in one line and 130.
Only a bug shows a traceback, and says so (exit code 1). Results go to standard output, all else to standard
error. The commands import what they need when they run: ``--help`` must not wait for torch.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated

import typer
from typer.main import get_command

from synthward import __version__
from synthward.commands import (
    accounting,
    attest,
    audit,
    budget,
    cohort,
    evaluate,
    fit,
    plan,
    sample,
    schema,
    simulate,
    statement,
    tune,
)
from synthward.commands.common import Interrupted, has_ranks

USER_ERROR, BUG, INTERRUPTED = 2, 1, 128 + signal.SIGINT

app = typer.Typer(
    name="synthward",
    help="Private synthetic health records: fit a generator under a privacy budget, sample cohorts, report.",
    add_completion=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"synthward {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options before the command."""


app.command("simulate")(simulate.simulate)
app.command("schema")(schema.schema)
app.command("fit")(fit.fit)
app.command("plan")(plan.plan)
app.command("tune")(tune.tune)
app.command("sample")(sample.sample)
app.command("evaluate")(evaluate.evaluate)
app.command("statement")(statement.statement)
app.command("audit")(audit.audit)
app.command("cohort")(cohort.cohort)
app.command("account")(accounting.account)
app.command("ledger")(accounting.ledger)
app.command("budget")(budget.budget)
app.command("sign")(attest.sign)
app.command("verify")(attest.verify)


# What torchrun may start.
_ALL_RANKS = frozenset({"fit", "sample"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    code = _run(words)
    if arguments is None and has_ranks():
        _leave(code)
    return code


def _leave(code: int) -> None:
    """End one of several processes without the interpreter's own last steps.

    All is closed and written by now. What is left are threads of gloo, which may hold a tensor of Python a moment
    longer: one that asks for the interpreter's lock when that is gone aborts the process (torch 2.13), and a run that
    is complete would be called a failure.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def _run(words: list[str]) -> int:
    if has_ranks() and not _ALL_RANKS.intersection(words):
        _say_once(
            f"error: only {' and '.join(sorted(_ALL_RANKS))} run on several processes; leave torchrun away"
        )
        return USER_ERROR
    try:
        code = get_command(app).main(args=words, prog_name="synthward", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); Python would complain once more while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Interrupted as stop:
        _say_once(f"interrupted; {stop}")
        return INTERRUPTED
    except KeyboardInterrupt:
        _say_once("interrupted")
        return INTERRUPTED
    except Exception as error:
        return _report(error)
    return code if isinstance(code, int) else 0


def _report(error: Exception) -> int:
    if getattr(error, "is_told", False):
        # Another process of this run has said it.
        return USER_ERROR
    line = _one_line(error)
    if line is not None:
        # A mistake in the words of the command is one on every process that runs it.
        say = _say_once if callable(getattr(error, "format_message", None)) else _say
        say(f"error: {line}")
        return USER_ERROR
    traceback.print_exception(error)
    _say(
        f"bug: {type(error).__name__}: this is a fault of synthward {__version__}, not of your input. Please "
        "report it with the lines above, after making sure that they show nothing of your records"
    )
    return BUG


def _one_line(error: Exception) -> str | None:
    """What a user can mend, as one line; None for a bug."""
    # Looked up, not imported: an error of this family exists only where its module has been loaded.
    errors = sys.modules.get("synthward.engine.errors")
    if errors is not None and isinstance(error, errors.SynthwardError):
        return _flat(str(error))
    if callable(getattr(error, "format_message", None)):
        return _usage_line(error)
    if isinstance(error, MemoryError):
        return "not enough memory; give fewer rows or a smaller --physical-batch-size"
    if isinstance(error, OSError) and error.errno is not None:
        return _system_line(error.errno, error.filename)
    # Libraries in Rust (safetensors) hide the system's error number in their own exception's text.
    hidden = re.search(r"\(os error (\d+)\)", str(error))
    return _system_line(int(hidden[1]), None) if hidden else None


def _system_line(number: int, file: object) -> str:
    text = os.strerror(number)
    if number in (errno.ENOSPC, errno.EDQUOT):
        text = "no space left on the disk; free some, and go on with --resume where there is one"
    return f"{os.fsdecode(file)}: {text}" if isinstance(file, (str, bytes, os.PathLike)) else text


def _usage_line(error: Exception) -> str:
    """An error of the argument parser (typer's own or click's, by version), with where to read more."""
    message = _flat(error.format_message())  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "synthward"
    return f"{message.rstrip('.')} (see `{command} --help`)"


def _flat(text: str) -> str:
    return " ".join(text.split())


def _say(line: str) -> None:
    print(f"synthward: {line}", file=sys.stderr, flush=True)


def _say_once(line: str) -> None:
    """What happens to all processes of a command, rank 0 says."""
    if not has_ranks() or os.environ.get("RANK") == "0":
        _say(line)
