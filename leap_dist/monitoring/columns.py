"""What of a run's summary stands in a table of several runs, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Optional

from leap_dist.monitoring.comparison import KINDS, MEASURES


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


class Column(NamedTuple):
    """A column of the tables: its heading, how a run's summary gives it (None where it does not), and its digits."""

    label: str
    of: Callable[[Mapping[str, Any]], Optional[float]]
    digits: Callable[[float], str]


def _plain(key: str, label: str, digits: Callable[[float], str] = _percent) -> Column:
    return Column(label, lambda summary: summary.get(key), digits)


def _own_seconds(summary: Mapping[str, Any]) -> Optional[float]:
    """None where the run shared its pass: those are the seconds of all that did."""
    return None if "shared_with" in summary else summary.get("train_seconds")


def _all_flops(summary: Mapping[str, Any]) -> Optional[float]:
    return sum(summary["flops"].values()) if "flops" in summary else None


def _judged(who: str, whose: str) -> dict[str, Column]:
    """kNN and probe of every kind of features."""
    return {
        f"{who}_{kind}_{measure}": _plain(f"{who}_{kind}_{measure}", f"{whose}{name} of {words}, %")
        for kind, words in KINDS.items()
        for measure, (_, name) in MEASURES.items()
    }


COLUMNS = {
    **_judged("student", ""),
    "student_top1": _plain("student_top1", "top-1, %"),
    "student_teacher_cka": _plain("student_teacher_cka", "CKA to the teacher", "{:.3f}".format),
    "epochs": _plain("epochs", "epochs", "{:.2f}".format),
    "teacher_flops": Column("teacher FLOPs", lambda summary: summary.get("flops", {}).get("teacher"), "{:.3e}".format),
    "flops": Column("all FLOPs", _all_flops, "{:.3e}".format),
    "train_seconds": Column("seconds", _own_seconds, "{:.1f}".format),
    "teacher_flops_saved": _plain("teacher_flops_saved", "teacher FLOPs saved, %"),
    "flops_saved": _plain("flops_saved", "all FLOPs saved, %"),
    "time_saved": _plain("time_saved", "time saved, %"),
    "final_block": _plain("final_block", "block at the end", "{:.1f}".format),
    **_judged("teacher", "teacher's "),
}
