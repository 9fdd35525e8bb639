"""Parquet files with encoded images in a column, in the layout of the Hugging Face hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np

from leap_dist.data.classes import MOST_CLASSES, UNLABELLED
from leap_dist.data.names import printable
from leap_dist.data.sources.images import WHOLE, Images, split_of
from leap_dist.data.sources.walk import is_hidden, size_of
from leap_dist.errors import UserError
from leap_dist.runtime.files import read_regular

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
# A row group is read whole or not at all, so images are shuffled within sets of row groups: four shards' worth each.
WINDOW_BYTES = 1 << 28


class _Columns(NamedTuple):
    """image, label: names. classes: those that the file's metadata names. is_path: images are paths of files."""

    image: str
    label: str
    classes: list[str]
    is_path: bool


@dataclass(frozen=True, kw_only=True)
class Rows(Images):
    """Rows of parquet files: image i is row rows[i] of the row group `places[groups[i]]` (file, number there).

    root: what paths of images may be relative to, beside the folder of their parquet file.
    """

    root: Path
    places: list[tuple[Path, int]]
    column: str
    groups: np.ndarray
    rows: np.ndarray

    def reader(self, numbers: Sequence[int]) -> Callable[[int], bytes]:
        """See Images. Every row group is read once, and only what is wanted of it is kept."""
        wanted = np.asarray(numbers)
        kept: dict[int, bytes | Path] = {}
        for group in np.unique(self.groups[wanted]):
            path, place = self.places[group]
            column = opened(path, partial(_read_column, place, self.column))
            for number in wanted[self.groups[wanted] == group].tolist():
                kept[number] = _content(column[int(self.rows[number])].as_py(), path.parent, self.root)

        def read(number: int) -> bytes:
            content = kept[number]
            return read_regular(content) if isinstance(content, Path) else content

        return read


def _content(value: Any, beside: Path, root: Path) -> bytes | Path:
    """What a cell holds: bytes, or the file that it names, beside its parquet file or in `root`."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if not isinstance(value, str):
        return value if value is not None else b""
    return named_file(value, beside, root)


def named_file(name: str, beside: Path, root: Path, hint: str = "") -> Path:
    """The file that a table in the folder `beside` names, there or in `root`, whether it is there or not.

    UserError, with `hint`, if it lies elsewhere: a table from the net may not name a file of one's own.
    """
    found = next((folder / name for folder in (beside, root) if (folder / name).is_file()), root / name)
    if not Path(os.path.abspath(found)).is_relative_to(os.path.abspath(root)) or "\0" in name:
        raise UserError(f"{beside}: a table names the image {printable(name[:200])}, which is not in {root}{hint}")
    return found


def parquet_files(folder: Path) -> list[Path]:
    """Parquet files in `folder` and up to three folders below, as the Hub lays them out."""
    found = [path for depth in range(4) for path in folder.glob("*/" * depth + "*.parquet")]
    visible = (path for path in found if not any(map(is_hidden, path.relative_to(folder).parts)))
    return sorted(path for path in visible if path.is_file())


def open_parquet(folder: Path, files: Sequence[Path]) -> dict[str, Images]:
    """`files` under `folder`, the split in a file's name (train-00000-of-00294.parquet) or in that of its folder."""
    require_pyarrow(folder)
    splits: dict[str, list[Path]] = {}
    for path in files:
        splits.setdefault(split_name(path) or WHOLE, []).append(path)
    if WHOLE in splits and len(splits) > 1:
        raise UserError(f"{splits[WHOLE][0]}: neither its name nor its folder's says which split it belongs to")
    for split, paths in splits.items():
        homes = sorted({path.parent.parent if split_of(path.parent.name) else path.parent for path in paths})
        if len(homes) > 1 and split != WHOLE:
            raise UserError(
                f"{folder}: split {split!r} lies in {len(homes)} folders, such as {homes[0]} and {homes[1]}; name one "
                "of these folders"
            )
    return _numbered({split: _open_split(folder, paths) for split, paths in splits.items()})


def require_pyarrow(folder: Path) -> None:
    """UserError if the package is not there."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise UserError(f"{folder}: reading parquet needs pyarrow: pip install pyarrow") from None


def has_image_column(path: Path) -> bool:
    """Whether a parquet file has one. UserError if it cannot be read."""
    return bool(set(IMAGE_COLUMNS) & set(opened(path, lambda file: file.schema_arrow).names))


def holds_paths(path: Path) -> bool:
    """Whether the images of a parquet file are named rather than in it."""
    return _columns(path).is_path


def split_name(path: Path) -> Optional[str]:
    """The split that a file belongs to, by its name or its folder's; None if neither says."""
    return split_of(re.split(r"[-_.\d]", path.stem)[0]) or split_of(path.parent.name)


def _numbered(splits: dict[str, Rows]) -> dict[str, Images]:
    """The same; where no file names the classes, all splits have as many as their labels number together."""
    most = max(int(images.labels.max(initial=-1)) for images in splits.values())
    if any(not images.classes for images in splits.values()) and most >= MOST_CLASSES:
        raise UserError(f"column of labels: {most} is no number of a class, and no class has a name")
    numbers = [str(i) for i in range(min(most, MOST_CLASSES) + 1)]
    return {split: images if images.classes else replace(images, classes=numbers) for split, images in splits.items()}


