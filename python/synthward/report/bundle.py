"""The three documents of a run together, and the JSON file that holds them."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from synthward.report.datasheet import write_datasheet
from synthward.report.documents import PrivacyDocuments
from synthward.report.facts import RunFacts
from synthward.report.modelcard import write_model_card
from synthward.report.statement import write_statement
from synthward.report.write import write_new_file


def write_documents(facts: RunFacts) -> PrivacyDocuments:
    """Statement, model card and datasheet of a run; all that they hold is public or paid for."""
    return PrivacyDocuments(
        written=datetime.now(UTC).strftime("%Y-%m-%d"),
        statement=write_statement(facts),
        model_card=write_model_card(facts),
        datasheet=write_datasheet(facts),
    )


def documents_path(report: Path) -> Path:
    """Where the documents of a report are kept as JSON: ``report.privacy.json`` beside ``report.html``."""
    return report.with_name(f"{report.stem}.privacy.json")


def save_documents(documents: PrivacyDocuments, path: Path, *, overwrite: bool = False) -> Path:
    """Write the documents as one JSON object.

    Raises:
        OutputError: the path exists and ``overwrite`` is False, or it cannot be written.
    """
    text = documents.model_dump_json(indent=1) + "\n"
    return write_new_file(path, text.encode("utf-8"), overwrite=overwrite)
