"""DP-SGD on torch: capture, clipping, noise, sampling, accounting, ledger.

Names load on first use, so that accounting alone does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from synthward.engine.keys import KeySchedule as KeySchedule
    from synthward.engine.ledger import Ledger as Ledger
    from synthward.engine.plan import PrivacyPlan as PrivacyPlan
    from synthward.engine.queries import QueryMechanism as QueryMechanism
    from synthward.engine.sampling import PoissonSampler as PoissonSampler
    from synthward.engine.sampling import physical_batches as physical_batches
    from synthward.engine.trainer import PrivateTrainer as PrivateTrainer

_ROOMS = {
    "KeySchedule": "keys",
    "Ledger": "ledger",
    "PrivacyPlan": "plan",
    "QueryMechanism": "queries",
    "PoissonSampler": "sampling",
    "physical_batches": "sampling",
    "PrivateTrainer": "trainer",
}
__all__ = list(_ROOMS)


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)
