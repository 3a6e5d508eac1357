"""Runs: fitting a generator to records under a budget, and sampling cohorts from it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from synthward.run.fit import FitOptions as FitOptions
    from synthward.run.fit import fit_run as fit_run
    from synthward.run.folder import RunFolder as RunFolder
    from synthward.run.sampling import sample_run as sample_run

# Found on first use, so that a sampler does not wait for what only training needs.
_HOMES = {"FitOptions": "fit", "fit_run": "fit", "RunFolder": "folder", "sample_run": "sampling"}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
