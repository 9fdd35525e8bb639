"""Kaggle's copy of ILSVRC: validation images in one folder, their classes in a table."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Optional

import numpy as np

from leap_dist.data.sources.files import Files
from leap_dist.data.sources.images import Images
from leap_dist.data.sources.walk import visible_folders, walk
from leap_dist.errors import UserError

TRUTH = "LOC_val_solution.csv"  # ImageId,PredictionString: the string begins with the wnid of the first box


def labelled_val(source: Path, folder: Path) -> Optional[Images]:
    """The images of `folder`, which has no class folders, with classes from the table in `source`; None if none is."""
    if visible_folders(folder) or not (source / TRUTH).is_file():
        return None
    with open(source / TRUTH, newline="", encoding="utf-8") as file:
        wnids = {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
    found = walk(folder)
    paths = [Path(path) for path, _ in found.files]
    unknown = [path for path in paths if path.stem not in wnids]
    if unknown:
        raise UserError(f"{source / TRUTH}: says nothing of {unknown[0]} ({len(unknown)} such images)")
    classes = sorted(set(wnids.values()))
    index = {wnid: label for label, wnid in enumerate(classes)}
    return Files(
        root=source,
        classes=classes,
        names=[str(path.relative_to(source)) for path in paths],
        labels=np.array([index[wnids[path.stem]] for path in paths]),
        sizes=np.array([size for _, size in found.files]),
        left_out=found.left_out,
    )
