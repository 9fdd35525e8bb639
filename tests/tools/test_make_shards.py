"""tools/make_shards.py: an image tree becomes shards that hold the very same bytes, or nothing at all."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

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


def convert(source: Path, out: Path, workers: int = 0) -> int:
    """The tool's exit status."""
    spec = importlib.util.spec_from_file_location("make_shards", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(source), str(out), "--workers", str(workers)])


def contents(folder: Path) -> list[tuple[bytes, int]]:
    dataset = StreamingDataset(local=str(folder))
    return [(dataset[i]["image"], int(dataset[i]["label"])) for i in range(dataset.size)]


@pytest.mark.parametrize("workers", [0, 2])
def test_splits_keep_bytes_and_labels_and_mix_the_classes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], workers: int
) -> None:
    truth = {split: make_tree(tmp_path / "src" / split) for split in ("train", "val")}
    assert convert(tmp_path / "src", tmp_path / "out", workers) == 0
    assert "image/s" in capfd.readouterr().err
    classes = json.loads((tmp_path / "out/class_to_idx.json").read_text())
    assert classes == {"ant": 0, "bee": 1, "cat": 2}
    for split, files in truth.items():
        assert check_shards(tmp_path / "out" / split, "xxh64") == 21
        samples = contents(tmp_path / "out" / split)
        assert dict(samples) == {data: classes[name] for data, name in files.items()}
        assert len({label for _, label in samples[:7]}) == 3


def test_a_tree_without_splits_and_the_same_order_twice(tmp_path: Path) -> None:
    make_tree(tmp_path / "src")
    for out in ("a", "b"):
        assert convert(tmp_path / "src", tmp_path / out) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert (tmp_path / "a/class_to_idx.json").exists()


def test_unreadable_images_are_all_listed_and_nothing_is_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_tree(tmp_path / "src/train")
    make_tree(tmp_path / "src/val")
    for name in ("val/ant/3.JPEG", "val/cat/0.JPEG"):
        path = tmp_path / "src" / name
        path.write_bytes(path.read_bytes()[:150])
    assert convert(tmp_path / "src", tmp_path / "out") == 2
    log = capfd.readouterr().err
    assert "the 2 images listed above do not decode" in log
    assert f"{tmp_path}/src/val/ant/3.JPEG\n{tmp_path}/src/val/cat/0.JPEG\n" in log
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("used", "exists and is not empty"),
        ("absent", "is not a folder"),
        ("empty", "find any class folder"),
        ("classes", "its classes differ"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str], case: str, message: str) -> None:
    source, out = tmp_path / "src", tmp_path / "out"
    if case == "used":
        make_tree(source)
        out.mkdir()
        (out / "mine.txt").write_text("keep me")
    elif case == "empty":
        source.mkdir()
    elif case == "classes":
        make_tree(source / "train")
        make_tree(source / "val", classes=("ant", "dog"))
    assert convert(source, out) == 2
    log = capfd.readouterr().err
    assert message in log and log.startswith("error: ") and log.count("\n") == 1
    assert case != "used" or [path.name for path in out.iterdir()] == ["mine.txt"]
