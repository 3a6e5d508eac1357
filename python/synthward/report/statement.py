"""The privacy statement, after the differential privacy pyramid of NIST SP 800-226 (March 2025).

The pyramid stands on its base: what is said at the top holds only as far as what is said below it does. Every
sentence is made from what the run recorded; of a run that is not private nothing is claimed.
"""

from __future__ import annotations

import math

from synthward.engine.accounting import CyclicPoissonGaussianEvent, SelectionEvent
from synthward.report.base import base_sections, residual_risks
from synthward.report.documents import AuditCheck, DataSetBudget, Fact, Interpretation, Section, Statement
from synthward.report.facts import RunFacts
from synthward.report.meaning import interpret
from synthward.report.mechanisms import SAMPLED, TRAINING, describe_events, flatten
from synthward.report.middle import middle_sections
from synthward.report.numbers import format_delta, format_epsilon, percent_up, round_up

OUTLINE = "NIST SP 800-226, Guidelines for Evaluating Differential Privacy Guarantees (March 2025), figure 1"

RELATIONS = {
    "add_or_remove_one": "one holds all records of one more {noun} than the other (add or remove one)",
    "replace_one": "one {noun}'s records are replaced by another's (replace one)",
}

ACCOUNTANTS = {
    "pld": "privacy loss distributions (PLD)",
    "rdp": "Rényi differential privacy (RDP)",
    "prv": "privacy random variables (PRV)",
}


def write_statement(facts: RunFacts) -> Statement:
    """The statement of a run; all of it is public or paid for."""
    guarantee = facts.guarantee
    # An adaptive run is bounded by its filter alone: its events were not fixed before, as an accountant's sum needs.
    meaning = None if guarantee is None else interpret(guarantee, () if facts.adaptive else facts.events)
    top = [_parameters(facts, meaning), _unit(facts), _other_releases(facts), _audit(facts)]
    return Statement(
        outline=OUTLINE,
        private=facts.is_private,
        headline=_headline(facts),
        guarantee=guarantee,
        budget=facts.budget,
        interpretation=meaning,
        data_set=facts.data_set,
        mechanisms=describe_events(facts.events, facts.unit),
        audit=facts.audit if facts.is_private else None,
        sections=tuple([*top, *middle_sections(facts), *base_sections(facts)]),
        held_constant=_held_constant(facts),
        assumptions=_assumptions(facts) if facts.is_private else (),
        not_covered=_not_covered(facts) if facts.is_private else (),
        residual_risks=residual_risks(facts) if facts.is_private else (),
    )


def _headline(facts: RunFacts) -> str:
    if facts.guarantee is None:
        return "This run is not private. Treat generator and synthetic rows like the records themselves."
    spent = f"({format_epsilon(facts.guarantee.epsilon)}, {format_delta(facts.guarantee.delta)})"
    queries_only = facts.events and not any(isinstance(e, TRAINING) for e in flatten(facts.events))
    run = "run" if queries_only else "training run"
    run += "" if facts.status in (None, "complete") else ", so far,"
    return f"The {run} is {spent}-differentially private for every {facts.unit.name}."


def _parameters(facts: RunFacts, meaning: Interpretation | None) -> Section:
    guarantee = facts.guarantee
    if guarantee is None or meaning is None:
        return Section(
            id="parameters", heading="Privacy parameters", level="top", paragraphs=(facts.not_private or "",)
        )
    version = facts.software.get("dp-accounting", "unknown")
    name = ACCOUNTANTS.get(guarantee.accountant, guarantee.accountant)
    if facts.adaptive:
        name = f"fully adaptive filter by {name}, its orders fixed before the run"
    table = [
        Fact(name="Epsilon", value=format_epsilon(guarantee.epsilon)),
        Fact(name="Delta", value=format_delta(guarantee.delta)),
        Fact(name="Variant", value="(epsilon, delta), also called approximate, differential privacy"),
        Fact(name="Accountant", value=f"{name}; dp-accounting {version}"),
    ]
    if facts.budget is not None:
        value = f"epsilon {format_epsilon(facts.budget.epsilon)} at the same delta, unit and relation"
        table.append(Fact(name="Budget set", value=value))
    if facts.units is not None:
        share = round_up(guarantee.delta * facts.units)
        value = f"{share} (should be well below 1; uses the noisy number of {facts.unit.noun}s)"
        table.append(Fact(name=f"Delta times {facts.unit.noun}s", value=value))
    return Section(
        id="parameters",
        heading="Privacy parameters",
        level="top",
        paragraphs=_meaning(facts, meaning),
        table=tuple(table),
    )


