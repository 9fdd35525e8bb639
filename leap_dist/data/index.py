"""What index.json says of a set's shards, in arrays: a few dozen bytes for each, and no object.

The file is read piece by piece, so that an index of a gigabyte costs no more memory than its arrays. All that the
loader uses of it is checked here; the rest is stepped over.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, Optional

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from leap_dist.data.classes import CLASSES
from leap_dist.data.names import printable
from leap_dist.errors import UserError
from leap_dist.runtime.files import open_regular

INDEX = "index.json"
# streaming's encodings of the two columns that are read. None of them builds anything: bytes stay bytes, and an integer
# is one of NumPy's. Other columns may have any encoding, as nothing of them is decoded.
IMAGES = ("bytes", "jpeg", "png")
INTEGERS = {"int": "<i8"} | {
    f"{sign}int{bits}": f"<{sign or 'i'}{bits // 8}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}
COMPRESSIONS = re.compile(r"(br|bz2|gz|zstd)(:\d{1,2})?|snappy")
MOST_BYTES = 2**32  # of a shard: its own table has 32 bits for a place in it
MOST_SAMPLES = 2**40  # of a set
PIECE = 1 << 18  # bytes of the file that are read at a time
MOST_PENDING = 1 << 24  # bytes that may be read before an entry ends; one has some hundreds
PLAIN_NAME = re.compile(r"(?:[\w-][\w.-]{0,99}/){0,7}[\w-][\w.-]{0,99}\.mds(?:\.\w{1,6})?", re.ASCII)


@dataclass(frozen=True)
class Texts:
    """Many short texts in one buffer. ends: (N,) int64, where each ends in it."""

    buffer: bytes
    ends: NDArray[np.int64]

    def __getitem__(self, number: int) -> str:
        begin = int(self.ends[number - 1]) if number else 0
        return self.buffer[begin : int(self.ends[number])].decode("utf-8", "surrogatepass")


@dataclass(frozen=True)
class Files:
    """One file of each shard. sizes: (shards,) int64, bytes; hashes: of the one kind that was asked for, '' if absent;
    keys: (shards,) uint64, what `key_of_name` gives of each name. A shard without such a file has the name ''.
    """

    names: Texts
    sizes: NDArray[np.int64]
    hashes: Texts
    keys: NDArray[np.uint64]


class Columns(NamedTuple):
    """The columns of a shard, as streaming names them, and how its file is compressed."""

    names: tuple[str, ...]
    encodings: tuple[str, ...]
    sizes: tuple[Optional[int], ...]
    compression: Optional[str]


@dataclass(frozen=True)
class ShardIndex:
    """All shards of a set, in the order of their samples.

    samples: (shards,) int64; kinds: which of `columns` each has; packed: None where no shard is compressed;
    parents: the folders below the set's own that files lie in, '' for that one; hashed: the kinds of hash that every
    file to be fetched has; contents: a digest of every shard's size and hashes.
    """

    samples: NDArray[np.int64]
    kinds: NDArray[np.int32]
    columns: list[Columns]
    raw: Files
    packed: Optional[Files]
    parents: frozenset[str]
    hashed: frozenset[str]
    contents: str

    def __len__(self) -> int:
        return len(self.samples)

    def columns_of(self, shard: int) -> Columns:
        """The columns of a shard."""
        return self.columns[self.kinds[shard]]

    @property
    def compressed(self) -> NDArray[np.bool_]:
        """(shards,) whether each has a packed file, to be unpacked to its raw one."""
        if self.packed is None:
            return np.zeros(len(self), np.bool_)
        return np.diff(self.packed.names.ends, prepend=0) > 0

    def largest(self) -> int:
        """Bytes that the shard takes that takes most, with its archive while it is unpacked."""
        return int((self.raw.sizes + (0 if self.packed is None else self.packed.sizes)).max())

    def require_hash(self, name: str, source: str) -> None:
        """UserError unless every file of `source` has a hash of this name."""
        if name not in self.hashed:
            known = ", ".join(sorted(self.hashed)) or "none"
            raise UserError(f"data.validate_hash: {name!r} is not in the index of {source} (it has: {known})")


class NotAnIndex(UserError):
    """A file that is no index at all, or half of one."""


def key_of_name(name: bytes) -> int:
    """64 bits by which a file of an index is found in a listing of its folder."""
    return xxhash.xxh3_64_intdigest(name)


def read_index(folder: Path, keep_hash: Optional[str] = None) -> ShardIndex:
    """The shards listed by `folder`'s index, of which all that the loader uses has been checked.

    keep_hash: the kind of hash whose values are to be kept. UserError unless it lists samples with the columns the
    loader reads, in files of its own folder.
    """
    path = folder / INDEX
    try:
        about = path.stat()
        return _read(folder, keep_hash, (about.st_ino, about.st_mtime_ns, about.st_size))
    except FileNotFoundError:
        below = sorted(found.parent for found in folder.glob(f"*/{INDEX}"))
        hint = f"did you mean {' or '.join(map(str, below[:3]))}?" if below else "tools/make_shards.py makes one"
        raise UserError(f"{path} does not exist: a folder of MDS shards is expected; {hint}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise NotAnIndex(f"{path} is not a readable MDS index ({type(error).__name__}: {error!s:.200})") from None


@functools.lru_cache(maxsize=8)  # a run opens its sets several times
def _read(folder: Path, keep_hash: Optional[str], _stamp: tuple[int, ...]) -> ShardIndex:
    reading = _Reading(folder, keep_hash)
    try:
        for entries in _entries(folder / INDEX):
            reading.take(entries)
    except msgspec.ValidationError as error:
        number, fault = _explained(str(error))
        reading.refuse(number, fault)
    return reading.done()


# ---- the file


class _File(msgspec.Struct, gc=False):
    basename: str
    bytes: Annotated[int, msgspec.Meta(ge=0, le=MOST_BYTES)]
    hashes: dict[str, str]


class _Entry(msgspec.Struct, gc=False):
    version: Literal[2]
    format: Literal["mds"]
    samples: Annotated[int, msgspec.Meta(ge=0, lt=MOST_BYTES // 4)]
    raw_data: _File
    column_names: tuple[str, ...]
    column_encodings: tuple[str, ...]
    column_sizes: tuple[Optional[Annotated[int, msgspec.Meta(ge=0, lt=MOST_BYTES)]], ...]
    zip_data: Optional[_File] = None
    compression: Optional[str] = None


_LIST = msgspec.json.Decoder(list[_Entry])
_FAULTS = {  # what does not fit `_Entry`, by a field's name in msgspec's message
    "version": "no MDS shard of version 2",
    "format": "no MDS shard of version 2",
    "samples": "no number of samples",
    "basename": "the basename is no name in the set's own folder",
    "bytes": "no size of a file",
    "hashes": "hashes: a mapping of texts is expected",
    "column_names": "every column needs a name of its own, an encoding and a size",
    "column_encodings": "every column needs a name of its own, an encoding and a size",
    "column_sizes": "a column's size is null or a number of bytes",
    "raw_data": "raw_data: no description of a file",
    "zip_data": "zip_data: no description of a file",
    "compression": "compression: known are br, bz2, gz, snappy and zstd",
}


def _entries(path: Path) -> Iterator[list[_Entry]]:
    """The entries of an index, some thousand at a time.

    JSON is read from left to right. So where the text up to a brace is a list of whole entries, it is so in the whole
    file too, whatever follows. Raises ValueError for what is no index.
    """
    with open_regular(path) as file:
        text = file.read(PIECE)
        begin = re.search(rb'"shards"\s*:\s*\[', text)
        head = text[: begin.end()] if begin else b""
        if not begin or json.loads(head + b"]}").get("shards") != []:
            raise ValueError("it has no list of shards")
        text = text[begin.end() :]
        while piece := file.read(PIECE):
            text += piece
            cut = _last_brace(text)
            entries = _whole(text[:cut]) if cut else None
            if entries is not None:
                yield entries
                text = text[cut:].lstrip().removeprefix(b",")
            elif len(text) > MOST_PENDING:
                raise ValueError(f"an entry does not end within {MOST_PENDING} bytes")
    yield msgspec.convert(json.loads(head + text)["shards"], list[_Entry])


def _last_brace(text: bytes) -> int:
    """Behind the last brace that a comma and another one follow, as between two entries; 0 if there is none."""
    at = len(text)
    while (at := text.rfind(b"{", 0, at)) >= 0:
        before = text[max(0, at - 100) : at].rstrip()
        if before.endswith(b",") and before[:-1].rstrip().endswith(b"}"):
            return text.rindex(b"}", 0, at) + 1
    return 0


def _whole(text: bytes) -> Optional[list[_Entry]]:
    """The entries, separated by commas, that a text holds; None if it is no such text."""
    try:
        return _LIST.decode(b"[" + text + b"]")
    except msgspec.ValidationError:
        raise
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _explained(error: str) -> tuple[int, str]:
    """Which entry msgspec complains of, and what is wrong with it in our words."""
    told, _, place = error.partition(" - at ")
    found = re.match(r"`\$\[(\d+)\]", place)
    named = re.findall(r"\w+", place) + re.findall(r"missing required field `(\w+)`", told)
    fault = next((_FAULTS[word] for word in reversed(named) if word in _FAULTS), _FAULTS["version"])
    return int(found[1]) if found else 0, f"{fault} ({told[:1].lower()}{told[1:]})"


# ---- its arrays


class _Reading:
    """Gathers the arrays while entries are read. All UserErrors name the shard."""

    def __init__(self, folder: Path, keep_hash: Optional[str]) -> None:
        self._folder, self._keep_hash = folder, keep_hash
        self._samples: list[NDArray[np.int64]] = []
        self._kinds: list[NDArray[np.int32]] = []
        self._known: dict[tuple[Any, ...], int] = {}  # columns, as `Columns` has them
        self._raw = _Gathered(keep_hash)
        self._packed: Optional[_Gathered] = None  # until a shard is compressed
        self._parents: set[str] = set()
        self._hashed: Optional[set[str]] = None
        self._told = hashlib.blake2s(digest_size=4)
        self.shards = 0

    def take(self, entries: Sequence[_Entry]) -> None:
        """The next entries of the file."""
        kinds = [(e.column_names, e.column_encodings, e.column_sizes, e.compression) for e in entries]
        for kind in dict.fromkeys(kinds):
            if kind not in self._known:
                _check_columns(self._folder, Columns(*kind))
                self._known[kind] = len(self._known)
        raw, packed = [e.raw_data for e in entries], [e.zip_data for e in entries]
        samples = np.array([e.samples for e in entries], np.int64)
        self._check(entries, samples)
        self._samples.append(samples)
        self._kinds.append(np.array([self._known[kind] for kind in kinds], np.int32))
        self._raw.take(raw)
        if self._packed is None and any(kind[-1] for kind in self._known):
            self._packed = _Gathered(self._keep_hash)
            self._packed.take([None] * self.shards)
        if self._packed is not None:
            self._packed.take(packed)
        self._parents |= {f.basename.rpartition("/")[0] for f in (*raw, *filter(None, packed))}
        for hashes in {tuple((p or r).hashes) for r, p in zip(raw, packed, strict=True)}:
            self._hashed = set(hashes) if self._hashed is None else self._hashed & set(hashes)
        self._told.update(msgspec.json.encode([f.hashes for f in raw], order="deterministic")[1:-1] + b",")
        self.shards += len(entries)

    def _check(self, entries: Sequence[_Entry], samples: NDArray[np.int64]) -> None:
        sizes = np.array([e.raw_data.bytes for e in entries], np.int64)
        for number in np.flatnonzero(samples * 4 >= sizes).tolist():
            self.refuse(number, f"{samples[number]} samples cannot lie in {sizes[number]} bytes")
        for number, (zipped, compression) in enumerate([(e.zip_data, e.compression) for e in entries]):
            if (zipped is None) != (compression is None):
                self.refuse(number, "says half of how it is compressed: both compression and zip_data are needed")
        for files in ([e.raw_data for e in entries], [e.zip_data for e in entries]):
            if all(map(PLAIN_NAME.fullmatch, [f.basename for f in files if f])):
                continue
            for number, file in enumerate(files):
                if file is not None and not is_inside(file.basename):
                    self.refuse(number, f"basename {_quoted(file.basename)} is no name in the set's own folder")

    def refuse(self, number: int, fault: str) -> NoReturn:
        """UserError for an entry of those that are being taken."""
        raise UserError(f"{self._folder / INDEX}: shard {self.shards + number}: {fault}")

    def done(self) -> ShardIndex:
        """The arrays of the whole index."""
        samples = np.concatenate([np.empty(0, np.int64), *self._samples])
        total = int(samples.sum())
        if not total:
            raise UserError(f"{self._folder} holds no samples")
        if total > MOST_SAMPLES:
            raise UserError(f"{self._folder / INDEX} lists {total} samples, more than there can be")
        raw, packed = self._raw.done(), self._packed and self._packed.done()
        _check_names(self._folder / INDEX, raw, packed)
        self._told.update(raw.sizes.tobytes())
        return ShardIndex(
            samples, np.concatenate(self._kinds), [Columns(*kind) for kind in self._known], raw, packed,
            parents=frozenset(self._parents), hashed=frozenset(self._hashed or ()), contents=self._told.hexdigest(),
        )  # fmt: skip


class _Gathered:
    """The files of one sort, so far."""

    def __init__(self, keep_hash: Optional[str]) -> None:
        self._keep_hash = keep_hash
        self._names, self._hashes = _GatheredTexts(), _GatheredTexts()
        self._sizes: list[NDArray[np.int64]] = []
        self._keys: list[NDArray[np.uint64]] = []

    def take(self, files: Sequence[Optional[_File]]) -> None:
        names = [f.basename.encode() if f else b"" for f in files]
        self._names.take(names)
        self._sizes.append(np.array([f.bytes if f else 0 for f in files], np.int64))
        self._keys.append(np.fromiter(map(key_of_name, names), np.uint64, len(names)))
        if kept := self._keep_hash:
            self._hashes.take([f.hashes.get(kept, "").encode("utf-8", "surrogatepass") if f else b"" for f in files])

    def done(self) -> Files:
        return Files(self._names.done(), np.concatenate(self._sizes), self._hashes.done(), np.concatenate(self._keys))


class _GatheredTexts:
    def __init__(self) -> None:
        self._buffer = bytearray()
        self._lengths: list[NDArray[np.int64]] = [np.empty(0, np.int64)]

    def take(self, texts: Sequence[bytes]) -> None:
        self._buffer += b"".join(texts)
        self._lengths.append(np.fromiter(map(len, texts), np.int64, len(texts)))

    def done(self) -> Texts:
        return Texts(bytes(self._buffer), np.concatenate(self._lengths).cumsum())


def _check_names(path: Path, raw: Files, packed: Optional[Files]) -> None:
    """UserError if a file is listed twice."""
    keys = raw.keys if packed is None else np.concatenate([raw.keys, packed.keys[packed.sizes > 0]])
    ordered = np.sort(keys)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(twice):
        return
    seen: set[str] = set()
    for files in filter(None, (raw, packed)):
        for number in np.flatnonzero(np.isin(files.keys, twice)).tolist():
            name = files.names[number]
            if name and name in seen:
                raise UserError(f"{path}: shard {number}: {_quoted(name)} is listed twice")
            seen.add(name)


def is_inside(name: str) -> bool:
    """Whether a name from an index leads to a file in its folder or below that may be a shard.

    No part of it begins with a dot: those are `..`, and what a cache keeps for itself.
    """
    parts = name.split("/")
    plain = all(part and not part.startswith(".") and len(os.fsencode(part)) <= 200 for part in parts)
    return plain and name.isprintable() and "\\" not in name and len(parts) <= 8 and parts[-1] not in (INDEX, CLASSES)


def _quoted(value: Any) -> str:
    return printable(f"{value!r:.80}")


def _check_columns(folder: Path, kind: Columns) -> None:
    names, encodings, sizes, compression = kind
    if not len(names) == len(encodings) == len(sizes) == len(set(names)) <= 1000:
        raise UserError(f"{folder / INDEX}: every column needs a name of its own, an encoding and a size")
    found = dict(zip(names, encodings, strict=True))
    if found.get("image") not in IMAGES:
        raise UserError(
            f"{folder}: shards have the columns {_shown(found)}; 'image' of type 'bytes' is needed, or 'jpeg' or 'png'"
        )
    if found.get("label", "int") not in INTEGERS:
        raise UserError(f"{folder}: column 'label' has the type {_quoted(found['label'])}; an integer type is needed")
    if compression is not None and not COMPRESSIONS.fullmatch(compression):
        raise UserError(f"{folder / INDEX}: compression {_quoted(compression)}; known are br, bz2, gz, snappy and zstd")


def _shown(columns: Mapping[str, str]) -> str:
    return printable(f"{columns!r:.200}")
