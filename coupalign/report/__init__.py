"""The page of a run: scores, curves, scores by group, pictures and configuration in one file."""

from coupalign.report.page import report_run, write_page
from coupalign.report.scores import read_scores

__all__ = ["read_scores", "report_run", "write_page"]
