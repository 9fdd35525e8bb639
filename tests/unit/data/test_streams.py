"""Tars and lists of paths are read in their own order: nothing is lost, nothing unpacked, nothing trusted."""

from __future__ import annotations

import csv
import io
import json
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tar_sets import add, make_shards, members, stored, tree_bytes, write_tar, write_tars

from leap_dist.data import check_shards
from leap_dist.data.sources import Lost, Sample, open_stream, webdataset
from leap_dist.data.sources.path_list import PIECE_ROWS
from leap_dist.data.sources.webdataset import read_tar
from leap_dist.errors import UserError
from small_sets import png

MIB = 0.001  # shards of a kilobyte, so that a tar becomes several


def read(path: Path) -> tuple[list[tuple[str, object, bytes | str]], list[Lost], Counter[str]]:
    """(name, label, bytes or the fault) of the samples of a tar, what is lost, and what is left out."""
    samples, lost, left_out = [], [], Counter()
    for found in read_tar(path, path.name, path.stat().st_size, left_out):
        if isinstance(found, Lost):
            lost.append(found)
            continue
        try:
            content = found.read()
        except ValueError as error:
            content = str(error)
        samples.append((found.name, found.label, content))
    return samples, lost, left_out


@pytest.mark.parametrize("kind", ["cls", "json", "img2dataset"])
def test_tars_keep_order_bytes_and_labels(tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str) -> None:
    truth = write_tars(tmp_path / "src", kind=kind)
    (tmp_path / "src/00000_stats.json").write_text("{}")
    pyarrow.parquet.write_table(pyarrow.table({"url": ["http://x"], "key": ["000"]}), tmp_path / "src/00000.parquet")
    assert make_shards(tmp_path / "src", tmp_path / "out", "--shard-mib", MIB) == 0
    assert stored(tmp_path / "out") == truth
    assert check_shards(tmp_path / "out", "xxh64") == 60
    assert len(list((tmp_path / "out").glob("*.mds"))) > 6
    classes = json.loads((tmp_path / "out/class_to_idx.json").read_text())
    assert classes == ({"all": 0} if kind == "img2dataset" else {str(i): i for i in range(7)})
    told = "; no labels: all become the one class 'all'" if kind == "img2dataset" else ""
    assert f"all: 6 tars of 0.0 GB, in 6 pieces{told}" in capfd.readouterr().out
    assert make_shards("--verify", tmp_path / "out") == 0


def test_workers_change_no_byte_and_small_tars_share_shards(tmp_path: Path) -> None:
    truth = write_tars(tmp_path / "src")
    for workers in (0, 2):
        assert make_shards(tmp_path / "src", tmp_path / str(workers), "--shard-mib", 0.01, workers=workers) == 0
    assert tree_bytes(tmp_path / "0") == tree_bytes(tmp_path / "2")
    assert stored(tmp_path / "0") == truth
    assert len(list((tmp_path / "0").glob("*.mds"))) < 6


def test_splits_by_the_names_of_tars_and_classes_by_a_file(tmp_path: Path) -> None:
    truth = write_tars(tmp_path / "src", tars=2, prefix="imagenet-train-")
    write_tars(tmp_path / "src", tars=1, prefix="imagenet-validation-")
    (tmp_path / "src/class_to_idx.json").write_text(json.dumps({name: i for i, name in enumerate("tuvwxyz")}))
    (tmp_path / "list.txt").write_text("z\nu\n")
    assert make_shards(tmp_path / "src", tmp_path / "out", "--classes", tmp_path / "list.txt") == 0
    assert json.loads((tmp_path / "out/class_to_idx.json").read_text()) == {"u": 0, "z": 1}
    wanted = {1: 0, 6: 1}
    assert stored(tmp_path / "out/train") == [(data, wanted[label]) for data, label in truth if label in wanted]
    assert stored(tmp_path / "out/val") == [(data, wanted[label]) for data, label in truth[:10] if label in wanted]


