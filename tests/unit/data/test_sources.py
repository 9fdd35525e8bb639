"""Every kind of source gives names, labels in the usual order, and the images' own bytes."""

from __future__ import annotations

import io
import json
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import ImageFolder

from leap_dist.data.sources import Images, open_source
from leap_dist.data.sources.ilsvrc import DEVKIT, SYNSETS, TRAIN_TAR, VAL_TAR
from leap_dist.errors import UserError

# ILSVRC2012_IDs are in no order of the wnids: an index built from them would be wrong.
IDS = {"n02": 1, "n03": 2, "n01": 3}
WNIDS = sorted(IDS)


def everything(images: Images) -> list[tuple[bytes, int]]:
    """All (bytes, label), in the order of the source."""
    numbers = range(len(images.names))
    read = images.reader(numbers)
    return [(read(i), int(images.labels[i])) for i in numbers]


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as tar:
        for name, data in files.items():
            add(tar, name, data)
    return packed.getvalue()


def devkit_files() -> dict[str, bytes]:
    """meta.mat with inner nodes of the hierarchy among the synsets, as the real one has, and five labels."""
    rows = [(number, wnid, wnid.upper(), 0) for wnid, number in IDS.items()] + [(4, "n00", "thing", 3)]
    kinds = [("ILSVRC2012_ID", float), ("WNID", object), ("words", object), ("num_children", float)]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, dtype=kinds).reshape(-1, 1)})
    return {"meta.mat": meta.getvalue(), "ILSVRC2012_validation_ground_truth.txt": b"3\n1\n2\n2\n3\n"}


VAL_WNIDS = ["n01", "n02", "n03", "n03", "n01"]


def write_ilsvrc(folder: Path, labels: str = "packed") -> None:
    train = {wnid: {f"{wnid}_{i}.JPEG": f"{wnid}/{i}".encode() * (i + 1) for i in range(3)} for wnid in IDS}
    (folder / TRAIN_TAR).write_bytes(tar_of({f"{wnid}.tar": tar_of(files) for wnid, files in train.items()}))
    shuffled = [4, 0, 3, 1, 2]  # labels follow the names, not the order in the tar
    val = {f"ILSVRC2012_val_{i + 1:08}.JPEG": f"val {i}".encode() for i in shuffled}
    (folder / VAL_TAR).write_bytes(tar_of(val))
    if labels == "packed":
        devkit = {f"{DEVKIT}/data/{name}": data for name, data in devkit_files().items()}
        (folder / f"{DEVKIT}.tar.gz").write_bytes(tar_of(devkit, "w:gz"))
    elif labels == "unpacked":
        (folder / DEVKIT / "data").mkdir(parents=True)
        for name, data in devkit_files().items():
            (folder / DEVKIT / "data" / name).write_bytes(data)
    elif labels == "synsets":
        (folder / SYNSETS).write_text("\n".join(VAL_WNIDS) + "\n")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("labels", ["packed", "unpacked", "synsets"])
