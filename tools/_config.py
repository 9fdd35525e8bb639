"""A run's config, for tools that need its shapes and not its files: the YAML may come from another machine."""

from __future__ import annotations

from pathlib import Path

from leap_dist.config import Config, load

WITHOUT_FILES = (
    "data.train=digits", "data.val=null", "evaluation.every_epochs=0", "teacher.weights=random", "resume=none",
    "curriculum.replay=null",
)  # fmt: skip


def load_without_files(path: Path | None, *overrides: str) -> Config:
    """`leap_dist.config.load` with stand-ins for the files that the YAML names; `overrides` win. UserError as there."""
    return load(path, [*WITHOUT_FILES, *overrides])