def test_a_sample_is_what_has_one_name_in_one_folder(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar",
        {
            "x/1.JPG": b"one", "x/1.seg.png": b"mask", "x/1.cls": b" 3\n", "y/1.png": b"two",
            "y/1.json": b'{"label": "4"}', "2.jpeg": b"three", "2.png": b"second", "2.json": b"{", "3.txt": b"words",
            "4.webp": b"four", "4.cls": b"cat", "._4.jpg": b"apple",
        },
    )  # fmt: skip
    samples, lost, left_out = read(path)
    assert samples == [
        ("a.tar/x/1", 3, b"one"), ("a.tar/y/1", 4, b"two"), ("a.tar/2", None, b"three"), ("a.tar/4", "cat", b"four")
    ]  # fmt: skip
    assert not lost
    assert left_out == {
        "names with several dots, .png": 1, "second images of a sample, .png": 1, "samples without an image": 1,
        "hidden": 1,
    }  # fmt: skip


def entry(name: str, kind: bytes, **about: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in about.items():
        setattr(info, key, value)
    return info


def test_only_regular_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.png").write_bytes(png(1))
    with tarfile.open("a.tar", "w") as tar:
        tar.addfile(entry("1.png", tarfile.SYMTYPE, linkname="/etc/passwd"))
        tar.addfile(entry("2.png", tarfile.LNKTYPE, linkname="own.png"))
        tar.addfile(entry("3.png", tarfile.CHRTYPE, devmajor=1, devminor=5))
        tar.addfile(entry("4.png", tarfile.FIFOTYPE))
        tar.addfile(entry("5", tarfile.DIRTYPE))
        add(tar, "../../up.png", b"content")
        add(tar, "/etc/root.png", b"more")
    samples, lost, left_out = read(tmp_path / "a.tar")
    assert [content for _, _, content in samples] == [b"content", b"more"] and not lost
    assert left_out == {"links, devices, pipes or sockets": 4}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "own.png"]


def broken(fault: str) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members(0, 20).items():
            add(tar, name, data)
    data = packed.getvalue()
    first = 20 * 512  # five samples of four blocks each
    if fault == "cut in an image":
        return data[: first + 512 + 40]
    if fault == "cut in a header":
        return data[: first + 100]
    if fault == "cut between samples":
        return data[:first]
    if fault == "noise":
        return data[:first] + bytes(range(1, 256)) * 40 + data[first + 255 * 40 :]
    if fault == "an exabyte":
        return data[:first] + entry("x.png", tarfile.REGTYPE, size=2**60).tobuf(tarfile.GNU_FORMAT)
    if fault == "less than nothing":
        return data[:first] + entry("x.png", tarfile.REGTYPE, size=-512).tobuf(tarfile.GNU_FORMAT)
    if fault == "a name of gigabytes":
        return data[:first] + entry("x", tarfile.GNUTYPE_LONGNAME, size=2**33).tobuf(tarfile.GNU_FORMAT) + bytes(9999)
    if fault == "names of names":
        return data[:first] + entry("x", tarfile.GNUTYPE_LONGNAME, size=0).tobuf(tarfile.GNU_FORMAT) * 4000
    assert fault == "sparse without end"
    info = entry("x.png", tarfile.REGTYPE, size=600_000, pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})
    return data[:first] + info.tobuf(tarfile.PAX_FORMAT) + b"999999999\n" + b"0\n" * 300_000


@pytest.mark.parametrize(
    "fault",
    [
        "cut in an image", "cut in a header", "cut between samples", "noise", "an exabyte", "less than nothing",
        "a name of gigabytes", "names of names", "sparse without end",
    ],
)  # fmt: skip
def test_a_damaged_tar_loses_its_rest_and_says_where(tmp_path: Path, fault: str) -> None:
    (tmp_path / "a.tar").write_bytes(broken(fault))
    samples, lost, _ = read(tmp_path / "a.tar")
    assert [(label, content) for _, label, content in samples[:5]] == [(i % 7, png(i)) for i in range(5)]
    assert all(isinstance(content, str) for _, _, content in samples[5:])
    assert len(lost) == 1 and lost[0].name == "a.tar" and "what follows is lost" in lost[0].reason
    rest = (tmp_path / "a.tar").stat().st_size - 10240  # as many images as it would hold, where it is not just cut
    assert lost[0].images == (max(1, round(rest / 2048)) if "at byte 10240 " in lost[0].reason else 1)
    assert "\n" not in lost[0].reason


def test_no_tar_is_told_and_an_empty_one_has_nothing(tmp_path: Path) -> None:
    for name, content in (("gzip", b"\x1f\x8b" + bytes(600)), ("nothing", b""), ("text", b"hello " * 300)):
        (tmp_path / name).write_bytes(content)
        samples, lost, _ = read(tmp_path / name)
        assert not samples and lost[0].reason.startswith("no tar"), name
    (tmp_path / "empty").write_bytes(bytes(10240))
    assert read(tmp_path / "empty") == ([], [], Counter())


