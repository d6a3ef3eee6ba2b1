"""Runs, or a sweep -> one self-contained HTML page with tables and figures. Imports no torch."""

from gmscale.report.comparison import Arm, ArmsTable, arms
from gmscale.report.page import write_report
from gmscale.report.runs import Run, find_runs, load_run
from gmscale.report.scorecard import write_scorecards

__all__ = ["Arm", "ArmsTable", "Run", "arms", "find_runs", "load_run", "write_report", "write_scorecards"]
