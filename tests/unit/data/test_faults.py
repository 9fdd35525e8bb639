"""Shards and images that cannot be read, met during a run: stand-ins, the ledger, and what evaluation does."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from leap_dist.config import DataConfig
from leap_dist.data import BadSamples, Batch, TrainLoader, build_eval_loader, build_train_loader
from leap_dist.data.faults import BadSample
from leap_dist.data.store import FetchError, one_line
from leap_dist.data.streaming import STAND_INS, stand_ins
from leap_dist.errors import UserError
from small_sets import ALONE, FAULTS, SIZE, config, write

pytestmark = pytest.mark.seconds

Build = Callable[..., TrainLoader]


@pytest.fixture
def build() -> Iterator[Build]:
    """Train loaders that are closed at the end of the test."""
    loaders = []

    def build(data: DataConfig, **options: int) -> TrainLoader:
        loaders.append(build_train_loader(data, **{"seed": 0, "micro_batch": 4, "world": ALONE} | options))
        return loaders[-1]

    yield build
    for loader in loaders:
        loader.close()


def epoch_of(loader: TrainLoader, epoch: int = 0) -> tuple[dict[int, torch.Tensor], dict[int, BadSample]]:
    """Pixels by id, each id once, and the bad samples of a whole epoch, within seconds."""
    started = time.monotonic()
    batches: list[Batch] = list(loader.epoch(epoch))
    assert time.monotonic() - started < 30
    assert len(batches) == len(loader)
    pixels = {int(i): x for batch in batches for i, x in zip(batch.ids, batch.images, strict=True)}
    assert sorted(pixels) == list(range(SIZE)), "a sample was lost or doubled"
    return pixels, {bad.id: bad for batch in batches for bad in batch.bad}


def damage(folder: Path, fault: str) -> list[str]:
    """Damage three of the shards; gives the names of their raw files."""
    victims = sorted(folder.glob("shard.*"))[3:6]
    for victim in victims:
        FAULTS[fault](victim)
    return [victim.name.removesuffix(".zstd") for victim in victims]


def check_stand_ins(pixels: dict, bad: dict[int, BadSample], raw: dict[int, torch.Tensor], shards: list[str]) -> None:
    """Bad samples come from the damaged shards only; each shows, unaugmented here, its first good stand-in."""
    assert bad and {fault.shard for fault in bad.values()} <= set(shards)
    for i, image in pixels.items():
        shown = next(j for j in [i, *stand_ins(i, SIZE)] if j not in bad)
        assert torch.equal(image, raw[shown]), i


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> dict[int, torch.Tensor]:
    """Every sample of the undamaged set as it is."""
    loader = build_train_loader(
        config(write(tmp_path_factory.mktemp("whole") / "set"), augment="none"), seed=0, micro_batch=4, world=ALONE
    )
    return epoch_of(loader)[0]


GRID = list(itertools.product(FAULTS, (None, "zstd"), (0, 2)))


@pytest.mark.parametrize(("fault", "compression", "workers"), GRID)
def test_shards_damaged_in_place_are_stood_in_for(
    build: Build, raw: dict, tmp_path: Path, fault: str, compression: str | None, workers: int
) -> None:
    folder = write(tmp_path / "set", compression=compression)
    loader = build(config(folder, workers=workers, augment="none", validate_hash="xxh64"))
    shards = damage(folder, fault)
    for epoch in range(2):
        pixels, bad = epoch_of(loader, epoch)
        if fault == "flipped" and compression is None:
            # A raw shard that is read in place is hashed at the start only: now pixels tell, where they can.
            assert {found.shard for found in bad.values()} <= set(shards)
            continue
        check_stand_ins(pixels, bad, raw, shards)
    if fault == "cut" and compression is None:
        assert len(bad) == len(shards)  # the last sample of each; the others are whole


@pytest.mark.parametrize(("fault", "compression", "workers"), GRID)
def test_shards_damaged_at_the_remote_are_stood_in_for(
    build: Build, raw: dict, tmp_path: Path, fault: str, compression: str | None, workers: int
) -> None:
    """A URI cannot be checked beforehand; a plain folder behind a cache would be, so damage it after the check."""
    folder = write(tmp_path / "set", compression=compression)
    data = config(folder, workers=workers, cache=str(tmp_path / "cache"), validate_hash="xxh64", augment="none")
    loader = build(data)
    shards = damage(folder, fault)
    first, second = epoch_of(loader), epoch_of(loader, 1)
    check_stand_ins(*first, raw, shards)
    assert first[1] == second[1] and {bad.shard for bad in first[1].values()} == set(shards)
    (cached,) = (tmp_path / "cache").iterdir()
    assert not set(shards) & {path.name for path in cached.iterdir()}, "a damaged shard was kept"


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_damaged_remote_shard_without_a_hash_is_seen_by_its_size(
    build: Build, raw: dict, tmp_path: Path, compression: str | None
) -> None:
    folder = write(tmp_path / "set", compression=compression)
    loader = build(config(folder, cache=str(tmp_path / "cache"), augment="none"))
    shards = damage(folder, "cut")
    pixels, bad = epoch_of(loader)
    check_stand_ins(pixels, bad, raw, shards)
    (cached,) = (tmp_path / "cache").iterdir()
    assert not set(shards) & {path.name for path in cached.iterdir()}, "a damaged shard was kept"


def test_a_stand_in_is_augmented_as_the_sample_it_stands_for(build: Build, tmp_path: Path) -> None:
    """And is the same for any number of ranks and workers, being a function of the sample's id."""
    whole = epoch_of(build(config(write(tmp_path / "whole"))))[0]
    data = config(write(tmp_path / "set", bad=37))
    pixels, bad = epoch_of(build(data))
    assert bad == {37: BadSample(37, bad[37].shard, bad[37].reason)} and "does not decode" in bad[37].reason
    assert all(torch.equal(pixels[i], whole[i]) for i in range(SIZE) if i != 37)
    other = stand_ins(37, SIZE)[0]
    dataset = build(data)._dataset
    assert torch.equal(pixels[37], dataset.get_item(37, 0, content_of=other)[0])
    assert not torch.equal(pixels[37], dataset.get_item(other, 0)[0])


