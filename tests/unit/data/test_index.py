"""The index of a set in arrays: however index.json is written, cut into pieces and spread over folders."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from leap_dist.data import check_shards, index
from leap_dist.data.index import PLAIN_NAME, is_inside, key_of_name, read_index
from leap_dist.data.store import OPEN_SHARDS, ShardStore, open_store
from leap_dist.errors import UserError
from small_sets import ALONE, SIZE, config, write


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the file be read so many bytes at a time."""

    def set_piece(size: int) -> None:
        monkeypatch.setattr(index, "PIECE", size)
        index._read.cache_clear()

    yield set_piece
    index._read.cache_clear()


def told(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "index.json").read_text())


def shards_of(folder: Path, keep_hash: str | None = None) -> list[tuple[Any, ...]]:
    found = read_index(folder, keep_hash)
    return [
        (int(found.samples[i]), found.raw.names[i], int(found.raw.sizes[i]), found.columns_of(i))
        for i in range(len(found))
    ]


def truth(folder: Path) -> list[tuple[Any, ...]]:
    """The same by the standard library."""
    return [
        (
            shard["samples"], shard["raw_data"]["basename"], shard["raw_data"]["bytes"],
            (*(tuple(shard[f"column_{key}"]) for key in ("names", "encodings", "sizes")), shard["compression"]),
        )
        for shard in told(folder)["shards"]
    ]  # fmt: skip


WRITTEN: dict[str, Callable[[dict[str, Any]], str]] = {
    "streaming's": lambda content: json.dumps(content, sort_keys=True),
    "indented": lambda content: json.dumps(content, indent=4),
    "dense": lambda content: json.dumps(content, separators=(",", ":")),
    "version first": lambda content: json.dumps({"version": 2, "shards": content["shards"]}),
    "with more beside it": lambda content: json.dumps(
        {"made": {"by": ["x", {"a": 1}, {"b": 2}]}, **content, "zzz": [{"a": 1}, {"b": [1, 2]}]}
    ),
    "with odd texts": lambda content: json.dumps(
        {"shards": [{**shard, "note": '}, {"x": [}, {]'} for shard in content["shards"]], "version": 2}
    ),
}


@pytest.mark.parametrize("how", WRITTEN)
@pytest.mark.parametrize("piece", [400, 1000, 1 << 18])
def test_an_index_is_read_alike_however_it_is_written_and_cut(
    how: str, piece: int, tmp_path: Path, small_pieces: Callable[[int], None]
) -> None:
    folder = write(tmp_path / "set", compression="zstd" if piece == 1000 else None)
    expected, contents = truth(folder), read_index(folder).contents
    (folder / "index.json").write_text(WRITTEN[how](told(folder)))
    small_pieces(piece)
    assert shards_of(folder) == expected
    assert read_index(folder).contents == contents
    hashes = [shard["raw_data"]["hashes"]["xxh64"] for shard in told(folder)["shards"]]
    found = read_index(folder, "xxh64").raw.hashes
    assert [found[i] for i in range(len(hashes))] == hashes


