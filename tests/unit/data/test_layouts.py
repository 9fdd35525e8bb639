"""Folders are read as they are meant, or a question is asked; what is left out is counted with its reason."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from leap_dist.config import load
from leap_dist.data.names import printable
from leap_dist.data.plans import Recipe, plan
from leap_dist.data.sharding import check_apart, write_planned
from leap_dist.data.sources import Images, open_source
from leap_dist.errors import UserError


def tree(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def opened(root: Path, layout: str | None = None) -> dict[str, dict[str, list[str]]]:
    """Split -> class -> names of its files."""
    return {split: by_class(images) for split, images in open_source(root, 0, layout).items()}


def by_class(images: Images) -> dict[str, list[str]]:
    of = {name: [] for name in images.classes}
    for name, label in zip(images.names, images.labels, strict=True):
        of[images.classes[label]].append(Path(name).name)
    return of


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [("train", "val", "test"), ("Train", "Val", "TEST"), ("training", "valid", "testing"), ("TRAIN", "Validation", "")],
)
def test_splits_are_known_by_their_usual_names(train: str, val: str, test: str, tmp_path: Path) -> None:
    tree(tmp_path, *(f"{split}/a/{split}.jpg" for split in (train, val, test) if split), "notes/readme.txt")
    found = opened(tmp_path)
    expected = {"train": train, "val": val, "test": test}
    assert found == {split: {"a": [f"{name}.jpg"]} for split, name in expected.items() if name}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train/a/0.jpg", "truck/b/0.jpg"), "train may be splits or classes by name, but truck lie beside"),
        (("train/0.jpg", "bus/0.jpg", "car/0.jpg"), "train may be splits or classes by name, but bus, car lie beside"),
        (("Test/0.jpg", "a/0.jpg"), "Test may be splits or classes"),
        (("test/a/0.jpg",), "test may be splits or classes by name; say --layout splits"),
        (("val/a/0.jpg", "valid/a/0.jpg", "train/a/0.jpg"), "val, valid would both be the split 'val'"),
        (("cat/train/0.jpg", "cat/val/1.jpg", "dog/train/0.jpg"), "cat, dog hold folders named as splits"),
        (("Train/a/0.jpg", "train/a/0.jpg"), "Train, train would both be the split 'train'"),
        (("train2012/a/0.jpg", "val2012/a/0.jpg"), "train2012, val2012 look like splits"),
        (("training_set/a/0.jpg", "eval/a/0.jpg", "Test-Images/0.jpg"), "look like splits; rename them"),
        (("imagenet_train/a/0.jpg", "imagenet_val/a/0.jpg"), "imagenet_train, imagenet_val look like splits"),
        (("ILSVRC2012_img_train/a/0.jpg", "ILSVRC2012_img_val/0.jpg"), "look like splits; rename them"),
        (("extra/a/0.jpg", "trainset/a/0.jpg", "valset/a/0.jpg"), "trainset, valset look like splits"),
    ],
)
def test_names_that_may_be_splits_or_classes_are_asked_about(names: tuple[str], message: str, tmp_path: Path) -> None:
    tree(tmp_path, *names)
    with pytest.raises(UserError, match=message):
        open_source(tmp_path, 0)
    assert list(opened(tmp_path, "classes")["."]) == sorted({name.split("/")[0] for name in names})


@pytest.mark.parametrize("names", [("tester", "trainer"), ("test_tube", "train2"), ("dev",), ("bullet_train", "bus")])
def test_classes_whose_names_only_resemble_splits_are_classes(names: tuple[str], tmp_path: Path) -> None:
    tree(tmp_path, *(f"{name}/0.jpg" for name in names))
    assert list(opened(tmp_path)["."]) == list(names)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("real/cat/0.jpg", "real/dog/1.jpg", "sketch/cat/2.jpg"), True),  # domains
        (("fold1/cat/0.jpg", "fold1/dog/1.jpg", "fold2/dog/2.jpg"), True),
        (("all_of_them/cat/0.jpg", "all_of_them/dog/1.jpg"), True),
        (("cat/images/0.jpg", "dog/images/1.jpg"), False),  # Tiny ImageNet
        (("cat/0.jpg", "cat/old/1.jpg", "cat/new/2.jpg", "dog/old/3.jpg"), False),
    ],
)
def test_classes_one_level_further_down_are_asked_for(
    names: tuple[str], said: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree(tmp_path, *names)
    open_source(tmp_path, 0)
    assert any("are taken for no classes" in line for line in caplog.messages) == said


def test_a_link_to_itself_is_no_folder(tmp_path: Path) -> None:
    tree(tmp_path, "a/0.jpg", "b/1.jpg")
    for place in ("loop", "a/loop"):
        (tmp_path / place).symlink_to("loop")
    assert opened(tmp_path) == {".": {"a": ["0.jpg"], "b": ["1.jpg"]}}
    assert open_source(tmp_path, 0)["."].left_out == {"without an extension": 2}


def test_layout_splits_leaves_out_and_counts_what_is_no_split(tmp_path: Path) -> None:
    tree(tmp_path, "train/a/0.jpg", "extra/a/0.jpg")
    images = open_source(tmp_path, 0, "splits")["train"]
    assert by_class(images) == {"a": ["0.jpg"]} and images.left_out == {"folder named extra": 1}
    with pytest.raises(UserError, match="no folder in it is named train, val or test"):
        open_source(tree(tmp_path / "none", "a/0.jpg"), 0, "splits")


def kaggle(root: Path) -> Path:
    base = "ILSVRC/Data/CLS-LOC"
    names = [f"{base}/train/{wnid}/{wnid}_1.JPEG" for wnid in ("n02", "n01")]
    names += [f"{base}/val/ILSVRC2012_val_0000000{i}.JPEG" for i in (1, 2, 3)]
    return tree(
        root, *names, f"{base}/test/ILSVRC2012_test_00000001.JPEG", "ILSVRC/Annotations/CLS-LOC/train/n01/1.xml"
    )


def test_the_root_of_kaggles_ilsvrc(tmp_path: Path) -> None:
    kaggle(tmp_path)
    with pytest.raises(UserError, match=r"CLS-LOC/val: images without class folders.* LOC_val_solution.csv"):
        open_source(tmp_path, 0)
    rows = "ILSVRC2012_val_00000002,n02 1 2 3 4 \nILSVRC2012_val_00000001,n01 1 2 3 4 n01 5 6 7 8 \n"
    rows += "ILSVRC2012_val_00000003,n01 0 0 9 9\n"
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + rows)
    found = opened(tmp_path)
    assert found["train"] == {"n01": ["n01_1.JPEG"], "n02": ["n02_1.JPEG"]}
    prefix = "ILSVRC2012_val_0000000"
    assert found["val"] == {"n01": [f"{prefix}1.JPEG", f"{prefix}3.JPEG"], "n02": [f"{prefix}2.JPEG"]}
    assert "test" not in found


@pytest.mark.parametrize("wrapped", ["archive", "a/b", "My Set/data"])
def test_a_folder_around_the_splits_is_looked_through(wrapped: str, tmp_path: Path) -> None:
    tree(tmp_path, f"{wrapped}/train/a/0.jpg", f"{wrapped}/val/a/1.jpg", "__MACOSX/x.jpg", ".DS_Store")
    assert opened(tmp_path) == {"train": {"a": ["0.jpg"]}, "val": {"a": ["1.jpg"]}}


def test_extensions_hidden_files_and_the_dustbins_of_others(tmp_path: Path) -> None:
    taken = ["jpg", "JPEG", "png", "ppm", "bmp", "pgm", "tif", "tiff", "webp", "jfif", "jpe", "avif", "gif", "jp2"]
    tree(tmp_path, *(f"a/{i:02}.{extension}" for i, extension in enumerate(taken)))
    tree(tmp_path, "a/x.heic", "a/y.HEIC", "a/z.txt", "a/noext", "a/._0.jpg", "a/.hidden/0.jpg", "list.csv")
    tree(tmp_path, "a/@eaDir/0.jpg/SYNO.jpg", "a/@eaDir/1.jpg", ".ipynb_checkpoints/0.jpg", "#recycle/0.jpg")
    tree(tmp_path, "$RECYCLE.BIN/b/0.jpg")
    images = open_source(tmp_path, 0)["."]
    assert by_class(images) == {"a": [f"{i:02}.{extension}" for i, extension in enumerate(taken)]}
    assert images.left_out == {".heic": 2, ".txt": 1, "without an extension": 1, "hidden": 7, ".csv": 1}


def test_every_file_is_read_once_whatever_links_there_are(tmp_path: Path) -> None:
    root = tree(tmp_path / "set", "a/0.jpg", "a/deep/1.jpg", "b/2.jpg")
    tree(tmp_path / "far", "3.jpg", "more/4.jpg")
    links = {"a/up": "..", "a/self": ".", "a/sibling": "../b", "a/deep/again": ".", "b/far": tmp_path / "far"}
    links |= {"b/far_again": tmp_path / "far/more", "c": "a", "d": ".."}
    for name, target in links.items():
        (root / name).symlink_to(target)
    (tmp_path / "far/back").symlink_to(root)
    (root / "b/5.jpg").symlink_to(tmp_path / "far/3.jpg")  # a file under another name is meant
    images = open_source(root, 0)["."]
    found = by_class(images)
    assert list(found) == ["a", "b"] and found["a"] == ["0.jpg", "1.jpg"]
    assert sorted(found["b"]) == ["2.jpg", "3.jpg", "4.jpg", "5.jpg"]
    assert images.left_out == {"links to folders that are read anyway": 8}


def test_class_folders_elsewhere_are_followed(tmp_path: Path) -> None:
    tree(tmp_path / "store", "x/0.jpg", "y/1.jpg")
    (tmp_path / "set").mkdir()
    for name, target in {"a": "x", "b": "y"}.items():
        (tmp_path / "set" / name).symlink_to(tmp_path / "store" / target)
    assert opened(tmp_path / "set") == {".": {"a": ["0.jpg"], "b": ["1.jpg"]}}


@pytest.mark.parametrize("out", ["src/mds", "src", "src/a/deep", "link/mds"])
def test_shards_inside_the_source_are_refused(out: str, tmp_path: Path) -> None:
    tree(tmp_path, "src/a/0.jpg")
    (tmp_path / "link").symlink_to("src")
    with pytest.raises(UserError, match="lies in"):
        check_apart(tmp_path / "src", tmp_path / out)
    check_apart(tmp_path / "src", tmp_path / "src-mds")


# ---- parquet


def parquet(path: Path, image: list, label: list | None = None, kind: str | None = None) -> None:
    arrow, tables = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"image": image}
    if label is not None:
        columns["label"] = arrow.array(label, type=kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    tables.write_table(arrow.table(columns), path)


def contents(images: Images) -> list[bytes]:
    read = images.reader(range(len(images.names)))
    return [read(i) for i in range(len(images.names))]


@pytest.mark.parametrize("name", ["default/train/0000.parquet", "data/train-00000-of-1.parquet", "TRAIN.parquet"])
def test_parquet_in_the_layouts_of_the_hub(name: str, tmp_path: Path) -> None:
    parquet(tmp_path / name, [b"x", b"yy"], [1, 0])
    parquet(tmp_path / ".cache/train/1.parquet", [b"z"], [2])
    assert contents(open_source(tmp_path, 0)["train"]) == [b"x", b"yy"]


def test_two_configurations_are_asked_about(tmp_path: Path) -> None:
    for name in ("full", "small"):
        parquet(tmp_path / name / "train/0.parquet", [b"x"], [0])
    with pytest.raises(UserError, match="split 'train' lies in 2 folders"):
        open_source(tmp_path, 0)


def test_a_table_beside_class_folders_is_counted_and_one_with_images_asked_about(tmp_path: Path) -> None:
    arrow, tables = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    tree(tmp_path, "a/0.jpg", "b/1.jpg")
    tables.write_table(arrow.table({"file_name": ["a/0.jpg"]}), tmp_path / "metadata.parquet")
    images = open_source(tmp_path, 0)["."]
    assert by_class(images) == {"a": ["0.jpg"], "b": ["1.jpg"]} and images.left_out == {".parquet": 1}
    parquet(tmp_path / "train-0.parquet", [b"x"], [0])
    with pytest.raises(UserError, match="holds both parquet files with images"):
        open_source(tmp_path, 0)


@pytest.mark.parametrize("struct", [True, False])
def test_parquet_with_paths_instead_of_bytes(struct: bool, tmp_path: Path) -> None:
    tree(tmp_path, "images/0.jpg", "images/long name.jpg", "data/beside.jpg")
    paths = ["images/0.jpg", str(tmp_path / "images/long name.jpg"), "beside.jpg", "images/gone.jpg"]
    cells = [{"bytes": None, "path": path} for path in paths] if struct else paths
    if struct:
        arrow = pytest.importorskip("pyarrow")
        cells = arrow.array(cells, type=arrow.struct({"bytes": arrow.binary(), "path": arrow.string()}))
    parquet(tmp_path / "data/train.parquet", cells, [0, 1, 2, 3])
    images = open_source(tmp_path, 0)["train"]
    assert images.sizes.tolist() == [12, 20, 15, 0]
    read = images.reader(range(4))
    assert [read(i) for i in range(3)] == [b"images/0.jpg", b"images/long name.jpg", b"data/beside.jpg"]
    with pytest.raises(FileNotFoundError):
        read(3)


def test_files_of_one_split_that_number_classes_otherwise_are_refused(tmp_path: Path) -> None:
    arrow, tables = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for number, names in enumerate((["cat", "dog"], ["dog", "cat"])):
        told = json.dumps({"info": {"features": {"label": {"names": names}}}})
        table = arrow.table({"image": [b"", b""], "label": [0, 1]}).replace_schema_metadata({"huggingface": told})
        tables.write_table(table, tmp_path / f"train-{number}.parquet")
    with pytest.raises(UserError, match=r"train-1\.parquet: its columns or the names of its classes"):
        open_source(tmp_path, 0)


def test_rows_without_a_label_are_left_out_and_counted(tmp_path: Path) -> None:
    parquet(tmp_path / "train.parquet", [b"a", b"b", b"c", b"d"], [0, None, -1, 2])
    parquet(tmp_path / "val.parquet", [b"e"], [1])
    sources = open_source(tmp_path, 0)
    planned = plan(sources, Recipe())
    assert planned.left_out("train", sources["train"]) == {"without a label": 2} and planned.size == 3
    assert list(planned.classes) == ["0", "1", "2"]  # as many as both splits number together
    part = plan({"train": sources["train"]}, Recipe(), ["2"])
    assert part.left_out("train", sources["train"]) == {"without a label": 2, "of other classes": 1}
    unlabelled = replace(sources["val"], labels=np.array([-1]))
    whole = plan({"train": sources["train"], "test": unlabelled}, Recipe())
    assert whole.left_out("test", unlabelled) == {"without a label": 1} and list(whole.sources) == ["train"]


@pytest.mark.parametrize(
    ("label", "kind", "message"),
    [
        ([0, 10**9], None, "1000000000 is no number of a class"),
        ([0.0, 1.0], None, "column 'label' should hold integers"),
        (["cat", "dog"], None, "column 'label' should hold integers"),
        ([True, False], None, "column 'label' should hold integers"),
        (None, None, "a column label or labels or fine_label is needed"),
    ],
)
def test_absurd_labels_of_parquet_are_refused(
    label: list | None, kind: str | None, message: str, tmp_path: Path
) -> None:
    parquet(tmp_path / "0.parquet", [b"x", b"y"], label, kind)
    with pytest.raises(UserError, match=message):
        open_source(tmp_path, 0)


# ---- names

EMOJI = "😀 é.jpg".encode()
WILD = [b"caf\xe9.jpg", "😀 é.jpg".encode(), b'a,b\n"c".jpg', b"\x1b[31mred.jpg", b"x" * 251 + b".jpg", b"\xff\xfe.png"]


def png() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (2, 2)).save(data, "PNG")
    return data.getvalue()


def test_names_of_any_bytes_are_listed_on_a_line_each(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path / "src") + b"/cl\xe4ss"
    os.makedirs(folder)
    for name in [*WILD, b"good.png"]:
        with open(folder + b"/" + name, "wb") as file:
            file.write(png() if name == b"good.png" else b"")
    sources = open_source(tmp_path / "src", 0)
    for _ in write_planned(plan(sources, Recipe()), tmp_path / "out", 0, max_bad=1):
        pass
    with open(tmp_path / "out/quarantine.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert len((tmp_path / "out/quarantine.csv").read_text("utf-8").splitlines()) == len(WILD) + 1
    listed = {row[0] for row in rows[1:]}
    assert listed == {printable(os.fsdecode(b"cl\xe4ss/" + name)) for name in WILD}
    assert {r"cl\xe4ss/caf\xe9.jpg", r"cl\xe4ss/😀 é.jpg", r'cl\xe4ss/a,b\n"c".jpg'} <= listed
    classes = (tmp_path / "out/class_to_idx.json").read_bytes()
    assert json.loads(classes.decode("utf-8")) == {r"cl\xe4ss": 0}
    assert json.loads((tmp_path / "out/index.json").read_text())["shards"][0]["samples"] == 1


@pytest.mark.parametrize(
    ("name", "shown"),
    [("plain é 😀", "plain é 😀"), ("a\nb\tc", r"a\nb\tc"), ("\udce9", r"\xe9"), ("\ud800", r"\ud800"),
     ("\u202egpj", r"\u202egpj"), ("\x1b[0m", r"\x1b[0m")],
)  # fmt: skip
def test_printable(name: str, shown: str) -> None:
    assert printable(name) == shown
    printable(name).encode("utf-8")


def test_a_path_that_is_no_utf_8_is_refused_where_a_config_would_hold_it(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.makedirs(folder)
    with pytest.raises(UserError, match="not UTF-8") as caught:
        load(None, ["teacher.model=t", "student.model=s", f"data.train={os.fsdecode(folder)}"])
    assert str(caught.value).isprintable()


def test_too_many_bad_names_end_in_one_line(tmp_path: Path) -> None:
    os.makedirs(tmp_path / "src/a")
    open(os.fsencode(tmp_path / "src/a") + b"/new\nline\xe9.jpg", "wb").close()
    with pytest.raises(UserError, match=r"a/new\\nline\\xe9.jpg: UnidentifiedImageError") as caught:
        list(write_planned(plan(open_source(tmp_path / "src", 0), Recipe()), tmp_path / "out", 0, max_bad=0))
    assert printable(str(caught.value)) == str(caught.value)
    assert np.all([line.isprintable() for line in (tmp_path / "out/quarantine.csv").read_text("utf-8").splitlines()])
