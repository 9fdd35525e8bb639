"""Distil a frozen vision transformer into small students with the LEAP curriculum (arXiv 2606.19483)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    from leap_dist.deployment import Distilled

__all__ = ["load"]


def load(path: str | Path, *, ema: bool = False, device: str = "cpu", own: Optional[str] = None) -> Distilled:
    """A distilled student, in eval mode: `leap_dist.load("runs/x")`. Needs torch, timm and safetensors only.

    path: a run's folder, one of a student in it, or an exported file; a teacher of tools/train_teacher.py too.
    ema: take the averaged weights, of a run with `student.ema_decay`.
    own: `package.module:function` of a student that is a module of your own; only what is named here is run.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the file or its record is not what an export leaves.
    """
    from leap_dist.deployment import load_distilled  # torch and timm: seconds

    return load_distilled(path, ema=ema, device=device, own=own)
