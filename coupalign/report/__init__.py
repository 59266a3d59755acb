"""The page of a run: scores with their protocol, curves, scores by group, pictures, configuration, in one HTML file."""

from coupalign.report.page import report_run, write_page, write_report
from coupalign.report.scores import read_scores

__all__ = ["read_scores", "report_run", "write_page", "write_report"]
