"""Differentially private generators of synthetic health records.

Names load on first use, so that the command line starts without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from synthward.data import Records as Records
    from synthward.data import read_records as read_records
    from synthward.engine import DPAdamBC as DPAdamBC
    from synthward.engine.errors import SynthwardError as SynthwardError
    from synthward.evaluate import evaluate_records as evaluate_records
    from synthward.privacy_engine import PrivacyEngine as PrivacyEngine
    from synthward.report import render_report as render_report
    from synthward.run import FitOptions as FitOptions
    from synthward.run import RunFolder as RunFolder
    from synthward.run import fit_run as fit_run
    from synthward.run import sample_run as sample_run
    from synthward.schema import Schema as Schema
    from synthward.schema import load_schema as load_schema

__version__ = "0.1.0"

_ROOMS = {
    "DPAdamBC": "engine",
    "FitOptions": "run",
    "PrivacyEngine": "privacy_engine",
    "Records": "data",
    "RunFolder": "run",
    "Schema": "schema",
    "SynthwardError": "engine.errors",
    "evaluate_records": "evaluate",
    "fit_run": "run",
    "load_schema": "schema",
    "read_records": "data",
    "render_report": "report",
    "sample_run": "run",
}
__all__ = ["__version__", *_ROOMS]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
