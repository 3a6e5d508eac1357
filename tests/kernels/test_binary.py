"""The sources of one instruction set may not leave code that another part of the program could pick up."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
COMPILER = shutil.which("c++")
FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}


@pytest.mark.skipif(COMPILER is None or shutil.which("nm") is None, reason="no C++ compiler or nm here")
@pytest.mark.parametrize("name", FLAGS)
def test_no_weak_symbols(name, tmp_path):
    """The linker keeps one copy of a weak symbol: with the wrong instructions, perhaps. One table is all."""
    if FLAGS[name] and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("not this processor's instruction set")
    out = tmp_path / f"{name}.o"
    # Unoptimised: nothing is inlined that need not be, so that every symbol shows.
    options = ["-std=c++17", "-O0", "-fno-exceptions", "-fvisibility=hidden", "-w", f"-I{CSRC}", *FLAGS[name]]
    subprocess.run([COMPILER, *options, "-c", CSRC / "isa" / f"{name}.cpp", "-o", out], check=True)
    listing = subprocess.run(["nm", "-C", out], check=True, capture_output=True, text=True).stdout
    # "address kind name", the address blank where the symbol is another file's.
    symbols = [line[16:].split(maxsplit=1) for line in listing.splitlines()]
    weak = [symbol for kind, symbol in symbols if kind in "WwVvu"]
    shared = [symbol for kind, symbol in symbols if kind in "TDBRC"]
    assert weak == []
    assert shared == [f"synthward::{name}::table"]
