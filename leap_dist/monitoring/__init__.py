"""What a run writes and shows: the journal, TensorBoard, FLOPs and seconds, traces, and runs drawn side by side.

Nothing here changes what a run computes. Checkpoints are runtime/'s, the student's file is models/', and the summary at
the end of a run wrapup.py's.
"""

from __future__ import annotations

from leap_dist.monitoring.accounting import Accountant, Costs, configured_peaks
from leap_dist.monitoring.journal import Journal
from leap_dist.monitoring.profiling import ProfilerWindow, check_window
from leap_dist.monitoring.telemetry import Bar, bar_interval, memory_bytes, table

__all__ = [
    "Accountant",
    "Bar",
    "Costs",
    "Journal",
    "ProfilerWindow",
    "bar_interval",
    "check_window",
    "configured_peaks",
    "memory_bytes",
    "table",
]
