"""The trained student as a file that plain timm loads: safetensors plus a JSON with the arguments that rebuild it.

meta = json.load(open("student.json"))
model = timm.create_model(meta["model"], **meta["kwargs"])
model.load_state_dict(safetensors.torch.load_file("student.safetensors"))
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from leap_dist.config import Config, StudentConfig
from leap_dist.distributed import World, barrier
from leap_dist.files import write_json, write_whole
from leap_dist.student import Student, build_student, student_kwargs

STUDENT = "student.safetensors"


def gathered_state(module: nn.Module, world: World) -> dict[str, torch.Tensor]:
    """The module's whole state dict on the host of rank 0 (empty elsewhere), at any ZeRO stage. Collective."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        if not world.is_main:
            return {}
        return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in module.state_dict().items()}


def export_student(engine: Any, config: Config, world: World) -> Path:
    """Write `student.safetensors` and `student.json` to the run folder. Collective."""
    path = Path(config.output) / STUDENT
    state = gathered_state(engine.module.student.backbone, world)
    if world.is_main:
        write_whole(path, lambda partial: save_file(state, partial))
        about = {
            "model": config.student.model,
            "kwargs": student_kwargs(config.student, config.data.image_size),
            "image_size": config.data.image_size,
            "mean": list(config.data.mean),
            "std": list(config.data.std),
        }
        write_json(path.with_suffix(".json"), about)
    barrier(world)
    return path


def load_student(path: Path, device: torch.device) -> Student:
    """The exported student, ready to extract features; or a teacher of train_teacher without its classifier."""
    about = json.loads(path.with_suffix(".json").read_text())
    kwargs = {key: value for key, value in about["kwargs"].items() if key not in ("num_classes", "img_size")}
    student = build_student(StudentConfig(model=about["model"], kwargs=kwargs), about["image_size"])
    state = {name: tensor for name, tensor in load_file(path).items() if not name.startswith("head.")}
    student.backbone.load_state_dict(state)
    return student.to(device).eval()
