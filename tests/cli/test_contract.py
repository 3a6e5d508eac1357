"""What every command keeps: help, exit codes, one error line, one JSON object."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from tests.commandline import Outcome, command, environment

COMMANDS = (
    "simulate",
    "schema",
    "fit",
    "plan",
    "tune",
    "sample",
    "evaluate",
    "statement",
    "audit",
    "cohort",
    "account",
    "ledger",
    "budget",
    "sign",
    "verify",
)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`synthward ...` in this process."""

    def invoke(*arguments: object) -> Outcome:
        from synthward.cli import main

        capsys.readouterr()
        code = main([str(a) for a in arguments])
        streams = capsys.readouterr()
        return Outcome(code, streams.out, streams.err)

    return invoke


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_the_json_option(call, name):
    outcome = call(name, "--help")
    assert outcome.code == 0 and not outcome.stderr
    assert "--json" in outcome.stdout
    assert len(outcome.stdout.splitlines()[2].strip()) > 20, "a sentence about what the command does"


def test_the_list_of_commands_is_complete(call):
    listed = call("--help").stdout.split("Commands:")[1].splitlines()
    assert {line.split()[0] for line in listed if line[2:3].strip()} == set(COMMANDS)


def test_version(call):
    import synthward

    assert call("--version") == Outcome(0, f"synthward {synthward.__version__}\n", "")


def test_help_does_not_wait_for_torch():
    """Below half a second on a quiet machine; three seconds are allowed on a busy one."""
    begin = time.monotonic()
    done = subprocess.run(command("--help"), capture_output=True, env=environment(), check=False)
    assert done.returncode == 0
    assert time.monotonic() - begin < 3


@pytest.mark.parametrize(
    ("arguments", "mention"),
    [
        ((), "Missing command"),
        (("conjure",), "conjure"),
        (("fit",), "--help"),
        (("sample", "run", "--out", "c.csv", "--rows", "many"), "--rows"),
        (("account", "--nosuch", "1"), "--nosuch"),
    ],
)
def test_misuse_is_one_line_and_code_2(call, arguments, mention):
    outcome = call(*arguments)
    assert outcome.code == 2 and not outcome.stdout
    [line] = outcome.stderr.splitlines()
    assert line.startswith("synthward: error: ") and mention in line


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Makes `synthward schema` raise the given exception from its middle."""

    def arrange(error: BaseException) -> None:
        def fail(_: object) -> None:
            raise error

        monkeypatch.setattr("synthward.data.draft_schema", fail)

    return arrange


def one_line(outcome: Outcome) -> str:
    assert not outcome.stdout
    [line] = outcome.stderr.splitlines()
    return line


@pytest.mark.parametrize("family", ["ConfigError", "DataError", "BudgetExceededError", "LedgerError"])
def test_an_error_of_ours_is_one_line(call, failing, family):
    from synthward.engine import errors

    failing(getattr(errors, family)("the column 'age'\nis missing"))
    outcome = call("schema", "x.csv")
    assert outcome.code == 2
    assert one_line(outcome) == "synthward: error: the column 'age' is missing"


@pytest.mark.parametrize(
    ("error", "mention"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), "/a/b: Permission denied"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "gone"), "gone: No such file"),
        (MemoryError(), "memory"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "no space left"),
    ],
)
def test_what_the_system_refuses_is_one_line(call, failing, error, mention):
    failing(error)
    outcome = call("schema", "x.csv")
    assert outcome.code == 2
    line = one_line(outcome)
    assert line.startswith("synthward: error: ") and mention in line


def test_a_bug_keeps_its_traceback_and_says_so(call, failing):
    failing(ZeroDivisionError("unforeseen"))
    outcome = call("schema", "x.csv")
    assert outcome.code == 1
    assert "Traceback" in outcome.stderr and "unforeseen" in outcome.stderr
    assert outcome.stderr.splitlines()[-1].startswith("synthward: bug: ZeroDivisionError")


def test_an_interruption_is_one_line_and_130(call, failing):
    failing(KeyboardInterrupt())
    outcome = call("schema", "x.csv")
    assert outcome.code == 130
    assert one_line(outcome).startswith("synthward: interrupted; ")


def test_control_c_in_a_child_process():
    """The real signal, in the middle of a command."""
    code = """
import sys, time, synthward.data
from synthward.cli import main
def wait(_):
    print("waiting", file=sys.stderr, flush=True)
    time.sleep(60)
synthward.data.draft_schema = wait
sys.exit(main(["schema", "x.csv"]))
"""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert not out
    assert errors.startswith("synthward: interrupted") and errors.count("\n") == 1


def test_a_reader_that_goes_away_is_no_error():
    """`synthward --help | true`."""
    process = subprocess.Popen(
        command("simulate", "--help"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    process.wait(timeout=60)
    assert errors == b""


def test_json_is_one_object_without_nan_or_infinity(capsys):
    from pathlib import Path

    from synthward.commands.common import emit

    emit({"a": float("inf"), "b": [float("nan"), 1.5], "c": Path("x")}, ["text"], as_json=True)
    assert json.loads(capsys.readouterr().out) == {"a": "inf", "b": [None, 1.5], "c": "x"}
    emit({"a": 1}, ["one", "two"], as_json=False)
    assert capsys.readouterr().out == "one\ntwo\n"


def test_a_seeded_run_is_never_shown_as_private():
    from synthward.commands.common import budget_line

    assert "NOT PRIVATE" in budget_line(1.0, 1e-6, "patient", private=False)
    assert "NOT PRIVATE" not in budget_line(1.0, 1e-6, "patient", private=True)


def test_account_does_not_import_torch():
    code = "import sys; from synthward.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    settings = {"noise-multiplier": 1, "sample-rate": 0.01, "steps": 10, "delta": 1e-5}
    words = ["account", "--json", *(f"--{name}={value}" for name, value in settings.items())]
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *words], capture_output=True, text=True, check=False
    )
    result, loaded = done.stdout.splitlines()
    assert json.loads(result)["epsilon"] > 0
    assert loaded == "False"
