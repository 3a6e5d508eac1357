"""The privacy statement of a report, in plain language, from what the run recorded."""

from __future__ import annotations

import math
from dataclasses import dataclass

from synthward.evaluate.result import EvaluationResult

RELATIONS = {
    "add_or_remove_one": "one holds all records of one more {unit} than the other (add or remove one)",
    "replace_one": "one {unit}'s records are replaced by another's (replace one)",
}

ACCOUNTANTS = {
    "pld": "privacy loss distributions (PLD)",
    "rdp": "Rényi differential privacy (RDP)",
    "prv": "privacy random variables (PRV)",
}


@dataclass(frozen=True)
class Statement:
    """Paragraphs and lists of the statement.

    Attributes:
        headline: one sentence.
        meaning: what the numbers mean.
        definition: unit, neighbouring relation and accountant.
        assumptions: what has to be true for the statement to hold.
        not_covered: what it does not say.
    """

    headline: str
    meaning: tuple[str, ...]
    definition: tuple[tuple[str, str], ...]
    assumptions: tuple[str, ...]
    not_covered: tuple[str, ...]


def format_epsilon(value: float) -> str:
    """Epsilon with up to three decimals, rounded up so that the text never understates it."""
    if not math.isfinite(value):
        return "infinite"
    # The small tolerance keeps a value such as 3.0000000000000004 from being printed as 3.001.
    return f"{math.ceil(value * 1000 - 1e-6) / 1000:g}"


def format_delta(value: float) -> str:
    """Delta in scientific notation, e.g. 1e-06."""
    return "not given" if math.isnan(value) else f"{value:.3g}"


def unit_words(result: EvaluationResult) -> tuple[str, str]:
    """The privacy unit as a noun and as a clause."""
    unit = result.privacy.get("unit")
    if unit in (None, "", "row"):
        return "row", "one row of the table; rows of the same person are not joined"
    return "unit", f"all rows that carry the same value of the column {unit!r}"


def write_statement(result: EvaluationResult) -> Statement:
    """Statement for a run; a run that is not private gets one that claims nothing."""
    noun, clause = unit_words(result)
    relation = str(result.privacy.get("relation", "add_or_remove_one"))
    definition = [
        ("Privacy unit", clause),
        ("Neighbouring data sets", RELATIONS.get(relation, relation).format(unit=noun)),
        ("Accountant", ACCOUNTANTS.get(_accountant(result), _accountant(result))),
    ]
    definition += [
        (title, str(result.privacy[key]))
        for key, title in (
            ("ledger_head", "Last entry of the ledger (hash)"),
            ("target_epsilon", "Budget set"),
        )
        if result.privacy.get(key) is not None
    ]
    if not result.is_private:
        return Statement(
            "This run is not private. Treat generator and synthetic rows like the records themselves.",
            (_why_not_private(result),),
            tuple(definition[:2]),
            (),
            (),
        )
    name = "" if noun == "row" else f" ({result.privacy['unit']})"
    spent = f"({format_epsilon(result.epsilon)}, {format_delta(result.delta)})"
    return Statement(
        f"The training run is {spent}-differentially private for every {noun}{name}.",
        _meaning(result, noun, relation),
        tuple(definition),
        _assumptions(result, noun),
        _not_covered(result, noun),
    )


def _accountant(result: EvaluationResult) -> str:
    return str(result.privacy.get("accountant", "not given"))


def _why_not_private(result: EvaluationResult) -> str:
    if result.privacy.get("private") is not True:
        seed = result.privacy.get("seed")
        seeded = "a seed" if seed is None else f"the seed {seed}"
        return (
            f"Its random numbers were made from {seeded} so that it can be repeated exactly. Whoever knows "
            "or guesses the seed can take the noise away again, so the noise protects nobody. Any epsilon "
            "shown is what the same run would have spent with secret keys; it is not a guarantee."
        )
    return "No noise was added, or too little to bound anything: epsilon is infinite."


def _meaning(result: EvaluationResult, noun: str, relation: str) -> tuple[str, ...]:
    epsilon, delta = result.epsilon, result.delta
    # Figures are rounded up, so that the text never promises more than the bound.
    factor = math.exp(min(epsilon, 700.0))
    factor_text = _round_up(factor)
    chance = f"1 in {math.floor(1 / delta + 1e-6):,}" if 0 < delta < 1 else format_delta(delta)
    guess = math.ceil(1000 * min(1.0, (factor + delta) / (1.0 + factor))) / 10
    cases = f"once with, once without the records of that {noun}"
    if relation == "replace_one":
        cases = f"once with the records of that {noun}, once with others in their place"
    return (
        f"Take any one {noun} and imagine the run twice: {cases}. Anything that can be observed of the "
        f"generator or of synthetic rows is at most {factor_text} times (e to the power of epsilon) as "
        f"likely in one case as in the other, apart from a chance of delta, {chance}.",
        f"In other words: someone who knows everything about the {noun} and all other records, and who has "
        f"to guess between the two cases at even odds, is right at most {guess:.1f} % of the time. This is "
        "an upper bound for the strongest attacker, not what a usual attacker reaches.",
        "It holds for whatever is done with the synthetic rows afterwards, and however many are drawn.",
    )


def _round_up(value: float) -> str:
    """Three significant digits, upwards."""
    scale = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{math.ceil(value / scale - 1e-9) * scale:.3g}"


def _assumptions(result: EvaluationResult, noun: str) -> tuple[str, ...]:
    given = tuple(str(line) for line in result.privacy.get("assumptions", ()))
    person = "Each person has one row; a person with several rows is protected less."
    if noun != "row":
        person = (
            "The records of one person share one value of the privacy unit; a person with several values "
            "is protected less."
        )
    return (
        "The declared schema (columns, bounds, categories, unit, label, constraints) is public knowledge "
        "and was not taken from the records. A schema drafted from the records is not private until a "
        "person has replaced what came from them.",
        "The settings of the run, sampling rate and number of steps among them, were chosen without "
        "looking at the records or at results computed from them.",
        "How many records there are is treated as private. Every training step draws each "
        f"{noun} independently with the stated sampling rate.",
        f"Held-out records are set aside by a keyed hash, for each {noun} alone; they take no part in "
        "training.",
        "Noise and sampling keys came from the operating system, were not fixed by a seed and are kept "
        "secret or destroyed.",
        person,
        *given,
    )


def _not_covered(result: EvaluationResult, noun: str) -> tuple[str, ...]:
    given = tuple(str(line) for line in result.privacy.get("not_covered", ()))
    return (
        "Figures computed from real records for comparison: nothing was spent on them. They carry a badge "
        "and are left out of a report made for release.",
        "Other releases from the same records, such as another run or another setting that was tried: "
        "their epsilons add up.",
        f"Facts about groups. If something is true of most {noun}s of a kind, the synthetic rows may show "
        "it, whether or not a given person took part.",
        "Side channels: timing, memory, logs, access to the machine or to the run's folder while it "
        "trains; attacks on the rounding of floating-point numbers.",
        *given,
    )
