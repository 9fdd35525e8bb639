"""The whole analysis of one or more models on the same images: two passes, and their results on rank 0."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Optional

import torch
from tqdm import tqdm

from leap_dist.analysis.passes import FirstPass, SecondPass
from leap_dist.analysis.results import Analysis, Cka, Model, build_block
from leap_dist.analysis.subjects import Subject
from leap_dist.data import EvalLoader
from leap_dist.errors import UserError
from leap_dist.monitoring import bar_interval
from leap_dist.runtime.distributed import World, collect_objects


@dataclass(frozen=True, kw_only=True)
class SurveyOptions:
    """pairs: of images whose subspaces are compared; k: dimensions of those; batch: images per rank at a time in the
    second pass; shuffles: random orders of the channels for the SEP.
    """

    pairs: int = 64
    k: int = 16
    batch: int = 16
    shuffles: int = 4


def survey(
    students: list[Subject], teacher: Optional[Subject], loader: EvalLoader, world: World, options: SurveyOptions
) -> Optional[Analysis]:
    """Analyse the students, and the teacher if there is one, on the images of `loader`. Collective.

    Returns the results on rank 0, None elsewhere. Raises UserError for subspaces that do not fit, too few images,
    models that take different image sizes, and tokens that are not finite.
    """
    subjects = [*students, *([teacher] if teacher else [])]
    matched = [(index, len(students)) for index in range(len(students))] if teacher else []
    _check(subjects, loader, world, options)
    pairs = min(options.pairs, loader.num_samples // 2)
    first = FirstPass(subjects, matched, loader.num_samples, 2 * pairs, world)
    for batch in progress(loader, "all images", world):
        first.update(batch)
    sample = first.finish()
    models = [_look_closer(subject, index, first, sample, world, options) for index, subject in enumerate(subjects)]
    if not world.is_main:
        return None
    names = [subject.name for subject in subjects]
    cka = [
        Cka(names[student], names[goal], found.matrix().cpu().numpy())
        for (student, goal), found in zip(matched, first.cka, strict=True)
    ]
    seen = int(first.blocks[0][0].images["uncentred"].images)  # less than asked for where some cannot be read
    return Analysis(seen, len(sample), options.k, [model for model in models if model], cka)


def _look_closer(
    subject: Subject, index: int, first: FirstPass, sample: torch.Tensor, world: World, options: SurveyOptions
) -> Optional[Model]:
    """The second pass over this rank's share of the pairs, and the results of both, on rank 0. Collective."""
    blocks = first.blocks[index]
    second = SecondPass(subject, blocks, options.k, options.shuffles, world)
    pairs = len(sample) // 2
    mine = sample[2 * (pairs * world.rank // world.size) : 2 * (pairs * (world.rank + 1) // world.size)]
    batches = mine.split(max(2, options.batch // 2 * 2)) if len(mine) else ()
    looks = [second.look(images) for images in progress(batches, f"{subject.name}: pairs", world)]
    found = [look for part in collect_objects(looks, world) for look in part]
    if not world.is_main:
        return None
    results = [
        build_block(totals, axes, [look[layer] for look in found])
        for layer, (totals, axes) in enumerate(zip(blocks, second.axes, strict=True))
    ]
    return Model(subject.name, results)


def _check(subjects: list[Subject], loader: EvalLoader, world: World, options: SurveyOptions) -> None:
    sizes = {subject.image_size for subject in subjects}
    if len(sizes) > 1:
        each = ", ".join(f"{subject.name} {subject.image_size}" for subject in subjects)
        raise UserError(f"the models take images of different sizes ({each} pixels), so they cannot see the same")
    if loader.num_samples < max(2, world.size):
        raise UserError(f"{loader.num_samples} images: at least 2, and one for each of {world.size} ranks, are needed")
    images = torch.zeros(1, 3, subjects[0].image_size, subjects[0].image_size, device=world.device)
    for subject in subjects:
        least = min(min(tokens.shape[1] - 1, tokens.shape[2]) for tokens in subject.layers(images))
        if not 1 <= options.k <= least:
            raise UserError(
                f"subspaces of {options.k} dimensions: {subject.name} has room for 1 to {least}; set --subspace"
            )


def progress(items: Iterable[Any], what: str, world: World) -> Iterable[Any]:
    """The items, with a bar on rank 0."""
    return tqdm(items, what, disable=not world.is_main, mininterval=bar_interval(), unit="batch", dynamic_ncols=True)
