"""The documents of a run as typed data: a privacy statement, a model card and a datasheet.

An epsilon occurs in them only inside a `Guarantee`, which has no form without delta, privacy unit and neighbouring
relation.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

FORMAT: Literal["synthward/privacy-documents/v1"] = "synthward/privacy-documents/v1"

Relation = Literal["add_or_remove_one", "replace_one"]
Level = Literal["top", "middle", "base"]

Epsilon = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Delta = Annotated[float, Field(gt=0.0, lt=1.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Document(BaseModel):
    """What all parts share: frozen, and nothing but the declared fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Unit(Document):
    """The unit of privacy: all rows with one value of ``column``, or one row where it is None."""

    column: str | None

    @property
    def noun(self) -> str:
        """How sentences call it."""
        return "row" if self.column is None else "unit"

    @property
    def name(self) -> str:
        """The noun, with the column that defines it."""
        return "row" if self.column is None else f"unit ({self.column})"

    @property
    def clause(self) -> str:
        """What one of them is."""
        if self.column is None:
            return "one row of the table; rows of the same person are not joined"
        return f"all rows that carry the same value of the column {self.column!r}"


class Guarantee(Document):
    """An (epsilon, delta) differential privacy guarantee with what it means nothing without."""

    epsilon: Epsilon
    delta: Delta
    unit: Unit
    relation: Relation
    accountant: str


class Rate(Document):
    """At a false positive rate, the most true positives that any attacker can reach."""

    false_positive_rate: Share
    true_positive_rate: Share


class Interpretation(Document):
    """What a guarantee bounds for an attacker who must tell whether one unit took part.

    Attributes:
        likelihood_ratio: e^epsilon; infinite values do not occur, but huge ones do.
        correct_guess: bound on a right guess between two cases of even odds.
        rates: bounds on the true positive rate, from the accountant's whole curve of (epsilon, delta).
        two_units: the guarantee for two units at once; None where it would say nothing.
    """

    likelihood_ratio: Annotated[float, Field(ge=1.0)]
    correct_guess: Share
    rates: tuple[Rate, ...]
    two_units: Guarantee | None


class Mechanism(Document):
    """One charged mechanism: its kind and parameters as in the ledger, and what it is in words."""

    kind: str
    title: str
    text: str
    parameters: dict[str, JsonValue]


class AuditCheck(Document):
    """One check of an audit.

    Attributes:
        name: what was checked.
        passed: None for what is reported and decides nothing.
        lower_bound, claimed: of epsilon, at the audit's delta; None where there is no such number.
        details: whatever else the audit recorded of the check.
    """

    name: str
    passed: bool | None
    lower_bound: Epsilon | None
    claimed: Epsilon | None
    details: dict[str, JsonValue]


class Audit(Document):
    """An audit of the run; its bounds hold at ``delta``.

    ``withheld`` counts checks that used real records, whose outcome no budget paid for.
    """

    delta: Delta
    claimed_epsilon: Epsilon | None
    checks: tuple[AuditCheck, ...]
    withheld: Annotated[int, Field(ge=0)]


class DataSetBudget(Document):
    """The budget file of a data set: what all releases from it may cost, and what they count for so far.

    Attributes:
        name: of the data set, as declared.
        total: what all of them together may cost.
        counted: what those in the file cost at most, unfinished ones whole.
        releases: how many they are.
        state: of this run in the file.
        head: SHA-256 of the file's last line.
    """

    name: str
    total: Guarantee
    counted: Guarantee
    releases: Annotated[int, Field(ge=1)]
    state: str
    head: str


class Fact(Document):
    """One row of a table."""

    name: str
    value: str


class Section(Document):
    """One block of the pyramid of NIST SP 800-226; ``level`` is where it stands."""

    id: str
    heading: str
    level: Level
    paragraphs: tuple[str, ...]
    table: tuple[Fact, ...] = ()


class Statement(Document):
    """The privacy statement. A run that is not private has neither guarantee nor interpretation."""

    outline: str
    private: bool
    headline: str
    guarantee: Guarantee | None
    budget: Guarantee | None
    interpretation: Interpretation | None
    data_set: DataSetBudget | None
    mechanisms: tuple[Mechanism, ...]
    audit: Audit | None
    sections: tuple[Section, ...]
    held_constant: tuple[str, ...]
    assumptions: tuple[str, ...]
    not_covered: tuple[str, ...]
    residual_risks: tuple[str, ...]

    @model_validator(mode="after")
    def _claims_only_what_is_private(self) -> Statement:
        if self.private != (self.guarantee is not None):
            raise ValueError("a statement is private exactly when it has a guarantee")
        if not self.private and (self.budget or self.interpretation or self.data_set):
            raise ValueError("a statement that is not private claims nothing")
        return self


class Entry(Document):
    """A question and its answer; None where the run recorded none and a person has to add it."""

    question: str
    answer: str | None


class Chapter(Document):
    """Entries under one heading of a model card or datasheet."""

    heading: str
    entries: tuple[Entry, ...]


class ModelCard(Document):
    """A model card with the headings of Mitchell et al. 2019."""

    title: str
    warning: str | None
    chapters: tuple[Chapter, ...]


class Datasheet(Document):
    """A datasheet with the headings of Gebru et al. 2021."""

    title: str
    warning: str | None
    chapters: tuple[Chapter, ...]


class PrivacyDocuments(Document):
    """All three documents of one run, as one JSON object."""

    format: Literal["synthward/privacy-documents/v1"] = FORMAT
    written: str
    statement: Statement
    model_card: ModelCard
    datasheet: Datasheet
