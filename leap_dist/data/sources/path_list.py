"""Parquet lists of image files that lie on a disk: a column `path`, and `label` if there is one."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Optional, Union

from leap_dist.data.names import printable
from leap_dist.data.sources.images import WHOLE
from leap_dist.data.sources.parquet import LABEL_COLUMNS, named_file, opened, parquet_files, require_pyarrow, split_name
from leap_dist.data.sources.streams import Lost, Piece, Sample, Stream, alike, named_classes
from leap_dist.errors import UserError
from leap_dist.runtime.files import read_regular

PATH = "path"
PIECE_ROWS = 4096  # four shards of 64 MiB if an image has 64 kB


class Table(NamedTuple):
    """A parquet file of a list. name: relative to the list's folder. groups: rows of each of its row groups."""

    name: str
    size: int
    label: Optional[str]
    groups: tuple[int, ...]


class _Rows(NamedTuple):
    """Some rows of one row group."""

    table: int
    group: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class PathList(Stream):
    """Image files that tables name. root: the folder that all of them lie in. tables: split -> its tables, sorted."""

    folder: Path
    root: Path
    tables: Mapping[str, list[Table]]

    def samples(self, piece: Piece, left_out: Counter[str]) -> Iterator[Union[Sample, Lost]]:
        """See Stream. UserError if a table names a file outside of `root`."""
        table, rows = self.tables[piece.split][piece.content.table], piece.content
        path = self.folder / table.name
        if path.stat().st_size != table.size:
            raise UserError(f"{path} has changed since it was listed: give what was begun with, or name a new folder")
        columns = opened(path, partial(_read_rows, rows, [PATH, *([table.label] if table.label else [])]))
        labels = columns[1] if table.label else [None] * len(columns[0])
        for row, (name, label) in enumerate(zip(columns[0], labels, strict=True), rows.start):
            if name is None:
                left_out["rows without a path"] += 1
                continue
            yield Sample(f"{table.name}:{rows.group}:{row} {printable(name[:500])}", label, self._reader(name))

    def _reader(self, name: str) -> Callable[[], bytes]:
        try:
            found = named_file(name, self.root, self.root, "; --root names the folder that they all lie in")
        except OSError as error:  # no name that a file can have
            return partial(_refuse, error)
        return partial(read_regular, found)

    def digest(self, split: str) -> str:
        """See Stream."""
        return hashlib.sha256(repr(self.tables[split]).encode(errors="surrogateescape")).hexdigest()

    def describe(self, split: str) -> str:
        """See Stream."""
        tables = self.tables[split]
        return f"{sum(sum(table.groups) for table in tables)} paths in {len(tables)} tables"


def _refuse(error: OSError) -> NoReturn:
    raise error


def is_path_list(path: Path) -> bool:
    """Whether a parquet file has a column of paths. UserError if it cannot be read."""
    return PATH in opened(path, lambda file: file.schema_arrow).names


def open_path_list(source: Path, root: Optional[Path]) -> PathList:
    """The table `source`, or all tables in that folder and up to three below.

    root: what paths are relative to, and where all files must lie; None: the folder of the list. UserError if a table
    has no such column, splits differ in whether they have labels, or labels are no integers.
    """
    folder = source if source.is_dir() else source.parent
    paths = parquet_files(source) if source.is_dir() else [source]
    require_pyarrow(source)
    if not paths:
        raise UserError(f"{source}: holds no parquet file, though --root is about a list of paths in one")
    tables: dict[str, list[Table]] = {}
    for path in paths:
        tables.setdefault(split_name(path) or WHOLE, []).append(_table(folder, path))
    if WHOLE in tables and len(tables) > 1:
        raise UserError(
            f"{folder / tables[WHOLE][0].name}: neither its name nor its folder's says which split it is of"
        )
    for same in tables.values():
        other = next((table for table in same if table.label != same[0].label), None)
        if other:
            raise UserError(f"{folder / other.name}: its labels are not where those of {folder / same[0].name} are")
    labelled = alike(folder, {split: same[0].label is not None for split, same in tables.items()})
    pieces = [piece for split in labelled for piece in _pieces(split, tables[split])]
    return PathList(
        unit="image", pieces=pieces, classes=named_classes(folder), labelled=labelled, folder=folder,
        root=root or folder, tables=tables,
    )  # fmt: skip


def _table(folder: Path, path: Path) -> Table:
    from pyarrow import types

    schema, metadata = opened(path, lambda file: (file.schema_arrow, file.metadata))
    if PATH not in schema.names:
        raise UserError(f"{path}: a column {PATH} is needed; it has {printable(', '.join(schema.names))}")
    kind = schema.field(PATH).type
    if not (types.is_string(kind) or types.is_large_string(kind)):
        raise UserError(f"{path}: column {PATH!r} should hold text; it holds {kind}")
    label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    if label and not types.is_integer(schema.field(label).type):
        raise UserError(
            f"{path}: column {label!r} should hold integers, numbers of classes; it holds {schema.field(label).type}"
        )
    groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    return Table(str(path.relative_to(folder)), path.stat().st_size, label, groups)


def _pieces(split: str, tables: Sequence[Table]) -> list[Piece]:
    rows = [
        _Rows(number, group, start, stop)
        for number, table in enumerate(tables)
        for group, count in enumerate(table.groups)
        for start, stop in pairwise([*range(0, count, PIECE_ROWS), count])
    ]
    return [Piece(split, number, part.stop - part.start, part) for number, part in enumerate(rows)]


def _read_rows(rows: _Rows, names: list[str], file: Any) -> list[list[Any]]:
    """The columns `names` of `rows`; no more of a row group than PIECE_ROWS is in memory at a time."""
    columns: list[list[Any]] = [[] for _ in names]
    at = 0
    for batch in file.iter_batches(PIECE_ROWS, row_groups=[rows.group], columns=names, use_threads=False):
        part = batch.slice(
            max(rows.start - at, 0), max(min(rows.stop - at, batch.num_rows) - max(rows.start - at, 0), 0)
        )
        for column, name in zip(columns, names, strict=True):
            column += part.column(name).to_pylist()
        at += batch.num_rows
        if at >= rows.stop:
            break
    return columns
