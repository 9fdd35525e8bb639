"""`report.html`: one page of what a run was, did and reached, and pages that compare runs.

Reads run folders, by the readers of monitoring/; computes nothing that a run's files do not say, and changes none of
them. facts.py gathers, words.py says it in sentences and tables, charts.py draws, pages.py puts it together.
"""

from __future__ import annotations

from leap_dist.report.facts import is_run
from leap_dist.report.pages import REPORT, runs_in, write_comparison, write_report

__all__ = ["REPORT", "is_run", "runs_in", "write_comparison", "write_report"]
