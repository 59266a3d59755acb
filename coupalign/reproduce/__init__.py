"""Whole tables by one command: the runs that a table needs, the paper's numbers beside ours, a page to look at."""

from coupalign.reproduce.runs import make_shapes, plan_runs, run_all, submit
from coupalign.reproduce.spec import read_table
from coupalign.reproduce.table import collect, publish

__all__ = ["collect", "make_shapes", "plan_runs", "publish", "read_table", "run_all", "submit"]