def _open_split(folder: Path, paths: list[Path]) -> Rows:
    columns = _columns(paths[0])
    labels, names, places, counts, sizes, weights = [], [], [], [], [], []
    for path in paths:
        if _columns(path) != columns:
            raise UserError(
                f"{path}: its columns or the names of its classes are others than those of {paths[0]}, of the same "
                "split; make both files alike"
            )
        column, groups = _read_labels(path, columns.label)
        labels.append(column)
        names += [f"{path.relative_to(folder)}:{i}" for i in range(len(column))]
        places += [(path, i) for i in range(len(groups))]
        counts += [rows for rows, _ in groups]
        weights += [size for _, size in groups]
        sizes.append(_sizes(path, columns, folder, groups))
    counts, weights, labels = np.array(counts), np.array(weights), np.concatenate(labels)
    groups = np.repeat(np.arange(len(counts)), counts)
    return Rows(
        root=folder,
        classes=columns.classes,
        names=names,
        labels=labels,
        sizes=np.concatenate(sizes),
        windows=_windows(weights)[groups],
        places=places,
        column=columns.image,
        groups=groups,
        rows=np.arange(len(groups)) - (np.cumsum(counts) - counts)[groups],
    )


def _sizes(path: Path, columns: _Columns, root: Path, groups: list[tuple[int, int]]) -> np.ndarray:
    """Bytes of every image of a file: of those it names their own, of those in it the mean of their row group."""
    if not columns.is_path:
        rows, weights = np.array(groups, dtype=np.int64).reshape(-1, 2).T
        return np.repeat(weights // np.maximum(rows, 1), rows)
    cells = opened(path, lambda file: file.read(columns=[columns.image], use_threads=False)[0]).to_pylist()
    contents = [_content(cell, path.parent, root) for cell in cells]
    return np.array([size_of(found) if isinstance(found, Path) else len(found) for found in contents], np.int64)


def _columns(path: Path) -> _Columns:
    """Which columns of a file are images and labels, and of what kind."""
    schema = opened(path, lambda file: file.schema_arrow)
    chosen = []
    for candidates in (IMAGE_COLUMNS, LABEL_COLUMNS):
        found = [name for name in candidates if name in schema.names]
        if not found:
            raise UserError(f"{path}: a column {' or '.join(candidates)} is needed; it has {', '.join(schema.names)}")
        chosen.append(found[0])
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    classes = features.get(chosen[1], {}).get("names", [])
    return _Columns(chosen[0], chosen[1], classes, _is_path(path, chosen[0], schema.field(chosen[0]).type))


def _is_path(path: Path, image: str, kind: Any) -> bool:
    """Whether a column of this type holds paths. UserError if it holds neither those nor bytes."""
    from pyarrow import types

    if types.is_binary(kind) or types.is_large_binary(kind):
        return False
    if types.is_string(kind) or types.is_large_string(kind):
        return True
    fields = [field.name for field in kind] if types.is_struct(kind) else []
    if not {"bytes", "path"} & set(fields):
        raise UserError(f"{path}: column {image!r} should hold bytes, paths or {{bytes, path}}; it holds {kind}")
    return "bytes" not in fields or opened(path, partial(_all_null, f"{image}.bytes"))


def _all_null(leaf: str, file: Any) -> bool:
    """Whether statistics say that a nested column holds nothing."""
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    found = [chunk.statistics for chunk in chunks if chunk.path_in_schema == leaf]
    return bool(found) and all(s is not None and s.has_null_count and s.num_values == 0 for s in found)


def _read_labels(path: Path, label: str) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """All labels of a file, -1 where there is none, and (rows, bytes) of each of its row groups."""
    from pyarrow import types

    column = opened(path, lambda file: file.read(columns=[label], use_threads=False)[label])
    if not types.is_integer(column.type):
        raise UserError(f"{path}: column {label!r} should hold integers, numbers of classes; it holds {column.type}")
    if types.is_unsigned_integer(column.type):  # beyond int64 there is no class either
        column = column.cast("int64", safe=False)
    metadata = opened(path, lambda file: file.metadata)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    numbers = column.cast("int64").fill_null(UNLABELLED).to_numpy()
    return numbers, [(group.num_rows, group.total_byte_size) for group in groups]


def opened(path: Path, use: Callable[[Any], Any]) -> Any:
    """What `use` makes of a parquet file. UserError if it cannot be read."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            return use(file)
    except (ArrowException, OSError, KeyError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None


def _read_column(place: int, name: str, file: Any) -> Any:
    return file.read_row_group(place, columns=[name], use_threads=False)[0].combine_chunks()


def _windows(weights: np.ndarray) -> np.ndarray:
    """The window of every row group: groups in a fixed shuffled order, cut at every WINDOW_BYTES of `weights`."""
    order = np.random.RandomState(0).permutation(len(weights))
    windows = np.empty(len(weights), dtype=np.int64)
    windows[order] = (np.cumsum(weights[order]) - weights[order]) // WINDOW_BYTES
    return windows
