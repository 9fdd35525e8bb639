"""make_shards.py --part and --merge: many machines make one set, the same whoever makes what and is killed when."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import make_shards as tool
import numpy as np
import pytest
from PIL import Image
from streaming import StreamingDataset
from streaming.base.util import merge_index
from tar_sets import make_shards, stored, tree_bytes, write_tar, write_tars

from leap_dist.data import check_shards, merging, plans, sharding
from leap_dist.data.sharding import Part
from leap_dist.data.sources import tree
from leap_dist.data.sources.walk import Found
from small_sets import png

SMALL = ("--shard-mib", 0.001)


def write_tree(folder: Path, each: int = 20) -> list[tuple[bytes, int]]:
    for number in range(3 * each):
        path = folder / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    return [(png(number), number % 3) for number in range(3 * each)]


def make_parts(source: Path, out: Path, of: int, *options: object) -> None:
    for number in random.Random(0).sample(range(1, of + 1), of):  # in any order
        assert make_shards(source, out, "--part", f"{number}/{of}", *SMALL, *options) == 0


def said(capfd: pytest.CaptureFixture[str]) -> str:
    """The one line that a refusal is."""
    log = capfd.readouterr().err
    assert log.startswith("error: ") and log.count("\n") == 1, log
    return log


@pytest.mark.parametrize("of", [2, 3, 12])
def test_parts_of_tars_are_merged_in_the_order_of_the_source(tmp_path: Path, of: int) -> None:
    truth = write_tars(tmp_path / "src")
    make_parts(tmp_path / "src", tmp_path / "out", of)
    assert make_shards("--merge", tmp_path / "out") == 0
    assert stored(tmp_path / "out") == truth
    assert make_shards(tmp_path / "src", tmp_path / "whole", *SMALL) == 0
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")
    assert (tmp_path / "out/class_to_idx.json").read_bytes() == (tmp_path / "whole/class_to_idx.json").read_bytes()


def shards(out: Path) -> list[bytes]:
    index = json.loads((out / "index.json").read_text())["shards"]
    return [(out / info["raw_data"]["basename"]).read_bytes() for info in index]


def test_parts_of_class_folders_are_the_shards_of_the_whole(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        write_tree(tmp_path / "src" / split)
    make_parts(tmp_path / "src", tmp_path / "out", 4)
    capfd.readouterr()
    assert make_shards(tmp_path / "out", "--verify") == 1
    assert "its parts are to be merged first: --merge" in said(capfd)
    assert make_shards(tmp_path / "out", "--merge", "--verify") == 0
    assert make_shards(tmp_path / "src", tmp_path / "whole", "--part", "1/1", *SMALL) == 0
    for split in ("train", "val"):
        assert shards(tmp_path / "out" / split) == shards(tmp_path / "whole" / split)
        assert check_shards(tmp_path / "out" / split, "xxh64") == 60
    assert not (tmp_path / "out/.sharding").exists()


def test_the_merged_index_is_streamings_own(tmp_path: Path) -> None:
    truth = write_tars(tmp_path / "src")
    make_parts(tmp_path / "src", tmp_path / "out", 3)
    assert make_shards("--merge", tmp_path / "out") == 0
    ours = json.loads((tmp_path / "out/index.json").read_text())
    (tmp_path / "theirs").mkdir()
    merge_index([str(tmp_path / f"out/{i}-of-3/index.json") for i in (1, 2, 3)], str(tmp_path / "theirs"))
    assert ours == json.loads((tmp_path / "theirs/index.json").read_text())
    assert all(info["raw_data"]["hashes"]["xxh64"] for info in ours["shards"])
    dataset = StreamingDataset(local=str(tmp_path / "out"), shuffle=False, batch_size=1)
    assert [(dataset[i]["image"], int(dataset[i]["label"])) for i in range(dataset.size)] == truth


def test_merging_twice_changes_nothing_and_finished_parts_are_kept(tmp_path: Path) -> None:
    write_tars(tmp_path / "src")
    make_parts(tmp_path / "src", tmp_path / "out", 3)
    assert make_shards("--merge", tmp_path / "out") == 0
    before = tree_bytes(tmp_path / "out")
    assert make_shards("--merge", tmp_path / "out") == 0
    assert tree_bytes(tmp_path / "out") == before
    make_parts(tmp_path / "src", tmp_path / "out", 3)
    assert tree_bytes(tmp_path / "out") == before


def test_parts_made_elsewhere_are_copied_together(tmp_path: Path) -> None:
    truth = write_tars(tmp_path / "src")
    for number in (1, 2, 3):
        assert make_shards(tmp_path / "src", tmp_path / f"m{number}", "--part", f"{number}/3", *SMALL) == 0
        shutil.copytree(tmp_path / f"m{number}", tmp_path / "out", dirs_exist_ok=True)
    assert make_shards("--merge", tmp_path / "out") == 0
    assert stored(tmp_path / "out") == truth


def test_bad_images_of_all_parts_are_listed_together(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_tars(tmp_path / "src")
    for number in (2, 5):
        write_tar(
            tmp_path / f"src/{number:05}.tar", {"1.png": b"no image", "1.cls": b"9", "2.png": png(2), "2.cls": b"8"}
        )
    assert make_shards(tmp_path / "src", tmp_path / "out", "--part", "2/2", *SMALL) == 2
    assert "more than --max-bad 0.001 allows: 00005.tar/1" in said(capfd)
    assert (tmp_path / "out/part-2-of-2.quarantine.csv").exists()
    make_parts(tmp_path / "src", tmp_path / "out", 2, "--max-bad", 0.2)
    assert make_shards("--merge", tmp_path / "out") == 0
    with open(tmp_path / "out/quarantine.csv", newline="") as file:
        assert [row[0] for row in csv.reader(file)] == ["image", "00002.tar/1", "00005.tar/1"]
    assert json.loads((tmp_path / "out/class_to_idx.json").read_text())["8"] == 8
    assert not list((tmp_path / "out").glob("part-*.csv"))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "of 3 parts 2 are not done: run --part 2/3"),
        ("shard gone", "is missing: run --part 2/3 again"),
        ("shard cut", "where index.json says"),
        ("index cut", "index.json cannot be read"),
        ("record cut", "part-2-of-3.json cannot be read"),
        ("other options", "part-2-of-3.json was begun with resize=4, not None"),
        ("other source", "part-2-of-3.json was begun from other images"),
        ("other number", "part-2-of-4.json is none of the 3 parts of this set"),
        ("nothing", "no part of a set was begun there"),
        ("whole", "was not made in parts: there is nothing to merge"),
    ],
)
def test_what_cannot_be_merged_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], case: str, message: str
) -> None:
    source, out = tmp_path / "src", tmp_path / "out"
    write_tars(source)
    if case == "whole":
        assert make_shards(source, out) == 0
    elif case != "nothing":
        make_parts(source, out, 3)
    victim = out / "2-of-3"
    if case == "missing":
        (out / "part-2-of-3.json").unlink()
    elif case == "shard gone":
        next(victim.glob("*.mds")).unlink()
    elif case in ("shard cut", "index cut", "record cut"):
        path = {"s": next(victim.glob("*.mds"), None), "i": victim / "index.json", "r": out / "part-2-of-3.json"}[
            case[0]
        ]
        path.write_bytes(path.read_bytes()[:-9])
    elif case.startswith("other"):
        if case == "other source":
            write_tars(source, tars=7)
        part = "2/4" if case == "other number" else "2/3"
        options = ["--resize", 4] if case == "other options" else []
        assert make_shards(source, tmp_path / "o", "--part", part, *SMALL, *options) == 0
        shutil.copytree(tmp_path / "o", out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("sharding.json"))
    capfd.readouterr()
    assert make_shards("--merge", out) == 2
    assert message in said(capfd)
    assert case == "whole" or not (out / "index.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--part", "1/2"], "was begun in 3 parts and not in 2 parts"),
        ([], "was begun in 3 parts and not as a whole"),
        (["--part", "1/3", "--resize", 4], "was begun with resize=None, not 4"),
    ],
)
def test_a_set_is_made_in_one_way(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], options: list[object], message: str
) -> None:
    write_tars(tmp_path / "src", tars=3)
    assert make_shards(tmp_path / "src", tmp_path / "out", "--part", "1/3", *SMALL) == 0
    capfd.readouterr()
    assert make_shards(tmp_path / "src", tmp_path / "out", *SMALL, *options) == 2
    assert message in said(capfd)


def test_a_part_that_was_damaged_is_made_again(tmp_path: Path) -> None:
    truth = write_tars(tmp_path / "src")
    make_parts(tmp_path / "src", tmp_path / "out", 3)
    next((tmp_path / "out/2-of-3").glob("*.mds")).unlink()
    make_parts(tmp_path / "src", tmp_path / "out", 3)
    assert make_shards("--merge", tmp_path / "out") == 0
    assert stored(tmp_path / "out") == truth


def test_two_machines_at_one_part_are_refused_and_others_work(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "LOCK_SECONDS", 0.2)
    write_tars(tmp_path / "src")
    work = tmp_path / "out/.sharding/2-of-3"
    work.mkdir(parents=True)
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert make_shards(tmp_path / "src", tmp_path / "out", "--part", "2/3") == 2
        assert "part 2/3: another process is writing shards here" in said(capfd)
        assert make_shards(tmp_path / "src", tmp_path / "out", "--part", "1/3") == 0
    assert make_shards(tmp_path / "src", tmp_path / "out", "--part", "2/3") == 0


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/", "1/99999999", "1/3/4"])
def test_a_part_is_one_of_some(text: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tool.parse(["a", "b", "--part", text])
    assert "K/N is expected" in capfd.readouterr().err


@pytest.mark.parametrize("of", [1, 2, 7, 64, 1000])
def test_every_piece_is_of_one_part_and_parts_are_alike(of: int) -> None:
    weights = np.random.default_rng(of).integers(1, 100, 3000)
    chosen = [Part(number, of).choose(weights) for number in range(1, of + 1)]
    assert [piece for part in chosen for piece in part] == list(range(3000))
    sums = [weights[part.start : part.stop].sum() for part in chosen]
    assert max(sums) - min(sums) <= 2 * weights.max()


# ---- at scale


@pytest.mark.parametrize("classes", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: int) -> None:
    """Two million names of a lister, shuffled 2**14 at a time, take as much memory as a fiftieth of them."""
    each = 2000

    def listed(folder: Path, taken: list[str], name: str) -> Found:
        return Found([(f"{folder}/{name}/{number:09}.jpg", 100_000) for number in range(each)])

    def peak(classes: int) -> int:
        names = [f"class{number:05}" for number in range(classes)]
        monkeypatch.setattr(tree, "_classes", lambda folder: (names, Counter()))
        tracemalloc.start()
        images = tree.open_tree(tmp_path, 0, "classes", tmp_path)
        planned = plans.plan(images, plans.Recipe(), scratch=tmp_path)
        assert sum(len(shard.images) for shard in planned.pieces) == planned.weights.sum() == classes * each
        assert planned.parameters()["splits"]["."]["images"] == classes * each
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    monkeypatch.setattr(plans, "SHUFFLED", 1 << 14)
    monkeypatch.setattr(plans, "AT_ONCE", 1 << 14)
    monkeypatch.setattr(tree, "_class_files", listed)
    monkeypatch.setattr(tree, "_loose_images", lambda folder: [])
    small, large = peak(20), peak(classes)
    assert large < 1.3 * small and large < 16 << 20, (small, large)


def test_a_set_beyond_what_is_shuffled_together_is_still_every_image_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "SHUFFLED", 25)
    truth = write_tree(tmp_path / "src")
    assert make_shards(tmp_path / "src", tmp_path / "out", *SMALL) == 0
    assert sorted(stored(tmp_path / "out")) == sorted(truth)


# ---- kills


def start(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, tool.__file__, *map(str, arguments)], start_new_session=True)


def write_slow_tars(folder: Path) -> None:
    """Images that take some 10 ms each, so that a kill finds the tool at work."""
    noise = np.random.default_rng(0)
    for number in range(16):
        members = {}
        for i in range(12):
            jpeg = io.BytesIO()
            Image.fromarray(noise.integers(0, 256, (500, 500, 3), dtype=np.uint8)).save(jpeg, "JPEG", quality=70)
            members |= {f"{i}.jpg": jpeg.getvalue(), f"{i}.cls": str(i).encode()}
        write_tar(folder / f"{number:05}.tar", members)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_kills_of_parts_and_merges_lose_and_double_nothing(tmp_path: Path) -> None:
    write_slow_tars(tmp_path / "src")
    options = ("--shard-mib", 0.3)
    for number in (1, 2, 3):
        assert make_shards(tmp_path / "src", tmp_path / "whole", "--part", f"{number}/3", *options, workers=2) == 0
    assert make_shards("--merge", tmp_path / "whole") == 0
    expected = tree_bytes(tmp_path / "whole")
    dice, out, kills, states = random.Random(0), tmp_path / "out", 0, []
    while kills < 20:
        tasks = [("--part", f"{number}/3", "--workers", dice.choice([0, 1, 2]), *options) for number in (1, 2, 3)]
        processes = [start(tmp_path / "src", out, *task) for task in tasks]
        began = work(out)
        while work(out) == began and any(process.poll() is None for process in processes):
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 0.3))
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
            process.wait()
        states.append(len(list(out.glob(".sharding/*/*.json"))) + 100 * len(list(out.glob("part-*.json"))))
        if len(list(out.glob("part-*-of-3.json"))) == 3:
            merging = start("--merge", out)
            while merging.poll() is None and not (out / ".sharding/lock").exists():
                time.sleep(0.001)
            merging.kill()
            merging.wait()
            assert make_shards("--merge", out) == 0
            assert tree_bytes(out) == expected
            shutil.rmtree(out)
    for number in (1, 2, 3):
        assert make_shards(tmp_path / "src", out, "--part", f"{number}/3", *options, workers=2) == 0
    assert make_shards("--merge", out) == 0
    assert tree_bytes(out) == expected
    assert len(set(states)) > 3, f"the kills did not find it at work: {states}"


def work(out: Path) -> int:
    """How much has been written."""
    return len(list(out.rglob("*.mds")))


def test_a_kill_in_a_merge_leaves_no_index_or_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    truth = write_tars(tmp_path / "src")
    make_parts(tmp_path / "src", tmp_path / "out", 3)
    read, calls = merging.read_part_index, 0

    def dies(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Killed
        return read(*arguments)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(merging, "read_part_index", dies)
        make_shards("--merge", tmp_path / "out")
    assert not (tmp_path / "out/index.json").exists()
    assert make_shards("--merge", tmp_path / "out") == 0
    assert stored(tmp_path / "out") == truth


def test_only_what_was_out_of_reach_is_tried_again(tmp_path: Path) -> None:
    """In tars of web images nearly every piece has one that does not decode; a kill must not cost them all."""
    write_tars(tmp_path / "src", tars=3)
    write_tar(tmp_path / "src/00001.tar", {"1.png": b"no image", "1.cls": b"1"})
    whole = (tmp_path / "src/00002.tar").read_bytes()
    (tmp_path / "src/00002.tar").write_bytes(whole[:9000] + b"\1" * (len(whole) - 9000))
    options = (*SMALL, "--max-bad", 0.06)
    assert make_shards(tmp_path / "src", tmp_path / "out", *options) == 2
    records = sorted((tmp_path / "out/.sharding").glob("*.json"))
    assert [json.loads(path.read_text())["retry"] for path in records] == [False, False, True]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.mds")}
    (tmp_path / "src/00002.tar").write_bytes(whole)
    assert make_shards(tmp_path / "src", tmp_path / "out", *options) == 0
    kept = {path.name[:11] for path, written in before.items() if path.stat().st_mtime_ns == written}
    assert kept == {"shard.00000"} and len(stored(tmp_path / "out")) == 20
