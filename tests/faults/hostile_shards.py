"""Hostile indices and shards, in place, through a cache and unpacked."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import brotli
import snappy
import zstandard
from streaming import MDSWriter

from hostile import BOMB, CASES, Case, Evil, Work, case, reads
from small_sets import png, write


def changed_index(folder: Path, change: Callable[[dict[str, Any]], Any], **options: Any) -> Path:
    """A small set whose index's first shard `change` has been at."""
    write(folder / "set", **options)
    index = folder / "set/index.json"
    content = json.loads(index.read_text())
    change(content["shards"][0])
    index.write_text(json.dumps(content))
    return folder / "set"


def index_case(name: str, change: Callable[[dict[str, Any]], Any], refused: str, *, quick: bool = False) -> None:
    CASES.append(Case(f"index_{name}", lambda folder: reads(changed_index(folder, change)), refused, quick))


for _name, _basename in {
    "dotdot": "../victim.txt", "deep_dotdot": "a/../../victim.txt", "absolute": "/etc/hostname", "backslash": "..\\v",
    "nul": "a\0b", "newline": "a\nb", "hidden": ".locks/x", "index": "index.json", "empty": "", "slash": "a//b",
    "long": "x" * 5000, "number": 7, "null": None, "dot": ".", "trailing": "a/", "bidi": "a\u202eb",
}.items():  # fmt: skip
    index_case(
        f"basename_{_name}",
        lambda shard, basename=_basename: shard["raw_data"].update(basename=basename),
        "is no name in the set's own folder",
        quick=_name in ("dotdot", "absolute"),
    )
for _name, _value in {
    "huge": 10**9,
    "negative": -1,
    "float": 7.5,
    "text": "7",
    "true": True,
    "endless": 10**400,
}.items():
    index_case(f"samples_{_name}", lambda shard, value=_value: shard.update(samples=value), "samples")
for _name, _value in {"huge": 10**19, "negative": -1, "float": 1e300, "text": "9", "list": [1]}.items():
    index_case(f"bytes_{_name}", lambda shard, value=_value: shard["raw_data"].update(bytes=value), "size of a file")
index_case("hashes", lambda shard: shard["raw_data"].update(hashes=["../x"]), "hashes")
index_case("compression", lambda shard: shard.update(compression="../../x"), "compress")
index_case("format", lambda shard: shard.update(format="json"), "no MDS shard of version 2")
index_case("version", lambda shard: shard.update(version=10**9), "no MDS shard of version 2")
index_case("sizes", lambda shard: shard.update(column_sizes=[-8, None]), "column's size")
index_case("few_columns", lambda shard: shard.update(column_names=["image"]), "every column needs")
index_case("image_pkl", lambda shard: shard.update(column_encodings=["pkl", "int"]), "'image' of type 'bytes'")
index_case(
    "label_pkl", lambda shard: shard.update(column_encodings=["bytes", "pkl"]), "'label' has the type", quick=True
)
index_case("no_raw_data", lambda shard: shard.pop("raw_data"), "raw_data: no description of a file")


@case("listed twice")
def index_with_one_file_twice(folder: Path) -> Work:
    write(folder / "set")
    index = folder / "set/index.json"
    shards = json.loads(index.read_text())["shards"]
    index.write_text(json.dumps({"version": 2, "shards": [shards[0], shards[0]]}))
    return reads(folder / "set")


def _odd_index(folder: Path, put: Callable[[Path], Any]) -> Work:
    write(folder / "set")
    (folder / "set/index.json").unlink()
    put(folder / "set/index.json")
    return reads(folder / "set")


@case("not a readable MDS index")
def index_nested_deep(folder: Path) -> Work:
    return _odd_index(folder, lambda path: path.write_text('{"shards":' + "[" * 10**5 + "]" * 10**5 + "}"))


@case("not a readable MDS index", quick=True)
def index_is_a_pipe(folder: Path) -> Work:
    return _odd_index(folder, os.mkfifo)


@case("not a readable MDS index")
def index_is_dev_zero(folder: Path) -> Work:
    return _odd_index(folder, lambda path: path.symlink_to("/dev/zero"))


@case("not a readable MDS index")
def index_is_a_folder(folder: Path) -> Work:
    return _odd_index(folder, Path.mkdir)


