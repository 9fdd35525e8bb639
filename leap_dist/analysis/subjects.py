"""The models under analysis: any timm vision transformer, or an exported student, as a map from images to tokens.

Patch tokens of every block, each through the model's final norm. That is what LEAP matches at every target block, and
at the last block what arXiv 2511.15572 analyses; class and register tokens are cut off, as there. For students with a
remedy see `Student.every_layer`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

import timm
import torch
from safetensors import SafetensorError
from torch import Tensor

from leap_dist.config import NO_WEIGHTS, RANDOM, DataConfig, StudentConfig, TeacherConfig
from leap_dist.errors import UserError
from leap_dist.models import Features, Student, build_student, load_student, on_grid, warm_start
from leap_dist.models.backbone import Unbuildable, is_family, sketch
from leap_dist.models.records import image_spec, read_record
from leap_dist.runtime.integrity import record_of
from leap_dist.teacher import build_teacher
from leap_dist.teacher.weights import fingerprint

Colour = tuple[float, ...]


@dataclass(frozen=True)
class Preprocessing:
    """How a model sees a square image: mean and std of RGB in [0, 1], and the share of a side its centre crop keeps."""

    mean: Colour
    std: Colour
    crop_pct: float = DataConfig.crop_pct


@dataclass(frozen=True)
class Subject:
    """One model, ready to be looked at.

    name: for tables and figures; image_size: side of the square images it takes, pixels; preprocessing: what else it
    expects of them; grid: (rows, columns) of the last block's patch tokens; every_layer: images (B, 3, S, S) to the
    `Features` of every block, shallowest first, no grad; final: images to those of the last block, likewise; mark:
    letters that differ where weights do; grids: of every block, where they differ, as in hierarchical models.
    """

    name: str
    image_size: int
    preprocessing: Preprocessing
    grid: tuple[int, int]
    every_layer: Callable[[Tensor], list[Features]]
    final: Callable[[Tensor], Features]
    mark: str
    grids: Optional[tuple[tuple[int, int], ...]] = None

    def layers(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, S, S) -> the patch tokens (B, N, D) of every block, shallowest first, float32."""
        return [features.patch.float() for features in self.every_layer(images)]

    def on_grid(self, maps: list[Tensor], grid: tuple[int, int]) -> list[Tensor]:
        """What `layers` gave, resized to `grid` as in training: rows (B * N, D)."""
        grids = self.grids or (self.grid,) * len(maps)
        return [on_grid(tokens, own, grid).flatten(0, 1) for tokens, own in zip(maps, grids, strict=True)]


def exported_subject(path: Path, name: str, device: torch.device) -> Subject:
    """A student that a run exported: `student.safetensors` with its .json beside it. UserError if they do not load."""
    record = record_of(path)
    try:
        about = read_record(record)
        images = image_spec(about, record)
        preprocessing = Preprocessing(tuple(images.mean), tuple(images.std), images.crop_pct)
        size, student = images.image_size, load_student(path, device).requires_grad_(False)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path} and {record.name} are no exported student ({error!r:.160})") from error

    every_layer = torch.no_grad()(student.every_layer)
    try:
        every_layer(torch.zeros(1, 3, size, size, device=device))
    except TypeError as error:  # timm's CaiT does not know return_prefix_tokens
        raise UserError(f"{path}: {about['model']} cannot give the tokens of every block") from error
    return Subject(name, size, preprocessing, student.grid, every_layer, *_last_of(student), student.layer_grids)


def exported_at(path: Path, side: int, device: torch.device) -> Callable[[Tensor], Features]:
    """What an exported student makes of images (B, 3, side, side), of another side than it was trained on: `final` of a
    `Subject`.

    Position embeddings are resampled by timm's `set_input_size`. UserError if the model takes one size alone.
    """
    student = load_student(path, device).requires_grad_(False)
    student.recipe = replace(student.recipe, resized_to=None)
    final = torch.no_grad()(student.forward)
    try:
        if hasattr(student.backbone, "set_input_size"):
            student.backbone.set_input_size(img_size=(side, side))
        final(torch.zeros(1, 3, side, side, device=device))
    except Exception as error:  # whatever a model raises at a size that it was not made for
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: takes images of one size alone, so it has no other scales ({reason})") from error
    return final


def _last_of(student: Student) -> tuple[Callable[[Tensor], Features], str]:
    """`Subject.final` and `Subject.mark` of a student."""
    mark = fingerprint({key: value.cpu() for key, value in student.state_dict().items()})
    return torch.no_grad()(student.forward), mark


def timm_subject(config: TeacherConfig, name: str, image_size: int, device: torch.device) -> Subject:
    """A timm model by name and weights, at square images of `image_size` pixels. Errors as of `build_teacher`.

    A model that is no plain vision transformer gives the cells of its stages, each at its own width and grid, the last
    through its final norm where it has one for maps.
    """
    if not _is_plain(config, image_size):
        return _staged_subject(config, name, image_size, device)
    teacher = build_teacher(config, image_size, device)
    teacher.retarget(teacher.spec.depth)

    def every_layer(images: Tensor) -> list[Features]:
        return list(teacher.sweep(images))

    parts = {"stem": teacher.stem, "blocks": teacher.blocks}
    weights = {f"{part}.{key}": x.cpu() for part, m in parts.items() for key, x in m.state_dict().items()}
    seen = Preprocessing(teacher.spec.mean, teacher.spec.std)
    return Subject(name, image_size, seen, teacher.spec.grid, every_layer, teacher.features, fingerprint(weights))


def _is_plain(config: TeacherConfig, image_size: int) -> bool:
    """Whether it is a model that can be a teacher. What cannot be built with an image size is none."""
    try:
        return is_family(sketch(config.model, config.kwargs, image_size, side="teacher"))
    except Unbuildable:
        return False


def _staged_subject(config: TeacherConfig, name: str, image_size: int, device: torch.device) -> Subject:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_student(StudentConfig(model=config.model, kwargs=config.kwargs), image_size)
    warm_start(model, NO_WEIGHTS if config.weights == RANDOM else config.weights)
    model.to(device).eval().requires_grad_(False)
    expected = model.backbone.pretrained_cfg

    preprocessing = Preprocessing(tuple(expected["mean"]), tuple(expected["std"]))
    every_layer = torch.no_grad()(model.every_layer)
    return Subject(name, image_size, preprocessing, model.grid, every_layer, *_last_of(model), model.layer_grids)


def native_image_size(model: str) -> int:
    """Side of the images that timm's `model` was trained on, pixels; 224 for a model that timm does not know."""
    known = timm.models.get_pretrained_cfg(model, allow_unregistered=True) if timm.is_model(model) else None
    return 224 if known is None else known.input_size[-1]
