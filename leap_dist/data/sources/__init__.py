"""Where images come from: class folders, the tars of ILSVRC2012, CIFAR's pickles, parquet. All are read in place."""

from __future__ import annotations

from pathlib import Path

from leap_dist.data.sources.cifar import cifar_folder, open_cifar
from leap_dist.data.sources.ilsvrc import has_tars, open_ilsvrc
from leap_dist.data.sources.images import WHOLE, Images
from leap_dist.data.sources.parquet import open_parquet
from leap_dist.data.sources.tree import open_tree
from leap_dist.errors import UserError

__all__ = ["WHOLE", "Images", "open_source"]


def open_source(folder: Path, workers: int) -> dict[str, Images]:
    """Split -> images of whatever kind `folder` holds, listed by `workers` processes; UserError if it holds none.

    The split is '.' where there are none. The tars of ILSVRC2012 are looked for first, then CIFAR's pickles, parquet
    files in the folder or one below, and class folders.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    if has_tars(folder):
        return open_ilsvrc(folder, workers)
    pickles = cifar_folder(folder.resolve())
    if pickles:
        return open_cifar(pickles)
    files = sorted([*folder.glob("*.parquet"), *folder.glob("*/*.parquet")])
    return open_parquet(folder, files) if files else open_tree(folder, workers)
