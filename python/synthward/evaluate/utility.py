"""Train on synthetic, test on real (TSTR), against train on real, test on real (TRTR).

Both classifiers of a pair see tables of the same number of rows (the smaller of the two, up to a cap) and are
tested on the same held-out real rows; no test row belongs to a unit that was trained on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from synthward.evaluate.auroc import Interval, auroc, bootstrap_auroc, interval
from synthward.evaluate.features import FeatureEncoder

MAX_TRAINING_ROWS = 100_000
MIN_CLASS_ROWS = 10
"""Rows of each class that a training or test table needs, else the comparison is skipped with a reason."""

MAX_SUBGROUP_LEVELS = 10
MAX_SUBGROUP_COLUMNS = 4
SUBGROUP_NAMES = ("sex", "gender", "race", "ethnicity", "age_group", "age", "insurance", "payer")
MODELS = ("gradient boosting", "logistic regression")


@dataclass(frozen=True)
class ModelUtility:
    """AUROC on held-out real rows of one kind of classifier, and the gap TRTR - TSTR, with 95 % intervals."""

    model: str
    tstr: Interval
    trtr: Interval
    gap: Interval


@dataclass(frozen=True)
class Subgroup:
    """One level of one column; AUROC of the boosted trees, NaN where the group is too small to say."""

    column: str
    level: str
    share_train: float
    share_synthetic: float
    test_rows: int
    prevalence_real: float
    prevalence_synthetic: float
    trtr: float
    tstr: float


@dataclass(frozen=True)
class Utility:
    """Outcome of the TSTR/TRTR comparison for ``label == positive``."""

    label: str
    positive: str
    training_rows: int
    test_rows: int
    test_units: int
    prevalence_train: float
    prevalence_holdout: float
    prevalence_synthetic: float
    models: tuple[ModelUtility, ...]
    subgroups: tuple[Subgroup, ...]


@dataclass(frozen=True)
class _Table:
    records: Any
    rows: np.ndarray  # int64 rows with a known label
    positive: np.ndarray  # bool per entry of rows


def measure_utility(
    schema: Any,
    train: Any,
    holdout: Any,
    synthetic: Any,
    *,
    max_training_rows: int = MAX_TRAINING_ROWS,
    bootstrap_draws: int = 300,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Utility | str:
    """Compare classifiers trained on synthetic and on real records; a reason in words where impossible."""
    target = find_target(schema)
    if isinstance(target, str):
        return target
    label, positive = target
    sources = {"training": train, "held-out": holdout, "synthetic": synthetic}
    tables = {name: _labelled(r, label, positive) for name, r in sources.items()}
    for name, table in tables.items():
        for wanted, count in (("", table.positive.sum()), ("not ", (~table.positive).sum())):
            if count < MIN_CLASS_ROWS:
                text = f"the {name} table has fewer than {MIN_CLASS_ROWS} rows with {label} {wanted}equal to"
                return f"{text} {schema.columns[label].levels[positive]!r}"
    if len(schema.modelled) < 2:
        return "the schema models no column besides the label"
    size = min(len(tables["training"].rows), len(tables["synthetic"].rows), max_training_rows)
    generator = np.random.default_rng(seed)
    real_part = _take(tables["training"], size, generator)
    made_part = _take(tables["synthetic"], size, generator)
    test = tables["held-out"]
    scores: dict[tuple[str, str], np.ndarray] = {}
    for k, (origin, part) in enumerate((("tstr", made_part), ("trtr", real_part))):
        if len(np.unique(part.positive)) < 2:
            return f"the rows drawn from the {('synthetic', 'training')[k]} table hold one class only"
        for m, model in enumerate(MODELS):
            scores[model, origin] = _fit_and_score(model, schema, part, test, label, seed)
            if progress is not None:
                progress((2 * k + m + 1) / 4)
    units = test.records.row_unit()[test.rows]
    models = tuple(_compare(m, scores, test.positive, units, bootstrap_draws, seed) for m in MODELS)
    groups = _subgroups(schema, tables, scores[MODELS[0], "trtr"], scores[MODELS[0], "tstr"], label)
    return Utility(
        label=label,
        positive=str(schema.columns[label].levels[positive]),
        training_rows=size,
        test_rows=len(test.rows),
        test_units=len(np.unique(units)),
        prevalence_train=float(tables["training"].positive.mean()),
        prevalence_holdout=float(test.positive.mean()),
        prevalence_synthetic=float(tables["synthetic"].positive.mean()),
        models=models,
        subgroups=groups,
    )


def find_target(schema: Any) -> tuple[str, int] | str:
    """The label column and the index of its positive level, or the reason why there is none."""
    label = schema.label
    if not label:
        return "the schema declares no label"
    # The schema has checked that the label is a modelled discrete column that has the positive level.
    levels = [str(level) for level in schema.columns[label].levels]
    if schema.label_positive is not None:
        return label, levels.index(str(schema.label_positive))
    if len(levels) == 2:
        return label, 1
    return f"the schema names no label_positive for {label!r}, which has {len(levels)} levels"


def choose_subgroup_columns(schema: Any, label: str) -> list[Any]:
    """Discrete columns of at most ten levels: known demographic names first, then in the schema's order."""
    small = [
        c
        for c in schema.modelled
        if c.is_discrete and c.name != label and 2 <= len(c.levels) <= MAX_SUBGROUP_LEVELS
    ]

    def priority(column: Any) -> int:
        name = column.name.lower()
        hits = [k for k, known in enumerate(SUBGROUP_NAMES) if known == name or name.startswith(known + "_")]
        return hits[0] if hits else len(SUBGROUP_NAMES)

    return sorted(small, key=priority)[:MAX_SUBGROUP_COLUMNS]


