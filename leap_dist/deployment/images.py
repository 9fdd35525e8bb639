"""Images on which an export is checked and calibrated: those of the run that it comes from, or of other shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor
from tqdm import tqdm

from leap_dist.config import DIGITS, Config, DataConfig, load
from leap_dist.data import build_eval_loader, resolve
from leap_dist.deployment.loaded import Distilled
from leap_dist.errors import UserError
from leap_dist.evaluation import HeldOut
from leap_dist.evaluation.knn import knn_accuracy
from leap_dist.models.records import ImageSpec
from leap_dist.pretraining.recipe import load_recipe
from leap_dist.runtime.distributed import World
from leap_dist.runtime.reporting import STDERR

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
BATCH = 32
CONFIG, RECIPE = "config.yaml", "recipe.yaml"


@dataclass(frozen=True)
class Shown:
    """Shards, as the student is to see their images. bicubic: how they are resized, else bilinearly."""

    data: DataConfig
    bicubic: bool


def shown_to(spec: ImageSpec, folder: Path, train: Optional[str], val: Optional[str]) -> Optional[Shown]:
    """The shards of the run in `folder` or its parent, or those named, for a student of `spec`; None if none."""
    found, place = _of_run(folder) if train is None else (DataConfig(train=train), folder)
    if DIGITS in (found.train, found.val):
        found = resolve(found, place, ALONE)
    sources = [found.train] if isinstance(found.train, str) else found.train
    if not found.train or (train is None and not all(Path(one).is_dir() for one in sources)):
        return None  # there is no run, or it was made elsewhere
    data = replace(
        found, val=val if val is not None else found.val, image_size=spec.image_size, mean=tuple(spec.mean),
        std=tuple(spec.std), crop_pct=spec.crop_pct, workers=0,
    )  # fmt: skip
    return Shown(data, spec.interpolation == "bicubic")


def _of_run(folder: Path) -> tuple[DataConfig, Path]:
    """The data of the run or the teacher's training in `folder` or its parent, and which; without any, no shards."""
    for place in (folder, folder.parent):
        if (place / CONFIG).is_file():
            return load(place / CONFIG, [], check=False).data, place
        if (place / RECIPE).is_file():
            return load_recipe(place / RECIPE, [], check=False).data, place
    return DataConfig(train=""), folder


def batches(shown: Shown, count: int, what: str) -> Iterator[Tensor]:
    """`count` training images, evenly strided, in batches (B, 3, S, S), with a progress bar called `what`."""
    data, batch = shown.data, min(BATCH, count)
    loader = build_eval_loader(data.train, data, batch=batch, world=ALONE, limit=count, bicubic=shown.bicubic)
    with tqdm(total=count, desc=what, unit=" images", dynamic_ncols=True, file=STDERR, leave=False) as bar:
        for found in loader:
            yield found.images
            bar.update(len(found.images))


def knn(models: dict[str, Any], shown: Shown, count: int) -> dict[str, float]:
    """kNN accuracy, 0 to 1, of each of `models`, images to pooled features (B, C); known and judged by `count` each.

    UserError where there are no held-out images, or they have no labels.
    """
    if shown.data.val is None:
        raise UserError("kNN needs held-out labelled images: --val SHARDS")
    config = Config(data=shown.data)
    held_out, k = HeldOut(config, ALONE, count, count, bicubic=shown.bicubic), config.evaluation.knn_k
    return {name: knn_accuracy(*held_out.features(model), k, ALONE.device)[0] for name, model in models.items()}


def pooled_by(model: Distilled) -> Any:
    """`model` as `knn` takes it."""

    def pooled(images: Tensor) -> Tensor:
        with torch.no_grad():
            return model(images).pooled

    return pooled
