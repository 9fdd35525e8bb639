"""The plan of a set of shards is a function of its source alone, and what interrupts the writing leaves no trace."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from streaming import MDSWriter

from leap_dist.data import check_shards, sharding
from leap_dist.data.parallel import parallel
from leap_dist.data.plans import Recipe, Shard, plan
from leap_dist.data.sharding import write_planned
from leap_dist.data.sources import Images
from leap_dist.errors import UserError

CLASSES = ["b", "a", "c"]


@dataclass(frozen=True, kw_only=True)
class Grey(Images):
    """One-pixel PNGs with a tail of any length."""

    def reader(self, numbers: Sequence[int]) -> Callable[[int], bytes]:
        return grey


def grey(number: int) -> bytes:
    png = io.BytesIO()
    Image.new("L", (1, 1), number % 256).save(png, "PNG")
    return png.getvalue() + bytes(10 * (number % 13))


def greys(count: int, **changes: object) -> Grey:
    values = {
        "classes": CLASSES,
        "names": [str(i) for i in range(count)],
        "labels": np.arange(count) % 3,
        "sizes": np.array([len(grey(i)) for i in range(count)]),
    }
    return Grey(**{**values, **changes})


def write(out: Path, images: Images, workers: int = 0, **recipe: object) -> int:
    """Number of images that were reported as done."""
    return sum(write_planned(plan({".": images}, Recipe(**recipe)), out, workers, max_bad=0))


def numbers(shards: list[Shard]) -> list[int]:
    return [number for shard in shards for number in shard.images.tolist()]


def test_every_image_is_in_one_shard_in_an_order_that_mixes() -> None:
    shards = plan({".": greys(300)}, Recipe(shard_mib=0.004)).shards
    assert len(shards) > 5 and [shard.number for shard in shards] == list(range(len(shards)))
    order = numbers(shards)
    assert sorted(order) == list(range(300))
    assert order != sorted(order) and np.corrcoef(order, np.arange(300))[0, 1] < 0.2
    # Pinned: resuming with another version of numpy must go on where the old one stopped.
    assert numbers(plan({".": greys(12)}, Recipe()).shards) == [10, 6, 4, 9, 2, 11, 0, 7, 5, 8, 3, 1]


def test_shards_are_full_but_not_over(tmp_path: Path) -> None:
    assert write(tmp_path, greys(400), shard_mib=0.006) == 400
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("*.mds"))]
    limit, header, largest = 0.006 * 2**20, 400, len(grey(12)) + 16
    assert len(sizes) > 4 and max(sizes) < limit + header
    assert min(sizes[:-1]) > limit - largest


def test_windows_are_kept_apart_and_follow_each_other() -> None:
    windows = np.arange(300) // 20 % 5
    order = numbers(plan({".": greys(300, windows=windows)}, Recipe()).shards)
    assert windows[order].tolist() == sorted(windows.tolist())
    assert np.diff(order[:60]).min() < 0  # mixed inside


def test_reencoded_images_are_planned_smaller() -> None:
    images = greys(1000, sizes=np.full(1000, 110_000))
    whole, resized = (len(plan({".": images}, Recipe(resize=resize)).shards) for resize in (None, 256))
    assert whole == 2 and resized == 1


def test_classes_keep_their_order_and_what_has_no_label_is_left_out() -> None:
    train = greys(12, labels=np.array([0, 1, 2, -1] * 3))
    planned = plan({"train": train, "test": greys(4, labels=np.full(4, -1))}, Recipe())
    assert planned.classes == {"b": 0, "a": 1, "c": 2} and list(planned.sources) == ["train"]
    assert sorted(numbers(planned.shards)) == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    part = plan({"train": train}, Recipe(), wanted=["c", "b"])
    assert part.classes == {"b": 0, "c": 1}
    assert part.labels["train"].tolist() == [0, -1, 1, -1] * 3


def test_classes_of_splits_are_matched_by_name() -> None:
    val = greys(6, classes=["a", "b", "c"])
    planned = plan({"train": greys(6), "val": val}, Recipe())
    assert planned.labels["val"].tolist() == [1, 0, 2] * 2
    with pytest.raises(UserError, match=r"classes c, d \(2 in all\) are not in all splits"):
        plan({"train": greys(6), "val": replace(val, classes=["a", "b", "d"])}, Recipe())


def test_two_classes_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match="two classes are named 'crane'"):
        plan({".": greys(6, classes=["crane", "boat", "crane"])}, Recipe())


def test_no_images_at_all_is_an_error() -> None:
    with pytest.raises(UserError, match="no images to write"):
        plan({".": greys(3, labels=np.full(3, -1))}, Recipe())


@pytest.mark.parametrize("fault", ["cut", "missing"])
def test_a_finished_shard_that_was_touched_is_written_again(tmp_path: Path, fault: str) -> None:
    recipe = {"shard_mib": 0.004}
    assert write(tmp_path / "whole", greys(200), **recipe) == 200
    progress = write_planned(plan({".": greys(200)}, Recipe(**recipe)), tmp_path / "out", 0, max_bad=0)
    for _ in range(3):
        next(progress)
    progress.close()
    victim = tmp_path / "out/shard.00001.mds"
    victim.unlink() if fault == "missing" else victim.write_bytes(victim.read_bytes()[:-1])
    assert not (tmp_path / "out/index.json").exists()
    assert write(tmp_path / "out", greys(200), **recipe) == 200
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_images_that_could_not_be_read_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unplugged(number: int) -> bytes:
        raise OSError("the disk is away")

    with monkeypatch.context() as patched, pytest.raises(UserError, match="the disk is away"):
        patched.setattr(Grey, "reader", lambda *_: unplugged)
        write(tmp_path / "out", greys(60), shard_mib=0.004)
    assert write(tmp_path / "out", greys(60), shard_mib=0.004) == 60
    assert write(tmp_path / "whole", greys(60), shard_mib=0.004) == 60
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_a_kill_left_at_the_very_end_is_cleaned(tmp_path: Path) -> None:
    write(tmp_path, greys(9))
    expected = contents(tmp_path)
    (tmp_path / ".sharding").mkdir()
    (tmp_path / ".sharding/00000.json").write_text("{")
    assert write(tmp_path, greys(9)) == 9
    assert contents(tmp_path) == expected and not (tmp_path / ".sharding").exists()


def test_a_kill_before_the_parameters_were_recorded_does_not_block_the_folder(tmp_path: Path) -> None:
    (tmp_path / "out/.sharding").mkdir(parents=True)
    assert write(tmp_path / "out", greys(9)) == 9
    assert check_shards(tmp_path / "out", "xxh64") == 9


def test_two_at_once_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "LOCK_SECONDS", 0.2)
    (tmp_path / ".sharding").mkdir()
    with open(tmp_path / ".sharding/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing shards here"):
            write(tmp_path, greys(9))
    assert write(tmp_path, greys(9)) == 9


def test_a_full_disk_is_one_line_and_can_be_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(MDSWriter, "write", full)
        with pytest.raises(UserError, match=r"No space left: the disk of .*/out is full, \d+\.\d MiB are free"):
            write(tmp_path / "out", greys(50), workers=1, shard_mib=0.004)
    assert write(tmp_path / "out", greys(50), shard_mib=0.004) == 50


def square(value: int) -> int:
    if value == 5:
        raise UserError("five is out")
    if value == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    if value == 7:
        raise ZeroDivisionError
    return value * value


@pytest.mark.parametrize("workers", [0, 2])
def test_parallel_keeps_the_order(workers: int) -> None:
    assert list(parallel(square, range(5), workers)) == [0, 1, 4, 9, 16]
    assert list(parallel(square, [], workers)) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_parallel_passes_errors_on(workers: int) -> None:
    with pytest.raises(UserError, match=r"^five is out$"):
        list(parallel(square, [1, 5], workers))
    with pytest.raises(ZeroDivisionError):
        list(parallel(square, [7], workers))


@pytest.mark.seconds
def test_a_killed_worker_is_an_error() -> None:
    with pytest.raises(UserError, match="a worker process was killed"):
        list(parallel(square, [1, 6], 1))