def _labelled(records: Any, label: str, positive: int) -> _Table:
    values = records.columns[label]
    rows = np.flatnonzero(values >= 0)
    return _Table(records, rows, values[rows] == positive)


def _take(table: _Table, size: int, generator: np.random.Generator) -> _Table:
    if size >= len(table.rows):
        return table
    kept = np.sort(generator.choice(len(table.rows), size=size, replace=False))
    return _Table(table.records, table.rows[kept], table.positive[kept])


def _fit_and_score(model: str, schema: Any, part: _Table, test: _Table, label: str, seed: int) -> np.ndarray:
    # Imported here: scikit-learn takes a second to import and most commands do not need it.
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression

    encoder = FeatureEncoder(schema, part.records, part.rows, exclude=label)
    if model == MODELS[0]:
        classifier = HistGradientBoostingClassifier(
            max_iter=100,
            learning_rate=0.08,
            max_leaf_nodes=15,
            min_samples_leaf=20,
            l2_regularization=1.0,
            categorical_features=encoder.categorical_mask(),
            early_stopping=False,
            random_state=seed,
        )
        encode = encoder.ordinal
    else:
        classifier = LogisticRegression(C=0.1, max_iter=300)
        encode = encoder.one_hot
    with warnings.catch_warnings():
        # A logistic fit that stops before convergence still ranks; its AUROC is what is reported.
        warnings.simplefilter("ignore")
        classifier.fit(encode(part.records, part.rows), part.positive)
        scores: np.ndarray = classifier.predict_proba(encode(test.records, test.rows))[:, 1]
    return scores


def _compare(
    model: str,
    scores: dict[tuple[str, str], np.ndarray],
    positive: np.ndarray,
    units: np.ndarray,
    draws: int,
    seed: int,
) -> ModelUtility:
    pair = [scores[model, "tstr"], scores[model, "trtr"]]
    (tstr, tstr_draws), (trtr, trtr_draws) = bootstrap_auroc(pair, positive, units, draws=draws, seed=seed)
    gap = interval(trtr - tstr, trtr_draws - tstr_draws)
    return ModelUtility(model, interval(tstr, tstr_draws), interval(trtr, trtr_draws), gap)


def _subgroups(
    schema: Any, tables: dict[str, _Table], trtr: np.ndarray, tstr: np.ndarray, label: str
) -> tuple[Subgroup, ...]:
    test, made, seen = tables["held-out"], tables["synthetic"], tables["training"]
    groups = []
    for column in choose_subgroup_columns(schema, label):
        test_codes = test.records.columns[column.name][test.rows]
        made_codes = made.records.columns[column.name][made.rows]
        seen_codes = seen.records.columns[column.name][seen.rows]
        for level, text in [*enumerate(column.levels), (-1, "missing")]:
            here = test_codes == level
            made_here = made_codes == level
            seen_here = seen_codes == level
            if not (here.any() or made_here.any() or seen_here.any()):
                continue
            classes = (test.positive[here].sum(), (~test.positive[here]).sum())
            enough = min(classes) >= MIN_CLASS_ROWS
            groups.append(
                Subgroup(
                    column=column.name,
                    level=str(text),
                    share_train=float(seen_here.mean()),
                    share_synthetic=float(made_here.mean()),
                    test_rows=int(here.sum()),
                    prevalence_real=_mean(test.positive[here]),
                    prevalence_synthetic=_mean(made.positive[made_here]),
                    trtr=auroc(trtr[here], test.positive[here]) if enough else float("nan"),
                    tstr=auroc(tstr[here], test.positive[here]) if enough else float("nan"),
                )
            )
    return tuple(groups)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")
