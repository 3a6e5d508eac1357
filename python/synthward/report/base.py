"""The base of the pyramid: query and trust model, side channels, access, exposure by collection."""

from __future__ import annotations

from synthward.engine.accounting import SelectionEvent
from synthward.report.documents import Fact, Section
from synthward.report.facts import RunFacts

DISCRETE = "discrete"


def base_sections(facts: RunFacts) -> tuple[Section, ...]:
    """Sections of the base, downwards in the order of the pyramid."""
    return (
        _query_model(facts),
        _trust_model(facts),
        _side_channels(facts),
        _security(facts),
        _collection(facts),
    )


def residual_risks(facts: RunFacts) -> tuple[str, ...]:
    """What may still harm a person although the statement holds."""
    assert facts.guarantee is not None
    noun = facts.unit.noun
    several = "rows" if noun == "row" else f"values of {facts.unit.column!r}"
    lines = [
        _arithmetic(facts),
        "Side channels: timing, memory, logs, access to the machine or to the run's folder while it trains.",
        f"A person with several {several}: epsilon grows with their number.",
        "Group facts: what holds for most people of a kind can be learned, and used against them, from any accurate "
        "release.",
    ]
    if facts.data_set is None and facts.budget_id is not None:
        lines.append(
            f"Composition: this statement knows of this run alone. The run draws on the budget file {facts.budget_id} "
            "of its data set, which counts other releases too and was not given."
        )
    elif facts.data_set is None:
        lines.append(
            "Composition: this statement knows of this run alone. Other releases from the same records add."
        )
    else:
        lines.append(
            "Composition: only releases that are in the data set's budget file are counted; others add."
        )
    if not any(isinstance(event, SelectionEvent) for event in facts.events):
        lines.append(
            "Choosing this run among several by results on the records was not charged, if it was done."
        )
    if not facts.is_complete and facts.status is not None:
        lines.append("The run is not finished: going on spends more, up to its budget.")
    return tuple(lines)


def _query_model(facts: RunFacts) -> Section:
    text = "What is asked of the records is settled when the run ends; sampling never touches them again."
    if facts.budget is not None:
        text = f"The budget was set before the run. {text}"
    paragraphs = [f"Data release, not interactive queries. {text}"]
    if facts.status not in (None, "complete"):
        paragraphs.append(f"The run is not finished (status: {facts.status}).")
    return Section(id="query-model", heading="Query model", level="base", paragraphs=tuple(paragraphs))


def _trust_model(facts: RunFacts) -> Section:
    text = (
        "Central model: whoever runs the training reads the records and is trusted with them. Whoever receives the "
        "generator or synthetic rows is not trusted, may know all other records, and may work together with others."
    )
    if not facts.is_private:
        text = "Whoever receives anything of this run has to be trusted as with the records."
    return Section(id="trust-model", heading="Trust model", level="base", paragraphs=(text,))


def _side_channels(facts: RunFacts) -> Section:
    paragraphs = [_arithmetic(facts)] if facts.is_private else []
    paragraphs.append(
        "Time, memory, progress lines and error messages of the run were not made independent of the records: keep "
        "them with the custodian."
    )
    if any(isinstance(event, SelectionEvent) for event in facts.events):
        paragraphs.append("Hyper-parameters were selected among trials, and the selection is charged.")
    elif facts.is_private:
        paragraphs.append("No selection of hyper-parameters is charged: none may have used the records.")
    return Section(
        id="side-channels",
        heading="Side channels and implementation challenges",
        level="base",
        paragraphs=tuple(paragraphs),
    )


def _arithmetic(facts: RunFacts) -> str:
    if facts.arithmetic == DISCRETE:
        return (
            "Sums of the training steps were rounded to a fixed grid and released on it (discrete arithmetic), which "
            "closes attacks on the rounding of floating-point numbers."
        )
    if facts.arithmetic is None:
        return (
            "Which arithmetic made the noise is not recorded: assume floating-point numbers, whose rounding can be "
            "attacked."
        )
    return "Sums and noise of training steps are floating-point numbers; attacks on their rounding are not excluded."


def _security(facts: RunFacts) -> Section:
    table = []
    if facts.ledger is not None and facts.ledger.keys:
        keys = f"{facts.ledger.keys} in the ledger (one, and one more for every time the run was resumed)"
        origin = "secret, not fixed by a seed" if facts.is_private else "not all secret"
        table = [Fact(name="Random keys", value=f"{keys}; {origin}")]
    if facts.signed:
        signed = "attestation.dsse.json in the run's folder; `synthward verify` checks it"
        table.append(Fact(name="Signature over the run's files", value=signed))
    paragraphs = [
        "The guarantee is about what is released. It does not protect the records where they are stored and read: a "
        "breach there undoes it for those records."
    ]
    if facts.is_private:
        paragraphs.append(
            "Keep the keys secret or destroy them, and keep the custodian's report, logs and the held-out split's "
            "salt (in run.json) with the records."
        )
    return Section(
        id="security",
        heading="Data security and access control",
        level="base",
        paragraphs=tuple(paragraphs),
        table=tuple(table),
    )


def _collection(facts: RunFacts) -> Section:
    paragraphs = [
        "Differential privacy lessens no risk of having collected the records. What is not needed should not be kept."
    ]
    if facts.schema is not None:
        left = [c.name for c in facts.schema.columns.values() if not c.is_modelled]
        text = f"{len(facts.schema.modelled)} columns were modelled"
        text += f"; declared but not modelled: {', '.join(left)}." if left else "; none was left out."
        paragraphs.append(text)
    return Section(
        id="collection",
        heading="Data collection exposure",
        level="base",
        paragraphs=tuple(paragraphs),
    )
