"""Copies of the source tree with one fault in each, and the tests that must notice it.

A fault is a text that stands exactly once in a file, and what takes its place. So a change to that line of the source
fails here until the fault is written anew; it cannot rot unnoticed.
"""

from __future__ import annotations

import compileall
import json
import os
import py_compile
import queue
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Where the parts of the package lie in the source tree, and their places in the package.
PARTS = {"python/synthward": ".", "engine": "engine", "kernels": "kernels"}
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.so")
# Seconds after which a run of tests counts as hanging.
_LIMIT = 300

# Reads requests, one a line, and runs pytest for each in a child that has not yet seen the package: what else it needs
# is there already, and takes longer to import than most tests take to run.
_SERVER = """
import json, os, signal, sys
sys.meta_path[:] = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]
import hypothesis, numpy, pytest, scipy.stats, torch

def run(package, report, log, tests):
    signal.alarm(LIMIT)
    to = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(to, 1), os.dup2(to, 2)
    # The same examples in every run, and no time for making those that fail smaller.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutants", derandomize=True, database=None, phases=phases)
    hypothesis.settings.load_profile("mutants")
    sys.path.insert(0, package)
    import synthward, synthward._C, synthward.engine, synthward.kernels
    for part in (synthward, synthward._C, synthward.engine, synthward.kernels):
        assert part.__file__.startswith(package), part.__file__

    class Outcomes:
        found = {}
        def pytest_runtest_logreport(self, report):
            if report.when == "call" or report.failed:
                self.found[report.nodeid] = report.outcome if report.when == "call" else "error"

    outcomes = Outcomes()
    code = pytest.main(["-q", "--tb=line", "--assert=plain", "-p", "no:cacheprovider", *tests], plugins=[outcomes])
    with open(report, "w") as file:
        json.dump({"code": int(code), "outcomes": outcomes.found}, file)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            run(*json.loads(line))
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
""".replace("LIMIT", str(_LIMIT))


@dataclass(frozen=True)
class Mutant:
    """One fault: `file` (in the source tree) with `old` for `new`; each of `tests` (node ids) must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def apply(self, text: str) -> str:
        count = text.count(self.old)
        assert count == 1, f"{self.file}: what the fault {self.name!r} replaces stands there {count} times"
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Outcome:
    """What a run of pytest gave: its exit code, and of each test "passed", "failed", "error" or "skipped"."""

    code: int
    outcomes: dict[str, str]
    output: str

    def of(self, test: str) -> list[str]:
        """Outcomes of a node id, of all its parameters if it names none."""
        whole = (name for name in self.outcomes if name == test or name.startswith(test + "["))
        return [self.outcomes[name] for name in whole]


class Tree:
    """A copy of the package and its tests in a folder, with the extension that is installed unless told."""

    def __init__(self, folder: Path, extension: Path | None = None) -> None:
        self.folder = folder
        self._package = folder / "package"
        package = self._package / "synthward"
        for part, place in PARTS.items():
            shutil.copytree(ROOT / part, package / place, ignore=_LEFT_OUT, dirs_exist_ok=True)
        shutil.copytree(ROOT / "tests", folder / "tests", ignore=_LEFT_OUT)
        shutil.copy2(ROOT / "pyproject.toml", folder)
        # Bytecode that is checked by its source, not by a time: files change more than once in a second here.
        compileall.compile_dir(
            package, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH
        )
        self.extension = package / installed_extension().name
        shutil.copy2(extension or installed_extension(), self.extension)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "COV"))}
        # Idle threads that spin would take the processor from the other runs; a library's own would not
        # survive the fork.
        environment |= {"OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-c", _SERVER],
            cwd=folder,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def place(self, file: str) -> Path:
        """Where a Python file of the source tree is in the copy."""
        part = max((p for p in PARTS if file.startswith(p + "/")), key=len)
        return self._package / "synthward" / PARTS[part] / file[len(part) + 1 :]

    def run(self, tests: Sequence[str]) -> Outcome:
        """Run tests of the copy with the package of the copy, in a process of its own."""
        report, log = self.folder / "report.json", self.folder / "log.txt"
        report.unlink(missing_ok=True)
        log.write_text("")
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps([str(self._package), str(report), str(log), tests]) + "\n")
        self._server.stdin.flush()
        status = self._server.stdout.readline()
        output = log.read_text(errors="replace")[-8000:]
        assert report.is_file(), f"the copy does not run (status {status.strip()}):\n{output}"
        found = json.loads(report.read_text())
        return Outcome(found["code"], found["outcomes"], output)

    def close(self) -> None:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


def installed_extension() -> Path:
    from synthward import _C

    return Path(_C.__file__)


class Runs:
    """Mutants and their tests, as many at a time as there are trees.

    `install` puts a mutant's fault into a tree for as long as its context lasts.
    """

    def __init__(
        self, trees: Sequence[Tree], install: Callable[[Tree, Mutant], AbstractContextManager[None]]
    ):
        self._trees, self._install = trees, install
        self._free: queue.SimpleQueue[Tree] = queue.SimpleQueue()
        for tree in trees:
            self._free.put(tree)
        self._threads = ThreadPoolExecutor(len(trees))
        self._found: dict[Mutant, Future[Outcome]] = {}

    def start(self, mutants: Iterable[Mutant]) -> None:
        """Begin with these, in their order."""
        for mutant in mutants:
            self._found[mutant] = self._threads.submit(self._run, mutant)

    def outcome(self, mutant: Mutant) -> Outcome:
        return self._found[mutant].result()

    def sound(self, tests: Iterable[str]) -> list[Outcome]:
        """Of the tests without any fault, a share in each tree."""
        named = sorted(set(tests))
        shares = [named[i :: len(self._trees)] for i in range(len(self._trees))]
        return [done.result() for done in [self._threads.submit(self._check, share) for share in shares]]

    def _run(self, mutant: Mutant) -> Outcome:
        tree = self._free.get()
        try:
            with self._install(tree, mutant):
                return tree.run(mutant.tests)
        finally:
            self._free.put(tree)

    def _check(self, tests: Sequence[str]) -> Outcome:
        tree = self._free.get()
        try:
            return tree.run(tests)
        finally:
            self._free.put(tree)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        for tree in self._trees:
            tree.close()


def assert_noticed(mutant: Mutant, found: Outcome) -> None:
    """Each of the mutant's tests failed in a tree that has the fault."""
    assert found.code == 1, (
        f"{mutant.name}: pytest ended with {found.code}, not with failures\n{found.output}"
    )
    for test in mutant.tests:
        assert "failed" in found.of(test), f"{mutant.name}: {test} did not notice\n{found.output}"


def assert_sound(tests: Iterable[str], found: list[Outcome]) -> None:
    """Each of the tests passed, whatever its parameters."""
    for outcome in found:
        assert outcome.code == 0, outcome.output
    for test in tests:
        assert {how for outcome in found for how in outcome.of(test)} == {"passed"}, test