def test_sparse_and_oversized_members_are_bad_images_and_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webdataset, "MOST_IMAGE_BYTES", 1000)
    sparse = entry("s.png", tarfile.REGTYPE, size=512)
    sparse.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,512",
                          "GNU.sparse.size": str(2**50), "GNU.sparse.numblocks": "1"}  # fmt: skip
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(sparse, io.BytesIO(bytes(512)))
        add(tar, "l.png", bytes(1001))
        add(tar, "m.png", bytes(1000))
        add(tar, "m.json", b" " * (webdataset.MOST_LABEL_BYTES + 1))
    samples, lost, _ = read(tmp_path / "a.tar")
    assert [(name, content) for name, _, content in samples] == [
        ("a.tar/s", "a sparse file of a tar"), ("a.tar/l", "has 1001 bytes, at most 1000 are read"),
        ("a.tar/m", bytes(1000)),
    ]  # fmt: skip
    assert not lost


def test_bad_images_of_tars_are_counted_and_what_is_too_much_stops(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    truth = write_tars(tmp_path / "src")
    for number in (1, 4):
        path = tmp_path / f"src/{number:05}.tar"
        path.write_bytes(path.read_bytes()[: 512 * 4 * 8 + 300])  # eight samples, and the header of a ninth
    write_tar(tmp_path / "src/00006.tar", {"1.png": b"no image", "1.cls": b"1", "2.png": png(2), "2.cls": b"horse"})
    assert make_shards(tmp_path / "src", tmp_path / "out") == 2
    log = capfd.readouterr().err
    assert "cannot be read, more than --max-bad 0.001 allows: 00001.tar: " in log and log.count("\n") == 1
    assert make_shards(tmp_path / "src", tmp_path / "out", "--max-bad", 0.2) == 0
    with open(tmp_path / "out/quarantine.csv", newline="") as file:
        rows = dict(list(csv.reader(file))[1:])
    assert rows.keys() == {"00001.tar", "00004.tar", "00006.tar/1", "00006.tar/2"}
    assert "at byte 16384 of 16684" in rows["00004.tar"] and "neither a number nor" in rows["00006.tar/2"]
    assert stored(tmp_path / "out") == truth[:18] + truth[20:48] + truth[50:]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("changed", "was begun from other images"),
        ("classes", "classes cat \\(1 in all\\) are wanted but not in the set, whose classes are numbers"),
        ("half labelled", "split 'train' has no labels, which other splits have"),
        ("layout", "--layout classes: .*/src holds no class folders"),
        ("no split", "neither its name nor its folder's says which split it is of"),
        ("both", "holds both tars, such as .*00000.tar, and parquet files with images"),
    ],
)
def test_mistakes_with_tars_end_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], case: str, message: str
) -> None:
    source, out, options = tmp_path / "src", tmp_path / "out", []
    write_tars(source, tars=2, kind="img2dataset" if case == "half labelled" else "cls",
               prefix="train-" if case in ("half labelled", "no split") else "")  # fmt: skip
    if case == "changed":
        write_tar(source / "00002.tar", {"x.png": b"no image", "x.cls": b"1"})
        assert make_shards(source, out) == 2
        capfd.readouterr()
        write_tar(source / "00003.tar", members(90, 1))
    elif case == "classes":
        (tmp_path / "list").write_text("cat\n3\n")
        options = ["--classes", tmp_path / "list"]
    elif case == "layout":
        options = ["--layout", "classes"]
    elif case == "half labelled":
        write_tars(source, tars=1, prefix="val-")
    elif case == "no split":
        write_tars(source, tars=1)
    elif case == "both":
        pyarrow.parquet.write_table(pyarrow.table({"image": [png(1)], "label": [0]}), source / "t.parquet")
    assert make_shards(source, out, *options) == 2
    log = capfd.readouterr().err
    assert re.search(message, log) and log.count("\n") == 1


def test_a_tar_that_changes_under_way_is_refused(tmp_path: Path) -> None:
    write_tars(tmp_path, tars=1)
    stream = open_stream(tmp_path, 1)
    write_tar(tmp_path / "00000.tar", members(0, 30))
    with pytest.raises(UserError, match="has changed since it was listed"):
        list(stream.samples(stream.pieces[0], Counter()))


