"""Class folders, as torchvision's ImageFolder reads them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from leap_dist.data.parallel import parallel
from leap_dist.data.sources.images import SPLITS, WHOLE, Images
from leap_dist.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Files(Images):
    """Files under `root`, which `names` are relative to."""

    root: Path

    def reader(self, numbers: Sequence[int]) -> Callable[[int], bytes]:
        """See Images."""
        return lambda number: (self.root / self.names[number]).read_bytes()


def split_folders(folder: Path) -> dict[str, str]:
    """Folders of a tree that are splits, by the split's name; none unless train or val is among them."""
    found = {SPLITS[name]: name for name in SPLITS if (folder / name).is_dir()}
    return found if found.keys() & {"train", "val"} else {}


def open_tree(folder: Path, workers: int) -> dict[str, Images]:
    """`folder`/<split>/<class>/... or `folder`/<class>/..., listed by `workers` processes.

    A test set without class folders is left out: ImageNet's has no public labels.
    """
    splits = split_folders(folder) or {WHOLE: WHOLE}
    if "test" in splits and not any(path.is_dir() for path in (folder / splits["test"]).iterdir()):
        log.warning("%s: left out, it has no class folders", folder / splits.pop("test"))
    return {split: _open_class_folders(folder, folder / name, workers) for split, name in splits.items()}


def _open_class_folders(root: Path, folder: Path, workers: int) -> Images:
    try:
        classes = find_classes(folder)[0]
    except FileNotFoundError as error:
        told = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{told}; images without classes go into one folder, e.g. {folder}/all") from None
    names, labels, sizes = [], [], []
    for label, files in enumerate(parallel(partial(_class_files, root, folder), classes, workers)):
        names += [name for name, _ in files]
        sizes += [size for _, size in files]
        labels += [label] * len(files)
    return Files(root=root, classes=classes, names=names, labels=np.array(labels), sizes=np.array(sizes))


def _class_files(root: Path, folder: Path, name: str) -> list[tuple[str, int]]:
    """(path relative to `root`, size) of every image of a class. A link to nothing has size 0: reading will tell."""
    try:
        files = [path for path, _ in make_dataset(folder, {name: 0}, extensions=IMG_EXTENSIONS)]
    except FileNotFoundError as error:
        raise UserError(f"{folder}: {' '.join(str(error).split())}") from None
    return [(os.path.relpath(path, root), os.path.getsize(path) if os.path.exists(path) else 0) for path in files]
