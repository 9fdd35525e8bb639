"""Writing shards, the check of a folder, and the embedded digits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from streaming import MDSWriter, StreamingDataset

from leap_dist.config import DataConfig
from leap_dist.data import check_shards, resolve, write_shards
from leap_dist.data.crops import decode
from leap_dist.errors import UserError
from leap_dist.runtime.distributed import World

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def write(folder: Path, compression: str | None = None, columns: dict[str, str] | None = None) -> Path:
    """Sixty samples in several shards."""
    columns = columns or {"image": "bytes", "label": "int"}
    values = {"bytes": b"x" * 100, "int": 1, "str": "one"}
    options = {"columns": columns, "compression": compression, "hashes": ["xxh64"], "size_limit": 2000}
    with MDSWriter(out=str(folder), **options) as writer:
        for _ in range(60):
            writer.write({name: values[kind] for name, kind in columns.items()})
    return folder


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-50:-40] = bytes(255 - value for value in data[-50:-40])
    path.write_bytes(data)


@pytest.mark.seconds
def test_written_shards_hold_the_samples_in_order(tmp_path: Path) -> None:
    samples = [(bytes([i]) * (i + 1), i % 7) for i in range(50)]
    write_shards(samples, tmp_path / "a" / "set")
    dataset = StreamingDataset(local=str(tmp_path / "a" / "set"))
    assert [(dataset[i]["image"], int(dataset[i]["label"])) for i in range(dataset.size)] == samples
    assert check_shards(tmp_path / "a" / "set", "xxh64") == 50
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["set"]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def failing():
        yield b"image", 0
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="on fire"):
        write_shards(failing(), tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_a_used_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match="not empty"):
        write_shards([(b"image", 0)], tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep me"


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("validate_hash", [None, "xxh64"])
def test_whole_sets_pass(tmp_path: Path, compression: str | None, validate_hash: str | None) -> None:
    assert check_shards(write(tmp_path / "set", compression), validate_hash) == 60


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [("missing", "is missing, though"), ("cut", "bytes where index.json says"), ("flipped", "is corrupt: its xxh64")],
)
def test_a_damaged_shard_is_named(tmp_path: Path, compression: str | None, fault: str, message: str) -> None:
    folder = write(tmp_path / "set", compression)
    victim = sorted(folder.glob("shard.*"))[2]
    if fault == "missing":
        victim.unlink()
    elif fault == "cut":
        victim.write_bytes(victim.read_bytes()[:-7])
    else:
        flip(victim)
    with pytest.raises(UserError, match=message) as caught:
        check_shards(folder, "xxh64")
    assert str(victim) in str(caught.value) and "\n" not in str(caught.value)


def test_a_flipped_bit_needs_the_hash_to_be_seen(tmp_path: Path) -> None:
    folder = write(tmp_path / "set")
    flip(folder / "shard.00001.mds")
    assert check_shards(folder) == 60


def test_an_unknown_hash_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"validate_hash: 'sha1' is not in the index .*\(it has: xxh64\)"):
        check_shards(write(tmp_path / "set"), "sha1")


def test_the_parent_of_a_split_names_the_split(tmp_path: Path) -> None:
    train = write(tmp_path / "set/train")
    with pytest.raises(UserError, match=rf"set/index.json does not exist: .*; did you mean {train}\?$"):
        check_shards(tmp_path / "set")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, "does not exist: a folder of MDS shards"),
        ('{"version": 2, "sha', "not a readable MDS index"),
        ("[]", "not a readable MDS index"),
        ('{"version": 2, "shards": []}', "holds no samples"),
    ],
)
def test_a_bad_index_is_said(tmp_path: Path, index: str | None, message: str) -> None:
    if index is not None:
        (tmp_path / "index.json").write_text(index)
    with pytest.raises(UserError, match=message):
        check_shards(tmp_path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"pixels": "bytes", "label": "int"}, "'image' of type 'bytes' is needed"),
        ({"image": "str"}, "'image' of type 'bytes' is needed"),
        ({"image": "bytes", "label": "str"}, "an integer type is needed"),
    ],
)
def test_wrong_columns_are_said(tmp_path: Path, columns: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_shards(write(tmp_path / "set", columns=columns))


def test_labels_are_optional(tmp_path: Path) -> None:
    assert check_shards(write(tmp_path / "set", columns={"image": "bytes"})) == 60


def test_digits_are_the_real_ones_split_once(tmp_path: Path) -> None:
    config = resolve(DataConfig(train="digits", val="digits"), tmp_path, ALONE)
    assert config.train == str(tmp_path / "data/digits/train") and config.val == str(tmp_path / "data/digits/val")
    truth = load_digits()
    left = {(image.tobytes(), int(label)) for image, label in zip(truth.images, truth.target, strict=True)}
    for folder, size in ((config.train, 1500), (config.val, 297)):
        dataset = StreamingDataset(local=folder)
        assert dataset.size == size
        for i in range(size):
            pixels = decode(dataset[i]["image"])
            assert pixels.shape == (3, 8, 8) and (pixels == pixels[:1]).all()
            levels = (pixels[0].double() * 16 / 255).round()
            left.remove((levels.numpy().tobytes(), int(dataset[i]["label"])))
    assert not left


def test_resolve_writes_once_and_leaves_other_sources_alone(tmp_path: Path) -> None:
    resolve(DataConfig(train="digits"), tmp_path, ALONE)
    index = tmp_path / "data/digits/train/index.json"
    written = index.stat().st_mtime_ns
    assert resolve(DataConfig(train="digits"), tmp_path, ALONE).val is None
    assert index.stat().st_mtime_ns == written and not (tmp_path / "data/digits/val").exists()
    other = DataConfig(train="/data/imagenet/train", val="s3://bucket/val")
    assert resolve(other, tmp_path, ALONE) == other
    assert json.loads(index.read_text())["shards"]
