"""Order, position and faults of the loaders, in one process. test_data_ranks.py has what takes several."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from leap_dist.config import DataConfig
from leap_dist.data import Batch, TrainLoader, build_eval_loader, build_train_loader, transforms
from leap_dist.data.loader import _Requests
from leap_dist.errors import UserError
from small_sets import ALONE, FAULTS, SIZE, config, flat, helpers_on_path, write

Build = Callable[..., TrainLoader]


def ids(batches: Iterable[Batch]) -> list[list[int]]:
    return [batch.ids.tolist() for batch in batches]


@pytest.fixture
def build() -> Iterator[Build]:
    """Train loaders that are closed at the end of the test."""
    loaders = []

    def build(data: DataConfig, seed: int = 0, micro_batch: int = 4) -> TrainLoader:
        loaders.append(build_train_loader(data, seed=seed, micro_batch=micro_batch, world=ALONE))
        return loaders[-1]

    yield build
    for loader in loaders:
        loader.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("whole") / "set")


def test_a_batch_is_what_it_says(build: Build, folder: Path) -> None:
    loader = build(config(folder, augment="none", mean=(0, 0, 0), std=(1, 1, 1)))
    assert len(loader) == 16 and loader.num_samples == SIZE
    for batch in loader.epoch(0):
        assert batch.images.shape == (4, 3, 8, 8) and batch.images.dtype == torch.float32
        assert batch.labels.dtype == batch.ids.dtype == torch.int64 and torch.equal(batch.labels, batch.ids)
        colours = torch.stack([batch.ids % 256, 255 - batch.ids % 256, 7 * batch.ids % 256], 1) / 255
        torch.testing.assert_close(batch.images.mean((2, 3)), colours.float(), rtol=0, atol=1e-6)


def test_labels_may_be_absent(build: Build, tmp_path: Path) -> None:
    loader = build(config(write(tmp_path / "set", labels=False)))
    assert {label for batch in loader.epoch(0) for label in batch.labels.tolist()} == {-1}


def test_an_epoch_is_a_permutation_fixed_by_seed_and_epoch(build: Build, folder: Path) -> None:
    loader = build(config(folder))
    first, second = ids(loader.epoch(0)), ids(loader.epoch(1))
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(SIZE))
    assert first != second
    assert ids(build(config(folder)).epoch(0)) == first
    assert ids(build(config(folder), seed=1).epoch(0)) != first


def test_the_incomplete_last_batch_is_dropped(build: Build, tmp_path: Path) -> None:
    loader = build(config(write(tmp_path / "set", size=63)))
    seen = flat(ids(loader.epoch(0)))
    assert len(loader) == 15 and len(seen) == len(set(seen)) == 60


def test_pixels_do_not_depend_on_workers_or_on_the_global_stream(build: Build, folder: Path) -> None:
    """Published LEAP is not reproducible at equal seed, as its augmentations draw from an unseeded stream."""
    epochs = []
    for workers in (0, 0, 2):
        torch.manual_seed(int(time.time_ns() % 2**31))
        loader = build(config(folder, workers=workers))
        epochs.append(torch.stack([batch.images for epoch in (0, 1) for batch in loader.epoch(epoch)]))
    assert torch.equal(epochs[0], epochs[1]) and torch.equal(epochs[0], epochs[2])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_is_augmented_anew_in_each_epoch(build: Build, folder: Path, workers: int) -> None:
    """Also in persistent workers, which were forked in the first one."""
    loader = build(config(folder, workers=workers))
    images = torch.empty(2, SIZE, 3, 8, 8, dtype=torch.uint8)
    for epoch in range(2):
        for batch in loader.epoch(epoch):
            images[epoch, batch.ids] = batch.images
    same = (images[0] == images[1]).all((1, 2, 3)).sum()
    assert same < SIZE / 4  # a flat image changes only by its colours: untouched twice 0.16**2, grey twice, ...


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_global_stream_alone(build: Build, folder: Path, workers: int) -> None:
    loader = build(config(folder, workers=workers))
    before = torch.get_rng_state()
    list(loader.epoch(0))
    list(loader.epoch(1, 3))
    list(build_eval_loader(str(folder), config(folder, workers=workers), batch=5, world=ALONE))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_any_position_can_be_taken_up_again(build: Build, folder: Path, workers: int) -> None:
    whole = build(config(folder, workers=workers))
    truth = {epoch: ids(whole.epoch(epoch)) for epoch in range(3)}
    for start in (1, 7, 15):
        fresh = build(config(folder, workers=workers))
        assert ids(fresh.epoch(1, start)) == truth[1][start:]
        assert ids(fresh.epoch(2)) == truth[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_one_loader_goes_anywhere(build: Build, folder: Path, workers: int) -> None:
    loader = build(config(folder, workers=workers))
    truth = {epoch: ids(loader.epoch(epoch)) for epoch in range(3)}
    assert ids(loader.epoch(0, 5)) == truth[0][5:]
    assert ids(itertools.islice(loader.epoch(1), 3)) == truth[1][:3]  # left early, as on SIGTERM
    assert ids(loader.epoch(1, 3)) == truth[1][3:]
    assert ids(loader.epoch(2, len(loader))) == []
    assert ids(loader.epoch(2)) == truth[2]
    assert ids(loader.epoch(2, 15)) == truth[2][15:]
    assert ids(loader.epoch(0)) == truth[0]


def test_a_position_behind_the_end_is_refused(build: Build, folder: Path) -> None:
    with pytest.raises(UserError, match="no micro-batch 17 in an epoch of 16"):
        list(build(config(folder)).epoch(0, 17))


def test_close_ends_the_workers(build: Build, folder: Path) -> None:
    loader = build(config(folder, workers=2))
    next(loader.epoch(0))
    workers = [Path(f"/proc/{worker.pid}") for worker in torch.multiprocessing.active_children()]
    assert workers and all(path.exists() for path in workers)
    loader.close()
    deadline = time.monotonic() + 10
    while torch.multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(path.exists() for path in workers)


def test_many_broken_off_epochs_keep_the_number_of_open_files(build: Build, folder: Path) -> None:
    loader = build(config(folder, workers=1))
    next(loader.epoch(0))
    before = len(os.listdir("/proc/self/fd"))
    for epoch in range(1, 6):
        next(loader.epoch(epoch))
        assert len(list(loader.epoch(epoch, 15))) == 1
    assert len(os.listdir("/proc/self/fd")) <= before + 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("limit", [None, 21])
def test_evaluation_reads_each_sample_once_over_the_ranks(
    folder: Path, workers: int, size: int, limit: int | None
) -> None:
    shares = []
    for rank in range(size if workers == 0 else 1):
        world = dataclasses.replace(ALONE, rank=rank, size=size)
        loader = build_eval_loader(str(folder), config(folder, workers=workers), batch=5, world=world, limit=limit)
        share = ids(loader)
        assert loader.num_samples == (limit or SIZE) and len(share) == len(loader)
        assert share == ids(loader)  # again, unshuffled
        shares += flat(share)
        own = np.array_split(np.arange(loader.num_samples), size)[rank]  # neighbours: few shards for each rank
        assert flat(share) == [int(i) * SIZE // loader.num_samples for i in own]
    assert len(set(shares)) == len(shares)
    assert workers or len(shares) == (limit or SIZE)


def test_a_limit_beyond_the_set_means_all(folder: Path) -> None:
    loader = build_eval_loader(str(folder), config(folder), batch=5, world=ALONE, limit=10_000)
    assert loader.num_samples == SIZE and flat(ids(loader)) == list(range(SIZE))


@pytest.mark.parametrize(
    ("options", "micro_batch", "message"),
    [
        ({}, 65, r"data.global_batch: 65 images \(65 on each of 1 ranks, 1 times\) are more than the 64 of .*set"),
        ({"canonical_nodes": 65}, 4, "canonical_nodes: 65 is more than the 64 samples"),
        ({"train": "nowhere://bucket/set", "cache": "cache"}, 4, "nowhere://bucket/set cannot be opened: ValueError"),
        ({"train": "/no/such/folder"}, 4, "/no/such/folder/index.json does not exist"),
        ({"validate_hash": "sha1"}, 4, "validate_hash: 'sha1' is not in the index"),
    ],
)
def test_what_cannot_work_is_said_at_once(
    build: Build, folder: Path, options: dict, micro_batch: int, message: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("leap_dist.data.store.INDEX_ATTEMPTS", 1)  # else seconds of pauses before a URI is given up
    with pytest.raises(UserError, match=message) as caught:
        build(dataclasses.replace(config(folder), **options), micro_batch=micro_batch)
    assert "\n" not in str(caught.value)


def outcome(build: Build, data: DataConfig) -> str:
    """The error of two epochs over `data`; every fault here must give one, quickly."""
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        loader = build(data)
        for epoch in range(2):
            list(loader.epoch(epoch))
    assert time.monotonic() - started < 15
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_shard_damaged_before_the_start(
    build: Build, tmp_path: Path, workers: int, compression: str | None, fault: str
) -> None:
    victim = sorted(write(tmp_path / "set", compression=compression).glob("shard.*"))[3]
    FAULTS[fault](victim)
    assert str(victim) in outcome(build, config(tmp_path / "set", workers=workers, validate_hash="xxh64"))


def hang(*_: object) -> None:
    time.sleep(60)


def dawdle(*_: object) -> None:
    time.sleep(4)  # too long, but not for the one who closes the loader


def die(*_: object) -> None:
    os._exit(3)


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("decode", "message"),
    [
        (dawdle, "timed out after 2 seconds"),
        pytest.param(hang, "timed out after 2 seconds", marks=pytest.mark.slow),  # closing it takes 10 s
        (die, "exited unexpectedly"),
    ],
)
def test_a_worker_that_hangs_or_dies_ends_the_run(
    build: Build, folder: Path, monkeypatch: pytest.MonkeyPatch, decode: object, message: str
) -> None:
    monkeypatch.setattr("leap_dist.data.transforms.decode_crop", decode)
    loader = build(config(folder, workers=1, timeout_s=2))
    with pytest.raises(UserError, match=f"{folder}: .*{message}"):
        list(loader.epoch(0))


def abandon(folder: str) -> None:
    """A rank that leaves at once, as train.py does on an error, while its worker is busy."""
    transforms.decode_crop = hang
    loader = build_train_loader(config(Path(folder), workers=1, timeout_s=2), seed=0, micro_batch=4, world=ALONE)
    try:
        next(loader.epoch(0))
    except UserError:
        print(loader._loader._iterator._workers[0].pid, flush=True)
        os._exit(1)


@pytest.mark.seconds
def test_a_worker_does_not_outlive_its_rank(folder: Path, tmp_path: Path) -> None:
    """It would hold the locks of the shards that it fetches, and the next run would wait for it."""
    said = tmp_path / "said"
    with said.open("w") as log:  # a pipe would be held open by the worker
        rank = subprocess.run(
            [sys.executable, __file__, str(folder)], stdout=log, stderr=log, timeout=120, env=helpers_on_path()
        )
    assert rank.returncode == 1, said.read_text()
    worker = int(said.read_text().splitlines()[-1])
    status, deadline = Path(f"/proc/{worker}/stat"), time.monotonic() + 10
    while status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z":
        assert time.monotonic() < deadline, "the worker lives on"
        time.sleep(0.05)


def test_an_epoch_that_ends_early_is_an_error(build: Build, folder: Path) -> None:
    loader = build(config(folder))
    loader._requests = _Requests()  # as if the workers had been asked for nothing
    with pytest.raises(UserError, match="epoch 0 ended after 0 of 16 batches"):
        list(loader.epoch(0))


if __name__ == "__main__":
    abandon(sys.argv[1])
