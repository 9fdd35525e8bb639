"""`students:`, which makes one run a cohort: names, and what of each student differs from the run's config."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from leap_dist.errors import UserError

SECTIONS = ("student", "objective", "curriculum", "optim")  # in which students of one run may differ
SEED = "student.seed"  # what the short `seed` of a student stands for
NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}", re.ASCII)
# Folders and files that a run folder has beside its students' own.
TAKEN = ("bad_samples.jsonl", "checkpoints", "cohort.json", "cohort.md", "config.yaml", "data", "demo-teacher",
         "history.jsonl", "report.html", "tensorboard")  # fmt: skip


def checked_students(value: Any, source: str, known: Collection[str]) -> dict[str, dict[str, Any]]:
    """`students` of one layer of a config as name -> {dotted key: value}; keys may be dotted, nested or both.

    known: every option's dotted key.

    Raises:
        UserError: no mapping, a name that cannot be a folder's, or an option that is the run's and not a student's.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"students={value!r} ({source}): expected a mapping from names to what differs")
    check_names(value, source)
    return {name: _overrides(name, own, source, known) for name, own in value.items()}


def check_names(names: Collection[Any], source: str) -> None:
    """Raise UserError for a name that cannot be a folder's beside the others."""
    folders: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise UserError(
                f"students.{name} ({source}): a folder bears this name, so it must be a text of at most 64 letters, "
                "digits and _ . + -, and begin with a letter or a digit; a number needs quotes"
            )
        if name.lower() in TAKEN:
            raise UserError(f"students.{name} ({source}): the run's folder has {name.lower()} of its own; rename it")
        if name.lower() in folders:
            raise UserError(
                f"students.{name} ({source}): {folders[name.lower()]} would have the same folder where capitals do not "
                "count; rename one"
            )
        folders[name.lower()] = name


def _overrides(name: str, own: Any, source: str, known: Collection[str]) -> dict[str, Any]:
    """What one student's entry says, by dotted keys."""
    if own is None:
        return {}
    if not isinstance(own, Mapping):
        raise UserError(
            f"students.{name}={own!r} ({source}): expected what differs from the run, e.g. {{student.model: NAME}}"
        )
    found = dict(_leaves(own, known, ""))
    for key in found:
        if key != "seed" and key.partition(".")[0] not in SECTIONS:
            raise UserError(
                f"students.{name}.{key} ({source}): is the same for all students of a run; one may differ in "
                f"{', '.join(SECTIONS)} and seed"
            )
    if "seed" in found:
        if SEED in found:
            raise UserError(f"students.{name}.seed ({source}): means the same as {SEED}; give one of them")
        found[SEED] = found.pop("seed")
    return found


def _leaves(layer: Mapping[Any, Any], known: Collection[str], prefix: str) -> list[tuple[str, Any]]:
    leaves = []
    for name, value in layer.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in known:
            leaves += _leaves(value, known, f"{key}.") if value else []
        else:
            leaves.append((key, value))
    return leaves
