"""DP-SGD on torch: capture, clipping, noise, sampling, accounting, ledger."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from synthward.engine.keys import KeySchedule as KeySchedule
    from synthward.engine.layout import Layout as Layout
    from synthward.engine.ledger import Ledger as Ledger
    from synthward.engine.optimizers import DPAdamBC as DPAdamBC
    from synthward.engine.plan import PrivacyPlan as PrivacyPlan
    from synthward.engine.queries import QueryMechanism as QueryMechanism
    from synthward.engine.sampling import PoissonSampler as PoissonSampler
    from synthward.engine.sampling import physical_batches as physical_batches
    from synthward.engine.spec import ClipSpec as ClipSpec
    from synthward.engine.spec import NoiseSpec as NoiseSpec
    from synthward.engine.spec import PerfSpec as PerfSpec
    from synthward.engine.spec import SamplingSpec as SamplingSpec
    from synthward.engine.step import DPStep as DPStep
    from synthward.engine.trainer import PrivateTrainer as PrivateTrainer

# Found on first use, so that accounting alone never loads torch.
_HOMES = {
    "ClipSpec": "spec",
    "DPAdamBC": "optimizers",
    "DPStep": "step",
    "KeySchedule": "keys",
    "Layout": "layout",
    "Ledger": "ledger",
    "NoiseSpec": "spec",
    "PerfSpec": "spec",
    "PoissonSampler": "sampling",
    "PrivacyPlan": "plan",
    "PrivateTrainer": "trainer",
    "QueryMechanism": "queries",
    "SamplingSpec": "spec",
    "physical_batches": "sampling",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
