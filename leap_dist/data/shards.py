"""Write MDS shards, and check that a folder of them is whole before anything is built on it."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

from leap_dist.data.classes import CLASSES
from leap_dist.data.names import printable
from leap_dist.errors import UserError
from leap_dist.runtime.files import read_json, writing

INDEX = "index.json"
COLUMNS = {"image": "bytes", "label": "int"}
HASH = "xxh64"
# streaming's encodings of the two columns that are read. None of them builds anything: bytes stay bytes, and an integer
# is one of NumPy's. Other columns may have any encoding, as nothing of them is decoded.
IMAGES = ("bytes", "jpeg", "png")
INTEGERS = {"int": "<i8"} | {
    f"{sign}int{bits}": f"<{sign or 'i'}{bits // 8}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}
COMPRESSIONS = re.compile(r"(br|bz2|gz|zstd)(:\d{1,2})?|snappy")
MOST_BYTES = 2**32  # of a shard: its own table has 32 bits for a place in it
MOST_SAMPLES = 2**40  # of a set
CHECKERS = 8  # files at a time: a network file system gives little to one reader


@contextmanager
def complete_or_absent(out: Path) -> Iterator[Path]:
    """Give an empty folder to fill; it becomes `out` if the block succeeds, and is removed if not.

    UserError if `out` exists and is not empty, or the disk refuses what the block writes.
    """
    out = out.absolute()  # "." has no name to derive one from
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} exists and is not empty: name a new folder")
    part = out.with_name(f".{out.name}.{uuid.uuid4().hex}.part")
    try:
        with writing(out.parent):
            part.mkdir(parents=True)
            yield part
            os.rename(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_shards(samples: Iterable[tuple[bytes, int]], out: Path) -> None:
    """Write (encoded image, label) pairs as MDS shards to the folder `out`, which appears only when it is complete.

    UserError if `out` exists and is not empty. Shards of 64 MiB, their xxh64 in the index.
    """
    from streaming import MDSWriter  # 3 s to import

    with (
        complete_or_absent(Path(out)) as part,
        MDSWriter(out=str(part), columns=COLUMNS, hashes=[HASH]) as writer,
    ):
        for image, label in samples:
            writer.write({"image": image, "label": label})


def read_index(folder: Path) -> list[dict[str, Any]]:
    """The shards listed by `folder`'s index, of which all that the loader uses has been checked.

    UserError unless it lists samples with the columns the loader reads, in files of its own folder.
    """
    path = folder / INDEX
    try:
        shards = read_json(path)["shards"]
    except FileNotFoundError:
        below = sorted(found.parent for found in folder.glob(f"*/{INDEX}"))
        hint = f"did you mean {' or '.join(map(str, below[:3]))}?" if below else "tools/make_shards.py makes one"
        raise UserError(f"{path} does not exist: a folder of MDS shards is expected; {hint}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a readable MDS index ({type(error).__name__}: {error!s:.200})") from None
    if not isinstance(shards, list):
        raise UserError(f"{path} is not a readable MDS index: 'shards' is no list")
    names: set[str] = set()
    for number, shard in enumerate(shards):
        if fault := _fault(shard):
            raise UserError(f"{path}: shard {number}: {fault}")
        _check_columns(folder, shard)
        for info in filter(None, (shard["raw_data"], shard["zip_data"])):
            if info["basename"] in names:
                raise UserError(f"{path}: shard {number}: {_quoted(info['basename'])} is listed twice")
            names.add(info["basename"])
    samples = sum(shard["samples"] for shard in shards)
    if not samples:
        raise UserError(f"{folder} holds no samples")
    if samples > MOST_SAMPLES:
        raise UserError(f"{path} lists {samples} samples, more than there can be")
    return shards


def _fault(shard: Any) -> Optional[str]:
    """What is wrong with an entry of an index, but for its columns; None if nothing is."""
    if not isinstance(shard, dict) or shard.get("version") != 2 or shard.get("format") != "mds":
        return "no MDS shard of version 2"
    samples, packed, compression = (shard.get(key) for key in ("samples", "zip_data", "compression"))
    if type(samples) is not int or not 0 <= samples < MOST_BYTES // 4:
        return f"{_quoted(samples)} is no number of samples"
    for key in ("raw_data", "zip_data"):
        if (key == "raw_data" or packed is not None) and (fault := _fault_of_file(shard.get(key))):
            return f"{key}: {fault}"
    if samples * 4 >= shard["raw_data"]["bytes"]:
        return f"{samples} samples cannot lie in {shard['raw_data']['bytes']} bytes"
    if (packed is None) != (compression is None):
        return "says half of how it is compressed: both compression and zip_data are needed"
    if packed is not None and not (isinstance(compression, str) and COMPRESSIONS.fullmatch(compression)):
        return f"compression {_quoted(compression)}; known are br, bz2, gz, snappy and zstd"
    return None


def _fault_of_file(info: Any) -> Optional[str]:
    """What is wrong with what an index says of a file; None if nothing is."""
    if not isinstance(info, dict):
        return "no description of a file"
    name, size, hashes = info.get("basename"), info.get("bytes"), info.get("hashes")
    if not isinstance(name, str) or not is_inside(name):
        return f"basename {_quoted(name)} is no name in the set's own folder"
    if type(size) is not int or not 0 <= size <= MOST_BYTES:
        return f"{_quoted(size)} is no size of a file"
    if not isinstance(hashes, dict) or not all(isinstance(value, str) for value in hashes.values()):
        return "hashes: a mapping of texts is expected"
    return None


def is_inside(name: str) -> bool:
    """Whether a name from an index leads to a file in its folder or below that may be a shard.

    No part of it begins with a dot: those are `..`, and what a cache keeps for itself.
    """
    parts = name.split("/")
    plain = all(part and not part.startswith(".") and len(os.fsencode(part)) <= 200 for part in parts)
    return plain and name.isprintable() and "\\" not in name and len(parts) <= 8 and parts[-1] not in (INDEX, CLASSES)


def _quoted(value: Any) -> str:
    return printable(f"{value!r:.80}")


def _check_columns(folder: Path, shard: dict[str, Any]) -> None:
    names, encodings, sizes = (shard.get(f"column_{what}") for what in ("names", "encodings", "sizes"))
    lists = (names, encodings, sizes)
    texts = all(isinstance(part, list) for part in lists) and all(isinstance(item, str) for item in names + encodings)
    if not texts or not len(names) == len(encodings) == len(sizes) == len(set(names)) <= 1000:
        raise UserError(f"{folder / INDEX}: every column needs a name of its own, an encoding and a size")
    if not all(size is None or (type(size) is int and 0 <= size < MOST_BYTES) for size in sizes):
        raise UserError(f"{folder / INDEX}: a column's size is null or a number of bytes")
    found = dict(zip(names, encodings, strict=True))
    if found.get("image") not in IMAGES:
        raise UserError(
            f"{folder}: shards have the columns {_shown(found)}; 'image' of type 'bytes' is needed, or 'jpeg' or 'png'"
        )
    if found.get("label", "int") not in INTEGERS:
        raise UserError(f"{folder}: column 'label' has the type {_quoted(found['label'])}; an integer type is needed")


def _shown(columns: dict[str, str]) -> str:
    return printable(f"{columns!r:.200}")


def check_shards(folder: Path, validate_hash: Optional[str] = None) -> int:
    """Compare every shard's file with the index, sizes always, contents if `validate_hash` names a hash of the index.

    Returns the number of samples; UserError at the first fault. Streaming itself checks neither: a missing or cut shard
    ends its epoch early without an exception, and it never hashes an uncompressed local shard.
    """
    shards = read_index(Path(folder))
    files = []
    for shard in shards:
        # Compressed shards are unpacked beside their archive, so the archive must be there and the rest may be.
        needed, optional = (shard["zip_data"], shard["raw_data"]) if shard["zip_data"] else (shard["raw_data"], None)
        files += [needed, optional] if optional and (Path(folder) / optional["basename"]).exists() else [needed]
    with ThreadPoolExecutor(CHECKERS) as pool:
        list(pool.map(lambda info: _check_file(Path(folder), info, validate_hash), files))  # the first fault is raised
    return sum(shard["samples"] for shard in shards)


def _check_file(folder: Path, info: dict[str, Any], validate_hash: Optional[str]) -> None:
    path = folder / info["basename"]
    if not path.is_file():
        what = "no regular file" if os.path.lexists(path) else "missing"
        raise UserError(f"{path} is {what}, though {INDEX} lists it")
    size = path.stat().st_size
    if size != info["bytes"]:
        raise UserError(f"{path} has {size} bytes where {INDEX} says {info['bytes']}: cut or overwritten")
    if validate_hash:
        _check_hash(path, info["hashes"], validate_hash)


def require_hash(name: str, hashes: dict[str, str], source: str) -> None:
    """Raise UserError unless the index of `source` gives the hash `name` of a shard."""
    if name not in hashes:
        known = ", ".join(hashes) or "none"
        raise UserError(f"data.validate_hash: {name!r} is not in the index of {source} (it has: {known})")


def _check_hash(path: Path, hashes: dict[str, str], name: str) -> None:
    require_hash(name, hashes, str(path.parent))
    from streaming.base.hashing import get_hash  # 3 s to import

    if get_hash(name, path.read_bytes()) != hashes[name]:
        raise UserError(f"{path} is corrupt: its {name} differs from the one in {INDEX}")
