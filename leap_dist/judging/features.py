"""Features of a set, computed by all ranks and kept on disk, so that a killed evaluation goes on.

Parts are written whole, each with a digest of itself, under a name that says of which model and which images they are.
A part that is damaged is computed again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from leap_dist.analysis import Subject
from leap_dist.config import DataConfig
from leap_dist.data.loose import build_loose_loader
from leap_dist.errors import UserError
from leap_dist.evaluation import FeatureSet, Pooling
from leap_dist.evaluation.features import check_finite, merge
from leap_dist.runtime.distributed import World, barrier, gather_objects
from leap_dist.runtime.files import write_whole

PART = 32  # batches that a kill may cost
VERSION = 1  # to be raised when the same model gives other features of the same images
log = logging.getLogger(__name__)


class View(NamedTuple):
    """How images are seen: the config says their size, crop and normalisation. cache: a folder that all ranks see."""

    config: DataConfig
    bicubic: bool
    batch: int
    cache: Path


def features_of(
    subject: Subject, pooling: Pooling, store: Any, view: View, world: World, table: Optional[Mapping[int, int]] = None
) -> Optional[FeatureSet]:
    """Class token and mean patch of every image of `store`, on rank 0, ordered by id; None elsewhere. Collective.

    Images that cannot be read are absent. table: what labels become.

    Raises:
        UserError: features that are not finite, or too many images that cannot be read.
    """
    pooling(torch.zeros(1, 3, subject.image_size, subject.image_size, device=world.device))  # learns the widths
    folder = view.cache / _key(subject, store, view)
    parts = list(_sound_parts(folder)) if world.is_main else []
    done = np.concatenate([part.ids.numpy() for part in parts]) if parts else np.empty(0, np.int64)
    (missing,) = gather_objects(np.setdiff1d(np.arange(store.size), done) if world.is_main else None, world)[:1]
    if len(missing):
        _compute(subject, pooling, store, view, world, folder, missing)
        barrier(world)
        parts = list(_sound_parts(folder)) if world.is_main else []
    if not world.is_main:
        return None
    found = merge(parts)
    check_finite(found)
    if table is None:
        return found
    return found._replace(labels=torch.tensor([table.get(label, -1) for label in found.labels.tolist()]))


def _key(subject: Subject, store: Any, view: View) -> str:
    config = view.config
    seen = [config.image_size, config.crop_pct, list(config.mean), list(config.std), view.bicubic]
    told = json.dumps([VERSION, subject.mark, subject.image_size, str(store.contents()), store.size, seen])
    return hashlib.blake2s(told.encode(), digest_size=12).hexdigest()


def _compute(
    subject: Subject, pooling: Pooling, store: Any, view: View, world: World, folder: Path, missing: np.ndarray
) -> None:
    """Write this rank's share of what is missing, in parts."""
    loader = build_loose_loader(store, view.config, batch=view.batch, world=world, only=missing, bicubic=view.bicubic)
    shown = tqdm(loader, f"{subject.name}: {store.source}", unit="batch", disable=not world.is_main, leave=False)
    batches = iter(shown)
    while group := list(itertools.islice(batches, PART)):
        rows = [
            FeatureSet(pooling(batch.images.to(world.device, non_blocking=True)).cpu(), batch.labels, batch.ids)
            for batch in group
        ]
        _write(FeatureSet(*map(torch.cat, zip(*rows, strict=True))), folder)


def _write(part: FeatureSet, folder: Path) -> None:
    name = f"{int(part.ids[0]):09d}-{int(part.ids[-1]):09d}-{len(part.ids)}.safetensors"
    columns = {key: value.contiguous() for key, value in part._asdict().items()}
    try:
        write_whole(folder / name, lambda path: save_file(columns, path, {"digest": _digest(columns)}))
    except OSError as error:
        raise UserError(f"{folder}: features cannot be kept there ({error.strerror or error}); see --cache") from None


def _digest(columns: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2s()
    for key in sorted(columns):
        digest.update(columns[key].numpy().tobytes())
    return digest.hexdigest()


def _sound_parts(folder: Path) -> Iterator[FeatureSet]:
    """Every part that is what was written; others are removed."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                columns = {key: file.get_tensor(key) for key in FeatureSet._fields}
                if (file.metadata() or {}).get("digest") != _digest(columns):
                    raise ValueError("other contents than were written")
        except (OSError, ValueError, SafetensorError) as error:
            log.warning("%s is damaged and computed again (%s)", path, str(error)[:100])
            os.unlink(path)
            continue
        yield FeatureSet(**columns)
