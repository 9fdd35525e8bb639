"""Which folders of a tree are splits and which are classes: as their names say, or asked where these may mislead."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Optional

from leap_dist.data.names import printable
from leap_dist.data.sources.images import split_of
from leap_dist.data.sources.walk import holds_images, sort_out, visible_folders
from leap_dist.errors import UserError

Layout = Optional[Literal["splits", "classes"]]  # what the user says; None: as the names say
KAGGLE = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")  # where Kaggle's copy of ILSVRC has train, val and test
# A split by another name than those of SPLITS: train2012, val_set, test-images, dev.
_TRAIN, _JUDGED = r"train(ing)?", r"(val(id(ation)?)?|test(ing)?|eval(uation)?|dev)"
_MORE = r"[-_. ]?(set|split|data|images|imgs|\d+)?"
LIKE_TRAIN, LIKE_JUDGED = (re.compile(word + _MORE, re.IGNORECASE) for word in (_TRAIN, _JUDGED))
# The same at the end of a longer name, imagenet_val: where all folders are named so, few mean classes.
LIKE_SPLIT = re.compile(rf"(.*[-_. ])?({_TRAIN}|{_JUDGED}){_MORE}", re.IGNORECASE)
DEPTH = 4  # of folders with a single folder in them, as unpacking an archive leaves


def root_of(folder: Path) -> Path:
    """The folder in or below `folder` that holds the splits: `folder` itself, unless it only wraps them."""
    for inside in KAGGLE:
        if (folder / inside).is_dir():
            return folder / inside
    place = folder
    for _ in range(DEPTH):
        names = visible_folders(place)
        if {"train", "val"} & {split_of(name) for name in names}:
            return place
        if len(names) != 1 or _has_images(place):
            break
        place = place / names[0]
    return folder


def split_folders(folder: Path, layout: Layout = None) -> dict[str, str]:
    """Split -> name of its folder in `folder`, in the order train, val, test; empty if its folders are classes.

    UserError where folders that are named as splits lie beside others with images, where neither train nor val is among
    them (a class may be called Test, or train), where two are the same split, where all look like splits under other
    names, and where they lie inside the classes: `--layout` answers.
    """
    names = visible_folders(folder)
    found: dict[str, list[str]] = {split: [] for split in ("train", "val", "test")}
    for name in names if layout != "classes" else ():
        if split_of(name):
            found[split_of(name)].append(name)
    found = {split: same for split, same in found.items() if same}
    if not found:
        if layout == "splits":
            raise UserError(f"{folder}: --layout splits, but no folder in it is named train, val or test")
        if layout is None and names and all(_has_splits(folder / name) for name in names):
            raise UserError(
                f"{folder}: {_listed(names)} hold folders named as splits; put the classes into the splits, or say "
                "--layout classes, which takes all splits of a class together"
            )
        if layout is None and (like := _like_splits(names)):
            raise UserError(
                f"{folder}: {_listed(like)} look like splits; rename them to train, val or test, or say "
                "--layout classes if these are names of classes"
            )
        return {}
    for split, same in found.items():
        if len(same) > 1:
            raise UserError(
                f"{folder}: {_listed(same)} would both be the split {split!r}; put them together, rename one, or say "
                "--layout classes if these are names of classes"
            )
    named = [name for same in found.values() for name in same]
    others = other_folders(folder, named) if layout is None else []
    if layout is None and (others or not found.keys() & {"train", "val"}):
        beside = f", but {_listed(others)} lie beside" if others else ""
        raise UserError(
            f"{folder}: {_listed(named)} may be splits or classes by name{beside}; say --layout splits, which leaves "
            "out what is no split, or --layout classes"
        )
    return {split: same[0] for split, same in found.items()}


def _like_splits(names: list[str]) -> list[str]:
    """Those of `names` that seem to be splits: all of several, or one to train on and one to judge by among others."""
    if len(names) > 1 and all(LIKE_SPLIT.fullmatch(name) for name in names):
        return names
    train, judged = ([name for name in names if kind.fullmatch(name)] for kind in (LIKE_TRAIN, LIKE_JUDGED))
    return [*train, *judged] if train and judged else []


def other_folders(folder: Path, named: list[str]) -> list[str]:
    """Folders with images in them beside those that are `named`."""
    return [name for name in visible_folders(folder) if name not in named and holds_images(folder / name)]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(printable(name) for name in names[:3]) + more


def _has_splits(folder: Path) -> bool:
    return any(split_of(name) for name in visible_folders(folder))


def _has_images(folder: Path) -> bool:
    return bool(sort_out(folder, (path.name for path in folder.iterdir() if not path.is_dir()))[0])
