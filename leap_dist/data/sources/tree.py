"""Class folders, as torchvision's ImageFolder reads them; or one flat folder of images, which is one class."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS as IMG
from torchvision.datasets.folder import find_classes, has_file_allowed_extension, make_dataset

from leap_dist.data.parallel import parallel
from leap_dist.data.sources.images import SPLITS, WHOLE, Images
from leap_dist.errors import UserError

ONE_CLASS = "all"  # of a folder that has none

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
    """`folder`/<split>/<class>/... or `folder`/<class>/..., listed by `workers` processes; images may also lie flat.

    A test set without class folders is left out: ImageNet's has no public labels.
    """
    splits = split_folders(folder)
    if splits:
        _tell_of_loose(folder, _loose_images(folder), f"folders {', '.join(splits.values())}")
    splits = splits or {WHOLE: WHOLE}
    if "test" in splits and not any(path.is_dir() for path in (folder / splits["test"]).iterdir()):
        log.warning("%s: left out, it has no class folders", folder / splits.pop("test"))
    return {split: _open_class_folders(folder, folder / name, workers) for split, name in splits.items()}


def _open_class_folders(root: Path, folder: Path, workers: int) -> Images:
    loose = _loose_images(folder)
    try:
        classes = find_classes(folder)[0]
    except FileNotFoundError:
        if not loose:
            raise UserError(f"{folder}: holds neither images nor class folders") from None
        return _open_flat(root, folder, loose)
    _tell_of_loose(folder, loose, "class folders")
    names, labels, sizes = [], [], []
    for label, files in enumerate(parallel(partial(_class_files, root, folder), classes, workers)):
        names += [name for name, _ in files]
        sizes += [size for _, size in files]
        labels += [label] * len(files)
    return Files(root=root, classes=classes, names=names, labels=np.array(labels), sizes=np.array(sizes))


def _loose_images(folder: Path) -> list[Path]:
    """Images that lie in `folder` itself."""
    return sorted(path for path in folder.iterdir() if path.is_file() and has_file_allowed_extension(path.name, IMG))


def _tell_of_loose(folder: Path, loose: list[Path], neighbours: str) -> None:
    if loose:
        log.warning("%s: left out %d images that lie beside the %s", folder, len(loose), neighbours)


def _open_flat(root: Path, folder: Path, paths: list[Path]) -> Images:
    """Images without classes: all of one."""
    log.warning("%s: no class folders; its %d images become the one class %r", folder, len(paths), ONE_CLASS)
    return Files(
        root=root,
        classes=[ONE_CLASS],
        names=[os.path.relpath(path, root) for path in paths],
        labels=np.zeros(len(paths), dtype=np.int64),
        sizes=np.array([path.stat().st_size for path in paths]),
    )


def _class_files(root: Path, folder: Path, name: str) -> list[tuple[str, int]]:
    """(path relative to `root`, size) of every image of a class. A link to nothing has size 0: reading will tell."""
    try:
        files = [path for path, _ in make_dataset(folder, {name: 0}, extensions=IMG)]
    except FileNotFoundError as error:
        raise UserError(f"{folder}: {' '.join(str(error).split())}") from None
    return [(os.path.relpath(path, root), os.path.getsize(path) if os.path.exists(path) else 0) for path in files]
