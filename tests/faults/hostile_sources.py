"""Hostile pickles, folders, tables and tars, as sources of tools/make_shards.py."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import pickle
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from hostile import CANARY, CASES, Case, Evil, Work, case
from leap_dist.errors import UserError
from small_sets import png

TOOL = Path(__file__).parents[2] / "tools/make_shards.py"


def make_shards(source: Path, out: Path, *options: str) -> None:
    """The tool as a user calls it; UserError with its line."""
    module = _module()
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = module.main([str(source), str(out), "--workers", "0", "--max-bad", "0.5", *options])
    if status:
        raise UserError(said.getvalue().strip().removeprefix("error: "))


def _module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_shards", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cifar(folder: Path, content: bytes) -> Work:
    """A CIFAR-10 whose names of classes are in the pickle `content`."""
    home = folder / "src/cifar-10-batches-py"
    home.mkdir(parents=True)
    (home / "batches.meta").write_bytes(content)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batch = {"data": np.zeros((4, 3072), np.uint8), "labels": [0, 1, 2, 3]}
        (home / name).write_bytes(pickle.dumps(batch, protocol=2))
    return lambda: make_shards(folder / "src", folder / "out")


NAMES = {"label_names": [str(i) for i in range(10)]}


@case(None, quick=True)
def cifar_as_it_is(folder: Path) -> Work:
    return cifar(folder, pickle.dumps(NAMES, protocol=2))


@case("which is no plain data", quick=True)
def cifar_that_runs_a_program(folder: Path) -> Work:
    return cifar(folder, pickle.dumps(NAMES | {"x": Evil(folder)}))


def _pickle_case(name: str, content: Callable[[Path], bytes], refused: str) -> None:
    CASES.append(Case(f"pickle_{name}", lambda folder: cifar(folder, content(folder)), refused, False))


class _Dtype:
    """A dtype of 8 bytes that says of itself that it holds objects: NumPy would take bytes for pointers."""

    def __reduce__(self) -> tuple[Any, ...]:
        return np.dtype, ("V8", False, True), (4, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 63, None)


class _Array:
    def __init__(self, dtype: Any, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape = dtype, shape

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, arguments, _ = np.zeros(1).__reduce__()
        return rebuild, arguments, (1, self.shape, self.dtype, False, b"\x41" * 8)


_pickle_case("eval", lambda folder: b"cbuiltins\neval\n(X\x01\0\0\0atR.", "no plain data")
_pickle_case("getattr", lambda folder: b"cbuiltins\ngetattr\n(cos\nsystem\ntR.", "no plain data")
_pickle_case("forged_dtype", lambda folder: pickle.dumps(_Array(_Dtype(), (1,))), "is expected")
_pickle_case("objects", lambda folder: pickle.dumps(np.array([Evil(folder)], object)), "no plain data|array of object")
_pickle_case("shape", lambda folder: pickle.dumps(_Array(np.dtype("u1"), (10**12,))), "shape does not fit")
_pickle_case("memo", lambda folder: b"\x80\x02]r\xff\xff\xff\xf0.", "memo has a gap")
_pickle_case("bytearray", lambda folder: b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x10\x85R.", "is expected")
_pickle_case("cut", lambda folder: pickle.dumps(NAMES)[:-9], "is expected")
_pickle_case("long", lambda folder: b"\x80\x02\x8b\xff\xff\xff\x7f.", "is expected")
_pickle_case("deep", lambda folder: b"\x80\x02" + b"]" * 10**6 + b"a" * (10**6 - 1) + b".", "is expected")
_pickle_case("codec", lambda folder: b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x04\0\0\0zlib\x86R.", "codec")
_pickle_case("extension", lambda folder: b"\x80\x02\x82\x01.", "is expected")
_pickle_case("no_mapping", lambda folder: pickle.dumps([1]), "it holds a list")
_pickle_case("empty", lambda folder: b"", "is expected")
_pickle_case("set_method", lambda folder: b"\x80\x02cnumpy\ndtype\n}X\x01\0\0\0aK\x01sb.", "is expected")


def _class_folder(folder: Path) -> Path:
    (folder / "src/a").mkdir(parents=True)
    for i in range(8):
        (folder / f"src/a/{i}.png").write_bytes(png(i))
    return folder / "src/a"


def _makes(folder: Path, samples: int = 8) -> Work:
    def make() -> None:
        make_shards(folder / "src", folder / "out")
        shards = json.loads((folder / "out/index.json").read_text())["shards"]
        assert sum(shard["samples"] for shard in shards) == samples

    return make


@case(None, quick=True)
def source_with_a_pipe(folder: Path) -> Work:
    os.mkfifo(_class_folder(folder) / "f.png")
    return _makes(folder)


@case(None)
def source_with_dev_zero(folder: Path) -> Work:
    (_class_folder(folder) / "zero.png").symlink_to("/dev/zero")
    return _makes(folder)


@case(None)
def source_with_a_socket(folder: Path) -> Work:
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(_class_folder(folder))  # a socket's path has 107 bytes at most
        server.bind("s.png")
        os.chdir(here)
    return _makes(folder)


@case(None, quick=True)
def source_with_loops(folder: Path) -> Work:
    home = _class_folder(folder)
    (home / "loop").symlink_to(".")
    (home / "up").symlink_to("..")
    (folder / "src/whole").symlink_to(".")
    return _makes(folder)


@case(None)
def flat_source_with_a_pipe(folder: Path) -> Work:
    home = _class_folder(folder)
    for path in home.iterdir():
        path.rename(folder / "src" / path.name)
    home.rmdir()
    os.mkfifo(folder / "src/f.png")
    return _makes(folder)


@case(None)
def source_with_a_table_that_is_a_pipe(folder: Path) -> Work:
    os.mkfifo(_class_folder(folder) / "t.parquet")
    return _makes(folder)


def _table(folder: Path, images: list[Any]) -> Work:
    (folder / "src").mkdir()
    labels = [0] * len(images)
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "label": labels}), folder / "src/t.parquet")
    return lambda: make_shards(folder / "src", folder / "out")


@case("which is not in", quick=True)
def table_that_names_a_file_elsewhere(folder: Path) -> Work:
    (folder / "own.png").write_bytes(png(1))
    return _table(folder, ["../own.png"] * 4)


@case("which is not in")
def table_that_names_a_device(folder: Path) -> Work:
    return _table(folder, ["/dev/zero"] * 4)


@case("expected; it holds")
def tar_of_a_device_and_a_path_upwards(folder: Path) -> Work:
    (folder / "src").mkdir()
    with tarfile.open(folder / "src/ILSVRC2012_img_train.tar", "w") as tar:
        device = tarfile.TarInfo("zero.tar")
        device.type, device.devmajor, device.devminor = tarfile.CHRTYPE, 1, 5
        tar.addfile(device)
        up = tarfile.TarInfo(f"../../{CANARY}")
        up.size = 3
        tar.addfile(up, io.BytesIO(b"abc"))
    return lambda: make_shards(folder / "src", folder / "out")


@case("damaged or cut|no images|cannot be read")
def tar_whose_member_has_an_exabyte(folder: Path) -> Work:
    (folder / "src").mkdir()
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as tar:
        image = tarfile.TarInfo("a.JPEG")
        image.size = 2**59
        inner.write(image.tobuf())
        inner.write(bytes(1024))
    with tarfile.open(folder / "src/ILSVRC2012_img_train.tar", "w") as tar:
        outer = tarfile.TarInfo("n01440764.tar")
        outer.size = len(inner.getvalue())
        tar.addfile(outer, io.BytesIO(inner.getvalue()))
    return lambda: make_shards(folder / "src", folder / "out")


def _webdataset(folder: Path, *entries: tarfile.TarInfo) -> None:
    """Eight sound samples, after headers without content."""
    (folder / "src").mkdir()
    with tarfile.open(folder / "src/00000.tar", "w") as tar:
        for entry in entries:
            tar.addfile(entry)
        for i in range(8):
            image = tarfile.TarInfo(f"../../{i}.png")
            image.size = len(png(i))
            tar.addfile(image, io.BytesIO(png(i)))


def _entry(name: str, kind: bytes, **about: Any) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type = kind
    for key, value in about.items():
        setattr(entry, key, value)
    return entry


@case(None, quick=True)
def webdataset_of_links_devices_and_paths_upwards(folder: Path) -> Work:
    _webdataset(
        folder,
        _entry("a.png", tarfile.SYMTYPE, linkname="/etc/passwd"),
        _entry("b.png", tarfile.LNKTYPE, linkname="../../victim.txt"),
        _entry("c.png", tarfile.CHRTYPE, devmajor=1, devminor=5),
        _entry("d.png", tarfile.FIFOTYPE),
        _entry(f"../../{CANARY}", tarfile.DIRTYPE),
    )
    return _makes(folder)


@case("cannot be read, more than", quick=True)
def webdataset_whose_member_has_an_exabyte(folder: Path) -> Work:
    (folder / "src").mkdir()
    image = _entry("a.png", tarfile.REGTYPE, size=2**59)
    (folder / "src/00000.tar").write_bytes(image.tobuf() + bytes(1024))
    return lambda: make_shards(folder / "src", folder / "out")


@case("cannot be read, more than")
def webdataset_with_a_name_of_gigabytes(folder: Path) -> Work:
    (folder / "src").mkdir()
    with open(folder / "src/00000.tar", "wb") as tar:
        tar.write(_entry("a.png", tarfile.GNUTYPE_LONGNAME, size=2**33).tobuf())
        tar.truncate(2**33 + 4096)
    return lambda: make_shards(folder / "src", folder / "out")


@case("cannot be read, more than")
def webdataset_with_a_sparse_petabyte(folder: Path) -> Work:
    sparse = {"major": "0", "minor": "1", "map": "0,0", "size": str(2**50), "numblocks": "1"}
    _webdataset(folder)
    for i in range(20):
        headers = {f"GNU.sparse.{key}": value for key, value in sparse.items()}
        with tarfile.open(folder / f"src/{i:05}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            tar.addfile(_entry("a.png", tarfile.REGTYPE, pax_headers=headers))
    return lambda: make_shards(folder / "src", folder / "out")


@case(None)
def webdataset_that_is_a_pipe(folder: Path) -> Work:
    _webdataset(folder)
    os.mkfifo(folder / "src/00001.tar")
    return _makes(folder)


def _list(folder: Path, paths: list[str]) -> Work:
    (folder / "src").mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"path": paths}), folder / "src/t.parquet")
    return lambda: make_shards(folder / "src", folder / "out")


@case("which is not in", quick=True)
def list_that_names_a_file_elsewhere(folder: Path) -> Work:
    (folder / "own.png").write_bytes(png(1))
    return _list(folder, ["../own.png"] * 4)


@case("cannot be read, more than")
def list_that_names_a_pipe(folder: Path) -> Work:
    (folder / "src").mkdir()
    os.mkfifo(folder / "src/f.bin")
    return _list(folder, ["f.bin", "x" * 5000, ""])
