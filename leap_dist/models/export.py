"""The trained student as a file that plain timm loads: safetensors plus a JSON with the arguments that rebuild it.

The JSON also has the size and hash of the weights, and a seal on itself: `leap_dist.runtime.integrity`.

docs/students.md has the lines that load it, without and with a remedy.
"""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Optional

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from leap_dist.config import Config
from leap_dist.errors import UserError
from leap_dist.models.map_student import ADDED
from leap_dist.models.own_student import is_own
from leap_dist.models.records import images_of, parts_at_most, parts_of, read_record, require_weights_of
from leap_dist.models.student import Student, StudentRecipe, assemble
from leap_dist.runtime.average import WeightAverage
from leap_dist.runtime.distributed import World, on_main
from leap_dist.runtime.integrity import check_recorded, record_of, write_recorded
from leap_dist.runtime.provenance import provenance
from leap_dist.runtime.running_stats import mean_running_stats

STUDENT = "student.safetensors"
AVERAGED = "student_ema.safetensors"


def gathered_state(module: nn.Module, world: World) -> dict[str, torch.Tensor]:
    """The module's whole state dict on the host of rank 0 (empty elsewhere), at any ZeRO stage. Collective."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        if not world.is_main:
            return {}
        return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in module.state_dict().items()}


def current_state(engine: Any, world: World) -> dict[str, torch.Tensor]:
    """What an export of the student would hold: on the host of rank 0, empty elsewhere. Collective.

    Running statistics of batch norms are the mean over ranks.
    """
    backbone = engine.module.student.backbone
    return gathered_state(backbone, world) | mean_running_stats(backbone, world)


def empty_twin(engine: Any) -> Student:
    """A model like the student in `engine`, on the host and outside of it, for `current_state` to be loaded into.

    Draws random numbers.
    """
    return assemble(engine.module.student.recipe)


def export_student(engine: Any, config: Config, world: World) -> Path:
    """Write `student.safetensors` and `student.json` to the run folder. Collective."""
    state = current_state(engine, world)
    return _write(Path(config.output) / STUDENT, state, engine.module.student, config, world)


def export_average(engine: Any, config: Config, world: World) -> Optional[Path]:
    """The same of the student with its averaged weights, as `student_ema`, if the run has them. Collective."""
    average: Optional[WeightAverage] = engine.module.average
    if average is None:
        return None
    state = current_state(engine, world) | average.whole(world)
    return _write(Path(config.output) / AVERAGED, state, engine.module.student, config, world)


def describe_student(student: Student) -> dict[str, Any]:
    """What a record says of the student itself: its recipe, and how its tokens are made."""
    return asdict(replace(student.recipe, width=student.width)) | student.about()


def _write(path: Path, state: dict[str, torch.Tensor], student: Student, config: Config, world: World) -> Path:
    """Collective; only rank 0 has the state."""

    def write() -> None:
        size = config.student.image_size or config.data.image_size
        images = images_of(config.data, size, config.evaluation.interpolation)
        about = describe_student(student) | images | provenance()
        write_recorded(path, lambda partial: save_file(state, partial), about)

    on_main(write, world)
    return path


def load_student(
    path: str | Path,
    device: torch.device | str = "cpu",
    own: Optional[str] = None,
    record: Optional[Path] = None,
) -> Student:
    """The exported student, or a teacher of `tools/train_teacher.py`, ready to extract features.

    path: of its file, or of the run's folder.
    own: `package.module:function` of a student that is a module of the user's own. The file names it too, but no
        file's word is taken for which code to run.
    record: where it is not the JSON of the same stem that was written with the file, and so does not know its hash.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it, or the JSON beside it, is not what was written, or not what an export writes: a model of timm
            with plain arguments, and its weights; or it is a module of the user's own, and `own` is not its function.
    """
    path = Path(path)
    if path.is_dir():
        path = path / STUDENT
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the end of a run exports its student as RUN/{STUDENT}")
    about = read_record(record or record_of(path))
    if record is None:
        check_recorded(path, StudentRecipe)
    if is_own(about["model"]) and about["model"] != own:
        raise UserError(
            f"{path}: is built by {about['model']}; if you trust it, load_student(path, own='{about['model']}')"
        )
    recipe = StudentRecipe(**{key.name: about[key.name] for key in fields(StudentRecipe) if key.name in about})
    try:
        with torch.device("meta"), parts_at_most(parts_of(path)):  # before there is any memory for a model of any size
            if recipe.map_at and not is_own(recipe.model):  # it will be run for a look
                require_weights_of(timm.create_model(recipe.model, **recipe.kwargs), path, added=ADDED)
            require_weights_of(assemble(recipe).backbone, path)
        student = assemble(recipe)
        student.backbone.load_state_dict(load_file(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # whatever a model raises at arguments that it was not made for
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: cannot be loaded as its record describes it ({reason})") from error
    return student.to(device).eval()