def _meaning(facts: RunFacts, meaning: Interpretation) -> tuple[str, ...]:
    guarantee, noun = facts.guarantee, facts.unit.noun
    assert guarantee is not None
    # Figures are rounded up, so that the text never promises more than the bound.
    chance = f"1 in {int(1 / guarantee.delta + 1e-6):,}"
    cases = f"once with, once without the records of that {noun}"
    if facts.relation == "replace_one":
        cases = f"once with the records of that {noun}, once with others in their place"
    return (
        f"Take any one {noun} and imagine the run twice: {cases}. Anything that can be observed of the generator or "
        f"of synthetic rows is at most {round_up(meaning.likelihood_ratio)} times (e to the power of epsilon) as "
        f"likely in one case as in the other, apart from a chance of delta, {chance}.",
        f"In other words: someone who knows everything about the {noun} and all other records, and who has to guess "
        f"between the two cases at even odds, is right at most {percent_up(meaning.correct_guess)} of the time. This "
        "is an upper bound for the strongest attacker, not what a usual attacker reaches.",
        _rates(facts, meaning),
        "It holds for whatever is done with the synthetic rows afterwards, and however many are drawn.",
    )


def _rates(facts: RunFacts, meaning: Interpretation) -> str:
    """True positive rates at fixed false positive rates, the usual figure of membership inference."""
    pairs = [
        (f"{100 * rate.false_positive_rate:g} %", percent_up(rate.true_positive_rate))
        for rate in meaning.rates
    ]
    if facts.relation == "replace_one":
        told = "; ".join(f"{wrong}: {right}" for wrong, right in pairs)
        return f"A test of the two cases that is wrong about one so often is right about the other at most: {told}."
    told = "; ".join(f"{wrong} finds at most {right}" for wrong, right in pairs)
    return (
        f"A test for who took part accuses some of the {facts.unit.noun}s that did not (false positive rate) and finds "
        f"some of those that did (true positive rate): one that accuses {told}."
    )


def _unit(facts: RunFacts) -> Section:
    noun = facts.unit.noun
    several = (
        "A person with several rows is protected less."
        if noun == "row"
        else f"A person with several values of {facts.unit.column!r} is protected less."
    )
    size = (
        f"The number of {noun}s is treated as private too."
        if facts.relation == "add_or_remove_one"
        else f"The number of {noun}s counts as public under this relation."
    )
    neighbours = RELATIONS[facts.relation].format(noun=noun)
    table = (
        Fact(name="Privacy unit", value=facts.unit.clause),
        Fact(name="Neighbouring data sets", value=neighbours),
    )
    paragraphs = [size, several]
    if facts.guarantee is None:
        paragraphs = []
    else:
        pair = interpret(facts.guarantee).two_units
        bound = (
            "no bound is left at this delta"
            if pair is None
            else f"epsilon is at most {format_epsilon(pair.epsilon)} and delta at most {round_up(pair.delta)}"
        )
        paragraphs.append(f"For two {noun}s together (of one person, or of a household), {bound}.")
    return Section(
        id="unit", heading="Unit of privacy", level="top", paragraphs=tuple(paragraphs), table=table
    )


def _other_releases(facts: RunFacts) -> Section:
    if not facts.is_private:
        text = "This run adds to what is known of the records without any bound."
    else:
        text = (
            "Every other release from the same records counts as well: another run, another setting that was tried, "
            "a table published without noise. Epsilons and deltas of private releases add up, at most; a release that "
            "is not private has no bound, and this statement does not mend that."
        )
    table = [] if facts.data_set is None else _data_set(facts.data_set)
    return Section(
        id="other-releases",
        heading="Mixing differential privacy with other data releases",
        level="top",
        paragraphs=(text,),
        table=tuple(table),
    )


def _data_set(found: DataSetBudget) -> list[Fact]:
    """The budget file in words; epsilons of all releases stand with its delta, unit and relation."""
    meant = (
        f"at delta {format_delta(found.total.delta)}, for every {found.total.unit.name}, "
        f"{found.total.relation.replace('_', ' ')}"
    )
    counted = "1 release counts" if found.releases == 1 else f"{found.releases:,} releases count"
    return [
        Fact(
            name="Budget file of the data set",
            value=f"{found.name or 'unnamed'}; this run is {found.state} in it",
        ),
        Fact(name="Total of all releases", value=f"epsilon {format_epsilon(found.total.epsilon)} {meant}"),
        Fact(
            name="Counted so far",
            value=f"epsilon {format_epsilon(found.counted.epsilon)} {meant}; {counted}, unfinished ones whole",
        ),
        Fact(name="Last entry of the budget file (SHA-256)", value=found.head),
    ]