def test_the_label_is_the_stand_ins(build: Build, tmp_path: Path) -> None:
    batches = build(config(write(tmp_path / "set", bad=37))).epoch(0)
    labels = {int(i): int(label) for batch in batches for i, label in zip(batch.ids, batch.labels, strict=True)}
    assert labels == {i: i for i in range(SIZE)} | {37: stand_ins(37, SIZE)[0]}


def test_stand_ins_are_a_function_of_the_id_spread_over_the_set() -> None:
    assert stand_ins(5, 1000) == stand_ins(5, 1000) != stand_ins(6, 1000)
    drawn = [other for i in range(500) for other in stand_ins(i, 10)]
    assert len(drawn) == 500 * STAND_INS
    assert all(abs(drawn.count(digit) / len(drawn) - 0.1) < 0.01 for digit in range(10))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_set_of_which_nothing_can_be_read_ends_the_run(build: Build, tmp_path: Path, workers: int) -> None:
    folder = write(tmp_path / "set")
    loader = build(config(folder, workers=workers))
    for shard in folder.glob("shard.*"):
        shard.unlink()
    with pytest.raises(UserError, match=rf"{folder}: sample \d+ cannot be read: .*nor can any of 20 others") as caught:
        list(loader.epoch(0))
    assert "\n" not in str(caught.value)


