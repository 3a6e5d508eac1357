"""Who may import whom, how large a file may be, and what may stand in none."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {"python/synthward": "synthward", "engine": "synthward.engine", "kernels": "synthward.kernels"}
FOLDERS = (*ROOMS, "csrc", "tests", "benchmarks", "docs", ".ci")
FILES = (
    "pyproject.toml",
    "Makefile",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    ".pre-commit-config.yaml",
)
CODE = {".py", ".pyi", ".cpp", ".h", ".inl"}
TEXT = CODE | {".md", ".toml", ".txt", ".j2", ".yaml", ".json", ""}
MAX_LINES = 500

# Third-party packages that a part of the house may use, by the start of its module name; the longest wins.
ALLOWED = {
    "synthward.kernels": {"numpy", "torch", "triton"},
    "synthward.engine": {"numpy", "torch", "cryptography", "safetensors"},
    "synthward.engine.accounting": {"dp_accounting", "numpy", "scipy", "prv_accountant"},
    "synthward.engine.errors": set(),
    "synthward.engine.files": set(),
    "synthward": {
        *("numpy", "torch", "scipy", "pyarrow", "pydantic", "typer", "rich", "sklearn"),
        *("matplotlib", "jinja2", "markupsafe", "safetensors", "numba"),
    },
    "synthward.commands": {"typer"},
    "synthward.run.attest": {"cryptography"},
    "synthward.schema": {"pydantic", "numpy"},
    "synthward.progress": {"rich"},
    "synthward.observe": {"torch", "pydantic", "numpy", "tensorboard"},
}

# What a part of the house may not import of the house itself.
CLOSED = {
    "synthward.kernels": r"synthward\.(?!kernels\b|_C\b)",
    "synthward.engine": r"synthward\.(?!engine\b|kernels\b)|synthward\.kernels\._|synthward\._C",
    "synthward.engine.files": r"synthward\.",
    "synthward.engine.accounting": r"synthward\.(?!engine\.(accounting|errors)\b)",
    "synthward": r"synthward\._C|synthward\.kernels",
    "synthward.schema": r"synthward\.(?!schema|codes|engine\.errors)",
    "synthward.data": r"synthward\.(?!data|schema|codes|engine\.(errors|files)\b)",
    "synthward.generators": r"synthward\.(?!generators|encoding|schema|engine\.(errors|device)|kernels\b)",
    "synthward.observe": r"synthward\.(?!observe|engine\b|__version__)",
    "synthward.evaluate": r"synthward\.(generators|run|commands|report)",
    "synthward.simulate": r"synthward\.(generators|run|engine(?!\.(errors|files)\b))",
}


def modules() -> Iterator[tuple[str, Path]]:
    """(module name, file) of every module of the package."""
    for folder, package in ROOMS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([package, *(p for p in parts if p != "__init__")]), file


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(imported name, line), `from a import b` as `a.b`, wherever in the file it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((name.name, node.lineno) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from ((f"{node.module}.{name.name}", node.lineno) for name in node.names)


def rule(table: dict[str, object], module: str) -> object:
    """The entry of the longest name that is `module` or a package around it."""
    fitting = [name for name in table if module == name or module.startswith(name + ".")]
    return table[max(fitting, key=len)]


def texts(suffixes: set[str]) -> Iterator[tuple[Path, str]]:
    named = [ROOT / name for name in FILES]
    found = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*") if file.is_file()]
    for file in [*named, *found]:
        if file.suffix in suffixes and "__pycache__" not in file.parts:
            yield file, file.read_text()


MODULES = list(modules())


@pytest.mark.parametrize(("module", "file"), MODULES, ids=[name for name, _ in MODULES])
def test_imports_run_one_way(module: str, file: Path):
    allowed, closed = rule(ALLOWED, module), rule(CLOSED, module)
    for name, line in imports(ast.parse(file.read_text())):
        top = name.split(".")[0]
        assert top not in ("engine", "kernels", "tests", "benchmarks"), f"{file}:{line}: imports {name}"
        if top == "synthward":
            assert not re.match(closed, name), f"{file}:{line}: {module} may not import {name}"
        elif top not in sys.stdlib_module_names:
            assert top in allowed, f"{file}:{line}: {module} may not use {top}"


def test_the_rules_would_find_a_breach():
    assert re.match(rule(CLOSED, "synthward.kernels.outer"), "synthward.engine.plan")
    assert re.match(rule(CLOSED, "synthward.engine.step"), "synthward._C.gaussian")
    assert re.match(rule(CLOSED, "synthward.engine.step"), "synthward.run.fit_run")
    assert re.match(rule(CLOSED, "synthward.engine.accounting.events"), "synthward.engine.plan")
    assert re.match(rule(CLOSED, "synthward.generators.gan"), "synthward.engine.clipping")
    assert "torch" not in rule(ALLOWED, "synthward.engine.accounting.accountant")
    assert [name for name, _ in imports(ast.parse("def f():\n from a import b, c"))] == ["a.b", "a.c"]


def test_commands_import_nothing_heavy_before_they_run():
    """`--help` and `--version` in a fraction of a second; `account` without torch."""
    code = "import sys, synthward.cli; print([m for m in ('torch', 'numpy', 'pyarrow') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["engine", "kernels", "synthward_engine", "_C"])
def test_the_parts_are_not_importable_by_themselves(name: str):
    """A second copy of the engine would have a second registry and a second ledger lock."""
    assert importlib.util.find_spec(name) is None


def test_no_file_is_too_long():
    long = {str(file): text.count("\n") for file, text in texts(CODE) if text.count("\n") > MAX_LINES}
    assert not long


# Written in pieces, so that this file does not find itself.
FORBIDDEN = {
    "flags for one machine": "-m" + "(arch|tune)=native",
    "fast-math": "-f" + "fast-math|-O" + "fast",
    "a path of one machine": r"(?<![\w.~}/])/(" + "home|root|work|Users" + r")/\w",
    "an address of a package index": "(--|PIP_)(extra[-_])?index[-_]url|https?://[a-z.]*py" + "pi",
    "an anchorless reminder": r"\b(FIX" + r"ME|XX" + r"X)\b|\bTO" + r"DO\b(?!.*\b(once|when|until)\b)",
}
# Comments that say what is not used, and the rules themselves, may name it.
EXEMPT = {".pre-commit-config.yaml", "CONTRIBUTING.md"}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_stands_in_no_file(what: str):
    pattern = re.compile(FORBIDDEN[what])
    found = [
        f"{file.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}"
        for file, text in texts(TEXT)
        if file.name not in EXEMPT
        for match in pattern.finditer(text)
    ]
    assert not found


def test_every_folder_of_the_package_is_a_package():
    for folder in ROOMS:
        for place in {file.parent for file in (ROOT / folder).rglob("*.py")}:
            assert (place / "__init__.py").is_file(), place
