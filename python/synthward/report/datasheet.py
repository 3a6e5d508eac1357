"""The datasheet of a synthetic cohort, with the headings of Gebru et al. 2021."""

from __future__ import annotations

from synthward.report.documents import Chapter, Datasheet, Entry
from synthward.report.facts import RunFacts
from synthward.report.mechanisms import QUERIES, TRAINING, flatten
from synthward.report.modelcard import WARNING, column_text, counts_text, guarantee_text
from synthward.schema import Column


def write_datasheet(facts: RunFacts) -> Datasheet:
    """The datasheet of what a run's generator gives, from what the run recorded and never from the records."""
    name = "records" if facts.schema is None else facts.schema.name
    return Datasheet(
        title=f"Datasheet: synthetic cohort of {name}",
        warning=None if facts.is_private else WARNING,
        chapters=(
            Chapter(heading="Motivation", entries=_motivation()),
            Chapter(heading="Composition", entries=_composition(facts)),
            Chapter(heading="Collection process", entries=_collection(facts)),
            Chapter(heading="Preprocessing, cleaning, labeling", entries=_preprocessing(facts)),
            Chapter(heading="Uses", entries=_uses()),
            Chapter(heading="Distribution", entries=_distribution(facts)),
            Chapter(heading="Maintenance", entries=_maintenance(facts)),
        ),
    )


def _motivation() -> tuple[Entry, ...]:
    return (
        Entry(question="For what purpose was the dataset created?", answer=None),
        Entry(question="Who created the dataset, and on behalf of which entity?", answer=None),
        Entry(question="Who funded the creation of the dataset?", answer=None),
    )


def _composition(facts: RunFacts) -> tuple[Entry, ...]:
    label = None
    if facts.schema is not None:
        label = f"Yes: {facts.schema.label}." if facts.schema.label else "No label is declared."
    return (
        Entry(
            question="What do the instances that comprise the dataset represent?",
            answer="Rows drawn from a generator. None was taken from a record, though one may equal a record by "
            "chance; none carries an identifier.",
        ),
        Entry(
            question="How many instances are there in total?",
            answer="As many as were drawn; drawing more costs no privacy. By default as many as the noisy number of "
            "records.",
        ),
        Entry(
            question="Does the dataset contain all possible instances or is it a sample?",
            answer="A random sample of what the generator can give.",
        ),
        Entry(question="What data does each instance consist of?", answer=_columns(facts)),
        Entry(question="Is there a label or target associated with each instance?", answer=label),
        Entry(question="Is any information missing from individual instances?", answer=_missing(facts)),
        Entry(
            question="Are relationships between individual instances made explicit?",
            answer="No: rows are drawn independently of each other; which rows would be of one person is not modelled.",
        ),
        Entry(
            question="Are there any errors, sources of noise, or redundancies in the dataset?",
            answer=_noise(facts),
        ),
        Entry(
            question="Does the dataset contain data that might be considered confidential or sensitive?",
            answer=f"It was made from records about persons. Guarantee: {guarantee_text(facts)}",
        ),
        Entry(
            question="Is it possible to identify individuals from the dataset?",
            answer="The guarantee bounds what can be learned of any one of them; see the privacy statement."
            if facts.is_private
            else "Nothing excludes it.",
        ),
    )


def _collection(facts: RunFacts) -> tuple[Entry, ...]:
    how = None
    if any(isinstance(event, TRAINING) for event in flatten(facts.events)):
        model = f"{facts.generator} model" if facts.generator else "model"
        how = (
            f"Drawn from a {model} that was trained on records with the mechanisms of the privacy statement."
        )
    return (
        Entry(question="How was the data associated with each instance acquired?", answer=how),
        Entry(question="Size of the records behind it", answer=counts_text(facts)),
        Entry(question="Over what timeframe was the data collected?", answer=None),
        Entry(question="Were the individuals in question notified, and did they consent?", answer=None),
        Entry(question="Were any ethical review processes conducted?", answer=None),
    )


def _preprocessing(facts: RunFacts) -> tuple[Entry, ...]:
    done = None
    if facts.schema is not None:
        left = [column.name for column in facts.schema.columns.values() if not column.is_modelled]
        done = "Records were read against the declared schema; values beyond its bounds were moved to them."
        done += f" Left out: {', '.join(left)}." if left else ""
    queries = [event for event in facts.events if isinstance(event, QUERIES)]
    learned = "Nothing was learned from the records for it by a charged query."
    if queries:
        noted = f" ({'; '.join(facts.notes)})" if facts.notes else ""
        learned = f"The encoding was learned from charged, noisy queries only{noted}."
    return (
        Entry(question="Was any preprocessing/cleaning/labeling of the data done?", answer=done),
        Entry(
            question="What did the preprocessing learn from the records?",
            answer=learned if facts.events else None,
        ),
        Entry(
            question="Is the software that was used available?",
            answer=", ".join(f"{name} {version}" for name, version in facts.software.items()) or None,
        ),
    )


def _uses() -> tuple[Entry, ...]:
    return (
        Entry(question="Has the dataset been used for any tasks already?", answer=None),
        Entry(
            question="What (other) tasks could the dataset be used for?",
            answer="Developing and testing analyses and software before they meet the records.",
        ),
        Entry(
            question="Are there tasks for which the dataset should not be used?",
            answer="Decisions about persons, attempts to find them again, and final results on small groups.",
        ),
    )


def _distribution(facts: RunFacts) -> tuple[Entry, ...]:
    free = (
        "Copying it, drawing more rows and working on with them needs no further privacy budget."
        if facts.is_private
        else "It must not be distributed beyond the people who may read the records."
    )
    return (
        Entry(question="Will the dataset be distributed to third parties?", answer=None),
        Entry(question="What does privacy ask of its distribution?", answer=free),
        Entry(question="Will it be distributed under a license or terms of use?", answer=None),
    )


def _maintenance(facts: RunFacts) -> tuple[Entry, ...]:
    anchor = None
    if facts.ledger is not None:
        anchor = f"The ledger's last line has the SHA-256 {facts.ledger.head}; a changed ledger has another."
    return (
        Entry(question="Who will be supporting/hosting/maintaining the dataset?", answer=None),
        Entry(
            question="Will the dataset be updated?",
            answer="Another cohort of the same run costs nothing; training again spends another budget on the records.",
        ),
        Entry(question="How can this version be recognized?", answer=anchor),
    )


def _columns(facts: RunFacts) -> str | None:
    if facts.schema is None:
        return column_text(facts)
    return "; ".join(_column(column) for column in facts.schema.modelled) + "."


def _column(column: Column) -> str:
    if column.is_discrete:
        return f"{column.name}: {column.kind}, {len(column.levels):,} declared levels"
    bounds = "declared bounds"
    if column.kind != "datetime":
        bounds = f"{column.min:g} to {column.max:g}"
    return f"{column.name}: {column.kind}, {bounds}"


def _missing(facts: RunFacts) -> str | None:
    if facts.schema is None:
        return None
    gaps = [column.name for column in facts.schema.modelled if column.missing]
    return f"Values may be missing in: {', '.join(gaps)}." if gaps else "No: no column may be missing."


def _noise(facts: RunFacts) -> str:
    if not facts.events:
        return "Every row is the output of a random generator."
    return "Every row is the output of a generator that was trained with noise on purpose; see the privacy statement."
