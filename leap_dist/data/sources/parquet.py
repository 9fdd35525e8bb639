"""Parquet files with encoded images in a column, in the layout of the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from leap_dist.data.sources.images import SPLITS, WHOLE, Images
from leap_dist.errors import UserError

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
# A row group is read whole or not at all, so images are shuffled within sets of row groups: four shards' worth each.
WINDOW_BYTES = 1 << 28


@dataclass(frozen=True, kw_only=True)
class Rows(Images):
    """Rows of parquet files: image i is row rows[i] of the row group `places[groups[i]]` (file, number there)."""

    places: list[tuple[Path, int]]
    column: str
    groups: np.ndarray
    rows: np.ndarray

    def reader(self, numbers: Sequence[int]) -> Callable[[int], bytes]:
        """See Images. Every row group is read once, and only what is wanted of it is kept."""
        wanted = np.asarray(numbers)
        kept = {}
        for group in np.unique(self.groups[wanted]):
            path, place = self.places[group]
            column = _opened(path, partial(_read_column, place, self.column))
            for number in wanted[self.groups[wanted] == group].tolist():
                value = column[int(self.rows[number])].as_py()
                kept[number] = value["bytes"] if isinstance(value, dict) else value
        return kept.__getitem__


def open_parquet(folder: Path, files: Sequence[Path]) -> dict[str, Images]:
    """`files` under `folder`, the split in a file's name (train-00000-of-00294.parquet) or in that of its folder."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise UserError(f"{folder}: reading parquet needs pyarrow: pip install pyarrow") from None
    splits: dict[str, list[Path]] = {}
    for path in files:
        names = [name for name in (path.stem.split("-")[0], path.parent.name) if name in SPLITS]
        splits.setdefault(SPLITS[names[0]] if names else WHOLE, []).append(path)
    if WHOLE in splits and len(splits) > 1:
        raise UserError(f"{splits[WHOLE][0]}: neither its name nor its folder's says which split it belongs to")
    return {split: _open_split(folder, paths) for split, paths in splits.items()}


def _open_split(folder: Path, paths: list[Path]) -> Rows:
    image, label, classes = _columns(paths[0])
    labels, names, places, counts, weights = [], [], [], [], []
    for path in paths:
        column, groups = _read_labels(path, label)
        labels.append(column)
        names += [f"{path.relative_to(folder)}:{i}" for i in range(len(column))]
        places += [(path, i) for i in range(len(groups))]
        counts += [rows for rows, _ in groups]
        weights += [size for _, size in groups]
    counts, weights, labels = np.array(counts), np.array(weights), np.concatenate(labels)
    groups = np.repeat(np.arange(len(counts)), counts)
    return Rows(
        classes=classes or [str(i) for i in range(labels.max(initial=-1) + 1)],
        names=names,
        labels=labels,
        sizes=(weights // np.maximum(counts, 1))[groups],
        windows=_windows(weights)[groups],
        places=places,
        column=image,
        groups=groups,
        rows=np.arange(len(groups)) - (np.cumsum(counts) - counts)[groups],
    )


def _columns(path: Path) -> tuple[str, str, list[str]]:
    """Names of the columns of images and labels, and the classes if the file's metadata has them."""
    schema = _opened(path, lambda file: file.schema_arrow)
    chosen = []
    for candidates in (IMAGE_COLUMNS, LABEL_COLUMNS):
        found = [name for name in candidates if name in schema.names]
        if not found:
            raise UserError(f"{path}: a column {' or '.join(candidates)} is needed; it has {', '.join(schema.names)}")
        chosen.append(found[0])
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return chosen[0], chosen[1], features.get(chosen[1], {}).get("names", [])


def _read_labels(path: Path, label: str) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """All labels of a file, and (rows, bytes) of each of its row groups."""
    column = _opened(path, lambda file: file.read(columns=[label], use_threads=False)[label].to_numpy())
    if not np.issubdtype(column.dtype, np.integer):
        raise UserError(f"{path}: column {label!r} should hold integers, without gaps; it reads as {column.dtype}")
    metadata = _opened(path, lambda file: file.metadata)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    return column, [(group.num_rows, group.total_byte_size) for group in groups]


def _opened(path: Path, use: Callable[[Any], Any]) -> Any:
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
