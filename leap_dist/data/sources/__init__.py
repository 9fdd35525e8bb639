"""Where images come from. All are read in place.

Class folders, the tars of ILSVRC2012, CIFAR's pickles and parquet with images are listed image by image, then read in
any order. WebDataset tars and lists of paths, which may have a billion images, are streams: read in their own order.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Optional

from leap_dist.data.sources.cifar import cifar_folder, open_cifar
from leap_dist.data.sources.ilsvrc import has_tars, open_ilsvrc
from leap_dist.data.sources.images import WHOLE, Images, counted
from leap_dist.data.sources.layout import Layout
from leap_dist.data.sources.parquet import has_image_column, holds_paths, open_parquet, parquet_files, require_pyarrow
from leap_dist.data.sources.path_list import is_path_list, open_path_list
from leap_dist.data.sources.streams import Lost, Piece, Sample, Stream
from leap_dist.data.sources.tree import open_tree
from leap_dist.data.sources.walk import holds_images
from leap_dist.data.sources.webdataset import open_tars, tar_files
from leap_dist.errors import UserError

__all__ = [
    "WHOLE", "Images", "Layout", "Lost", "Piece", "Sample", "Stream", "counted", "open_source", "open_stream",
]  # fmt: skip


def open_stream(source: Path, piece_bytes: int, root: Optional[Path] = None) -> Optional[Stream]:
    """WebDataset tars or parquet lists of paths in the folder `source`, or the one that it is; None if it is neither.

    What `open_source` knows goes before. piece_bytes: as of `open_tars`. root: where the files of a list lie; nothing
    else has one. UserError where both could be meant.
    """
    if root is not None or (source.is_file() and source.suffix == ".parquet"):
        return open_path_list(source, root)
    if source.is_file() and source.suffix == ".tar":
        return open_tars(source.parent, [source], piece_bytes)
    if not source.is_dir() or has_tars(source) or cifar_folder(source.resolve()):
        return None
    tars, tables = tar_files(source), parquet_files(source)
    if not (tars or tables) or holds_images(source):
        return None
    if not tars:
        require_pyarrow(source)
        return open_path_list(source, None) if is_path_list(tables[0]) and not has_image_column(tables[0]) else None
    if tables and find_spec("pyarrow") and has_image_column(tables[0]):  # those of img2dataset have none
        raise UserError(
            f"{source}: holds both tars, such as {tars[0]}, and parquet files with images, such as {tables[0]}; name "
            "the folder of one of them"
        )
    return open_tars(source, tars, piece_bytes)


def open_source(folder: Path, workers: int, layout: Layout = None, scratch: Optional[Path] = None) -> dict[str, Images]:
    """Split -> images of whatever kind `folder` holds, listed by `workers` processes; UserError if it holds none.

    The split is '.' where there are none. The tars of ILSVRC2012 are looked for first, then CIFAR's pickles, parquet
    files with images in the folder or up to three below, and class folders. layout: of class folders, see
    `layout.split_folders`. scratch: of class folders, see `tree.open_tree`.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    if has_tars(folder):
        return open_ilsvrc(folder, workers)
    pickles = cifar_folder(folder.resolve())
    if pickles:
        return open_cifar(pickles)
    tables = _tables(folder)
    return open_parquet(folder, tables) if tables else open_tree(folder, workers, layout, scratch)


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