def _audit(facts: RunFacts) -> Section:
    heading = "Auditing and empirical measures of privacy"
    if not facts.is_private:
        return Section(
            id="audit", heading=heading, level="top", paragraphs=("Nothing is claimed to be audited.",)
        )
    audit = facts.audit
    if audit is None:
        none = "No audit of this run is recorded. The guarantee rests on the argument and the tests of the software."
        return Section(id="audit", heading=heading, level="top", paragraphs=(none,))
    paragraphs = [
        f"An audit tries to show that a claim is false. Its lower bounds hold at delta {format_delta(audit.delta)}; a "
        "bound above the claim would disprove it, and one below it proves nothing."
    ]
    if audit.withheld:
        paragraphs.append(
            f"Checks that used real records are left out ({audit.withheld}): no budget paid for their figures. The "
            "custodian has them."
        )
    if audit.claimed_epsilon is not None:
        claim = f"Claimed to the audit: epsilon {format_epsilon(audit.claimed_epsilon)} at that delta."
        paragraphs.append(claim)
    table = tuple(Fact(name=check.name, value=outcome(check)) for check in audit.checks)
    return Section(id="audit", heading=heading, level="top", paragraphs=tuple(paragraphs), table=table)


def outcome(check: AuditCheck) -> str:
    """What a check found, in words; its bound is rounded down."""
    word = {True: "passed", False: "FAILED", None: "reported, decides nothing"}[check.passed]
    if check.lower_bound is not None:
        word += f"; epsilon is at least {math.floor(check.lower_bound * 1000) / 1000:g}"
    if check.claimed is not None:
        word += f"; claimed: {format_epsilon(check.claimed)}"
    return word


def _held_constant(facts: RunFacts) -> tuple[str, ...]:
    """What neighbouring data sets share: all that may be known without a charge."""
    lines = []
    if facts.schema is not None:
        lines.append(
            f"The schema {facts.schema.name!r} ({len(facts.schema.modelled)} modelled columns with their bounds and "
            f"levels, unit, label, constraints), SHA-256 {facts.schema.fingerprint()}."
        )
    else:
        lines.append("The declared schema: columns, bounds, levels, unit, label, constraints.")
    if facts.settings:
        chosen = ", ".join(f"{name} {text}" for name, text in facts.settings)
        lines.append(f"The settings: {chosen}.")
    if facts.grid:
        grid = "; ".join(f"{name}: {values}" for name, values in facts.grid)
        lines.append(
            f"What the selection could choose among: {grid}. What it chose is an output, and charged."
        )
    if facts.holdout:
        lines.append(
            f"The share of {facts.unit.noun}s that is held out of training: {100 * facts.holdout:g} %."
        )
    if facts.relation == "replace_one":
        lines.append(f"The number of {facts.unit.noun}s.")
    return tuple(lines)


def _assumptions(facts: RunFacts) -> tuple[str, ...]:
    noun = facts.unit.noun
    lines = [
        "The declared schema (columns, bounds, categories, unit, label, constraints) is public knowledge and was not "
        "taken from the records. A schema drafted from the records is not private until a person has replaced what "
        "came from them.",
    ]
    if any(isinstance(event, SelectionEvent) for event in facts.events):
        lines.append(
            "All settings but those that the charged selection chose were chosen without looking at the records or at "
            "results computed from them, and so were the values that it could choose among."
        )
    elif facts.adaptive:
        lines.append(
            "Settings that changed during the run followed from what was released before; all others were chosen "
            "without looking at the records or at results computed from them."
        )
    else:
        lines.append(
            "The settings of the run were chosen without looking at the records or at results computed from them."
        )
    if facts.relation == "add_or_remove_one":
        lines.append("How many records there are is treated as private.")
    if any(isinstance(event, SAMPLED) for event in flatten(facts.events)):
        turn = any(isinstance(event, CyclicPoissonGaussianEvent) for event in flatten(facts.events))
        whose = f"{noun} of the group whose turn it is" if turn else noun
        lines.append(f"Every training step draws each {whose} independently, with the stated probability.")
    if facts.holdout:
        lines.append(
            f"Held-out records are set aside by a keyed hash, for each {noun} alone; they take no part in training."
        )
    lines.append("Noise and sampling keys were not fixed by a seed and are kept secret or destroyed.")
    if noun == "row":
        lines.append("Each person has one row; a person with several rows is protected less.")
    else:
        lines.append(
            "The records of one person share one value of the privacy unit; a person with several values is "
            "protected less."
        )
    return (*lines, *facts.assumptions)


def _not_covered(facts: RunFacts) -> tuple[str, ...]:
    return (
        "Figures computed from real records for comparison: nothing was spent on them. They carry a badge and are "
        "left out of a report made for release.",
        "Other releases from the same records, such as another run or another setting that was tried.",
        f"Facts about groups. If something is true of most {facts.unit.noun}s of a kind, the synthetic rows may show "
        "it, whether or not a given person took part.",
        "The records themselves: where they are kept, and who may read them.",
        *facts.not_covered,
    )
