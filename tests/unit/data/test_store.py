"""Where shards are read from: in place, unpacked, through a cache of limited size; what killed runs leave there."""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from leap_dist.config import DataConfig
from leap_dist.data import check_sources
from leap_dist.data.store import LOCKS, STAGING, FetchError, ShardStore, open_store
from leap_dist.errors import UserError
from small_sets import ALONE, SIZE, config, write


def opened(folder: Path, **options: object) -> ShardStore:
    return open_store(str(folder), config(folder, **options), ALONE)


def labels(store: ShardStore) -> list[int]:
    return [int(store.read(i)["label"]) for i in range(store.size)]


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def cached(tmp_path: Path) -> Path:
    (folder,) = (tmp_path / "cache").iterdir()
    return folder


def test_a_raw_set_is_read_in_place_and_never_written_to(tmp_path: Path) -> None:
    folder = write(tmp_path / "set")
    before = files(folder)
    store = opened(folder, cache_limit="1kb")  # without a cache there is nothing to evict but the user's own files
    store.fetch_ahead(range(len(store.index)))
    assert not store.fetches and labels(store) == list(range(SIZE))
    assert files(folder) == before


def test_a_compressed_set_is_unpacked_in_place(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", compression="zstd")
    before = files(folder)
    assert labels(opened(folder)) == list(range(SIZE))
    raw = {name.removesuffix(".zstd") for name in before}
    assert files(folder) == before | raw | {STAGING, LOCKS}
    assert labels(opened(folder, validate_hash="xxh64")) == list(
        range(SIZE)
    )  # also what was unpacked goes by the index


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_compressed_set_in_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", compression="zstd")
    folder.chmod(0o500)
    with pytest.raises(UserError, match=r"nobody may write; set data\.cache"):
        opened(folder)


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_cache_holds_each_shard_unpacked_and_survives_the_source(tmp_path: Path, compression: str | None) -> None:
    folder = write(tmp_path / "set", compression=compression)
    before = files(folder)
    store = opened(folder, cache=str(tmp_path / "cache"), validate_hash="xxh64")
    assert labels(store) == list(range(SIZE)) and files(folder) == before
    assert files(cached(tmp_path)) == {name.removesuffix(".zstd") for name in before} | {STAGING, LOCKS}
    for path in folder.glob("shard.*"):
        path.unlink()
    assert labels(store) == list(range(SIZE))


def test_shards_wanted_ahead_arrive_in_the_background(tmp_path: Path) -> None:
    store = opened(write(tmp_path / "set"), cache=str(tmp_path / "cache"))
    store.fetch_ahead([0, 3, 5])
    names = {f"shard.{i:05d}.mds" for i in (0, 3, 5)}
    deadline = time.monotonic() + 10
    while not names <= files(cached(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert {name for name in files(cached(tmp_path)) if name.startswith("shard.")} == names


def test_what_was_read_longest_ago_is_evicted_first(tmp_path: Path) -> None:
    folder = write(tmp_path / "set")
    store = opened(folder, cache=str(tmp_path / "cache"), cache_limit="4kb")
    firsts = (store.shard_sizes.cumsum() - store.shard_sizes).tolist()
    fitting = 4096 // store.index.largest()
    for first in firsts[:fitting]:
        store.read(first)
    store.read(firsts[0])
    store.read(firsts[fitting])
    left = {name for name in files(cached(tmp_path)) if name.startswith("shard.")}
    assert left == {f"shard.{i:05d}.mds" for i in range(fitting + 1) if i != 1}


def test_a_cache_that_is_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"cache_limit: 1024 bytes are too few for .*set, whose .* at least four must fit"
    ):
        opened(write(tmp_path / "set"), cache=str(tmp_path / "cache"), cache_limit="1kb")


def test_a_cache_that_thrashes_is_not_taken_for_bad_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(write(tmp_path / "set"), cache=str(tmp_path / "cache"))
    monkeypatch.setattr(store, "_fetch", lambda shard_id: None)  # there and gone again
    with pytest.raises(UserError, match=r"data.cache_limit: too small, .*shard.00000.mds is evicted again"):
        store.read(0)


def test_leftovers_of_a_killed_run_are_cleared_away(tmp_path: Path) -> None:
    """A cut shard in the cache, as some cloud clients leave one, and a half-done download in the staging folder."""
    folder = write(tmp_path / "set")
    store = opened(folder, cache=str(tmp_path / "cache"))
    for name in ("shard.00001.mds", f"{STAGING}/shard.00002.mds", f"{STAGING}/shard.00002.mds.95Da5bD7"):
        (cached(tmp_path) / name).write_bytes(b"half")
    (cached(tmp_path) / LOCKS / "shard.00003.mds").write_text("OSError: the network was away")
    store = opened(folder, cache=str(tmp_path / "cache"))
    assert labels(store) == list(range(SIZE))
    assert not files(cached(tmp_path) / STAGING)


class Network:
    """Fails `failures` times, each time leaving half the file as google's client does, then copies it."""

    def __init__(self, failures: int, error: Exception) -> None:
        self.failures, self.error, self.asked = failures, error, 0

    def download(self, remote: str, local: str, _timeout: float) -> None:
        self.asked += 1
        data = Path(remote).read_bytes()
        broken = self.asked <= self.failures
        Path(local).parent.mkdir(parents=True, exist_ok=True)
        Path(local).write_bytes(data[: len(data) // 2] if broken else data)
        if broken:
            raise self.error


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the store has slept, without sleeping."""
    slept: list[float] = []
    monkeypatch.setattr("leap_dist.data.store.time", SimpleNamespace(sleep=slept.append, time=time.time))
    return slept


def fetch_through(network: Network, monkeypatch: pytest.MonkeyPatch, store: ShardStore) -> None:
    class Client:
        clean_up = staticmethod(lambda: None)

        def download(self, remote: str, local: str, timeout: float) -> None:
            if not os.path.exists(local):  # as streaming's clients begin
                network.download(remote, local, timeout)

    monkeypatch.setattr("streaming.base.stream.CloudDownloader.get", lambda *_: Client())
    store.read(0)


def test_a_shard_arrives_after_a_minute_without_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    store = opened(write(tmp_path / "set"), cache=str(tmp_path / "cache"))
    fetch_through(network := Network(6, ConnectionError("reset")), monkeypatch, store)
    assert network.asked == 7 and 0.75 * 63 <= sum(pauses) <= 1.25 * 63
    assert not files(cached(tmp_path) / STAGING)


@pytest.mark.parametrize(
    ("failures", "error", "asked"),
    [
        (7, ConnectionError("reset"), 7),
        (1, FileNotFoundError("no such object"), 1),
        (2, ValueError("Checksum failure"), 2),
    ],
)
def test_a_shard_is_not_asked_for_where_it_is_of_no_use(
    failures: int, error: Exception, asked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    store = opened(write(tmp_path / "set"), cache=str(tmp_path / "cache"))
    network = Network(failures, error)
    with pytest.raises(FetchError, match=str(error)):
        fetch_through(network, monkeypatch, store)
    assert network.asked == asked == len(pauses) + 1


@pytest.mark.parametrize("failures", [1, 4])
def test_half_an_index_does_not_get_into_the_cache(
    failures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    folder = write(tmp_path / "set")
    network = Network(failures, PermissionError("403"))
    monkeypatch.setattr("leap_dist.data.store.CloudDownloader.direct_download", network.download)
    if failures == 1:
        assert opened(folder, cache=str(tmp_path / "cache")).size == SIZE
    else:
        with pytest.raises(UserError, match="cannot be opened: PermissionError: 403"):
            opened(folder, cache=str(tmp_path / "cache"))
        assert network.asked == 4 and not (cached(tmp_path) / "index.json").exists()


def test_contents_are_read_once_however_often_a_run_opens_a_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    monkeypatch.setattr("leap_dist.data.shards._check_hash", lambda path, *_: hashed.append(path))
    folder = write(tmp_path / "set")
    for _ in range(3):
        store = opened(folder, validate_hash="xxh64")
    opened(folder, validate_hash="xxh64", cache=str(tmp_path / "cache"))  # there each is hashed when it arrives
    assert len(hashed) == len(set(hashed)) == len(store.index)


def test_a_shard_is_downloaded_once_for_all(tmp_path: Path) -> None:
    """Others wait for its lock, and then find it there."""
    store = opened(write(tmp_path / "set"), cache=str(tmp_path / "cache"))
    with (cached(tmp_path) / LOCKS / "shard.00000.mds").open("w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        seen: list[int] = []
        reader = threading.Thread(target=lambda: seen.append(int(store.read(0)["label"])), daemon=True)
        reader.start()
        time.sleep(0.2)
        assert not seen
        target = cached(tmp_path) / "shard.00000.mds"
        target.write_bytes((tmp_path / "set" / target.name).read_bytes())
        (tmp_path / "set" / target.name).unlink()
    reader.join(timeout=10)
    assert seen == [0]


@pytest.mark.parametrize("scheme", ["s3", "gs", "oci", "hf", "azure", "nowhere"])
def test_a_remote_that_cannot_be_reached_is_one_clear_line(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever each cloud's package raises, down to its absence."""

    def unreachable(*_: object) -> None:
        raise ModuleNotFoundError(f"No module\nnamed {scheme!r}")

    monkeypatch.setattr("leap_dist.data.store.INDEX_ATTEMPTS", 1)
    monkeypatch.setattr("leap_dist.data.store.CloudDownloader.direct_download", unreachable)
    data = DataConfig(train=f"{scheme}://bucket/set", cache=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=f"{scheme}://bucket/set cannot be opened: ModuleNotFound") as caught:
        open_store(data.train, data, ALONE)
    assert "\n" not in str(caught.value)


# ---- what is known of a run's sets before it begins


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that s3://bucket/ is an address of."""

    def download(remote: str, local: str, _timeout: float) -> None:
        Path(local).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "bucket" / remote.removeprefix("s3://bucket/"), local)

    monkeypatch.setattr("leap_dist.data.store.INDEX_ATTEMPTS", 1)
    monkeypatch.setattr("leap_dist.data.store.CloudDownloader.direct_download", download)
    return tmp_path / "bucket"


def remote_config(tmp_path: Path, **options: object) -> DataConfig:
    sources = {"train": "s3://bucket/train", "val": "s3://bucket/val"}
    return DataConfig(**{**sources, "cache": str(tmp_path / "cache"), **options})


def test_remote_sets_are_opened_before_anything_is_built_and_no_shard_is_fetched(tmp_path: Path, bucket: Path) -> None:
    for name in ("train", "val"):
        write(bucket / name)
    check_sources(remote_config(tmp_path), ALONE)
    fetched = [files(folder) for folder in (tmp_path / "cache").iterdir()]
    assert fetched == [{"index.json", STAGING, LOCKS}] * 2


@pytest.mark.parametrize("key", ["train", "val"])
def test_a_remote_set_that_cannot_be_opened_ends_the_run_at_its_start(key: str, tmp_path: Path, bucket: Path) -> None:
    """A mistyped bucket of the held-out images would otherwise be heard of after the last step."""
    write(bucket / {"train": "val", "val": "train"}[key])
    with pytest.raises(UserError, match=f"s3://bucket/{key} cannot be opened: FileNotFoundError") as caught:
        check_sources(remote_config(tmp_path), ALONE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["train", "val"])
def test_with_held_out_images_remote_sets_need_labels(key: str, tmp_path: Path, bucket: Path) -> None:
    for name in ("train", "val"):
        write(bucket / name, labels=name != key)
    with pytest.raises(
        UserError, match=rf"data\.{key}=s3://bucket/{key}: its shards have no labels, .*; set data\.val="
    ):
        check_sources(remote_config(tmp_path), ALONE)
    if key == "train":
        check_sources(remote_config(tmp_path, val=None), ALONE)


@pytest.mark.parametrize("key", ["train", "val"])
def test_with_held_out_images_local_sets_need_labels(key: str, tmp_path: Path) -> None:
    sources = {name: str(write(tmp_path / name, labels=name != key)) for name in ("train", "val")}
    with pytest.raises(UserError, match=rf"data\.{key}={sources[key]}: its shards have no labels, .*; set data\.val="):
        check_sources(DataConfig(**sources), ALONE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validate_hash": "xxh64"}, "shard.00003.mds is corrupt: its xxh64"),
        ({"cache": "cache", "cache_limit": "1kb"}, "data.cache_limit: 1024 bytes are too few for .*train"),
    ],
)
@pytest.mark.parametrize("key", ["train", "val"])
def test_sets_are_held_against_the_options_before_anything_is_built(
    key: str, options: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train, val = write(tmp_path / "train"), write(tmp_path / "val")
    shard = tmp_path / key / "shard.00003.mds"
    shard.write_bytes(shard.read_bytes()[:-3] + b"???")
    with pytest.raises(UserError, match=message):
        check_sources(DataConfig(train=str(train), val=str(val), **options), ALONE)
