"""Which of a run's settings a report shows, and which of them a released report keeps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

PUBLIC_KEYS = frozenset(
    (
        *("generator", "epsilon", "target_epsilon", "delta", "accountant", "unit", "relation", "private"),
        *("noise_multiplier", "sample_rate", "steps", "clipping", "max_grad_norm", "expected_batch_size"),
        *("seed", "run_id", "version", "created", "optimizer", "learning_rate", "lr", "batch_size"),
        *("holdout_fraction", "query_noise_multiplier", "physical_batch_size", "arithmetic"),
    )
)
"""Settings that a person chooses before the records are read. Everything else stays with the custodian."""

PUBLIC_GROUPS = frozenset(("plan", "settings", "model", "generator_settings", "hyperparameters"))
"""Groups whose entries are choices too; entries that ``_TELLING`` finds are still kept back."""

MAX_ITEMS = 24
"""Of a longer list (the coefficients of a strategy), so many are shown."""

# Counts of records, places of files and the key of the held-out split tell about the records.
_TELLING = re.compile(
    r"row|record|unit|patient|train_|holdout|salt|path|file|data|key|digest|hash|num_|count|loss",
    re.IGNORECASE,
)


def settings_table(settings: Mapping[str, Any], *, releasable: bool) -> list[tuple[str, str]]:
    """Settings as (name, text), groups flattened with dots.

    Args:
        settings: scalars, lists and (nested) groups.
        releasable: keep only choices that do not depend on the records. What is unknown is left out.
    """
    rows: list[tuple[str, str]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            inside = _flatten(value, str(key))
            if releasable:
                public_group = str(key) in PUBLIC_GROUPS
                inside = [
                    (n, t) for n, t in inside if public_group and not _TELLING.search(n.split(".", 1)[1])
                ]
            rows += inside
        elif not releasable or str(key) in PUBLIC_KEYS:
            rows.append((str(key), setting_text(value)))
    return rows


def setting_text(value: Any) -> str:
    """One setting as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        shown = ", ".join(setting_text(v) for v in value[:MAX_ITEMS])
        return shown if len(value) <= MAX_ITEMS else f"{shown}, ... ({len(value):,} in all)"
    return str(value)


def _flatten(group: Mapping[str, Any], prefix: str) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in group.items():
        name = f"{prefix}.{key}"
        rows += _flatten(value, name) if isinstance(value, Mapping) else [(name, setting_text(value))]
    return rows
