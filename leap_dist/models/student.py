"""The student that a config asks for: a plain vision transformer, another timm model, or a module of the user's own."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from typing import Optional

import torch

from leap_dist.config import StudentConfig
from leap_dist.models.backbone import Unbuildable, check_patches, is_family, outline, sketch
from leap_dist.models.map_student import assemble_map, map_recipe
from leap_dist.models.own_student import assemble_own, is_own, own_recipe
from leap_dist.models.student_base import Student, StudentRecipe
from leap_dist.models.vit_student import assemble_vit, heads_of, is_plain, vit_recipe

__all__ = ["Student", "StudentRecipe", "assemble", "build_student", "uniform_control"]


def build_student(
    config: StudentConfig, image_size: int, width: Optional[int] = None, device: Optional[torch.device] = None
) -> Student:
    """Build the randomly initialised student for images of `image_size` pixels, unless it has a size of its own.

    width: the teacher's, to which a remedy brings the tokens; unused without one. A module of the user's own is built
    on the host, whatever `device` says: it may not know the meta device.

    Raises:
        UserError: unknown model, arguments it does not take, no spatial map, no map of that reduction, or one that
            cannot be widened or given a classifier as asked for.
    """
    device = device or torch.device("cpu")
    with device:
        student = assemble(_recipe(config, image_size, width))
    if device.type != "meta":
        student.check_runs()
    return student


def assemble(recipe: StudentRecipe) -> Student:
    """Build what a recipe says."""
    if is_own(recipe.model):
        return assemble_own(recipe)
    return assemble_map(recipe) if recipe.map_at else assemble_vit(recipe)


def _recipe(config: StudentConfig, image_size: int, width: Optional[int]) -> StudentRecipe:
    size = config.image_size or image_size
    recipe = (own_recipe if is_own(config.model) else _timm_recipe)(config, size, width)
    return recipe if size == image_size else replace(recipe, resized_to=size)


def _timm_recipe(config: StudentConfig, size: int, width: Optional[int]) -> StudentRecipe:
    try:
        model = sketch(config.model, config.kwargs, size, side="student")
    except Unbuildable as error:  # img_size, it may be
        return map_recipe(config, size, width, error)
    if not is_family(model):
        return map_recipe(config, size, width)
    key = "student.image_size" if config.image_size else "data.image_size"
    check_patches(model, size, key, f"student.model={config.model}")
    if is_plain(config, model):
        return vit_recipe(config, model, size, width)
    return map_recipe(config, size, width)


def uniform_control(config: StudentConfig, image_size: int, width: int) -> StudentConfig:
    """A student without the remedy and with as many parameters: every block a little wider (arXiv 2511.15572).

    It has the number of heads of the configured student, the width is the multiple of it that comes nearest.
    """
    meta = torch.device("meta")

    def parameters(student: StudentConfig) -> int:
        return sum(parameter.numel() for parameter in build_student(student, image_size, width, meta).parameters())

    def uniform(embed_dim: int) -> StudentConfig:
        return replace(config, remedy="none", kwargs={**config.kwargs, "embed_dim": embed_dim})

    heads = heads_of(outline(config.model, config.kwargs, image_size, side="student"), config)
    wanted, widths = parameters(config), range(heads, width + heads, heads)
    above = bisect_left(widths, wanted, key=lambda embed_dim: parameters(uniform(embed_dim)))
    nearest = min(widths[max(0, above - 1) : above + 1], key=lambda w: abs(parameters(uniform(w)) - wanted))
    return uniform(nearest)
