"""tools/make_shards.py: every image becomes a sample of the very same bytes, by any number of workers and kills."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import pty
import random
import signal
import subprocess
import sys
import termios
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from streaming import StreamingDataset

from leap_dist.data import check_shards

TOOL = Path(__file__).parents[2] / "tools/make_shards.py"


def make_tree(folder: Path, classes: tuple[str, ...] = ("ant", "bee", "cat"), each: int = 7) -> dict[bytes, str]:
    """JPEGs of different colours; bytes -> class."""
    files = {}
    for c, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            path = folder / name / f"{i}.JPEG"
            Image.new("RGB", (9, 6), (40 * c, 20 * i, len(folder.name) * 9)).save(path, "JPEG")
            files[path.read_bytes()] = name
    return files


def make_shards(*arguments: object) -> int:
    """The tool's exit status."""
    spec = importlib.util.spec_from_file_location("make_shards", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    workers = [] if "--workers" in arguments else ["--workers", 0]
    return module.main([str(argument) for argument in (*arguments, *workers)])


def contents(folder: Path) -> list[tuple[bytes, int]]:
    dataset = StreamingDataset(local=str(folder))
    return [(dataset[i]["image"], int(dataset[i]["label"])) for i in range(dataset.size)]


def tree_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_splits_keep_bytes_and_labels_and_mix_the_classes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    truth = {split: make_tree(tmp_path / "src" / split) for split in ("train", "val")}
    assert make_shards(tmp_path / "src", tmp_path / "out", "--workers", 2) == 0
    log = capfd.readouterr()
    assert log.err == ""  # no one watches: no bar
    assert log.out.splitlines() == [
        f"listing {tmp_path}/src",
        "train: 21 of 21 images, 3 classes, 1 shards",
        "val: 21 of 21 images, 3 classes, 1 shards",
    ]
    classes = json.loads((tmp_path / "out/class_to_idx.json").read_text())
    assert classes == {"ant": 0, "bee": 1, "cat": 2}
    for split, files in truth.items():
        assert check_shards(tmp_path / "out" / split, "xxh64") == 21
        samples = contents(tmp_path / "out" / split)
        assert dict(samples) == {data: classes[name] for data, name in files.items()}
        assert len({label for _, label in samples[:7]}) == 3


def test_the_number_of_workers_changes_no_byte_and_a_second_call_does_nothing(tmp_path: Path) -> None:
    make_tree(tmp_path / "src", each=30)
    for workers in (0, 1, 2):
        assert make_shards(tmp_path / "src", tmp_path / str(workers), "--workers", workers, "--shard-mib", 0.004) == 0
    written = tree_bytes(tmp_path / "0")
    assert len([name for name in written if name.endswith(".mds")]) > 5
    assert written == tree_bytes(tmp_path / "1") == tree_bytes(tmp_path / "2")
    assert Counter(data for data, _ in contents(tmp_path / "0")) == Counter(
        path.read_bytes() for path in (tmp_path / "src").rglob("*.JPEG")
    )
    (tmp_path / "0/shard.00000.mds").chmod(0o444)
    before = (tmp_path / "0/shard.00000.mds").stat()
    assert make_shards(tmp_path / "src", tmp_path / "0", "--shard-mib", 0.004) == 0
    assert (tmp_path / "0/shard.00000.mds").stat() == before and tree_bytes(tmp_path / "0") == written


def test_resize_reencodes_only_what_is_larger(tmp_path: Path) -> None:
    folder = tmp_path / "src/ant"
    folder.mkdir(parents=True)
    Image.effect_noise((60, 90), 50).convert("RGB").save(folder / "tall.png")
    Image.effect_noise((40, 30), 50).save(folder / "small.png")
    assert make_shards(tmp_path / "src", tmp_path / "out", "--resize", 40, "--quality", 95) == 0
    stored = {
        image.size: image for image, in_ in ((Image.open(io.BytesIO(d)), d) for d, _ in contents(tmp_path / "out"))
    }
    assert {size: image.format for size, image in stored.items()} == {(40, 60): "JPEG", (40, 30): "PNG"}
    whole = Image.open(folder / "tall.png").resize((40, 60), Image.Resampling.BICUBIC)
    error = np.asarray(whole, float) - np.asarray(stored[40, 60].convert("RGB"), float)
    assert np.abs(error).mean() < 3


def damage(tree: Path, *names: str) -> None:
    for name in names:
        path = tree / name
        path.write_bytes(path.read_bytes()[:150])


def test_unreadable_images_are_left_out_and_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_tree(tmp_path / "src/train")
    make_tree(tmp_path / "src/val")
    damage(tmp_path / "src", "val/ant/3.JPEG", "val/cat/0.JPEG")
    (tmp_path / "src/train/bee/nowhere.jpg").symlink_to(tmp_path / "gone")
    assert make_shards(tmp_path / "src", tmp_path / "out", "--max-bad", 0.1, "--workers", 2) == 0
    assert f"left out: {tmp_path}/out/quarantine.csv" in capfd.readouterr().out
    with open(tmp_path / "out/quarantine.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["image", "reason"]
    assert {row[0] for row in rows[1:]} == {"val/ant/3.JPEG", "val/cat/0.JPEG", "train/bee/nowhere.jpg"}
    assert all(row[1] and "0x" not in row[1] for row in rows)
    assert (check_shards(tmp_path / "out/train"), check_shards(tmp_path / "out/val")) == (21, 19)
    assert make_shards("--verify", tmp_path / "out") == 0


def test_too_many_unreadable_images_stop_it_and_a_higher_limit_continues(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_tree(tmp_path / "src")
    damage(tmp_path / "src", "bee/0.JPEG", "bee/1.JPEG")
    assert make_shards(tmp_path / "src", tmp_path / "out") == 2
    log = capfd.readouterr().err
    assert "2 of 21 images cannot be read, more than --max-bad 0.001 allows: bee/" in log and log.count("\n") == 1
    assert str(tmp_path / "out/quarantine.csv") in log
    assert len((tmp_path / "out/quarantine.csv").read_text().splitlines()) == 3
    assert not (tmp_path / "out/index.json").exists()
    assert make_shards(tmp_path / "src", tmp_path / "out", "--max-bad", 0.1) == 0
    assert make_shards(tmp_path / "src", tmp_path / "whole", "--max-bad", 1) == 0
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "whole")


def test_a_subset_by_a_class_list_keeps_the_order_of_classes(tmp_path: Path) -> None:
    files = make_tree(tmp_path / "src/train", classes=("ant", "bee", "cat", "dog"))
    make_tree(tmp_path / "src/val", classes=("ant", "bee", "cat"))  # a split may have more classes than are wanted
    (tmp_path / "list.txt").write_text("cat  # purrs\n\nant\n")
    assert make_shards(tmp_path / "src", tmp_path / "out", "--classes", tmp_path / "list.txt") == 0
    assert json.loads((tmp_path / "out/class_to_idx.json").read_text()) == {"ant": 0, "cat": 1}
    expected = {data: {"ant": 0, "cat": 1}[name] for data, name in files.items() if name in ("ant", "cat")}
    assert dict(contents(tmp_path / "out/train")) == expected


def test_imagenet100_are_100_classes_in_the_order_of_their_wnids(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_shards", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    wnids = module.read_classes("imagenet100")
    assert len(set(wnids)) == 100 and {"n02869837", "n02090622"} <= set(wnids)
    make_tree(tmp_path / "src", classes=(*wnids, "n00000001"), each=1)
    assert make_shards(tmp_path / "src", tmp_path / "out", "--classes", "imagenet100") == 0
    classes = json.loads((tmp_path / "out/class_to_idx.json").read_text())
    assert classes == {wnid: label for label, wnid in enumerate(sorted(wnids))}


def test_a_test_split_without_labels_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split in ("train", "val"):
        make_tree(tmp_path / "src" / split)
    (tmp_path / "src/test").mkdir()
    (tmp_path / "src/test/000.jpg").write_bytes(b"whatever it shows")
    assert make_shards(tmp_path / "src", tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["train", "val"]
    assert "src/test: left out, it has no class folders" in caplog.text


def test_a_flat_folder_of_images_is_one_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = make_tree(tmp_path, classes=("photos",))
    (tmp_path / "photos/notes.txt").write_text("not an image")
    assert make_shards(tmp_path / "photos", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out/class_to_idx.json").read_text()) == {"all": 0}
    assert sorted(contents(tmp_path / "out")) == sorted((data, 0) for data in files)
    assert caplog.messages == [f"{tmp_path}/photos: no class folders; its 7 images become the one class 'all'"]


@pytest.mark.parametrize(
    ("beside", "told"),
    [("src", "src: left out 2 images that lie beside the folders train"),
     ("src/train", "src/train: left out 2 images that lie beside the class folders")],
)  # fmt: skip
def test_images_beside_folders_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, beside: str, told: str
) -> None:
    files = make_tree(tmp_path / "src/train")
    for name in ("0.jpg", "1.PNG"):
        (tmp_path / beside / name).write_bytes(next(iter(files)))
    assert make_shards(tmp_path / "src", tmp_path / "out") == 0
    assert len(contents(tmp_path / "out/train")) == len(files)
    assert caplog.messages == [f"{tmp_path}/{told}"]


def test_the_listing_says_what_is_left_out_and_layout_answers_its_question(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_tree(tmp_path / "src", classes=("train", "truck"), each=2)
    (tmp_path / "src/truck/phone.heic").write_bytes(b"?")
    (tmp_path / "src/truck/.hidden.jpg").write_bytes(b"?")
    assert make_shards(tmp_path / "src", tmp_path / "out") == 2
    assert "say --layout splits" in capfd.readouterr().err
    assert make_shards(tmp_path / "src", tmp_path / "src/out", "--layout", "classes") == 2
    assert "out lies in " in capfd.readouterr().err
    assert make_shards(tmp_path / "src", tmp_path / "out", "--layout", "classes") == 0
    told = capfd.readouterr().out.splitlines()[-1]
    assert told == "all: 4 of 4 images, 2 classes, 1 shards; left out: 1 .heic, 1 hidden"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("used", "exists and is not empty"),
        ("absent", "is not a folder"),
        ("empty", "holds neither images nor class folders"),
        ("no images", "valid file for the classes bee"),
        ("classes", "bee, cat, dog (3 in all) are not in all splits"),
        ("unknown class", "n01558993, n01692333, n01729322 (100 in all) are wanted but not in the set"),
        ("no list", "neither imagenet100 nor a readable file"),
        ("other options", "with resize=None, not 32"),
        ("other images", "from other images"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str], case: str, message: str) -> None:
    source, out, options = tmp_path / "src", tmp_path / "out", []
    if case in ("used", "no images", "unknown class", "no list", "other options", "other images"):
        make_tree(source)
    if case == "used":
        out.mkdir()
        (out / "mine.txt").write_text("keep me")
    elif case == "empty":
        source.mkdir()
    elif case == "no images":
        for path in (source / "bee").iterdir():
            path.unlink()
    elif case == "classes":
        make_tree(source / "train")
        make_tree(source / "val", classes=("ant", "dog"))
    elif case in ("unknown class", "no list"):
        options = ["--classes", "imagenet100" if case == "unknown class" else "imagenet1000"]
    elif case.startswith("other"):
        damage(source, "ant/0.JPEG")
        assert make_shards(source, out) == 2
        capfd.readouterr()
        options = ["--resize", 32] if case == "other options" else []
        if case == "other images":
            damage(source, "ant/1.JPEG")
            (source / "ant/0.JPEG").unlink()
    assert make_shards(source, out, *options) == 2
    said, log = capfd.readouterr()
    assert message in log and log.startswith("error: ") and log.count("\n") == 1
    assert " images, " not in said  # nothing that reads like success before the refusal
    assert case != "used" or [path.name for path in out.iterdir()] == ["mine.txt"]


# ---- verification


def rewrite_index(folder: Path, change: object) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index["shards"])
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("flipped", "is corrupt: its xxh64"),
        ("cut", "bytes where index.json says"),
        ("missing", "No such file"),
        ("shard unlisted", "images in shards and 0 in quarantine"),
        ("split gone", "is missing, though sharding.json lists"),
        ("unfinished", "no shards, or not all of them yet"),
        ("label", "has the label 2, but class_to_idx.json lists 2"),
        ("undecodable", "sample 0 does not decode"),
    ],
)
def test_verify_names_the_fault(tmp_path: Path, capfd: pytest.CaptureFixture[str], fault: str, message: str) -> None:
    from streaming import MDSWriter

    out = tmp_path / "out"
    make_tree(tmp_path / "src/train")
    make_tree(tmp_path / "src/val")
    assert make_shards(tmp_path / "src", out, "--shard-mib", 0.004) == 0
    victim = out / "val/shard.00001.mds"
    if fault in ("flipped", "cut"):
        data = victim.read_bytes()
        victim.write_bytes(data[:-9] + (b"" if fault == "cut" else bytes(255 - byte for byte in data[-9:])))
    elif fault == "missing":
        victim.unlink()
    elif fault == "shard unlisted":
        rewrite_index(out / "val", lambda shards: shards.pop())
    elif fault == "split gone":
        (out / "val/index.json").unlink()
    elif fault == "unfinished":
        (out / "train/index.json").unlink()
        (out / "val/index.json").unlink()
    elif fault == "label":
        (out / "class_to_idx.json").write_text('{"ant": 0, "bee": 1}')
    elif fault == "undecodable":
        columns = {"image": "bytes", "label": "int"}
        with MDSWriter(out=str(tmp_path / "bad"), columns=columns, hashes=["xxh64"]) as writer:
            writer.write({"image": b"no image", "label": 0})
        (tmp_path / "bad/class_to_idx.json").write_text('{"ant": 0}')
        out = tmp_path / "bad"
    capfd.readouterr()
    assert make_shards("--verify", out, "--workers", 2) == 1
    log = capfd.readouterr().err
    assert message in log and log.startswith("error: ") and log.count("\n") == 1


def test_verify_counts_what_is_sound(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_tree(tmp_path / "src/train", each=5)
    make_tree(tmp_path / "src/val", each=2)
    (tmp_path / "src/val/bee/1.JPEG").unlink()
    assert make_shards(tmp_path / "src", tmp_path / "out") == 0
    capfd.readouterr()
    assert make_shards("--verify", tmp_path / "out") == 0
    out = capfd.readouterr().out
    assert f"{tmp_path}/out/train: 15 images, 3 classes of 5 to 5 images, all sound\n" in out
    assert f"{tmp_path}/out/val: 5 images, 3 classes of 1 to 2 images, all sound\n" in out


# ---- in a process of its own: the bar, and kills


def start(*arguments: object, **options: object) -> subprocess.Popen:
    command = [sys.executable, TOOL, *arguments]
    return subprocess.Popen([str(part) for part in command], start_new_session=True, **options)


@pytest.mark.seconds
def test_the_bar_on_a_terminal_shows_the_rate_and_the_time_left(tmp_path: Path) -> None:
    make_tree(tmp_path / "src")
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 100))
    process = start(tmp_path / "src", tmp_path / "out", "--workers", 2, stdout=subprocess.DEVNULL, stderr=end)
    os.close(end)
    shown = ""
    with suppress(OSError):  # the terminal's way to say that no one writes any more
        while part := os.read(terminal, 1 << 16):
            shown += part.decode()
    os.close(terminal)
    assert process.wait() == 0
    assert "100%" in shown and "21/21" in shown and "image/s" in shown and "<00:00" in shown


