"""Fixtures of the bad-input tests: the tiny data in a folder of its own, and the command line in this
process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.commandline import Outcome, assert_one_line_error, fit_arguments
from tests.tinydata import write_tiny


@dataclass
class Desk:
    """A folder with data.csv and schema.toml; `refused` runs a command that must fail cleanly."""

    folder: Path
    call: Callable[..., Outcome]

    @property
    def data(self) -> Path:
        return self.folder / "data.csv"

    @property
    def schema(self) -> Path:
        return self.folder / "schema.toml"

    @property
    def out(self) -> Path:
        return self.folder / "run"

    def contents(self) -> dict[str, bytes]:
        """Every file below the folder with its bytes, every folder with none."""
        found = sorted(self.folder.rglob("*"))
        return {str(p.relative_to(self.folder)): p.read_bytes() if p.is_file() else b"" for p in found}

    def refused(self, *arguments: object, mentions: tuple[str, ...] = ()) -> str:
        """The command ends with code 2 and one line; no file appears, changes or goes. Returns the line."""
        before = self.contents()
        line = assert_one_line_error(self.call(*arguments), *mentions)
        after = self.contents()
        assert sorted(after) == sorted(before), "a refused command left files behind"
        assert after == before, "a refused command changed a file"
        return line

    def fit_refused(self, *extra: object, mentions: tuple[str, ...] = (), **settings: object) -> str:
        """`fit` on the folder's data is refused."""
        return self.refused(
            *fit_arguments(self.data, self.schema, self.out, *extra, **settings), mentions=mentions
        )


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """The console script's entry point in this process (a child would import torch anew each time)."""
    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.setenv("NO_COLOR", "1")

    def invoke(*arguments: object) -> Outcome:
        from synthward.cli import main

        capfd.readouterr()
        monkeypatch.setattr("sys.argv", ["synthward", *map(str, arguments)])
        try:
            code = main()
        except SystemExit as ended:
            code = ended.code
        streams = capfd.readouterr()
        return Outcome(int(code or 0), streams.out, streams.err)

    return invoke


@pytest.fixture
def desk(tmp_path: Path, call: Callable[..., Outcome]) -> Iterator[Desk]:
    """A fresh folder with the tiny data and its schema."""
    write_tiny(tmp_path)
    yield Desk(tmp_path, call)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run of the diffusion generator, with data.csv and schema.toml beside it."""
    from tests.commandline import run

    folder = tmp_path_factory.mktemp("finished")
    data, schema = write_tiny(folder)
    outcome = run(*fit_arguments(data, schema, folder / "run"))
    assert outcome.code == 0, outcome.stderr[-3000:]
    return folder / "run"
