"""The whole evaluation of one synthetic table against the records it was made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from synthward.engine.errors import DataError
from synthward.evaluate.binning import NUMERIC_BINS, BinnedTable, bin_records, code_labels
from synthward.evaluate.copies import check_copies
from synthward.evaluate.marginals import (
    MAX_PAIRS,
    PairTV,
    binned_one_way,
    binned_two_way,
    choose_pairs,
    code_shares,
    joint_counts,
)
from synthward.evaluate.result import (
    RELEASABLE_ROWS,
    Comparison,
    EvaluationResult,
    Marginal,
    Panel,
    PublicMarginal,
)
from synthward.evaluate.utility import Utility, measure_utility

MAX_PANEL_CODES = 24
MAX_PANELS = 4
NO_HOLDOUT = "no held-out records were given"

Progress = Callable[[str, float], None]


def evaluate_records(
    schema: Any,
    train: Any,
    holdout: Any | None,
    synthetic: Any,
    *,
    privacy: dict[str, Any],
    settings: dict[str, Any],
    epsilon_curve: Sequence[tuple[int, float]],
    progress: Progress | None = None,
    seed: int = 0,
    numeric_bins: int = NUMERIC_BINS,
    max_training_rows: int = 100_000,
) -> EvaluationResult:
    """Compare a synthetic table with the records that it was made from.

    Args:
        schema: the schema of all three tables.
        train: ``Records`` that the generator was trained on.
        holdout: ``Records`` of units that were not trained on, or None: what needs them is then skipped.
        synthetic: ``Records`` of the synthetic table.
        privacy: ``epsilon``, ``delta``, ``unit`` (column name, or None for a row), ``private`` (False for
            seeded runs; anything but True is treated as not private); optional ``relation``
            ("add_or_remove_one"), ``accountant``, ``target_epsilon``, ``noise_multiplier``, ``sample_rate``,
            ``steps``, ``seed``, ``ledger_head``, ``assumptions`` and ``not_covered`` (lists of sentences
            added to the statement).
        settings: shown in the report; see ``synthward.report.settings`` for what a released report keeps.
        epsilon_curve: (step, epsilon spent so far) for the plot.
        progress: called with a stage in words and the fraction done of the whole.
        seed: seed of bootstrap and subsamples of the evaluation.
        numeric_bins: equal-width bins of numeric columns.
        max_training_rows: cap on the rows that each utility classifier is trained on.

    Raises:
        DataError: the training or the synthetic table is empty.
    """
    report = progress or (lambda stage, fraction: None)
    for name, records in (("training", train), ("synthetic", synthetic)):
        if records.num_rows == 0:
            raise DataError(f"nothing to evaluate: the {name} table has no rows")
    if holdout is not None and holdout.num_rows == 0:
        holdout = None
    skipped: dict[str, str] = {}
    report("marginals", 0.0)
    seen, made = bin_records(train, numeric_bins), bin_records(synthetic, numeric_bins)
    fresh = None if holdout is None else bin_records(holdout, numeric_bins)
    others = [made] if fresh is None else [made, fresh, made.sample(fresh.rows, seed)]
    chosen = choose_pairs(len(seen.names), seed)
    if len(seen.names) * (len(seen.names) - 1) // 2 > MAX_PAIRS:
        skipped["some pairs"] = f"a random {MAX_PAIRS} of all pairs of columns were measured"
    pairs = binned_two_way(seen, others, chosen, progress=lambda f: report("pairs", 0.05 + 0.35 * f))
    report("copies", 0.4)
    copies = check_copies(train, holdout, synthetic, seed)
    report("utility", 0.45)
    utility: Utility | str = NO_HOLDOUT
    if holdout is not None:
        utility = measure_utility(
            schema,
            train,
            holdout,
            synthetic,
            max_training_rows=max_training_rows,
            seed=seed,
            progress=lambda f: report("utility", 0.45 + 0.5 * f),
        )
    if isinstance(utility, str):
        skipped["utility"] = utility
    if fresh is None:
        skipped["held-out comparison"] = NO_HOLDOUT
    if synthetic.num_rows < RELEASABLE_ROWS:
        skipped["releasable marginals"] = f"the synthetic table has fewer than {RELEASABLE_ROWS} rows"
    report("panels", 0.95)
    comparison = Comparison(
        sizes=_sizes(train, holdout, synthetic),
        marginals=_marginals(schema, seen, fresh, made, numeric_bins),
        one_way=binned_one_way(seen, made),
        one_way_floor=None if fresh is None else binned_one_way(seen, fresh),
        pairs=pairs[0],
        pairs_floor=None if fresh is None else pairs[1],
        pairs_matched=None if fresh is None else pairs[2],
        panels=_panels(schema, seen, made, pairs[0], numeric_bins),
        utility=None if isinstance(utility, str) else utility,
        copies=copies,
        ingest=_ingest(train, holdout, synthetic),
    )
    result = EvaluationResult(
        schema_name=str(getattr(schema, "name", "") or "records"),
        columns=seen.names,
        privacy=dict(privacy),
        settings=dict(settings),
        epsilon_curve=tuple((int(step), float(epsilon)) for step, epsilon in epsilon_curve),
        public_marginals=_public_marginals(schema, made, numeric_bins, seed),
        comparison=comparison,
        skipped=skipped,
        numeric_bins=numeric_bins,
        seed=seed,
    )
    report("done", 1.0)
    return result


def _sizes(train: Any, holdout: Any | None, synthetic: Any) -> dict[str, int]:
    return {
        "train_rows": train.num_rows,
        "train_units": train.num_units,
        "holdout_rows": 0 if holdout is None else holdout.num_rows,
        "holdout_units": 0 if holdout is None else holdout.num_units,
        "synthetic_rows": synthetic.num_rows,
    }


def _marginals(
    schema: Any, seen: BinnedTable, fresh: BinnedTable | None, made: BinnedTable, numeric_bins: int
) -> tuple[Marginal, ...]:
    return tuple(
        Marginal(
            column.name,
            str(column.kind),
            tuple(code_labels(column, numeric_bins)),
            code_shares(seen.codes[k], seen.cardinalities[k]),
            None if fresh is None else code_shares(fresh.codes[k], fresh.cardinalities[k]),
            code_shares(made.codes[k], made.cardinalities[k]),
        )
        for k, column in enumerate(schema.modelled)
    )


def _public_marginals(
    schema: Any, made: BinnedTable, numeric_bins: int, seed: int
) -> tuple[PublicMarginal, ...]:
    if made.rows < RELEASABLE_ROWS:
        return ()
    part = made.sample(RELEASABLE_ROWS, seed)
    return tuple(
        PublicMarginal(
            column.name,
            str(column.kind),
            tuple(code_labels(column, numeric_bins)),
            code_shares(part.codes[k], part.cardinalities[k]),
        )
        for k, column in enumerate(schema.modelled)
    )


def _panels(
    schema: Any, seen: BinnedTable, made: BinnedTable, pairs: PairTV, numeric_bins: int
) -> tuple[Panel, ...]:
    """The worst small pair, the pair with the label that matters most, and the most dependent pairs."""
    small = np.array([c <= MAX_PANEL_CODES for c in seen.cardinalities])
    usable = np.flatnonzero(small[pairs.pairs].all(axis=1))
    if usable.size == 0:
        return ()
    dependence = np.array([_dependence(seen, *pairs.pairs[k]) for k in usable])
    picks: list[tuple[int, str]] = [(usable[np.argmax(pairs.values[usable])], "largest difference")]
    if schema.label in seen.names:
        label = seen.names.index(schema.label)
        with_label = np.flatnonzero((pairs.pairs[usable] == label).any(axis=1))
        if with_label.size:
            best = with_label[np.argmax(dependence[with_label])]
            picks.append((usable[best], "most dependent on the label"))
    picks += [(usable[k], "strongly dependent") for k in np.argsort(-dependence, kind="stable")]
    chosen: dict[int, str] = {}
    used: set[int] = set()
    for k, why in picks:
        columns = set(pairs.pairs[k].tolist())
        # After the first two, prefer columns that no panel shows yet.
        if (
            len(chosen) < MAX_PANELS
            and k not in chosen
            and (why != "strongly dependent" or not columns & used)
        ):
            chosen[k] = why
            used |= columns
    labels = [tuple(code_labels(c, numeric_bins)) if small[k] else () for k, c in enumerate(schema.modelled)]
    return tuple(
        Panel(
            left=seen.names[i],
            right=seen.names[j],
            why=why,
            left_labels=labels[i],
            right_labels=labels[j],
            train=joint_counts(seen, i, j) / seen.rows,
            synthetic=joint_counts(made, i, j) / made.rows,
            tv=float(pairs.values[k]),
        )
        for k, why in chosen.items()
        for i, j in [pairs.pairs[k].tolist()]
    )


def _dependence(table: BinnedTable, i: int, j: int) -> float:
    # Total variation between the joint distribution and the product of its marginals: 0 when independent.
    joint = joint_counts(table, i, j) / table.rows
    product = np.outer(joint.sum(axis=1), joint.sum(axis=0))
    return float(0.5 * np.abs(joint - product).sum())


def _ingest(train: Any, holdout: Any | None, synthetic: Any) -> dict[str, dict[str, Any]]:
    """What reading did, per file: parts of one file share its report and are named together."""
    reports: list[tuple[list[str], Any]] = []
    for name, records in (("train", train), ("held-out", holdout), ("synthetic", synthetic)):
        report = getattr(records, "report", None)
        if report is None:
            continue
        shared = [names for names, known in reports if known is report or known == report]
        if shared:
            shared[0].append(name)
        else:
            reports.append(([name], report))
    found: dict[str, dict[str, Any]] = {}
    for names, report in reports:
        entry: dict[str, Any] = {"rows": int(report.rows)}
        for part in ("clipped", "other", "missing", "violations"):
            entry[part] = {k: int(v) for k, v in getattr(report, part, {}).items()}
        found[" and ".join(names)] = entry
    return found
