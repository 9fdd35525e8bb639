"""The trained student as a file that plain timm loads: safetensors plus a JSON with the arguments that rebuild it.

docs/students.md has the lines that load it, without and with a remedy.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from leap_dist.config import Config
from leap_dist.config.ranges import RANGES, complaint
from leap_dist.errors import UserError
from leap_dist.models.student import Student, StudentRecipe, assemble
from leap_dist.runtime.distributed import World, on_main
from leap_dist.runtime.files import write_json, write_whole

STUDENT = "student.safetensors"


def gathered_state(module: nn.Module, world: World) -> dict[str, torch.Tensor]:
    """The module's whole state dict on the host of rank 0 (empty elsewhere), at any ZeRO stage. Collective."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        if not world.is_main:
            return {}
        return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in module.state_dict().items()}


def export_student(engine: Any, config: Config, world: World) -> Path:
    """Write `student.safetensors` and `student.json` to the run folder. Collective.

    Raises:
        UserError: on every rank, the disk refuses.
    """
    path = Path(config.output) / STUDENT
    student: Student = engine.module.student
    state = gathered_state(student.backbone, world)
    about = {
        **asdict(replace(student.recipe, width=student.width)),
        "image_size": config.data.image_size,
        "mean": list(config.data.mean),
        "std": list(config.data.std),
        "crop_pct": config.data.crop_pct,
    }

    def write() -> None:
        write_whole(path, lambda partial: save_file(state, partial))
        write_json(path.with_suffix(".json"), about)

    on_main(write, world)
    return path


def _check_record(about: dict[str, Any], record: Path) -> None:
    """UserError where a number of the record is none that a run could have had."""
    for name in ("image_size", "crop_pct", "mean", "std"):
        fault = complaint(f"data.{name}", about[name], RANGES) if name in about else None
        if fault:
            raise UserError(f"{record}: {fault.removeprefix('data.')}")


def load_student(path: str | Path, device: torch.device | str = "cpu") -> Student:
    """The exported student, or a teacher of `tools/train_teacher.py`, ready to extract features.

    path: of its file, or of the run's folder.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if path.is_dir():
        path = path / STUDENT
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the end of a run exports its student as RUN/{STUDENT}")
    about = json.loads(path.with_suffix(".json").read_text())
    _check_record(about, path.with_suffix(".json"))
    student = assemble(
        StudentRecipe(**{key.name: about[key.name] for key in fields(StudentRecipe) if key.name in about})
    )
    student.backbone.load_state_dict(load_file(path))
    return student.to(device).eval()