def test_the_tars_are_read_in_place_with_labels_by_sorted_wnid(tmp_path: Path, labels: str, workers: int) -> None:
    write_ilsvrc(tmp_path, labels)
    source = open_source(tmp_path, workers)
    assert list(source) == ["train", "val"]
    assert source["train"].classes == source["val"].classes == WNIDS
    expected = [(f"{wnid}/{i}".encode() * (i + 1), WNIDS.index(wnid)) for wnid in WNIDS for i in range(3)]
    assert everything(source["train"]) == expected
    assert source["train"].names[4] == f"{TRAIN_TAR}/n02/n02_1.JPEG"
    assert everything(source["val"]) == [(f"val {i}".encode(), WNIDS.index(w)) for i, w in enumerate(VAL_WNIDS)]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no labels", "nothing says what the images of ILSVRC2012_img_val.tar show"),
        ("count", "holds 5 images, but the ground truth beside it has 4 labels"),
        ("cut", "n01.tar: .*the tar is damaged or cut"),
        ("outer cut", "img_train.tar.*: .*the tar is damaged or cut"),
        ("val cut", "img_val.tar: .*the tar is damaged or cut"),
        ("no tar of tars", "a tar of <wnid>.tar files is expected; it holds a.JPEG"),
        ("devkit cut", "devkit_t12.tar.gz: .*fetch it anew"),
    ],
)
def test_faulty_tars_are_named(tmp_path: Path, fault: str, message: str) -> None:
    write_ilsvrc(tmp_path, {"no labels": "none", "count": "synsets"}.get(fault, "packed"))
    train, devkit = tmp_path / TRAIN_TAR, tmp_path / f"{DEVKIT}.tar.gz"
    if fault == "count":
        (tmp_path / SYNSETS).write_text("\n".join(VAL_WNIDS[1:]))
    elif fault == "cut":
        inner = tar_of({"n01_0.JPEG": bytes(4000)})[:2000]
        train.write_bytes(tar_of({"n01.tar": inner, "n02.tar": tar_of({"n02_0.JPEG": b"x"})}))
    elif fault == "outer cut":
        data = train.read_bytes()
        train.write_bytes(data[: len(data) // 2])
    elif fault == "val cut":
        (tmp_path / VAL_TAR).write_bytes((tmp_path / VAL_TAR).read_bytes()[: 4 * 1024 + 512])
    elif fault == "no tar of tars":
        train.write_bytes(tar_of({"a.JPEG": b"x"}))
    elif fault == "devkit cut":
        devkit.write_bytes(devkit.read_bytes()[:200])
    with pytest.raises(UserError, match=message):
        open_source(tmp_path, 0)


def write_cifar(folder: Path, coarse: bool) -> tuple[np.ndarray, list[int], list[int]]:
    """Train images (N, 32, 32, 3), their labels and those of the test images, in torchvision's layout."""
    random = np.random.default_rng(0)
    parts = ["train"] if coarse else [f"data_batch_{i}" for i in range(1, 6)]
    key = "fine_labels" if coarse else "labels"
    folder.mkdir()
    pixels, labels = [], []
    for name in [*parts, "test" if coarse else "test_batch"]:
        data = random.integers(0, 256, (4, 3072), dtype=np.uint8)
        targets = random.integers(0, 3, 4).tolist()
        with open(folder / name, "wb") as file:
            pickle.dump({"data": data, key: targets, "coarse_labels": [0] * 4}, file)
        pixels.append(data.reshape(4, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.append(targets)
    names = {"fine_label_names" if coarse else "label_names": ["plane", "auto", "bird"]}
    with open(folder / ("meta" if coarse else "batches.meta"), "wb") as file:
        pickle.dump(names, file)
    return np.concatenate(pixels[:-1]), [label for part in labels[:-1] for label in part], labels[-1]


@pytest.mark.parametrize("name", ["cifar-10-batches-py", "cifar-100-python"])
@pytest.mark.parametrize("inside", [True, False])
def test_cifar_becomes_lossless_pngs(tmp_path: Path, name: str, inside: bool) -> None:
    pixels, labels, test_labels = write_cifar(tmp_path / name, coarse="100" in name)
    source = open_source(tmp_path / name if inside else tmp_path, 0)
    assert list(source) == ["train", "test"]
    assert source["train"].classes == ["plane", "auto", "bird"]  # as the set numbers them: not sorted
    stored = everything(source["train"])
    assert [label for _, label in stored] == labels
    np.testing.assert_array_equal([np.asarray(Image.open(io.BytesIO(png))) for png, _ in stored], pixels)
    assert [label for _, label in everything(source["test"])] == test_labels


def test_a_missing_batch_of_cifar_is_named(tmp_path: Path) -> None:
    write_cifar(tmp_path / "cifar-10-batches-py", coarse=False)
    (tmp_path / "cifar-10-batches-py/data_batch_3").unlink()
    with pytest.raises(UserError, match="data_batch_3: a pickle of CIFAR"):
        open_source(tmp_path, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_tree_lists_what_image_folder_lists(tmp_path: Path, workers: int) -> None:
    for name in ("b/1.jpg", "b/deeper/2.PNG", "a/0.jpeg", "a/notes.txt", "b/10.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    images = open_source(tmp_path, workers)["."]
    theirs = ImageFolder(str(tmp_path))
    assert [(str(tmp_path / name), label) for name, label in zip(images.names, images.labels, strict=True)] == (
        theirs.samples
    )
    assert [data.decode() for data, _ in everything(images)] == images.names
    assert images.sizes.tolist() == [len(name) for name in images.names]


def test_splits_of_a_tree_are_named_as_the_loader_expects(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        (tmp_path / split / "ant").mkdir(parents=True)
        (tmp_path / split / "ant/0.jpg").write_text(split)
    source = open_source(tmp_path, 0)
    assert {split: everything(images) for split, images in source.items()} == {
        "train": [(b"train", 0)],
        "val": [(b"validation", 0)],
        "test": [(b"test", 0)],
    }


# ---- parquet


def write_parquet(path: Path, rows: list[tuple[bytes, int]], struct: bool = True, group: int = 3) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = [{"bytes": data, "path": "x.jpg"} if struct else data for data, _ in rows]
    table = arrow.table({"image": image, "label": [label for _, label in rows]})
    if struct:
        features = {"info": {"features": {"label": {"names": ["tench", "goldfish"], "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=group)


@pytest.mark.parametrize("struct", [True, False])
def test_parquet_files_in_the_layout_of_the_hub(tmp_path: Path, struct: bool) -> None:
    rows = [(f"image {i}".encode(), i % 2) for i in range(16)]
    write_parquet(tmp_path / "data/train-00000-of-00002.parquet", rows[:8], struct)
    write_parquet(tmp_path / "data/train-00001-of-00002.parquet", rows[8:], struct)
    write_parquet(tmp_path / "data/validation-00000-of-00001.parquet", rows[3:5], struct)
    source = open_source(tmp_path, 0)
    assert list(source) == ["train", "val"]
    assert source["train"].classes == (["tench", "goldfish"] if struct else ["0", "1"])
    assert everything(source["train"]) == rows
    assert everything(source["val"]) == rows[3:5]
    read = source["train"].reader([15, 2])
    assert (read(2), read(15)) == (rows[2][0], rows[15][0])
    assert source["train"].names[8] == "data/train-00001-of-00002.parquet:0"


def test_parquet_images_stay_near_their_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from leap_dist.data.sources import parquet

    monkeypatch.setattr(parquet, "WINDOW_BYTES", 3000)
    write_parquet(tmp_path / "all.parquet", [(bytes(range(100)) * 10 + bytes([i]), i % 2) for i in range(60)], group=2)
    images = open_source(tmp_path, 0)["."]
    assert all(len(set(images.windows[2 * i : 2 * i + 2])) == 1 for i in range(30))  # a row group is in one window
    assert images.windows[0] != images.windows[2] or images.windows[2] != images.windows[4]
    assert 5 < len(set(images.windows)) <= 30


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no label", "a column label or labels or fine_label is needed; it has image, kind"),
        ("text labels", "column 'label' should hold integers"),
        ("cut", "0.parquet: "),
        ("split", "neither its name nor its folder's says which split"),
    ],
)
def test_faulty_parquet_is_named(tmp_path: Path, fault: str, message: str) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "0.parquet"
    write_parquet(path, [(b"x", 0)] * 9)
    if fault == "no label":
        parquet.write_table(arrow.table({"image": [b"x"], "kind": [0]}), path)
    elif fault == "text labels":
        parquet.write_table(arrow.table({"image": [b"x"], "label": ["cat"]}), path)
    elif fault == "cut":
        path.write_bytes(path.read_bytes()[:-30])
    elif fault == "split":
        write_parquet(tmp_path / "train-0.parquet", [(b"x", 0)])
    with pytest.raises(UserError, match=message) as caught:
        open_source(tmp_path, 0)
    assert "\n" not in str(caught.value)


def test_parquet_without_pyarrow_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "0.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="reading parquet needs pyarrow"):
        open_source(tmp_path, 0)