@case("not a readable MDS index")
def index_of_a_terabyte(folder: Path) -> Work:
    def put(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(1 << 40)

    return _odd_index(folder, put)


@case("no regular file")
def shard_is_dev_zero(folder: Path) -> Work:
    shard = sorted(write(folder / "set").glob("shard.*"))[3]
    shard.unlink()
    shard.symlink_to("/dev/zero")
    return reads(folder / "set")


@case("no regular file")
def shard_is_a_pipe(folder: Path) -> Work:
    shard = sorted(write(folder / "set").glob("shard.*"))[3]
    shard.unlink()
    os.mkfifo(shard)
    return reads(folder / "set", cache=str(folder / "cache"))


@case("'image' of type 'bytes'")
def every_column_is_a_pickle(folder: Path) -> Work:
    with MDSWriter(out=str(folder / "set"), columns={"image": "pkl", "label": "pkl"}) as writer:
        writer.write({"image": Evil(folder), "label": Evil(folder)})
    return reads(folder / "set")


@case(None, quick=True)
def a_pickle_beside_the_wanted_columns(folder: Path) -> Work:
    """It is stepped over; so is what no decoder would take."""
    columns = {"image": "bytes", "aaa": "pkl", "label": "int", "zzz": "json"}
    with MDSWriter(out=str(folder / "set"), columns=columns) as writer:
        for i in range(20):
            writer.write({"image": png(i), "aaa": Evil(folder), "label": i, "zzz": {"a": [i]}})
    return reads(folder / "set")


def _patched_shard(folder: Path, at: int, data: bytes) -> Path:
    source = folder / "set" if (folder / "set").exists() else write(folder / "set")
    shard = min(source.glob("shard.*"))
    content = bytearray(shard.read_bytes())
    content[at : at + len(data)] = data
    shard.write_bytes(content)
    return folder / "set"


@case("cannot be read.*is said to lie at bytes")
def shard_with_a_sample_of_4_gib(folder: Path) -> Work:
    return reads(_patched_shard(folder, 8, struct.pack("<I", 2**32 - 1)))


@case("cannot be read.*is said to lie at bytes")
def shard_with_a_sample_that_ends_before_it_begins(folder: Path) -> Work:
    return reads(_patched_shard(folder, 4, struct.pack("<II", 900, 4)))


@case("cannot be read.*is said to have columns")
def sample_with_columns_of_4_gib(folder: Path) -> Work:
    shard = min(write(folder / "set").glob("shard.*"))
    begin = struct.unpack("<I", shard.read_bytes()[4:8])[0]
    return reads(_patched_shard(folder, begin, struct.pack("<I", 2**32 - 1)))


def _cached(
    name: str, change: Callable[[dict[str, Any]], Any], refused: str, *, quick: bool = False, **how: Any
) -> None:
    def make(folder: Path) -> Work:
        return reads(changed_index(folder, change, **how), cache=str(folder / "a/b"))

    CASES.append(Case(f"cached_{name}", make, refused, quick))


_cached("dotdot", lambda shard: shard["raw_data"].update(basename="../../victim.txt"), "no name in", quick=True)
_cached("absolute", lambda shard: shard["raw_data"].update(basename="/etc/hostname"), "no name in")
_cached("zip", lambda shard: shard["zip_data"].update(basename="../../../victim.txt"), "no name in", compression="zstd")


@case("says half of how it is compressed")
def compressed_by_half(folder: Path) -> Work:
    return reads(changed_index(folder, lambda shard: shard.update(compression="zstd")))


@case("a link that leads elsewhere", quick=True)
def staging_folder_is_a_link(folder: Path) -> Work:
    write(folder / "set", compression="zstd")
    (folder / "set/.staging").symlink_to(folder.parent)
    return reads(folder / "set")


@case("a link that leads elsewhere")
def lock_folder_is_a_link(folder: Path) -> Work:
    write(folder / "set", compression="zstd")
    (folder / "set/.locks").symlink_to(folder.parent)
    return reads(folder / "set")


@case(None)
def lock_folder_is_a_link_where_nothing_is_fetched(folder: Path) -> Work:
    """It held a file of the user's own, which used to be emptied as an old lock."""
    write(folder / "set")
    (folder / "set/.locks").symlink_to(folder.parent)
    return reads(folder / "set")


@case("cannot be read.*FetchError|cannot be read.*OSError|symbolic link")
def lock_is_a_link(folder: Path) -> Work:
    write(folder / "set", compression="zstd")
    (folder / "set/.locks").mkdir()
    for name in json.loads((folder / "set/index.json").read_text())["shards"]:
        (folder / "set/.locks" / name["raw_data"]["basename"]).symlink_to(folder.parent / "victim.txt")
    return reads(folder / "set")


@case(None)
def shard_named_as_a_lock_of_the_cache(folder: Path) -> Work:
    """It used to wait for itself."""
    changed_index(folder, lambda shard: shard["raw_data"].update(basename="room"))
    (folder / "set/shard.00000.mds").rename(folder / "set/room")
    return reads(folder / "set", cache=str(folder / "cache"))


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "zstd": zstandard.compress, "gz": gzip.compress, "bz2": bz2.compress, "snappy": snappy.compress,
    "br": lambda data: brotli.compress(data, quality=1),
}  # fmt: skip


def _packed_bomb(compression: str) -> Callable[[Path], Work]:
    def make(folder: Path) -> Work:
        write(folder / "set", compression=compression)
        index = folder / "set/index.json"
        content = json.loads(index.read_text())
        packed = PACKERS[compression](BOMB)
        for shard in content["shards"]:
            (folder / "set" / shard["zip_data"]["basename"]).write_bytes(packed)
            shard["zip_data"]["bytes"] = len(packed)
        index.write_text(json.dumps(content))
        return reads(folder / "set", cache=str(folder / "cache"))

    return make


for _name in PACKERS:
    CASES.append(Case(f"bomb_{_name}", _packed_bomb(_name), "cannot be read.*index", _name == "zstd"))
