"""The built wheel and source archive: what is in them, and that the wheel works away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def python(*arguments: object, cwd: Path) -> str:
    """Runs this interpreter; the output, or a failure that shows it."""
    words = [sys.executable, *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "SKBUILD"))}
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the checkout, compiled anew in a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    build = f"build-dir={tmp_path_factory.mktemp('build')}"
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--config-settings", build)
    python("-m", "pip", "wheel", "--quiet", *options, "--wheel-dir", folder, ROOT, cwd=folder)
    [made] = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed into an empty folder."""
    target = tmp_path_factory.mktemp("installed")
    python(
        *("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel),
        cwd=target,
    )
    return target


# -I: neither the current folder nor the user's. The environment's own (editable) synthward is put away too.
AWAY = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]
sys.path[:] = [p for p in sys.path if p != {root!r}]
sys.path.insert(0, {target!r})
"""


def away(installed: Path, code: str, folder: Path) -> list[str]:
    """Lines that `code` prints where only the installed wheel has a synthward."""
    return python(
        "-I", "-c", AWAY.format(root=str(ROOT), target=str(installed)) + code, cwd=folder
    ).splitlines()


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for needed in (
        *("synthward/py.typed", "synthward/cli.py", "synthward/simulate/hospital.toml"),
        *("synthward/report/templates/report.html.j2", "synthward/_C.pyi"),
        *("synthward/engine/__init__.py", "synthward/kernels/__init__.py"),
    ):
        assert needed in names, needed
    assert sum(name.startswith("synthward/_C.") and name.endswith(".so") for name in names) == 1
    places = {name.split("/")[0] for name in names}
    assert {p for p in places if not p.endswith(".dist-info")} == {"synthward"}
    unwanted = [n for n in names if n.endswith((".md", ".pyc", ".cpp", ".inl")) or "/tests/" in n]
    assert not unwanted


def test_the_extension_needs_neither_libtorch_nor_openmp(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        [name] = [n for n in archive.namelist() if n.endswith(".so")]
        library = archive.read(name)
    for foreign in (b"libtorch", b"libc10", b"libgomp", b"libomp", str(ROOT).encode()):
        assert foreign not in library, foreign


def test_the_wheel_works_elsewhere(installed: Path, tmp_path: Path):
    """Every part comes from the wheel, and a compiled kernel agrees with its reference."""
    code = """
import torch, synthward, synthward.engine, synthward.kernels as kernels
from synthward import _C
for module in (synthward, synthward.engine, kernels, _C):
    print(module.__file__)
a, g = torch.arange(12.0).reshape(3, 4), torch.ones(3, 2)
print(torch.equal(*(kernels.outer_sq_norms(a, g, backend=b) for b in ("cpp", "reference"))))
print(synthward.engine.PrivacyPlan.__name__)
"""
    *files, equal, name = away(installed, code, tmp_path)
    assert [Path(file).is_relative_to(installed) for file in files] == [True] * 4, files
    assert (equal, name) == ("True", "PrivacyPlan")


def test_the_parts_are_not_importable_by_themselves_elsewhere(installed: Path, tmp_path: Path):
    code = """
from importlib.util import find_spec
names = ("engine", "kernels", "python", "csrc", "synthward.tests", "synthward.python")
print([name for name in names if find_spec(name)])
"""
    assert away(installed, code, tmp_path) == ["[]"]


def test_the_command_works_elsewhere(installed: Path, tmp_path: Path):
    """A command that computes, from the wheel, in a folder of its own."""
    code = """
from synthward.cli import main
main("account --noise-multiplier 1 --sample-rate 0.01 --steps 10 --delta 1e-5 --json".split())
print("torch" in sys.modules)
"""
    line, torch_loaded = away(installed, code, tmp_path)
    assert '"epsilon"' in line
    assert torch_loaded == "False"


def test_the_source_archive_can_be_built_from(tmp_path: Path):
    """The sdist holds all that the wheel is made of."""
    made = python(
        "-c",
        "import sys; from scikit_build_core.build import build_sdist; print(build_sdist(sys.argv[1]))",
        tmp_path,
        cwd=ROOT,
    ).split()[-1]
    with tarfile.open(tmp_path / made) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    for needed in (
        *("pyproject.toml", "LICENSE", "README.md", "csrc/CMakeLists.txt", "csrc/bindings/module.cpp"),
        *("engine/__init__.py", "kernels/__init__.py", "python/synthward/cli.py"),
        "python/synthward/report/templates/report.html.j2",
    ):
        assert needed in names, needed
    assert not [n for n in names if n.startswith((".venv", "build/", "out/"))]


def test_the_version_stands_once():
    """In pyproject.toml and in the package: the same."""
    import tomllib

    import synthward

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == synthward.__version__