def test_a_shard_that_failed_is_tried_again_later(
    build: Build, raw: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that was away must not make its shards bad for ever."""
    folder = write(tmp_path / "set")
    loader = build(config(folder, cache=str(tmp_path / "cache"), augment="none"))
    hidden = folder / "shard.00004.mds"
    hidden.rename(tmp_path / "away")
    assert {bad.shard for bad in epoch_of(loader)[1].values()} == {hidden.name}
    (tmp_path / "away").rename(hidden)
    assert epoch_of(loader, 1)[1], "tried again at once"
    monkeypatch.setattr("leap_dist.data.store.RETRY_AFTER_S", 0.0)
    pixels, bad = epoch_of(loader, 2)
    assert not bad and all(torch.equal(pixels[i], raw[i]) for i in raw)


def test_a_new_run_tries_failed_shards_at_once(build: Build, tmp_path: Path) -> None:
    folder = write(tmp_path / "set")
    data = config(folder, cache=str(tmp_path / "cache"))
    loader = build(data)
    (folder / "shard.00004.mds").rename(tmp_path / "away")
    assert epoch_of(loader)[1]
    (tmp_path / "away").rename(folder / "shard.00004.mds")
    assert not epoch_of(build(data))[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_out_what_it_cannot_read(
    tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Another sample in its place would falsify an accuracy."""
    data = config(write(tmp_path / "set", bad=37), workers=workers, max_bad_fraction=0.02)
    loader = build_eval_loader(str(tmp_path / "set"), data, batch=1, world=ALONE)
    seen = [(int(i), int(label)) for batch in loader for i, label in zip(batch.ids, batch.labels, strict=True)]
    assert seen == [(i, i) for i in range(SIZE) if i != 37]
    assert "1 samples cannot be read and are left out: [37]" in caplog.text


def test_evaluation_stops_when_too_much_is_missing(tmp_path: Path) -> None:
    data = config(write(tmp_path / "set", bad=37), max_bad_fraction=0.0)
    with pytest.raises(
        UserError, match=r"1 of 64 samples of .*set cannot be read, at most 0 may be; the last is 37, wh"
    ):
        list(build_eval_loader(str(tmp_path / "set"), data, batch=5, world=ALONE))


def test_a_rank_that_can_read_nothing_at_all_says_so(tmp_path: Path) -> None:
    """It would have no batch to keep in step with ranks whose model is collective."""
    data = config(write(tmp_path / "set", bad=0), max_bad_fraction=1.0)
    with pytest.raises(UserError, match="none of this rank's 1 samples can be read"):
        list(build_eval_loader(str(tmp_path / "set"), data, batch=5, world=ALONE, limit=1))


def bad(*ids: int) -> list[BadSample]:
    return [BadSample(i, "shard.00000.mds", "does not decode") for i in ids]


def test_the_ledger_counts_distinct_samples_and_lists_them(tmp_path: Path) -> None:
    ledger = BadSamples(tmp_path / "bad.jsonl", most=3, world=ALONE)
    ledger.reopen(resumed=False)
    for found in (bad(9, 2), bad(2), bad(), bad(9)):
        ledger.note(found)
        if ledger.fresh:
            ledger.share()
    assert len(ledger) == 2 and not ledger.fresh
    listed = [json.loads(line) for line in ledger.path.read_text().splitlines()]
    assert listed == [{"id": i, "shard": "shard.00000.mds", "reason": "does not decode"} for i in (2, 9)]


def test_the_ledger_outlives_a_resume_and_not_a_fresh_start(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    first, resumed, fresh = (BadSamples(path, most=3, world=ALONE) for _ in range(3))
    first.reopen(resumed=False)
    first.note(bad(1, 2))
    first.share()
    resumed.reopen(resumed=True)
    resumed.note(bad(2, 3))
    assert list(resumed.fresh) == [3]
    resumed.share()
    assert len(resumed) == 3
    fresh.reopen(resumed=False)
    assert len(fresh) == 0 and not path.exists()


def test_samples_that_did_not_arrive_are_tried_again_by_a_resumed_run(tmp_path: Path) -> None:
    """Else one bad image would end a run that an outage of the network had brought to the limit."""
    path = tmp_path / "bad.jsonl"
    first, resumed = (BadSamples(path, most=3, world=ALONE) for _ in range(2))
    first.note([*bad(1), BadSample(2, "shard.00000.mds", f"cannot be read: {one_line(FetchError('away'))}")])
    first.share()
    resumed.reopen(resumed=True)
    assert len(first) == 2 and len(resumed) == 1


def test_a_list_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"id": 5, "sha')
    with pytest.raises(UserError, match=r"bad\.jsonl is not a list of bad samples: .*; delete it"):
        BadSamples(tmp_path / "bad.jsonl", most=3, world=ALONE).reopen(resumed=True)


def test_beyond_the_limit_the_run_stops_with_the_list(tmp_path: Path) -> None:
    ledger = BadSamples(tmp_path / "bad.jsonl", most=3, world=ALONE)
    ledger.note(bad(1, 2, 3))
    ledger.share()
    ledger.note(bad(4))
    with pytest.raises(UserError, match=rf"4 training samples cannot be read, at most 3 may be; .*{ledger.path}"):
        ledger.share()
    assert len(ledger.path.read_text().splitlines()) == 4
