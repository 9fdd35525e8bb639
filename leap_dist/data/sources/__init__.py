"""Where images come from: class folders, the tars of ILSVRC2012, CIFAR's pickles, parquet. All are read in place."""

from __future__ import annotations

from pathlib import Path

from leap_dist.data.sources.cifar import cifar_folder, open_cifar
from leap_dist.data.sources.ilsvrc import has_tars, open_ilsvrc
from leap_dist.data.sources.images import WHOLE, Images, counted
from leap_dist.data.sources.layout import Layout
from leap_dist.data.sources.parquet import has_image_column, holds_paths, open_parquet, parquet_files, require_pyarrow
from leap_dist.data.sources.tree import open_tree
from leap_dist.data.sources.walk import holds_images
from leap_dist.errors import UserError

__all__ = ["WHOLE", "Images", "Layout", "counted", "open_source"]


def open_source(folder: Path, workers: int, layout: Layout = None) -> dict[str, Images]:
    """Split -> images of whatever kind `folder` holds, listed by `workers` processes; UserError if it holds none.

    The split is '.' where there are none. The tars of ILSVRC2012 are looked for first, then CIFAR's pickles, parquet
    files with images in the folder or up to three below, and class folders. layout: of class folders, see
    `layout.split_folders`.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    if has_tars(folder):
        return open_ilsvrc(folder, workers)
    pickles = cifar_folder(folder.resolve())
    if pickles:
        return open_cifar(pickles)
    tables = _tables(folder)
    return open_parquet(folder, tables) if tables else open_tree(folder, workers, layout)


def _tables(folder: Path) -> list[Path]:
    """The parquet files that images are to be read from. UserError where image files could be meant as well."""
    files = parquet_files(folder)
    if not files:
        return []
    require_pyarrow(folder)
    tables = [path for path in files if has_image_column(path)]
    if not holds_images(folder):
        return tables or files  # what they lack is said when they are opened
    if tables and not holds_paths(tables[0]):
        raise UserError(
            f"{folder}: holds both parquet files with images, such as {tables[0]}, and image files; name the folder of "
            "one of them"
        )
    return tables
