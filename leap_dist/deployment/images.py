"""Images on which an export is checked and calibrated: those of the run that it comes from, or of other shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor
from tqdm import tqdm

from leap_dist.config import DIGITS, Config, DataConfig, EvaluationConfig, load
from leap_dist.data import build_eval_loader, resolve
from leap_dist.deployment.loaded import Distilled
from leap_dist.errors import UserError
from leap_dist.evaluation import HeldOut
from leap_dist.evaluation.knn import knn_accuracy
from leap_dist.pretraining.recipe import load_recipe
from leap_dist.runtime.distributed import World
from leap_dist.runtime.reporting import STDERR

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
BATCH = 32
CONFIG, RECIPE = "config.yaml", "recipe.yaml"


def data_of(folder: Path, record: dict[str, Any], train: Optional[str], val: Optional[str]) -> Optional[DataConfig]:
    """The shards of the run in `folder` or its parent, or those named, as the student is to see them; None if none."""
    found = DataConfig(train="") if train is None else DataConfig(train=train)
    if train is None:
        for place in (folder, folder.parent):
            if (place / CONFIG).is_file():
                found = load(place / CONFIG, [], check=False).data
                break
            if (place / RECIPE).is_file():
                found = load_recipe(place / RECIPE, [], check=False).data
                break
    if not found.train:
        return None
    if DIGITS in (found.train, found.val):
        found = resolve(found, folder, ALONE)
    if train is None and not Path(found.train).is_dir():
        return None  # the run was made elsewhere
    return replace(
        found, val=val if val is not None else found.val, image_size=record["image_size"], mean=tuple(record["mean"]),
        std=tuple(record["std"]), crop_pct=record.get("crop_pct", found.crop_pct), workers=0,
    )  # fmt: skip


def batches(data: DataConfig, count: int, what: str) -> Iterator[Tensor]:
    """`count` images of `data.train`, evenly strided, in batches (B, 3, S, S), with a progress bar called `what`."""
    loader = build_eval_loader(data.train, data, batch=min(BATCH, count), world=ALONE, limit=count)
    with tqdm(total=count, desc=what, unit=" images", dynamic_ncols=True, file=STDERR, leave=False) as bar:
        for batch in loader:
            yield batch.images
            bar.update(len(batch.images))


def knn(models: dict[str, Any], data: DataConfig, count: int) -> dict[str, float]:
    """kNN accuracy, 0 to 1, of each of `models`, images to pooled features (B, C); known and judged by `count` each.

    UserError where `data.val` is not set, or has no labels.
    """
    if data.val is None:
        raise UserError("kNN needs held-out labelled images: --val SHARDS")
    config = Config(data=data, evaluation=EvaluationConfig())
    held_out = HeldOut(config, ALONE, count, count)
    k = config.evaluation.knn_k
    return {name: knn_accuracy(*held_out.features(model), k, ALONE.device)[0] for name, model in models.items()}


def pooled_by(model: Distilled) -> Any:
    """`model` as `knn` takes it."""

    def pooled(images: Tensor) -> Tensor:
        with torch.no_grad():
            return model(images).pooled

    return pooled
