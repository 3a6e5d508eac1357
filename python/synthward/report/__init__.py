"""The report of a synthetic cohort: one HTML file, one picture, and the documents that need no records."""

from synthward.report.bundle import documents_path, save_documents, write_documents
from synthward.report.documents import Guarantee, PrivacyDocuments
from synthward.report.facts import RunFacts, facts_of_result, read_facts
from synthward.report.overview import save_overview_png
from synthward.report.render import BADGE, NOT_PRIVATE, render_documents, render_report

__all__ = [
    "BADGE",
    "NOT_PRIVATE",
    "Guarantee",
    "PrivacyDocuments",
    "RunFacts",
    "documents_path",
    "facts_of_result",
    "read_facts",
    "render_documents",
    "render_report",
    "save_documents",
    "save_overview_png",
    "write_documents",
]