# ---- lists of paths


def write_list(path: Path, names: list[str], **columns: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"url": [f"http://host/{i}" for i in range(len(names))], "path": names, **columns})
    pyarrow.parquet.write_table(table, path, row_group_size=40)


def write_images(folder: Path, count: int) -> list[str]:
    folder.mkdir(parents=True)
    for i in range(count):
        (folder / f"{i}.png").write_bytes(png(i))
    return [f"{i}.png" for i in range(count)]


def test_a_list_of_paths_and_labels(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    names = write_images(tmp_path / "disk", 100)
    absolute = [str(tmp_path / "disk" / name) if i % 2 else name for i, name in enumerate(names)]
    labels = [None if i == 7 else i % 5 for i in range(100)]
    write_list(tmp_path / "lists/a.parquet", absolute[:60], label=labels[:60])
    write_list(
        tmp_path / "lists/b.parquet", [*absolute[60:], None, "gone.png", "x" * 300], label=[*labels[60:], 1, 1, 1]
    )
    options = ["--root", tmp_path / "disk", "--shard-mib", MIB, "--max-bad", 0.05]
    assert make_shards(tmp_path / "lists", tmp_path / "out", *options) == 0
    assert stored(tmp_path / "out") == [(png(i), i % 5) for i in range(100) if i != 7]
    assert "all: 103 paths in 2 tables, in 4 pieces" in capfd.readouterr().out
    assert "left out: 1 rows without a path, 1 without a label" in caplog.text
    with open(tmp_path / "out/quarantine.csv", newline="") as file:
        assert [row[0].partition(" ")[0] for row in csv.reader(file)] == ["image", "b.parquet:1:1", "b.parquet:1:2"]


def test_a_list_without_labels_beside_its_images_is_one_class(tmp_path: Path) -> None:
    write_list(tmp_path / "src/list.parquet", write_images(tmp_path / "src/pictures", 9))
    assert make_shards(tmp_path / "src/list.parquet", tmp_path / "o", "--root", tmp_path / "src/pictures") == 0
    assert stored(tmp_path / "o") == [(png(i), 0) for i in range(9)]
    assert json.loads((tmp_path / "o/class_to_idx.json").read_text()) == {"all": 0}


def test_rows_of_a_large_row_group_are_shared_out(tmp_path: Path) -> None:
    count = 2 * PIECE_ROWS + 5
    table = pyarrow.table({"path": [f"{i}.png" for i in range(count)], "label": np.arange(count)})
    pyarrow.parquet.write_table(table, tmp_path / "l.parquet", row_group_size=count)
    stream = open_stream(tmp_path / "l.parquet", 1)
    assert [piece.weight for piece in stream.pieces] == [PIECE_ROWS, PIECE_ROWS, 5]
    found = [sample.label for piece in stream.pieces for sample in stream.samples(piece, Counter())]
    assert found == list(range(count))


@pytest.mark.parametrize("name", ["../own.png", "/etc/passwd", "a/../../own.png"])
def test_a_list_names_no_file_outside_of_its_root(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    (tmp_path / "own.png").write_bytes(png(1))
    write_list(tmp_path / "src/list.parquet", [name] * 4)
    assert make_shards(tmp_path / "src", tmp_path / "out") == 2
    log = capfd.readouterr().err
    assert f"which is not in {tmp_path}/src; --root names the folder" in log and log.count("\n") == 1


@pytest.mark.parametrize(
    ("columns", "message"),
    [({"label": ["cat"]}, "column 'label' should hold integers"), ({"path": [3]}, "column 'path' should hold text")],
)
def test_columns_of_another_kind_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], columns: dict[str, object], message: str
) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"path": ["a.png"], **columns}), tmp_path / "list.parquet")
    assert make_shards(tmp_path / "list.parquet", tmp_path.with_name("o")) == 2
    assert message in capfd.readouterr().err


def test_class_folders_with_a_table_of_paths_stay_class_folders(tmp_path: Path) -> None:
    names = write_images(tmp_path / "ant", 3)
    write_list(tmp_path / "meta.parquet", names)
    assert open_stream(tmp_path, 1) is None
    assert isinstance(next(open_stream(tmp_path, 1, tmp_path / "ant").samples(
        open_stream(tmp_path, 1, tmp_path / "ant").pieces[0], Counter())), Sample)  # fmt: skip
