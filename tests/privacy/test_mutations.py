"""Tests of the tests: each fault that is put into a copy of the source must be noticed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pybind11
import pytest

from tests.privacy.mutants import ROOT, Mutant, Runs, Tree, assert_noticed, assert_sound
from tests.privacy.mutants_compiled import COMPILED
from tests.privacy.mutants_python import PYTHON
from tests.privacy.mutants_ranks import RANKS
from tests.privacy.mutants_recorded import RECORDINGS
from tests.privacy.mutants_triton import TRITON

ALL = [*PYTHON, *TRITON, *COMPILED, *RANKS, *RECORDINGS]
# Runs beside each other: each test of a fault is small.
AT_ONCE = 2


def named_in(mutants: list[Mutant]) -> list[str]:
    return sorted({test for mutant in mutants for test in mutant.tests})


def chosen(request: pytest.FixtureRequest, test: str) -> list[Mutant]:
    """The mutants of a test's parameters that are to run in this session."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    mine = [item for item in items if item.originalname == test and item.path == request.path]
    return [item.callspec.params["mutant"] for item in mine]


def test_names_are_given_once():
    names = [mutant.name for mutant in ALL]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("mutant", ALL, ids=lambda m: m.name)
def test_the_fault_is_about_a_line_that_is_there(mutant: Mutant):
    assert mutant.apply((ROOT / mutant.file).read_text())


# Python, and the Triton kernels in the interpreter


@contextmanager
def in_python(tree: Tree, mutant: Mutant) -> Iterator[None]:
    file = tree.place(mutant.file)
    sound = file.read_text()
    file.write_text(mutant.apply(sound))
    try:
        yield
    finally:
        file.write_text(sound)


@pytest.fixture(scope="module")
def interpreted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    runs = Runs([Tree(tmp_path_factory.mktemp("mutants")) for _ in range(AT_ONCE)], in_python)
    runs.start(chosen(request, "test_a_fault_in_python_is_noticed"))
    yield runs
    runs.close()


@pytest.mark.parametrize("mutant", [*PYTHON, *TRITON, *RECORDINGS], ids=lambda m: m.name)
def test_a_fault_in_python_is_noticed(interpreted: Runs, mutant: Mutant):
    assert_noticed(mutant, interpreted.outcome(mutant))


def test_the_copy_without_a_fault_passes(interpreted: Runs):
    """So that what fails fails for its fault."""
    named = named_in([*PYTHON, *TRITON, *RECORDINGS])
    assert_sound(named, interpreted.sound(named))


# What several ranks do together; each test starts its own


@pytest.fixture(scope="module")
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    runs = Runs([Tree(tmp_path_factory.mktemp("mutants"))], in_python)
    runs.start(chosen(request, "test_a_fault_between_ranks_is_noticed"))
    yield runs
    runs.close()


@pytest.mark.slow
@pytest.mark.parametrize("mutant", RANKS, ids=lambda m: m.name)
def test_a_fault_between_ranks_is_noticed(together: Runs, mutant: Mutant):
    assert_noticed(mutant, together.outcome(mutant))


@pytest.mark.slow
def test_ranks_without_a_fault_pass(together: Runs):
    named = named_in(RANKS)
    assert_sound(named, together.sound(named))


# The compiled kernels, in a build of the one instruction set that every machine has


class Build:
    """A build folder of a copy of the compiled sources. One fault at a time."""

    def __init__(self, folder: Path) -> None:
        self._sources, self._folder, self._lock = folder / "csrc", folder / "build", threading.Lock()
        shutil.copytree(ROOT / "csrc", self._sources)
        self._replace("CMakeLists.txt", "x86_64|AMD64|amd64", "one set alone")
        # Nothing is measured here, and less is compiled sooner.
        self._replace("CMakeLists.txt", "-O3", "-O1")
        self._replace("dispatch.cpp", "#if defined(__x86_64__) || defined(_M_X64)", "#if 0", count=2)
        self._run(
            *("cmake", "-S", self._sources, "-B", self._folder, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
            *(f"-D{name}={sys.executable}" for name in ("Python_EXECUTABLE", "PYTHON_EXECUTABLE")),
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        )
        self.sound = folder / "sound.so"
        shutil.copy2(self._make(), self.sound)

    @contextmanager
    def into(self, tree: Tree, mutant: Mutant) -> Iterator[None]:
        """The fault in the tree's extension."""
        file = self._sources.parent / mutant.file
        with self._lock:
            sound = file.read_text()
            file.write_text(mutant.apply(sound))
            try:
                # A new file, not new contents: a process that is at its end may still have the old one open.
                tree.extension.unlink()
                shutil.copy2(self._make(), tree.extension)
            finally:
                file.write_text(sound)
        try:
            yield
        finally:
            tree.extension.unlink(missing_ok=True)
            shutil.copy2(self.sound, tree.extension)

    def _make(self) -> Path:
        self._run("cmake", "--build", self._folder)
        [made] = self._folder.glob("_C.*")
        return made

    def _replace(self, file: str, old: str, new: str, count: int = 1) -> None:
        text = (self._sources / file).read_text()
        assert text.count(old) == count, f"{file}: {old!r}"
        (self._sources / file).write_text(text.replace(old, new))

    @staticmethod
    def _run(program: str, *words: object) -> None:
        beside = Path(sys.executable).parent
        path = f"{beside}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            [shutil.which(program, path=path) or program, *map(str, words)],
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    build = Build(tmp_path_factory.mktemp("compiled"))
    trees = [Tree(tmp_path_factory.mktemp("mutants"), build.sound) for _ in range(AT_ONCE)]
    runs = Runs(trees, build.into)
    runs.start(chosen(request, "test_a_fault_in_a_compiled_kernel_is_noticed"))
    yield runs
    runs.close()


@pytest.mark.slow
@pytest.mark.parametrize("mutant", COMPILED, ids=lambda m: m.name)
def test_a_fault_in_a_compiled_kernel_is_noticed(compiled: Runs, mutant: Mutant):
    assert_noticed(mutant, compiled.outcome(mutant))


@pytest.mark.slow
def test_the_build_without_a_fault_passes(compiled: Runs):
    named = named_in(COMPILED)
    assert_sound(named, compiled.sound(named))
