"""The trained student as a file that plain timm loads: safetensors plus a JSON with the arguments that rebuild it.

The JSON also has the size and hash of the weights, and a seal on itself: `leap_dist.runtime.integrity`.

docs/students.md has the lines that load it, without and with a remedy.
"""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from leap_dist.config import Config
from leap_dist.errors import UserError
from leap_dist.models.records import read_record, require_weights_of
from leap_dist.models.student import Student, StudentRecipe, assemble
from leap_dist.runtime.distributed import World, on_main
from leap_dist.runtime.integrity import check_recorded, record_of, write_recorded

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
    on_main(lambda: write_recorded(path, lambda partial: save_file(state, partial), about), world)
    return path


def load_student(path: str | Path, device: torch.device | str = "cpu") -> Student:
    """The exported student, or a teacher of `tools/train_teacher.py`, ready to extract features.

    path: of its file, or of the run's folder.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it, or the JSON beside it, is not what was written, or not what an export writes: a model of timm
            with plain arguments, and its weights.
    """
    path = Path(path)
    if path.is_dir():
        path = path / STUDENT
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the end of a run exports its student as RUN/{STUDENT}")
    about = read_record(record_of(path))
    check_recorded(path, StudentRecipe)
    recipe = StudentRecipe(**{key.name: about[key.name] for key in fields(StudentRecipe) if key.name in about})
    try:
        with torch.device("meta"):
            require_weights_of(assemble(recipe).backbone, path)  # before there is any memory for a model of any size
        student = assemble(recipe)
        student.backbone.load_state_dict(load_file(path))
    except (SafetensorError, TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError, OSError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: cannot be loaded as its record describes it ({reason})") from error
    return student.to(device).eval()
