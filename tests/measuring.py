"""The checkout's package `benchmarks` for tests: other packages install something of that name."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


def measuring(name: str) -> Any:
    """The module ``benchmarks.<name>`` of this checkout."""
    loaded = sys.modules.get("benchmarks")
    if loaded is None or Path(str(loaded.__file__)).parent != _FOLDER:
        spec = importlib.util.spec_from_file_location(
            "benchmarks", _FOLDER / "__init__.py", submodule_search_locations=[str(_FOLDER)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["benchmarks"])
    return importlib.import_module(f"benchmarks.{name}")