@pytest.mark.parametrize("piece", [300, 1 << 18])
@pytest.mark.parametrize("place", [0, 4, -1])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shard: shard["raw_data"].update(bytes="9"), "raw_data|no size of a file .expected `int`, got `str`"),
        (lambda shard: shard.update(samples=-1), "no number of samples"),
        (lambda shard: shard["raw_data"].update(basename="../x"), r"basename '../x' is no name in the set's own"),
        (lambda shard: shard.update(format="json"), "no MDS shard of version 2"),
        (lambda shard: shard.pop("raw_data"), "raw_data: no description of a file"),
        (lambda shard: shard.update(samples=10**6), "1000000 samples cannot lie in"),
        (lambda shard: shard.update(compression="zstd"), "says half of how it is compressed"),
        (lambda shard: shard["raw_data"].update(basename="shard.00002.mds"), "'shard.00002.mds' is listed twice"),
    ],
)
def test_a_fault_names_its_shard(
    change: Callable[[dict[str, Any]], Any], message: str, place: int, piece: int, tmp_path: Path,
    small_pieces: Callable[[int], None],
) -> None:  # fmt: skip
    folder = write(tmp_path / "set")
    content = told(folder)
    change(content["shards"][place])
    (folder / "index.json").write_text(json.dumps(content))
    small_pieces(piece)
    number = range(len(content["shards"]))[place]
    where = rf"set/index.json: shard {number if 'twice' not in message else max(number, 2)}: "
    with pytest.raises(UserError, match=where + f".*({message})") as caught:
        read_index(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("piece", [300, 1 << 18])
@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_half_an_index_is_none(keep: float, piece: int, tmp_path: Path, small_pieces: Callable[[int], None]) -> None:
    folder = write(tmp_path / "set")
    data = (folder / "index.json").read_bytes()
    (folder / "index.json").write_bytes(data[: int(len(data) * keep)])
    small_pieces(piece)
    with pytest.raises(UserError, match="is not a readable MDS index"):
        read_index(folder)


def test_an_endless_entry_ends(tmp_path: Path, small_pieces: Callable[[int], None], monkeypatch: Any) -> None:
    folder = write(tmp_path / "set")
    (folder / "index.json").write_text('{"shards": [{"x": "' + "a" * 10**5)
    small_pieces(1000)
    monkeypatch.setattr(index, "MOST_PENDING", 10**4)
    with pytest.raises(UserError, match="an entry does not end within 10000 bytes"):
        read_index(folder)


def test_shards_may_differ_in_their_columns(tmp_path: Path) -> None:
    first, second = write(tmp_path / "set/a", size=8), write(tmp_path / "set/b", size=8, labels=False)
    merge(tmp_path / "set", first, second)
    store = open_store(str(tmp_path / "set"), config(tmp_path / "set"), ALONE)
    assert ["label" in store.read(i) for i in range(16)] == [True] * 8 + [False] * 8
    assert len(store.index.columns) == 2


# ---- sets in sub-folders


def merge(root: Path, *parts: Path) -> Path:
    """One index of several sets below `root`, as streaming's `merge_index` writes it."""
    shards = []
    for part in parts:
        for shard in told(part)["shards"]:
            for key in ("raw_data", "zip_data"):
                if shard[key]:
                    shard[key]["basename"] = os.path.join(part.relative_to(root), shard[key]["basename"])
            shards.append(shard)
    (root / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    return root


@pytest.fixture(params=[None, "zstd"])
def merged(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    deep = "b/" + "/".join("x" * 90 for _ in range(3))  # longer than a file's name may be
    parts = [write(tmp_path / "set" / name, compression=request.param) for name in ("a", deep)]
    yield merge(tmp_path / "set", *parts)


@pytest.mark.parametrize("cached", [False, True])
def test_a_merged_index_is_read(merged: Path, cached: bool, tmp_path: Path) -> None:
    options = {"cache": str(tmp_path / "cache"), "cache_limit": "6kb"} if cached else {}
    store = open_store(str(merged), config(merged, validate_hash="xxh64", **options), ALONE)
    assert [store.read(i)["label"] for i in range(store.size)] == [*range(SIZE)] * 2
    if cached:
        assert 0 < sum(about.st_size for _, about in store._present()) <= 6 * 1024


def test_a_shard_that_a_merged_index_misses_is_named(merged: Path) -> None:
    victim = min((merged / "a").glob("shard.00003.*"))
    victim.unlink()
    with pytest.raises(UserError, match=f"{victim} is missing, though index.json lists it"):
        check_shards(merged)


def test_a_folder_that_is_gone_is_named_by_its_first_shard(tmp_path: Path) -> None:
    root = merge(tmp_path, write(tmp_path / "a"), write(tmp_path / "b"))
    (root / "b").rename(tmp_path / "c")
    with pytest.raises(UserError, match=r"b/shard.00000.mds is missing"):
        check_shards(root)


# ---- names and readers


@pytest.mark.parametrize(
    "name",
    ["shard.00000.mds", "a/b-c/shard.1.mds.zstd", "index.json", "a/index.json", ".x.mds", "a/.b/x.mds", "../x.mds",
     "a//b.mds", "/a.mds", "a\\b.mds", "é.mds", "x.mds\n", "a/" * 8 + "x.mds", "a" * 201 + ".mds"],
)  # fmt: skip
def test_a_name_that_is_plain_is_inside(name: str) -> None:
    """The quick look is never kinder than the exact one."""
    assert is_inside(name) or not PLAIN_NAME.fullmatch(name)


def test_no_two_names_of_a_large_set_have_one_key() -> None:
    keys = np.fromiter((key_of_name(b"shard.%07d.mds" % i) for i in range(100_000)), np.uint64)
    assert len(np.unique(keys)) == len(keys)


def test_few_shards_are_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leap_dist.data.store.OPEN_SHARDS", 3)
    folder = write(tmp_path / "set")
    store = ShardStore(str(folder), config(folder))
    assert 3 < len(store.index) < OPEN_SHARDS

    for sample_id in np.random.RandomState(0).randint(0, SIZE, 300).tolist():
        assert store.read(sample_id)["label"] == sample_id
        assert store.shard_name(sample_id) in {Path(path).name for path in held_open(folder)}
        assert len(held_open(folder)) <= 3
    del store
    assert not held_open(folder)


def held_open(folder: Path) -> list[str]:
    """The files of a folder that this process has open."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:  # the one that the listing itself had open
            continue
    return [path for path in found if path.startswith(str(folder))]
