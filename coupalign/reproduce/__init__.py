"""Train and score the runs of a table, then print our numbers next to the published ones."""

from coupalign.reproduce.runs import make_shapes, plan_runs, run_all, submit
from coupalign.reproduce.spec import read_table
from coupalign.reproduce.table import collect, publish

__all__ = ["collect", "make_shapes", "plan_runs", "publish", "read_table", "run_all", "submit"]
