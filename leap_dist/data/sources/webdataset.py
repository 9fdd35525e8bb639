"""WebDataset: tars of samples whose files have one name and say by its end what they are, `key.jpg` and `key.cls`.

Tars are read from the first byte to the last, and nothing is unpacked. Of a member's name only the key and the end are
used; only regular files are read. What is damaged loses the rest of its tar and no more.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn, Optional, Union

from leap_dist.data.names import printable
from leap_dist.data.sources.images import WHOLE, split_of
from leap_dist.data.sources.streams import Lost, Piece, Sample, Stream, alike, grouped, named_classes
from leap_dist.data.sources.walk import EXTENSIONS, HIDDEN, NO_EXTENSION, SPECIAL, is_hidden
from leap_dist.errors import UserError

MOST_IMAGE_BYTES = 512 << 20
MOST_LABEL_BYTES = 1 << 20  # of a .cls or .json
MOST_HEADER_BYTES = 1 << 20  # of one member, long names and the like included
LABELS = ("cls", "json")
READ_BYTES = 1 << 20  # at a time: tars lie on network file systems
LOOKED_AT = 100  # samples of a split's first tar, for labels
NUMBER = re.compile(r"[+-]?\d{1,18}")


class Member(NamedTuple):
    """A regular file of a tar. content: its bytes, None if it is not wanted; fault: why it cannot be had."""

    key: str
    end: str
    content: Optional[bytes]
    fault: str


@dataclass(frozen=True, kw_only=True)
class Tars(Stream):
    """WebDataset tars. files: split -> (path relative to `folder`, bytes) of each, sorted."""

    folder: Path
    files: Mapping[str, list[tuple[str, int]]]

    def samples(self, piece: Piece, left_out: Counter[str]) -> Iterator[Union[Sample, Lost]]:
        """See Stream."""
        for number in piece.content:
            name, size = self.files[piece.split][number]
            yield from read_tar(self.folder / name, name, size, left_out)

    def digest(self, split: str) -> str:
        """See Stream."""
        lines = (f"{size} {name}\n".encode(errors="surrogateescape") for name, size in self.files[split])
        digest = hashlib.sha256()
        for line in lines:
            digest.update(line)
        return digest.hexdigest()

    def describe(self, split: str) -> str:
        """See Stream."""
        files = self.files[split]
        return f"{len(files)} tars of {sum(size for _, size in files) / 1e9:.1f} GB"


def tar_files(folder: Path) -> list[Path]:
    """Tars in `folder` and up to three folders below."""
    found = [path for depth in range(4) for path in folder.glob("*/" * depth + "*.tar")]
    visible = (path for path in found if not any(map(is_hidden, path.relative_to(folder).parts)))
    return sorted(path for path in visible if path.is_file())


def open_tars(folder: Path, paths: list[Path], piece_bytes: int) -> Tars:
    """`paths`, which lie in `folder`; the split is a word of a tar's name, or the name of its folder.

    piece_bytes: how many bytes of tars one process reads at a time, at least. UserError if the split of a tar is not
    said, or splits differ in whether they have labels.
    """
    files: dict[str, list[tuple[str, int]]] = {}
    for path in paths:
        files.setdefault(_split(path.relative_to(folder)), []).append(
            (str(path.relative_to(folder)), path.stat().st_size)
        )
    if WHOLE in files and len(files) > 1:
        raise UserError(f"{folder / files[WHOLE][0][0]}: neither its name nor its folder's says which split it is of")
    labelled = alike(folder, {split: _has_labels(folder, tars) for split, tars in files.items()})
    pieces = [piece for split in labelled for piece in grouped(split, [size for _, size in files[split]], piece_bytes)]
    return Tars(
        unit="B", pieces=pieces, classes=named_classes(folder), labelled=labelled, folder=folder, files=files
    )  # fmt: skip


def _split(path: Path) -> str:
    """imagenet1k-train-0000.tar, train/0000.tar, ..."""
    words = [*re.split(r"[-_.]", path.stem), *reversed(path.parent.parts)]
    return next(filter(None, map(split_of, words)), WHOLE)


def _has_labels(folder: Path, tars: list[tuple[str, int]]) -> bool:
    """Whether one of the first samples of a split has a label."""
    name, size = tars[0]
    found = (found for found in read_tar(folder / name, name, size, Counter()) if isinstance(found, Sample))
    return any(sample.label is not None for sample in itertools.islice(found, LOOKED_AT))


def read_tar(path: Path, name: str, size: int, left_out: Counter[str]) -> Iterator[Union[Sample, Lost]]:
    """The samples of a tar of `size` bytes, which reports call `name`; see Stream. UserError if it is another one."""
    images = 0
    with _open_regular(path) as file:
        if os.fstat(file.fileno()).st_size != size:
            raise UserError(f"{path} has changed since it was listed: give what was begun with, or name a new folder")
        walk = _Walk(file, left_out)
        for key, members in itertools.groupby(walk, key=lambda member: member.key):
            sample = _sample(f"{name}/{printable(key)}", list(members), left_out)
            if sample is not None:
                images += 1
                yield sample
    if walk.fault:
        share = max(size - walk.at, 0) / max(walk.at, 1)
        yield Lost(
            name, f"{walk.fault} at byte {walk.at} of {size}; what follows is lost", max(1, round(images * share))
        )


def _open_regular(path: Path) -> IO[bytes]:
    """Without waiting for the writer of a pipe."""
    try:
        return open(path, "rb", READ_BYTES, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _sample(name: str, members: list[Member], left_out: Counter[str]) -> Optional[Sample]:
    """What the members of one key are; None if no image is among them."""
    images = [member for member in members if f".{member.end}" in EXTENSIONS]
    for member in images[1:]:
        left_out[f"second images of a sample, .{member.end}"] += 1
    if not images:
        left_out["samples without an image"] += 1
        return None
    return Sample(name, _label(members), _reader(images[0]))


def _reader(member: Member) -> Callable[[], bytes]:
    def refused() -> NoReturn:
        raise ValueError(member.fault)

    return refused if member.content is None else lambda: member.content


def _label(members: list[Member]) -> Union[int, str, None]:
    """What .cls says, or `label` in .json: a number or the name of a class."""
    contents = {member.end: member.content for member in members if member.content is not None}
    if "cls" in contents:
        return _number(contents["cls"].decode(errors="replace").strip())
    try:
        about = json.loads(contents.get("json", b"null"))
    except (ValueError, RecursionError):
        return None
    value = about.get("label") if isinstance(about, dict) else None
    if isinstance(value, str):
        return _number(value.strip())
    return value if type(value) is int else None


def _number(text: str) -> Union[int, str, None]:
    return int(text) if NUMBER.fullmatch(text) else text or None


class _Walk:
    """The regular files of an open tar, one after the other. After the last one, `fault` says what ended it early.

    Of the files of one key only the first image is read, and the first of each other kind. at: the byte it has come to.
    """

    def __init__(self, file: IO[bytes], left_out: Counter[str]) -> None:
        self._file, self._left_out = file, left_out
        self._key, self._had = "", set[str]()
        self.at, self.fault = 0, ""

    def __iter__(self) -> Iterator[Member]:
        headers = _Headers(self._file)
        tar = None
        while True:
            headers.left = MOST_HEADER_BYTES
            try:
                tar = tarfile.TarFile(fileobj=headers) if tar is None else tar
                entry = tar.next()
            except Exception as error:  # tarfile has no common base for what a strange file raises
                self.fault = "cut" if "end of data" in str(error) else f"no tar ({printable(str(error))[:100]})"
                return
            if entry is None:
                self.fault = self._how_it_ended(tar.offset)
                return
            tar.members.clear()  # which tarfile keeps for a second look
            if entry.size < 0 or tar.offset <= self.at:
                self.fault = "no tar (a header leads backwards)"
                return
            self.at = tar.offset
            if member := self._member(entry):
                yield member

    def _how_it_ended(self, at: int) -> str:
        """tarfile takes the first block that is no header for the end."""
        self._file.seek(at)
        block = self._file.read(tarfile.BLOCKSIZE)
        self.at = at
        if len(block) < tarfile.BLOCKSIZE:
            return "no mark of the end, so it may be cut"
        return "no header" if any(block) else ""

    def _member(self, entry: tarfile.TarInfo) -> Optional[Member]:
        """What is wanted of an entry; None, and counted, if it is not."""
        folder, slash, base = entry.name.rpartition("/")
        stem, dot, end = base.partition(".")
        key, end = folder + slash + stem, end.lower()
        if entry.isdir():
            return None
        if is_hidden(base) or not entry.isreg():
            self._left_out[HIDDEN if is_hidden(base) else f"links, {SPECIAL}"] += 1
            return None
        kind = "image" if f".{end}" in EXTENSIONS else end
        if kind not in ("image", *LABELS):
            if kind != "txt":  # the caption
                self._left_out[_kind(end) if dot else NO_EXTENSION] += 1
            return Member(key, end, None, "")
        return self._read(entry, key, end, kind)

    def _read(self, entry: tarfile.TarInfo, key: str, end: str, kind: str) -> Member:
        if key != self._key:
            self._key, self._had = key, set()
        if kind in self._had:
            return Member(key, end, None, "")
        self._had.add(kind)
        most = MOST_IMAGE_BYTES if kind == "image" else MOST_LABEL_BYTES
        if entry.issparse():
            return Member(key, end, None, "a sparse file of a tar")
        if entry.size > most:
            return Member(key, end, None, f"has {entry.size} bytes, at most {most} are read")
        try:
            self._file.seek(entry.offset_data)
            content = self._file.read(entry.size)
        except OSError as error:
            return Member(key, end, None, f"cannot be read: {error.strerror}")
        whole = len(content) == entry.size
        return Member(key, end, content if whole else None, "its tar is cut")


def _kind(end: str) -> str:
    """What a file that is left out is counted as. For WebDataset `a.12.jpg` is the file `12.jpg` of the sample `a`."""
    *more, last = end.split(".")
    return f"{'names with several dots, ' if more else ''}.{printable(last[:10])}"


class _Headers:
    """A file as tarfile reads headers from it: of no member more than `left` bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.left = MOST_HEADER_BYTES
        self.name, self.mode = "", "rb"

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self.left:
            raise tarfile.ReadError(f"a header of more than {MOST_HEADER_BYTES} bytes")
        self.left -= size
        return self._file.read(size)

    def seek(self, *place: Any) -> int:
        return self._file.seek(*place)

    def tell(self) -> int:
        return self._file.tell()
