"""Sets of images as they were downloaded or as shards, each with the names of its classes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np

from leap_dist.config import DataConfig, is_remote
from leap_dist.data.classes import read_classes
from leap_dist.data.loose import LooseStore
from leap_dist.data.shards import INDEX
from leap_dist.data.sources import WHOLE, open_source
from leap_dist.data.sources.files import Files
from leap_dist.data.store import open_store
from leap_dist.errors import UserError
from leap_dist.evaluation.retrieval import Truth
from leap_dist.runtime.distributed import World
from leap_dist.runtime.plain_pickle import read_plain_pickle


@dataclass(frozen=True)
class LabelledSet:
    """store: of shards or of loose images; classes: name -> label, where known."""

    store: Any
    classes: Optional[dict[str, int]]


@dataclass(frozen=True)
class RetrievalSet:
    """name: as its file says, such as roxford5k; the truth of each query is of numbers of database images."""

    name: str
    queries: LooseStore
    database: LooseStore
    truths: list[Truth]


def open_labelled(source: str, splits: Sequence[str], config: DataConfig, world: World) -> LabelledSet:
    """Shards in a folder or at a URI, or any folder that tools/make_shards.py reads; of the latter one of `splits`.

    UserError where it is neither, or does not say which of its parts is meant.
    """
    folder = Path(source)
    if is_remote(source) or (folder / INDEX).is_file():
        store = open_store(source, config, world)
        return LabelledSet(store, read_classes(store.folder))
    found = open_source(folder, max(1, config.workers))
    wanted = next((name for name in (*splits, WHOLE) if name in found), None)
    if wanted is None:
        raise UserError(f"{source}: has the parts {', '.join(found)}, but not {' or '.join(splits)}; name one's folder")
    images = found[wanted]
    return LabelledSet(LooseStore(images, source), {name: label for label, name in enumerate(images.classes)})


def open_retrieval(folder: Path, distractors: Optional[Path] = None) -> RetrievalSet:
    """A revisited set in its published layout: gnd_NAME.pkl beside jpg/. distractors: a folder of further images.

    UserError in one line for whatever is not as published; the pickle runs nothing.
    """
    files = sorted(folder.glob("gnd_*.pkl"))
    if len(files) != 1:
        raise UserError(f"{folder}: one gnd_NAME.pkl is expected beside jpg/; there are {len(files)}")
    told = read_plain_pickle(files[0], "the ground truth of a revisited set")
    try:
        names, asked = ([str(name) for name in told[key]] for key in ("imlist", "qimlist"))
        truths = [_truth(entry, len(names)) for entry in told["gnd"]]
        boxes = [tuple(float(side) for side in entry["bbx"]) for entry in told["gnd"]]
        if len(truths) != len(asked) or not asked or not names:
            raise ValueError(f"{len(asked)} queries, {len(truths)} truths, {len(names)} images")
        if not all(len(box) == 4 and box[0] < box[2] and box[1] < box[3] for box in boxes):
            raise ValueError("a box is not left, top, right, lower")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{files[0]}: not as published ({type(error).__name__}: {error})") from None
    database = [*_paths(folder / "jpg", names), *(_further(distractors) if distractors else [])]
    store = LooseStore(_files(database), str(folder))
    return RetrievalSet(
        files[0].stem.removeprefix("gnd_"),
        LooseStore(_files(_paths(folder / "jpg", asked)), f"{folder}, queries", boxes),
        store,
        truths,
    )


def _truth(entry: Any, images: int) -> Truth:
    columns = [np.asarray(entry[key], dtype=np.float64).reshape(-1) for key in Truth._fields]
    for numbers in columns:
        if not (np.isin(numbers, np.arange(images))).all():
            raise ValueError(f"an image beyond the {images} of imlist")
    return Truth(*(numbers.astype(np.int64) for numbers in columns))


def _paths(folder: Path, names: Sequence[str]) -> list[Path]:
    """UserError for a name that leads out of the folder, or whose image is not there."""
    paths = []
    for name in names:
        path = folder / f"{name.removesuffix('.jpg')}.jpg"
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise UserError(f"{folder}: {name!r} is no name of an image in it")
        if not path.is_file():
            raise UserError(f"{path} is missing, though the ground truth names it")
        paths.append(path)
    return paths


def _further(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not found:
        raise UserError(f"{folder}: holds no .jpg or .png, so there are no distractors")
    return found


def _files(paths: Sequence[Path]) -> Files:
    return Files(
        root=Path("/"),
        classes=["all"],
        names=[os.path.relpath(path.absolute(), "/") for path in paths],
        labels=np.zeros(len(paths), np.int64),
        sizes=np.array([path.stat().st_size for path in paths]),
    )
