"""The model card of a generator, with the headings of Mitchell et al. 2019."""

from __future__ import annotations

from synthward.evaluate.utility import choose_subgroup_columns
from synthward.report.documents import Chapter, Entry, ModelCard
from synthward.report.facts import RunFacts
from synthward.report.mechanisms import TRAINING, flatten
from synthward.report.numbers import format_delta, format_epsilon

WARNING = "Not private: whatever came of this run, these documents' figures apart, has to be treated like the records."


def write_model_card(facts: RunFacts) -> ModelCard:
    """The card of a run's generator, from what the run recorded and never from the records."""
    name = "records" if facts.schema is None else facts.schema.name
    return ModelCard(
        title=f"Model card: generator of {name}",
        warning=None if facts.is_private else WARNING,
        chapters=(
            Chapter(heading="Model details", entries=_details(facts)),
            Chapter(heading="Intended use", entries=_use(facts)),
            Chapter(heading="Factors", entries=_factors(facts)),
            Chapter(heading="Metrics", entries=_metrics()),
            Chapter(heading="Evaluation data", entries=_evaluation_data(facts)),
            Chapter(heading="Training data", entries=_training_data(facts)),
            Chapter(heading="Quantitative analyses", entries=_analyses()),
            Chapter(heading="Ethical considerations", entries=_ethics(facts)),
            Chapter(heading="Caveats and recommendations", entries=_caveats(facts)),
        ),
    )


def guarantee_text(facts: RunFacts) -> str:
    """The guarantee in one sentence, or that there is none and why."""
    guarantee = facts.guarantee
    if guarantee is None:
        return f"None. {facts.not_private or ''}".strip()
    relation = guarantee.relation.replace("_", " ")
    return (
        f"({format_epsilon(guarantee.epsilon)}, {format_delta(guarantee.delta)})-differential privacy for every "
        f"{guarantee.unit.name}; neighbouring data sets: {relation}."
    )


def column_text(facts: RunFacts) -> str | None:
    """The modelled columns with their declared kinds; None without a schema."""
    if facts.schema is None:
        return None
    return ", ".join(f"{column.name} ({column.kind})" for column in facts.schema.modelled) + "."


def counts_text(facts: RunFacts) -> str:
    """How large the training set was: the noisy numbers that were charged, else that it is private."""
    if facts.units is None:
        return "Not told: it counts as private, and no charged query gave a noisy number."
    noisy = f"About {round(facts.units):,} {facts.unit.noun}s"
    if facts.records is not None and facts.unit.column is not None:
        noisy += f" with about {round(facts.records):,} records"
    return f"{noisy}. These are noisy answers of a charged query; the exact numbers count as private."


def _details(facts: RunFacts) -> tuple[Entry, ...]:
    settings = "; ".join(f"{name}: {text}" for name, text in (*facts.settings, *facts.selected)) or None
    selected = ", ".join(name for name, _ in facts.selected) or None
    training = any(isinstance(event, TRAINING) for event in flatten(facts.events))
    return (
        Entry(question="Person or organization developing the model", answer=None),
        Entry(question="Model date", answer=facts.created),
        Entry(question="Model version", answer=facts.run_id and f"run {facts.run_id}"),
        Entry(question="Model type", answer=facts.generator),
        Entry(
            question="Training algorithm",
            answer="Gradient steps with bounded contributions and noise; see the privacy statement."
            if training
            else None,
        ),
        Entry(question="Parameters and constraints", answer=settings),
        *([Entry(question="Chosen by a charged selection", answer=selected)] if selected else ()),
        Entry(question="Status", answer=facts.status),
        Entry(question="Software", answer=", ".join(f"{n} {v}" for n, v in facts.software.items()) or None),
        Entry(question="License", answer=None),
        Entry(question="Where to send questions", answer=None),
    )


def _use(facts: RunFacts) -> tuple[Entry, ...]:
    primary = "Drawing synthetic rows with the columns of the declared schema"
    primary += "." if facts.is_private else ", for tests of software by people who may read the records."
    return (
        Entry(question="Primary intended uses", answer=primary),
        Entry(question="Primary intended users", answer=None),
        Entry(
            question="Out-of-scope uses",
            answer="Decisions about a person; finding persons again; any statement about small groups or rare "
            "values without checking it on the records; histories of a patient (synthetic rows are drawn one by "
            "one and carry no identifier).",
        ),
    )


def _factors(facts: RunFacts) -> tuple[Entry, ...]:
    groups = None
    if facts.schema is not None:
        named = [column.name for column in choose_subgroup_columns(facts.schema, facts.schema.label or "")]
        groups = f"Groups by {', '.join(named)}." if named else "No column of few levels is declared."
    return (
        Entry(question="Relevant factors", answer=groups),
        Entry(
            question="Evaluation factors",
            answer="The same, level by level, in the custodian's evaluation report." if groups else None,
        ),
    )


def _metrics() -> tuple[Entry, ...]:
    return (
        Entry(
            question="Model performance measures",
            answer="Total variation of one and two columns; AUROC of classifiers trained on synthetic and tested on "
            "real rows; share of rows that repeat a training row.",
        ),
        Entry(
            question="Variation approaches",
            answer="Bootstrap over units; held-out records as the floor of what fresh records show.",
        ),
    )


def _evaluation_data(facts: RunFacts) -> tuple[Entry, ...]:
    if facts.holdout is None:
        kept = None
    elif facts.holdout == 0.0:
        kept = "None was set aside."
    else:
        kept = (
            f"{100 * facts.holdout:g} % of the {facts.unit.noun}s, set aside before training by a keyed hash of each "
            f"{facts.unit.noun} alone."
        )
    return (
        Entry(question="Datasets", answer=kept),
        Entry(question="Preprocessing", answer="Read against the same declared schema as the training data."),
    )


def _training_data(facts: RunFacts) -> tuple[Entry, ...]:
    return (
        Entry(question="Datasets", answer=None),
        Entry(question="Columns", answer=column_text(facts)),
        Entry(question="Size", answer=counts_text(facts)),
        Entry(question="Privacy guarantee for the training data", answer=guarantee_text(facts)),
    )


def _analyses() -> tuple[Entry, ...]:
    return (
        Entry(
            question="Unitary and intersectional results",
            answer="Not told here: they are computed from real records, and no budget was spent on them. The "
            "custodian's evaluation report holds them.",
        ),
    )


def _ethics(facts: RunFacts) -> tuple[Entry, ...]:
    if facts.is_private:
        harms = (
            "Facts about groups can be learned from the model, and used against people of the group who took no part. "
            "The guarantee does not cover that."
        )
    else:
        harms = "Records of single persons may be found in whatever this model gives."
    return (
        Entry(question="Sensitive data", answer="The model was made from records about persons."),
        Entry(question="Risks and harms", answer=harms),
        Entry(question="Mitigations", answer=guarantee_text(facts)),
    )


def _caveats(facts: RunFacts) -> tuple[Entry, ...]:
    lines = ["Relations of three and more columns were not necessarily learned."]
    if facts.schema is not None and facts.schema.constraints:
        names = ", ".join(constraint.name for constraint in facts.schema.constraints)
        lines.append(f"Declared constraints of a row: {names}.")
    if facts.status not in (None, "complete"):
        lines.append("Training is not finished.")
    return (
        Entry(question="Caveats", answer=" ".join(lines)),
        Entry(
            question="Recommendations",
            answer="Confirm a finding on the records, under their rules of access, before relying on it.",
        ),
    )
