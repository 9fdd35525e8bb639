"""What a user may call a MODEL: a run, an export, a run's teacher, or a timm model; understood first, opened later."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from leap_dist.config import HUB, Config, TeacherConfig, load
from leap_dist.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from leap_dist.analysis import Subject
    from leap_dist.models import Features
    from leap_dist.runtime.distributed import World

EXPORTED, RECORD, STUDENT = ".safetensors", (".yaml", ".yml"), "student.safetensors"


@dataclass(frozen=True)
class Request:
    """A MODEL as named: an exported student's file, or a timm model and, where it was one's teacher, that run."""

    name: str
    student: Optional[Path] = None
    teacher: Optional[TeacherConfig] = None
    run: Optional[Config] = None


def request(text: str) -> Request:
    """Understand a MODEL without loading it. UserError where it is none of the three kinds."""
    path = Path(text)
    if (path / STUDENT).is_file() or (path.is_dir() and os.sep in text):  # else it may be the name of a model
        text, path = f"{path / STUDENT}", path / STUDENT
    if text.endswith(RECORD):
        run = load(path, [], check=False)
        return Request(run.teacher.model, teacher=replace(run.teacher, placement="replicated"), run=run)
    if text.endswith(EXPORTED) and ("=" not in text or path.is_file()):
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        return Request(path.absolute().parent.name if path.stem in ("student", "teacher") else path.stem, student=path)
    name, _, weights = text.partition("=")
    return Request(name, teacher=TeacherConfig(model=name, weights=weights or HUB))


def open_subjects(requests: list[Request], image_size: Optional[int], world: World) -> list[Subject]:
    """Load the models. A timm model takes images of the size asked for, else a student's or a run's, else its own."""
    from leap_dist.analysis import exported_subject, native_image_size

    exported = {r.name: exported_subject(r.student, r.name, world.device) for r in requests if r.student}
    sizes = [subject.image_size for subject in exported.values()]
    sizes += [r.run.data.image_size for r in requests if r.run]
    sizes += [native_image_size(r.teacher.model) for r in requests if r.teacher]
    size = image_size or sizes[0]
    for subject in exported.values():
        if subject.image_size != size:
            raise UserError(f"{subject.name} takes images of {subject.image_size} pixels, not {size}")
    return [exported.get(r.name) or open_timm(r, size, world) for r in requests]


def at_scale(asked: Request, subject: Subject, scale: float, world: World) -> Subject:
    """The model of `subject`, made for images `scale` times as large, to which it resizes those that `subject` takes.

    That is bilinear and not antialiased, as in the published multi-scale code. The size is a whole number of tokens.

    Raises:
        UserError: the model has one size alone.
    """
    import torch.nn.functional as F

    from leap_dist.analysis import exported_at

    token = subject.image_size / subject.grid[0]
    side = round(max(1, round(subject.image_size * scale / token)) * token)
    if side == subject.image_size:
        return subject
    device = world.device
    resized = exported_at(asked.student, side, device) if asked.student else open_timm(asked, side, world).final

    def final(images: Tensor) -> Features:
        return resized(F.interpolate(images, (side, side), mode="bilinear", align_corners=False))

    return replace(subject, final=final, mark=f"{subject.mark} at {side} pixels")


def open_timm(asked: Request, size: int, world: World) -> Subject:
    """A timm model, or the teacher of a run, at images of `size` pixels. UserError where it cannot be had."""
    from leap_dist.analysis import Preprocessing, timm_subject

    if asked.run is None:
        try:
            return timm_subject(asked.teacher, asked.name, size, world.device)
        except UserError as error:  # in the words of a run's config, where here it is NAME=FILE
            words = str(error).replace("teacher.model=", "").replace("student.model=", "")
            for option in ("teacher.weights=", "student.weights="):
                words = words.replace(option, f"{asked.teacher.model}=")
            raise UserError(words) from error
    from leap_dist.assembly import with_demo_teacher

    teacher = with_demo_teacher(replace(asked.run, teacher=asked.teacher), world).teacher
    subject = timm_subject(teacher, asked.name, size, world.device)
    seen = asked.run.data
    return replace(subject, preprocessing=Preprocessing(tuple(seen.mean), tuple(seen.std), seen.crop_pct))


def named_apart(requests: list[Request], teacher: bool) -> list[Request]:
    """Requests of one name get numbers: names are keys of the results. teacher: the last one is, and is called that."""
    if teacher and requests[-1].name in [r.name for r in requests[:-1]]:
        requests = [*requests[:-1], replace(requests[-1], name=f"{requests[-1].name} (teacher)")]
    names = [r.name for r in requests]
    return [
        replace(r, name=f"{r.name} #{names[: i + 1].count(r.name)}") if names.count(r.name) > 1 else r
        for i, r in enumerate(requests)
    ]
