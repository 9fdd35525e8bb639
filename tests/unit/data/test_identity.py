"""Shards are those a run began with, and those at their source: whatever was written over them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from leap_dist.config import DataConfig
from leap_dist.data import build_train_loader, check_sources, store, write_shards
from leap_dist.data.store import open_store
from leap_dist.errors import UserError
from leap_dist.runtime.checkpoint import Checkpoints
from small_sets import ALONE, config, png, write
from stubs import stub_config


def overwrite(folder: Path, **changes: object) -> None:
    shutil.rmtree(folder)
    write(folder, **changes)


def test_an_overwritten_local_source_is_not_read_from_a_stale_cache(tmp_path: Path) -> None:
    source, cached = write(tmp_path / "set"), {"cache": str(tmp_path / "cache")}
    data = config(source, **cached)
    open_store(str(source), data, ALONE).read(0)
    open_store(str(source), data, ALONE)  # the same source again
    overwrite(source, size=32)
    with pytest.raises(UserError, match=r"set has changed since its shards were copied to .*cache/set-\w+;"):
        check_sources(data, ALONE)
    shutil.rmtree(next((tmp_path / "cache").iterdir()))
    assert open_store(str(source), data, ALONE).size == 32


@pytest.mark.parametrize("hashes", [True, False])
def test_equal_numbers_of_other_images_are_another_set(hashes: bool, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write_shards(((png(i), i) for i in range(20)), first)
    write_shards(((png(i) + b"." * (not hashes), i) for i in reversed(range(20))), second)
    if not hashes:
        for folder in (first, second):
            index = json.loads((folder / "index.json").read_text())
            for shard in index["shards"]:
                shard["raw_data"]["hashes"] = {}
            (folder / "index.json").write_text(json.dumps(index))
    stores = [open_store(str(folder), config(folder), ALONE) for folder in (first, second)]
    assert stores[0].layout() == stores[1].layout() and stores[0].contents() != stores[1].contents()
    copied = shutil.copytree(first, tmp_path / "copied")
    assert open_store(str(copied), config(copied), ALONE).contents() == stores[0].contents()


def test_a_checkpoint_goes_on_with_its_own_images_only(tmp_path: Path) -> None:
    run = stub_config(tmp_path)
    write_shards(((png(i), i) for i in range(20)), tmp_path / "set")
    loader = build_train_loader(config(tmp_path / "set"), seed=0, micro_batch=4, world=ALONE)
    saved = tmp_path / "step00000001"
    saved.mkdir()
    mine = Checkpoints(run, ALONE, loader.layout, "t", contents=loader.contents)
    (saved / "run.json").write_text(json.dumps(mine._identity() | {"step": 1, "world_size": 1}))
    assert not mine.needs_conversion(saved)
    with pytest.raises(UserError, match=r"saved with data\.train's contents="):
        Checkpoints(run, ALONE, loader.layout, "t", contents="another").needs_conversion(saved)
    before = {key: value for key, value in mine._identity().items() if "contents" not in key}
    (saved / "run.json").write_text(json.dumps(before | {"step": 1, "world_size": 1}))  # by an earlier version
    assert not mine.needs_conversion(saved)
    loader.close()


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that s3://bucket/ is an address of."""

    def download(remote: str, local: str, _timeout: float) -> None:
        Path(local).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "bucket" / remote.removeprefix("s3://bucket/"), local)

    monkeypatch.setattr("leap_dist.data.store.CloudDownloader.direct_download", download)
    return tmp_path / "bucket"


def test_an_overwritten_remote_source_is_not_read_from_a_stale_cache(
    tmp_path: Path, bucket: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, data = write(bucket / "set"), DataConfig(train="s3://bucket/set", cache=str(tmp_path / "cache"))
    for _ in range(2):
        open_store(data.train, data, ALONE)
        store._ask_for_changes.cache_clear()  # as in a new process
    assert not caplog.messages
    shutil.move(source, tmp_path / "away")
    open_store(data.train, data, ALONE)
    open_store(data.train, data, ALONE)
    (line,) = caplog.messages
    assert line.startswith("s3://bucket/set: cannot be asked whether it has changed since it was cached (FileNotFound")
    store._ask_for_changes.cache_clear()
    write(source, size=32)
    with pytest.raises(UserError, match=r"s3://bucket/set has changed since its shards were copied to .*/set-\w+;"):
        check_sources(data, ALONE)


def test_names_of_classes_come_into_the_cache_with_the_index(tmp_path: Path, bucket: Path) -> None:
    for name, classes in (("a", {"x": 0, "y": 1}), ("b", {"x": 1, "y": 0})):
        write(bucket / name / "part", size=8)
        (bucket / name / "class_to_idx.json").write_text(json.dumps(classes))
    data = DataConfig(train="s3://bucket/a/part", val="s3://bucket/b/part", cache=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"class 'x' has label 1, but 0 in data\.train=s3://bucket/a/part"):
        check_sources(data, ALONE)


def test_a_source_with_the_longest_of_names_has_a_folder_in_the_cache(tmp_path: Path) -> None:
    source = write(tmp_path / ("n" * 255))
    assert open_store(str(source), config(source, cache=str(tmp_path / "cache")), ALONE).size
