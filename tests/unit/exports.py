"""What a run leaves of a student, made in a moment."""

from __future__ import annotations

import json
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def exported(folder: Path, name: str = "student", classes: int = 0, **about: object) -> Path:
    """A run's folder with an untrained student as a run exports it."""
    folder.mkdir(parents=True, exist_ok=True)
    kwargs = {**SHAPE, "num_classes": classes}
    torch.manual_seed(len(name))
    model = timm.create_model("vit_tiny_patch16_224", **kwargs)
    save_file(model.state_dict(), folder / f"{name}.safetensors")
    record = {
        "model": "vit_tiny_patch16_224", "kwargs": kwargs, "remedy": "none", "width": 24, "image_size": 32,
        "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "crop_pct": 0.8, **about,
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(record))
    return folder
