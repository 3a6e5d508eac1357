"""The report of a synthetic cohort: one HTML file, and one picture."""

from synthward.report.overview import save_overview_png
from synthward.report.render import BADGE, NOT_PRIVATE, render_report

__all__ = ["BADGE", "NOT_PRIVATE", "render_report", "save_overview_png"]
