"""What ``synthward audit`` left in a run folder, read with patience and believed with none."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from synthward.report.documents import Audit, AuditCheck

_READ = ("name", "passed", "lower_bound", "claimed", "from_records", "releasable")


def read_audit(path: Path, run_id: str) -> tuple[Audit | None, tuple[AuditCheck, ...]]:
    """The audit in ``path`` as it may be released, and the checks that stay with the custodian.

    None where there is no audit, one that says that it is of another run than ``run_id``, or one that gives no delta
    for its bounds. Parts that can not be read are left out.
    A check counts as one that used real records unless it says ``"from_records": false``.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return None, ()
    is_own = isinstance(data, Mapping) and data.get("run_id", run_id) == run_id
    delta = _number(data.get("delta")) if is_own else None
    if delta is None or not 0.0 < delta < 1.0:
        return None, ()
    checks = data.get("checks")
    listed = [c for c in checks if isinstance(c, Mapping)] if isinstance(checks, list) else []
    kept = tuple(_check(c) for c in listed if c.get("from_records") is not False)
    audit = Audit(
        delta=delta,
        claimed_epsilon=_bound(data.get("claimed_epsilon")),
        checks=tuple(_check(c) for c in listed if c.get("from_records") is False),
        withheld=len(kept),
    )
    return audit, kept


def _check(check: Mapping[str, Any]) -> AuditCheck:
    passed = check.get("passed")
    return AuditCheck(
        name=str(check.get("name") or "unnamed"),
        passed=passed if isinstance(passed, bool) else None,
        lower_bound=_bound(check.get("lower_bound")),
        claimed=_bound(check.get("claimed")),
        details={str(name): value for name, value in check.items() if name not in _READ},
    )


def _bound(value: Any) -> float | None:
    number = _number(value)
    return None if number is None else max(number, 0.0)


def _number(value: Any) -> float | None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if good and math.isfinite(value) else None
