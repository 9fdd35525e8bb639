"""What a file was made with: the versions of the libraries that matter, and the state of this package's own code."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Optional

import timm
import torch

PACKAGE = Path(__file__).resolve().parents[1]
PATIENCE = 10.0  # seconds that git may take, of a slow disk


@cache
def provenance() -> dict[str, Any]:
    """`versions` by library, and `git` as of `git_state`.

    Read once in a process, so call it early: who trains for days edits the files meanwhile.
    """
    versions = {"leap_dist": _own_version(), "torch": str(torch.__version__), "timm": timm.__version__}
    return {"versions": versions, "git": git_state(PACKAGE)}


def _own_version() -> Optional[str]:
    """None where this is a checkout on PYTHONPATH."""
    try:
        return version("leap_dist")
    except PackageNotFoundError:
        return None


def git_state(folder: Path) -> Optional[dict[str, Any]]:
    """The commit of the package in `folder`, and whether files there differ from it.

    None where git does not know it: there is no git, or the package is installed elsewhere. An environment that lies in
    somebody's own repository is not that repository's code.
    """
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "--", ".")
    return None if commit is None or changes is None else {"commit": commit, "changed": bool(changes)}


def _git(folder: Path, *arguments: str) -> Optional[str]:
    """What a git command says; None where it fails."""
    quiet = {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    # Set in a hook of another repository, say, they would name that one.
    foreign = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
    environment = {key: value for key, value in os.environ.items() if key not in foreign}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], env=environment | quiet, timeout=PATIENCE, check=True,
            stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace",
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
