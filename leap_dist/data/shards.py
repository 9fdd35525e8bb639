"""Write MDS shards, and check that a folder of them is whole before anything is built on it."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

from leap_dist.errors import UserError
from leap_dist.runtime.files import writing

INDEX = "index.json"
COLUMNS = {"image": "bytes", "label": "int"}
HASH = "xxh64"
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
    """The shards listed by `folder`'s index; UserError unless it lists samples with the columns the loader reads."""
    path = folder / INDEX
    try:
        shards = json.loads(path.read_text())["shards"]
    except FileNotFoundError:
        below = sorted(found.parent for found in folder.glob(f"*/{INDEX}"))
        hint = f"did you mean {' or '.join(map(str, below[:3]))}?" if below else "tools/make_shards.py makes one"
        raise UserError(f"{path} does not exist: a folder of MDS shards is expected; {hint}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a readable MDS index ({type(error).__name__}: {error})") from None
    if not sum(shard["samples"] for shard in shards):
        raise UserError(f"{folder} holds no samples")
    for shard in shards:
        _check_columns(folder, shard)
    return shards


def _check_columns(folder: Path, shard: dict[str, Any]) -> None:
    found = dict(zip(shard.get("column_names", ()), shard.get("column_encodings", ()), strict=True))
    if found.get("image") != "bytes":
        raise UserError(f"{folder}: shards have the columns {found}; 'image' of type 'bytes' is needed")
    if not found.get("label", "int").startswith(("int", "uint")):
        raise UserError(f"{folder}: column 'label' has the type {found['label']!r}; an integer type is needed")


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
        raise UserError(f"{path} is missing, though {INDEX} lists it")
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