def make_slow_tree(folder: Path, images: int) -> None:
    """Images that take some 10 ms each, so that a kill finds the tool at work; two of them are damaged."""
    noise = np.random.default_rng(0)
    for i in range(images):
        path = folder / f"class{i % 4}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (500, 500, 3), dtype=np.uint8)).save(path, quality=70)
        if i % 50 == 7:
            path.write_bytes(path.read_bytes()[:5000])


SLOW = ("--shard-mib", 0.8, "--max-bad", 1)  # a handful of images a shard


def opened(out: Path) -> int:
    """When a run last took the lock of `out`, in ns; 0 if none has."""
    lock = out / ".sharding/lock"
    return lock.stat().st_mtime_ns if lock.exists() else 0


def kill_at_work(process: subprocess.Popen, whole_session: bool) -> bool:
    """SIGKILL the tool, or it and its workers; False if it was done by then."""
    killed = process.poll() is None
    if killed:
        (os.killpg if whole_session else os.kill)(process.pid, signal.SIGKILL)
    process.wait()
    return killed


@pytest.mark.seconds
def test_a_killed_run_is_continued_to_the_same_bytes(tmp_path: Path) -> None:
    make_slow_tree(tmp_path / "src", 100)
    assert make_shards(tmp_path / "src", tmp_path / "whole", *SLOW, "--workers", 2) == 0
    out = tmp_path / "out"
    process = start(tmp_path / "src", out, *SLOW, "--workers", 2)
    while len(list(out.glob(".sharding/*.json"))) < 2:
        assert process.poll() is None
        time.sleep(0.002)
    assert kill_at_work(process, whole_session=False)
    assert not (out / "index.json").exists()
    records = [path for path in out.glob(".sharding/*.json") if not json.loads(path.read_text())["bad"]]
    finished = {path: path.stat().st_mtime_ns for path in (out / f"shard.{record.stem}.mds" for record in records)}
    assert make_shards(tmp_path / "src", out, *SLOW, "--workers", 2) == 0
    assert tree_bytes(out) == tree_bytes(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in finished} == finished  # kept, not written again


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_kills_lose_and_double_nothing(tmp_path: Path) -> None:
    make_slow_tree(tmp_path / "src", 300)
    assert make_shards(tmp_path / "src", tmp_path / "whole", *SLOW, "--workers", 2) == 0
    expected = tree_bytes(tmp_path / "whole")
    dice, kills, sets, finished, out = random.Random(0), 0, 0, [], tmp_path / "out0"
    while kills < 20:
        before = opened(out)
        process = start(tmp_path / "src", out, *SLOW, "--workers", dice.choice([0, 1, 2]))
        while opened(out) == before and process.poll() is None:
            time.sleep(0.002)
        time.sleep(dice.uniform(0, 0.5))
        if kill_at_work(process, whole_session=dice.random() < 0.5):
            kills += 1
            finished.append(len(list(out.glob(".sharding/*.json"))))
            continue
        assert process.returncode == 0 and tree_bytes(out) == expected
        sets += 1
        out = tmp_path / f"out{sets}"
    assert make_shards(tmp_path / "src", out, *SLOW, "--workers", 2) == 0
    assert tree_bytes(out) == expected
    assert len(set(finished)) > 5, f"the kills did not find it at work: {finished}"


@pytest.mark.slow
def test_real_images_keep_their_bytes(tmp_path: Path) -> None:
    """LEAP_IMAGENET_SAMPLES names a tree of class folders with ImageNet's JPEGs."""
    source = os.environ.get("LEAP_IMAGENET_SAMPLES")
    if source is None:
        pytest.skip("LEAP_IMAGENET_SAMPLES does not name a folder of class folders")
    assert make_shards(source, tmp_path / "out", "--workers", 2, "--shard-mib", 4) == 0
    assert make_shards("--verify", tmp_path / "out", "--workers", 2) == 0
    stored = Counter(data for data, _ in contents(tmp_path / "out"))
    assert stored == Counter(path.read_bytes() for path in Path(source).glob("*/*") if path.is_file())
