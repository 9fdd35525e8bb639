"""`student.weights`: what training starts from. A timm checkpoint of the hub or a file, or an earlier run's export."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import huggingface_hub
import torch
from torch import Tensor, nn

from leap_dist.config import HUB, NO_WEIGHTS
from leap_dist.errors import UserError
from leap_dist.models.backbone import family, is_family
from leap_dist.models.map_student import ADDED, widened_parts
from leap_dist.models.own_student import is_own
from leap_dist.models.student_base import Student
from leap_dist.models.weight_files import read_weights
from leap_dist.runtime.files import read_json

_EXPORT = "student.safetensors"  # as `export_student` leaves it in a run's folder


def warm_start(student: Student, weights: str) -> None:
    """Give the student the weights that `student.weights` means.

    A position embedding, or a table of relative positions, of another image size is resampled as timm does it. What a
    remedy adds, and a classifier of other classes, stays as it was initialised unless the file has it.

    Raises:
        UserError: the weights cannot be reached or read, are of another student, or fit in part only.
    """
    if weights == NO_WEIGHTS:
        return
    what = f"student.weights={weights}"
    path = _hub_file(student, what) if weights == HUB else Path(weights)
    path = path / _EXPORT if path.is_dir() else path
    exported = _check_record(student, path, what)
    stored = {name: value for name, value in read_weights(path, "student.weights").items() if isinstance(value, Tensor)}
    wanted = student.backbone.state_dict()
    fitted = stored if _missing(stored, wanted) == [] else _converted(stored, student.backbone, what)
    new = () if exported else _new_parts(student)
    missing = [name for name in _missing(fitted, wanted) if not name.startswith((*new, *_classifier(student.backbone)))]
    if missing:
        raise UserError(
            f"{what}: has {len(wanted) - len(missing)} of the {len(wanted)} tensors of student.model="
            f"{student.recipe.model}; lacks {_named(missing[0], fitted, wanted)}"
        )
    fits = {name: fitted[name] for name in wanted.keys() - set(_missing(fitted, wanted))}
    student.backbone.load_state_dict(fits, strict=False)


def _missing(found: dict[str, Any], wanted: dict[str, Tensor]) -> list[str]:
    """Names that are not there or of another shape; counters of batches apart, which old files lack."""
    return [
        name
        for name, tensor in wanted.items()
        if not name.endswith("num_batches_tracked") or name in found
        if name not in found or found[name].shape != tensor.shape
    ]


def _named(name: str, found: dict[str, Any], wanted: dict[str, Tensor]) -> str:
    if name not in found:
        return name
    return f"{name} of shape {tuple(wanted[name].shape)}, its own is {tuple(found[name].shape)}"


def _converted(stored: dict[str, Any], model: nn.Module, what: str) -> dict[str, Any]:
    """timm's own conversion of a checkpoint for this architecture: names, and grids of other image sizes."""
    convert = _filter_of(model)
    if convert is None:
        return stored
    try:
        with torch.no_grad():
            return convert(dict(stored), model)
    except Exception as error:  # what a converter raises at a file that it was not made for
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.120}"
        raise UserError(f"{what}: timm cannot fit it to {type(model).__name__} ({reason})") from error


def _filter_of(model: nn.Module) -> Optional[Callable[[dict[str, Any], nn.Module], dict[str, Any]]]:
    if is_family(model):
        return family(model).checkpoint_filter
    module = sys.modules[type(model).__module__]
    return getattr(module, "checkpoint_filter_fn", None) or getattr(module, "_checkpoint_filter_fn", None)


def _new_parts(student: Student) -> tuple[str, ...]:
    """Beginnings of the names of what a remedy has put in, which a checkpoint of the plain model has not."""
    if student.recipe.map_at:
        return (*ADDED, *(widened_parts(student.recipe) if student.recipe.remedy == "wide_last" else ()))
    last = f"blocks.{student.depth - 1}."
    return {"none": (), "lift": ("norm.",), "wide_last": (last, "norm.", "fc_norm.")}[student.recipe.remedy]


def _classifier(model: nn.Module) -> tuple[str, ...]:
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    return tuple(f"{name}." for name in (*names, "mean_head"))


def _check_record(student: Student, path: Path, what: str) -> bool:
    """Whether `path` is an export of this package. UserError where it is one of another student."""
    record = path.with_suffix(".json")
    try:
        about = read_json(record)
        theirs = about["model"], about["remedy"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    recipe = student.recipe
    if theirs not in ((recipe.model, recipe.remedy), (recipe.model, "none")):
        raise UserError(
            f"{what}: is an export of student.model={theirs[0]!s:.100} with student.remedy={theirs[1]!s:.100}; this "
            f"run has {recipe.model} and {recipe.remedy}"
        )
    return theirs[1] == recipe.remedy


def _hub_file(student: Student, what: str) -> Path:
    model = student.recipe.model
    source = {} if is_own(model) else student.backbone.pretrained_cfg
    if not source.get("hf_hub_id"):
        raise UserError(f"{what}: timm knows no hub file of {model}; give a file's path")
    file = source["hf_hub_id"], source.get("hf_hub_filename") or "model.safetensors"
    try:
        return Path(huggingface_hub.hf_hub_download(*file))
    except Exception as error:  # the hub's client lets through the errors of half a dozen packages
        raise UserError(f"{what}: cannot get weights of {model} ({error!r:.120}); give a file's path") from error
