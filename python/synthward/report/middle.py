"""The middle of the pyramid: algorithms and their correctness, utility, bias."""

from __future__ import annotations

from synthward.report.documents import Fact, Section
from synthward.report.facts import RunFacts
from synthward.report.mechanisms import TRAINING, describe_events, flatten


def middle_sections(facts: RunFacts) -> tuple[Section, ...]:
    """Sections of the middle level, in the order of the pyramid."""
    return (_algorithms(facts), _utility(facts), _bias(facts))


def _algorithms(facts: RunFacts) -> Section:
    mechanisms = describe_events(facts.events, facts.unit)
    paragraphs = []
    if not facts.is_private:
        paragraphs.append("What ran is listed for the record; without secret noise it protects nobody.")
    elif not mechanisms:
        paragraphs.append("No ledger was given: the mechanisms are not listed here.")
    else:
        paragraphs.append(
            "Every mechanism of the run that used the records is listed here. Each was written to the ledger, and the "
            "line flushed to the disk, before its result was used; epsilon is recomputed from these lines alone."
        )
    if facts.notes:
        paragraphs.append(f"What the ledger notes of queries: {'; '.join(facts.notes)}.")
    table = [Fact(name=m.title, value=m.text) for m in mechanisms]
    if facts.ledger is not None and facts.ledger.lines:
        entries = f"{facts.ledger.lines:,} lines, each with the hash of the one before"
        if facts.ledger.recovered:
            entries += f"; {facts.ledger.recovered} torn by a crash and charged as far as they could be read"
        table.append(Fact(name="Ledger", value=entries))
    if facts.ledger is not None:
        table.append(Fact(name="Last entry of the ledger (SHA-256)", value=facts.ledger.head))
    table += [Fact(name=f"Version of {name}", value=version) for name, version in facts.software.items()]
    return Section(
        id="algorithms",
        heading="Algorithms and correctness",
        level="middle",
        paragraphs=tuple(paragraphs),
        table=tuple(table),
    )


def _utility(facts: RunFacts) -> Section:
    paragraphs = ["Noise and bounds on contributions make the synthetic rows less accurate than the records."]
    if facts.score is None:
        paragraphs.append(
            "How much is not said here: measuring it needs the records, and no budget was spent on it. `synthward "
            "evaluate` measures it for the custodian."
        )
    else:
        paragraphs.append(
            f"The selection charged a noisy score of the trial that it chose: {facts.score:.3g}, the mean total "
            "variation of tables of synthetic rows from those of the records (0 is equal, 1 is nothing in common)."
        )
    return Section(id="utility", heading="Utility and accuracy", level="middle", paragraphs=tuple(paragraphs))


def _bias(facts: RunFacts) -> Section:
    paragraphs = []
    if any(isinstance(event, TRAINING) for event in flatten(facts.events)):
        paragraphs.append(
            "Training with bounded contributions and noise costs small groups most (systemic bias): what is rare "
            "among the records may be rarer, blurred or missing in the synthetic rows. Look at a group before "
            "drawing conclusions about it."
        )
    if facts.schema is not None:
        clipped = [c.name for c in facts.schema.modelled if c.is_numeric]
        other = [c.name for c in facts.schema.modelled if c.other is not None]
        if clipped:
            paragraphs.append(
                f"Values beyond the declared bounds were moved to them ({len(clipped)} numeric columns), which biases "
                "means and tails where bounds are tight (statistical bias)."
            )
        if other:
            paragraphs.append(f"Undeclared levels became the declared other level in: {', '.join(other)}.")
    if not paragraphs:
        paragraphs.append("Nothing was recorded that says which groups or values the run treats worse.")
    return Section(id="bias", heading="Bias", level="middle", paragraphs=tuple(paragraphs))
