"""Class folders, numbered and ordered as by torchvision's ImageFolder; or one flat folder of images, one class."""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Optional

from leap_dist.data.names import printable
from leap_dist.data.parallel import parallel
from leap_dist.data.sources.files import Files
from leap_dist.data.sources.images import WHOLE, Images, counted
from leap_dist.data.sources.kaggle import TRUTH, labelled_val
from leap_dist.data.sources.layout import Layout, other_folders, root_of, split_folders
from leap_dist.data.sources.spool import Listing
from leap_dist.data.sources.walk import (
    HIDDEN,
    LINKS,
    Found,
    is_hidden,
    leads_back,
    size_of,
    sort_out,
    visible_folders,
    walk,
)
from leap_dist.errors import UserError

ONE_CLASS = "all"  # of a folder that has none

log = logging.getLogger(__name__)


def open_tree(folder: Path, workers: int, layout: Layout = None, scratch: Optional[Path] = None) -> dict[str, Images]:
    """`folder`/<split>/<class>/... or `folder`/<class>/..., listed by `workers` processes; images may also lie flat.

    A test set without class folders is left out: ImageNet's has no public labels. layout: see `split_folders`. scratch:
    whose disk holds the lists, see `spool.Spool`; what is in memory grows with the largest class, not with the set.
    """
    top = folder if layout == "classes" else root_of(folder)
    splits = split_folders(top, layout)
    if splits:
        _tell_of_loose(top, _loose_images(top), f"folders {', '.join(splits.values())}")
    others = other_folders(top, list(splits.values())) if splits else []
    if "test" in splits and not visible_folders(top / splits["test"]):
        log.warning("%s: left out, it has no class folders", top / splits.pop("test"))
    _check_alike(top, splits, folder)
    opened = {}
    for split, name in (splits or {WHOLE: WHOLE}).items():
        known = labelled_val(folder, top / name) if split == "val" else None
        opened[split] = known or _open_class_folders(folder, top / name, workers, Listing(scratch))
    return _with_others(opened, others)


def _check_alike(top: Path, splits: dict[str, str], source: Path) -> None:
    """UserError if one split has class folders and another just images, which nobody says the classes of."""
    flat = [split for split, name in splits.items() if not visible_folders(top / name)]
    unlabelled = [split for split in flat if split != "val" or not (source / TRUTH).is_file()]
    if unlabelled and len(flat) < len(splits):
        raise UserError(
            f"{top / splits[unlabelled[0]]}: images without class folders, which other splits have; put each into a "
            f"folder named as its class, or Kaggle's {TRUTH} into {source}, or name the folder of one split"
        )


def _with_others(opened: dict[str, Images], others: list[str]) -> dict[str, Images]:
    """The same; the first split says which folders beside the splits are left out."""
    first = next(iter(opened))
    left_out = {f"folder named {printable(name)}": 1 for name in others}
    return opened | {first: replace(opened[first], left_out={**opened[first].left_out, **left_out})}


def _open_class_folders(root: Path, folder: Path, workers: int, listing: Listing) -> Images:
    loose = _loose_images(folder)
    classes, left_out = _classes(folder)
    if not classes:
        if not loose:
            raise UserError(f"{folder}: holds neither images nor class folders")
        return _open_flat(root, folder, loose, left_out, listing)
    _tell_of_loose(folder, loose, "class folders")
    taken = [os.path.realpath(folder / name) for name in classes]
    inner: list[set[str]] = []  # of every class, the folders in it that its images lie in; "" for itself
    for label, found in enumerate(parallel(partial(_class_files, folder, taken), classes, workers)):
        home = folder / classes[label]
        inside = [path[len(str(home)) + 1 :] for path, _ in found.files]
        beginning = os.path.join(os.path.relpath(home, root), "")  # once: relpath takes longer than listing an image
        listing.add((beginning + path for path in inside), [size for _, size in found.files], label)
        inner.append({path.partition(os.sep)[0] if os.sep in path else "" for path in inside})
        left_out += found.left_out
    _tell_of_nested(folder, inner)
    return Files(root=root, classes=[printable(name) for name in classes], left_out=left_out, **listing.columns())


def _tell_of_nested(folder: Path, inner: list[set[str]]) -> None:
    """Say so where the classes may be one level further down: no image lies in a class folder itself."""
    names = sorted(set().union(*inner))
    if "" not in names and max(map(len, inner)) > 1:
        log.warning(
            "%s: all images lie in folders inside the class folders, such as %s, which are taken for no classes; "
            "if they are, put them together in one folder and name that",
            folder,
            ", ".join(map(printable, names[:3])),
        )


def _classes(folder: Path) -> tuple[list[str], Counter[str]]:
    """Names of the class folders, sorted, and what else lies in `folder`; loose images are for `_loose_images`.

    A link to a class folder, or to one that holds it, is no class of its own.
    """
    real = {os.path.realpath(folder / name) for name in visible_folders(folder) if not (folder / name).is_symlink()}
    names, left_out = [], Counter()
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if not path.is_dir():
            left_out += sort_out(folder, [path.name])[1]
        elif is_hidden(path.name):
            left_out[HIDDEN] += sum(len(files) for _, _, files in os.walk(path))
        elif path.is_symlink() and leads_back(os.path.realpath(path), real):
            left_out[LINKS] += 1
        else:
            names.append(path.name)
    return names, left_out


def _loose_images(folder: Path) -> list[Path]:
    """Images that lie in `folder` itself."""
    return [
        folder / name for name in sort_out(folder, (path.name for path in folder.iterdir() if not path.is_dir()))[0]
    ]


def _tell_of_loose(folder: Path, loose: list[Path], neighbours: str) -> None:
    if loose:
        log.warning("%s: left out %d images that lie beside the %s", folder, len(loose), neighbours)


def _open_flat(root: Path, folder: Path, paths: list[Path], left_out: Counter[str], listing: Listing) -> Images:
    """Images without classes: all of one."""
    log.warning("%s: no class folders; its %d images become the one class %r", folder, len(paths), ONE_CLASS)
    listing.add((os.path.relpath(path, root) for path in paths), [size_of(path) for path in paths], 0)
    return Files(root=root, classes=[ONE_CLASS], left_out=left_out, **listing.columns())


def _class_files(folder: Path, taken: list[str], name: str) -> Found:
    """Every image of a class, and what was left out. UserError if there is none."""
    found = walk(folder / name, taken)
    if not found.files:
        there = f" (there are {counted(found.left_out)})" if found.left_out else ""
        raise UserError(f"{folder}: no valid file for the classes {printable(name)}{there}; a class needs an image")
    return found
