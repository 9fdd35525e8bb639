"""Is a checkpoint plain? DeepSpeed unpickles its files whole, so what they ask for is looked at before it sees them."""

from __future__ import annotations

from pathlib import Path

import torch

from leap_dist.errors import UserError
from leap_dist.runtime.checkpoint_folder import others


def require_plain(folder: Path) -> None:
    """UserError unless every file of weights and states in `folder` builds tensors, plain data and DeepSpeed's own.

    Torch's restricted unpickler goes through each file and calls nothing that is not on its list and the one below. It
    maps the tensors and reads none of them: milliseconds a file. A file that changes between this and DeepSpeed's read
    is beyond it.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([dict, set, LossScaler, ZeroStageEnum, fragment_address]):
        for path in sorted(folder.rglob("*.pt")):
            try:
                torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:  # torch, pickle and zip each raise their own
                raise UserError(_refusal(folder, path, error)) from None


def _refusal(folder: Path, path: Path, error: Exception) -> str:
    text = " ".join(str(error).split())
    asked = next((text.partition(mark)[2].split()[0] for mark in ("GLOBAL ", "global ") if mark in text), "")
    if asked.startswith("leap_dist."):
        return (
            f"checkpoint {folder}: was saved by another version of leap_dist ({asked}); go on with that version, or "
            "begin anew in another output"
        )
    if asked:
        return f"checkpoint {folder}: {path.name} asks for {asked:.100}, which no checkpoint needs: it could run code"
    return f"checkpoint {folder}: cannot be read ({path.name}: {type(error).__name__}: {text:.200}); {others(folder)}"
