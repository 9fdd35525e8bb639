"""Files that a stranger could have made, each with the way a user would meet it. None may run, leave or overwhelm.

A case is a function of an empty folder that makes its files and returns what a user does with them. `CANARY`, a file
name, is what a program in one of them would make in the folder above; `victim.txt` there must stay as it is.
"""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import io
import json
import os
import pickle
import socket
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Optional

import brotli
import numpy as np
import pyarrow
import pyarrow.parquet
import snappy
import torch
import zstandard
from PIL import Image
from safetensors.torch import save_file
from streaming import MDSWriter

from leap_dist.config import Config, load
from leap_dist.data.streaming import open_dataset
from leap_dist.data.transforms import Whole, eval_transform, train_transform
from leap_dist.errors import UserError
from leap_dist.models import load_student
from leap_dist.runtime.plain_checkpoint import require_plain
from leap_dist.sweeps.plan import read_plan
from leap_dist.teacher.weight_files import read_weights
from small_sets import ALONE, config, png, write

CANARY = "canary"
TOOL = Path(__file__).parents[2] / "tools/make_shards.py"
Work = Callable[[], Any]


class Case(NamedTuple):
    """A hostile file. refused: what is said of it; None: it is taken, and does no harm. quick: in `make test`."""

    name: str
    make: Callable[[Path], Work]
    refused: Optional[str]
    quick: bool


CASES: list[Case] = []


def case(refused: Optional[str], *, quick: bool = False) -> Callable[[Callable[..., Work]], Callable[..., Work]]:
    def register(make: Callable[[Path], Work]) -> Callable[[Path], Work]:
        CASES.append(Case(make.__name__, make, refused, quick))
        return make

    return register


class Evil:
    """Pickled, it makes the canary when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.canary = str(folder.parent / CANARY)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.canary,)


# ---- shards


def read_all(folder: Path, **options: Any) -> None:
    """Check, open and decode a whole set, augmented and not. UserError also for the first sample that is bad."""
    options = config(folder, **options)
    for transform in (train_transform(options, ALONE.device), Whole(eval_transform(options))):
        dataset = open_dataset(str(folder), options, world=ALONE, transform=transform, seed=0, substitutes=False)
        for sample in range(min(dataset.store.size, 20)):
            try:
                dataset.get_item(sample, 0)
            except UserError:
                raise
            except Exception as error:  # leap_dist.data.streaming.Unreadable, the one that a run counts
                assert type(error).__name__ == "Unreadable", error
                raise UserError(str(error)) from None


def changed_index(folder: Path, change: Callable[[dict[str, Any]], Any], **options: Any) -> Path:
    """A small set whose index's first shard `change` has been at."""
    write(folder / "set", **options)
    index = folder / "set/index.json"
    content = json.loads(index.read_text())
    change(content["shards"][0])
    index.write_text(json.dumps(content))
    return folder / "set"


def index_case(name: str, change: Callable[[dict[str, Any]], Any], refused: str, *, quick: bool = False) -> None:
    CASES.append(Case(f"index_{name}", lambda folder: _reader(changed_index(folder, change)), refused, quick))


def _reader(folder: Path, **options: Any) -> Work:
    return lambda: read_all(folder, **options)


for _name, _basename in {
    "dotdot": "../victim.txt", "deep_dotdot": "a/../../victim.txt", "absolute": "/etc/hostname", "backslash": "..\\v",
    "nul": "a\0b", "newline": "a\nb", "hidden": ".locks/x", "index": "index.json", "empty": "", "slash": "a//b",
    "long": "x" * 5000, "number": 7, "null": None, "dot": ".", "trailing": "a/", "bidi": "a\u202eb",
}.items():  # fmt: skip
    index_case(
        f"basename_{_name}",
        lambda shard, basename=_basename: shard["raw_data"].update(basename=basename),
        "is no name in the set's own folder",
        quick=_name in ("dotdot", "absolute"),
    )
for _name, _value in {
    "huge": 10**9,
    "negative": -1,
    "float": 7.5,
    "text": "7",
    "true": True,
    "endless": 10**400,
}.items():
    index_case(f"samples_{_name}", lambda shard, value=_value: shard.update(samples=value), "samples")
for _name, _value in {"huge": 10**19, "negative": -1, "float": 1e300, "text": "9", "list": [1]}.items():
    index_case(f"bytes_{_name}", lambda shard, value=_value: shard["raw_data"].update(bytes=value), "size of a file")
index_case("hashes", lambda shard: shard["raw_data"].update(hashes=["../x"]), "hashes")
index_case("compression", lambda shard: shard.update(compression="../../x"), "compress")
index_case("format", lambda shard: shard.update(format="json"), "no MDS shard of version 2")
index_case("version", lambda shard: shard.update(version=10**9), "no MDS shard of version 2")
index_case("sizes", lambda shard: shard.update(column_sizes=[-8, None]), "column's size")
index_case("few_columns", lambda shard: shard.update(column_names=["image"]), "every column needs")
index_case("image_pkl", lambda shard: shard.update(column_encodings=["pkl", "int"]), "'image' of type 'bytes'")
index_case(
    "label_pkl", lambda shard: shard.update(column_encodings=["bytes", "pkl"]), "'label' has the type", quick=True
)
index_case("no_raw_data", lambda shard: shard.pop("raw_data"), "raw_data: no description of a file")


@case("listed twice")
def index_with_one_file_twice(folder: Path) -> Work:
    write(folder / "set")
    index = folder / "set/index.json"
    shards = json.loads(index.read_text())["shards"]
    index.write_text(json.dumps({"version": 2, "shards": [shards[0], shards[0]]}))
    return _reader(folder / "set")


def _odd_index(folder: Path, put: Callable[[Path], Any]) -> Work:
    write(folder / "set")
    (folder / "set/index.json").unlink()
    put(folder / "set/index.json")
    return _reader(folder / "set")


@case("not a readable MDS index")
def index_nested_deep(folder: Path) -> Work:
    return _odd_index(folder, lambda path: path.write_text('{"shards":' + "[" * 10**5 + "]" * 10**5 + "}"))


@case("not a readable MDS index", quick=True)
def index_is_a_pipe(folder: Path) -> Work:
    return _odd_index(folder, os.mkfifo)


@case("not a readable MDS index")
def index_is_dev_zero(folder: Path) -> Work:
    return _odd_index(folder, lambda path: path.symlink_to("/dev/zero"))


@case("not a readable MDS index")
def index_is_a_folder(folder: Path) -> Work:
    return _odd_index(folder, Path.mkdir)


@case("not a readable MDS index")
def index_of_a_terabyte(folder: Path) -> Work:
    def put(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(1 << 40)

    return _odd_index(folder, put)


@case("no regular file")
def shard_is_dev_zero(folder: Path) -> Work:
    shard = sorted(write(folder / "set").glob("shard.*"))[3]
    shard.unlink()
    shard.symlink_to("/dev/zero")
    return _reader(folder / "set")


@case("no regular file")
def shard_is_a_pipe(folder: Path) -> Work:
    shard = sorted(write(folder / "set").glob("shard.*"))[3]
    shard.unlink()
    os.mkfifo(shard)
    return _reader(folder / "set", cache=str(folder / "cache"))


@case("'image' of type 'bytes'")
def every_column_is_a_pickle(folder: Path) -> Work:
    with MDSWriter(out=str(folder / "set"), columns={"image": "pkl", "label": "pkl"}) as writer:
        writer.write({"image": Evil(folder), "label": Evil(folder)})
    return _reader(folder / "set")


@case(None, quick=True)
def a_pickle_beside_the_wanted_columns(folder: Path) -> Work:
    """It is stepped over; so is what no decoder would take."""
    columns = {"image": "bytes", "aaa": "pkl", "label": "int", "zzz": "json"}
    with MDSWriter(out=str(folder / "set"), columns=columns) as writer:
        for i in range(20):
            writer.write({"image": png(i), "aaa": Evil(folder), "label": i, "zzz": {"a": [i]}})
    return _reader(folder / "set")


def _patched_shard(folder: Path, at: int, data: bytes) -> Path:
    source = folder / "set" if (folder / "set").exists() else write(folder / "set")
    shard = min(source.glob("shard.*"))
    content = bytearray(shard.read_bytes())
    content[at : at + len(data)] = data
    shard.write_bytes(content)
    return folder / "set"


@case("cannot be read.*is said to lie at bytes")
def shard_with_a_sample_of_4_gib(folder: Path) -> Work:
    return _reader(_patched_shard(folder, 8, struct.pack("<I", 2**32 - 1)))


@case("cannot be read.*is said to lie at bytes")
def shard_with_a_sample_that_ends_before_it_begins(folder: Path) -> Work:
    return _reader(_patched_shard(folder, 4, struct.pack("<II", 900, 4)))


@case("cannot be read.*is said to have columns")
def sample_with_columns_of_4_gib(folder: Path) -> Work:
    shard = min(write(folder / "set").glob("shard.*"))
    begin = struct.unpack("<I", shard.read_bytes()[4:8])[0]
    return _reader(_patched_shard(folder, begin, struct.pack("<I", 2**32 - 1)))


# ---- through a cache, and unpacked in place


def _cached(
    name: str, change: Callable[[dict[str, Any]], Any], refused: str, *, quick: bool = False, **how: Any
) -> None:
    def make(folder: Path) -> Work:
        return _reader(changed_index(folder, change, **how), cache=str(folder / "a/b"))

    CASES.append(Case(f"cached_{name}", make, refused, quick))


_cached("dotdot", lambda shard: shard["raw_data"].update(basename="../../victim.txt"), "no name in", quick=True)
_cached("absolute", lambda shard: shard["raw_data"].update(basename="/etc/hostname"), "no name in")
_cached("zip", lambda shard: shard["zip_data"].update(basename="../../../victim.txt"), "no name in", compression="zstd")


@case("says half of how it is compressed")
def compressed_by_half(folder: Path) -> Work:
    return _reader(changed_index(folder, lambda shard: shard.update(compression="zstd")))


@case("a link that leads elsewhere", quick=True)
def staging_folder_is_a_link(folder: Path) -> Work:
    write(folder / "set", compression="zstd")
    (folder / "set/.staging").symlink_to(folder.parent)
    return _reader(folder / "set")


@case("a link that leads elsewhere")
def lock_folder_is_a_link(folder: Path) -> Work:
    write(folder / "set", compression="zstd")
    (folder / "set/.locks").symlink_to(folder.parent)
    return _reader(folder / "set")


@case(None)
def lock_folder_is_a_link_where_nothing_is_fetched(folder: Path) -> Work:
    """It held a file of the user's own, which used to be emptied as an old lock."""
    write(folder / "set")
    (folder / "set/.locks").symlink_to(folder.parent)
    return _reader(folder / "set")


@case("cannot be read.*FetchError|cannot be read.*OSError|symbolic link")
def lock_is_a_link(folder: Path) -> Work:
    write(folder / "set", compression="zstd")
    (folder / "set/.locks").mkdir()
    for name in json.loads((folder / "set/index.json").read_text())["shards"]:
        (folder / "set/.locks" / name["raw_data"]["basename"]).symlink_to(folder.parent / "victim.txt")
    return _reader(folder / "set")


@case(None)
def shard_named_as_a_lock_of_the_cache(folder: Path) -> Work:
    """It used to wait for itself."""
    changed_index(folder, lambda shard: shard["raw_data"].update(basename="room"))
    (folder / "set/shard.00000.mds").rename(folder / "set/room")
    return _reader(folder / "set", cache=str(folder / "cache"))


BOMB = bytes(1 << 30)
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "zstd": zstandard.compress, "gz": gzip.compress, "bz2": bz2.compress, "snappy": snappy.compress,
    "br": lambda data: brotli.compress(data, quality=1),
}  # fmt: skip


def _packed_bomb(compression: str) -> Callable[[Path], Work]:
    def make(folder: Path) -> Work:
        write(folder / "set", compression=compression)
        index = folder / "set/index.json"
        content = json.loads(index.read_text())
        packed = PACKERS[compression](BOMB)
        for shard in content["shards"]:
            (folder / "set" / shard["zip_data"]["basename"]).write_bytes(packed)
            shard["zip_data"]["bytes"] = len(packed)
        index.write_text(json.dumps(content))
        return _reader(folder / "set", cache=str(folder / "cache"))

    return make


for _name in PACKERS:
    CASES.append(Case(f"bomb_{_name}", _packed_bomb(_name), "cannot be read.*index", _name == "zstd"))


# ---- images


def _image(data: bytes, folder: Path) -> Work:
    with MDSWriter(out=str(folder / "set"), columns={"image": "bytes", "label": "int"}) as writer:
        for i in range(4):
            writer.write({"image": data, "label": i})
    return _reader(folder / "set", canonical_nodes=1)


def _encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, *chunks: bytes, bits: int = 8, colour: int = 2) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(chunks)
        + _chunk(b"IDAT", zlib.compress(bytes(9999)))
        + _chunk(b"IEND", b"")
    )


@case("does not decode.*13000 x 13000 pixels", quick=True)
def png_of_169_megapixels(folder: Path) -> Work:
    return _image(_encoded(Image.new("L", (13000, 13000)), "PNG"), folder)


@case("does not decode.*pixels")
def png_of_4_gigapixels(folder: Path) -> Work:
    return _image(_png(65535, 65535), folder)


@case("does not decode")
def png_of_a_billion_by_one(folder: Path) -> Work:
    return _image(_png(2**31 - 1, 1), folder)


@case("does not decode")
def png_with_a_text_of_a_gigabyte(folder: Path) -> Work:
    return _image(_png(8, 8, _chunk(b"zTXt", b"a\0\0" + zlib.compress(BOMB))), folder)


@case("does not decode")
def png_with_a_profile_of_a_gigabyte(folder: Path) -> Work:
    plain = _encoded(Image.new("RGB", (8, 8)), "PNG")
    return _image(plain[:33] + _chunk(b"iCCP", b"a\0\0" + zlib.compress(BOMB)) + plain[33:], folder)


@case("does not decode.*pixels")
def gif_with_a_canvas_of_4_gigapixels(folder: Path) -> Work:
    data = bytearray(_encoded(Image.new("P", (8, 8)), "GIF"))
    data[6:10] = b"\xff\xff\xff\xff"
    return _image(bytes(data), folder)


@case(None)
def gif_of_two_thousand_frames(folder: Path) -> Work:
    frames = [Image.new("P", (200, 200), i % 255) for i in range(2000)]
    return _image(_encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), folder)


@case("does not decode.*pixels")
def tiff_of_4_gigapixels(folder: Path) -> Work:
    data = _encoded(Image.new("L", (300, 300)), "TIFF").replace(
        struct.pack("<HHII", 256, 4, 1, 300), struct.pack("<HHII", 256, 4, 1, 65535)
    )
    return _image(data.replace(struct.pack("<HHII", 257, 4, 1, 300), struct.pack("<HHII", 257, 4, 1, 65535)), folder)


@case("does not decode.*pixels")
def jpeg_2000_of_64_megapixels(folder: Path) -> Work:
    return _image(_encoded(Image.new("L", (8000, 8000)), "JPEG2000"), folder)


@case("does not decode.*cannot identify", quick=True)
def eps(folder: Path) -> Work:
    return _image(_encoded(Image.new("RGB", (64, 64)), "EPS"), folder)


def _format_case(form: str) -> None:
    def make(folder: Path) -> Work:
        return _image(_encoded(Image.new("RGB", (64, 64)), form), folder)

    CASES.append(Case(f"image_{form.lower()}", make, "does not decode.*cannot identify", False))


for _form in ("PDF", "ICO", "TGA", "PCX", "SGI", "IM", "DDS", "ICNS", "SPIDER"):
    _format_case(_form)


@case("does not decode.*cannot identify")
def image_psd(folder: Path) -> Work:
    return _image(b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 30000, 30000, 8, 3) + bytes(500), folder)


@case(None)
def images_of_every_format_that_is_meant(folder: Path) -> Work:
    image = Image.new("RGB", (64, 48), (200, 30, 40))
    forms = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM", "MPO")
    with MDSWriter(out=str(folder / "set"), columns={"image": "bytes", "label": "int"}) as writer:
        for form in forms:
            writer.write({"image": _encoded(image, form), "label": 0})
    return _reader(folder / "set", canonical_nodes=1)


# ---- pickles


def make_shards(source: Path, out: Path, *options: str) -> None:
    """The tool as a user calls it; UserError with its line."""
    module = _module()
    said = io.StringIO()
    import contextlib

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
_pickle_case("cut", lambda folder: pickle.dumps(NAMES)[:-9], "is expected")
_pickle_case("long", lambda folder: b"\x80\x02\x8b\xff\xff\xff\x7f.", "is expected")
_pickle_case("deep", lambda folder: b"\x80\x02" + b"]" * 10**6 + b"a" * (10**6 - 1) + b".", "is expected")
_pickle_case("codec", lambda folder: b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x04\0\0\0zlib\x86R.", "codec")
_pickle_case("extension", lambda folder: b"\x80\x02\x82\x01.", "is expected")
_pickle_case("no_mapping", lambda folder: pickle.dumps([1]), "it holds a list")
_pickle_case("empty", lambda folder: b"", "is expected")
_pickle_case("set_method", lambda folder: b"\x80\x02cnumpy\ndtype\n}X\x01\0\0\0aK\x01sb.", "is expected")


# ---- weights and checkpoints


@case("which no checkpoint needs", quick=True)
def checkpoint_that_runs_a_program(folder: Path) -> Work:
    (folder / "step00000001").mkdir()
    torch.save({"module": {}, "x": Evil(folder)}, folder / "step00000001/mp_rank_00_model_states.pt")
    return lambda: require_plain(folder / "step00000001")


@case("which no checkpoint needs")
def optimizer_that_runs_a_program(folder: Path) -> Work:
    (folder / "step00000001").mkdir()
    torch.save({}, folder / "step00000001/mp_rank_00_model_states.pt")
    torch.save([Evil(folder)], folder / "step00000001/zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return lambda: require_plain(folder / "step00000001")


@case("cannot be read")
def checkpoint_of_the_old_format(folder: Path) -> Work:
    (folder / "step00000001").mkdir()
    path = folder / "step00000001/mp_rank_00_model_states.pt"
    torch.save([Evil(folder)], path, _use_new_zipfile_serialization=False)
    return lambda: require_plain(folder / "step00000001")


@case("load it where you trust it")
def teacher_that_runs_a_program(folder: Path) -> Work:
    torch.save({"model": Evil(folder)}, folder / "teacher.pth")
    return lambda: read_weights(folder / "teacher.pth")


@case("teacher.weights=")
def teacher_that_is_a_bare_pickle(folder: Path) -> Work:
    (folder / "teacher.safetensors").write_bytes(pickle.dumps(Evil(folder)))
    return lambda: read_weights(folder / "teacher.safetensors")


@case("teacher.weights=")
def safetensors_of_8_exabytes(folder: Path) -> Work:
    (folder / "t.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")
    return lambda: read_weights(folder / "t.safetensors")


@case("teacher.weights=")
def safetensors_whose_tensor_is_not_there(folder: Path) -> Work:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (folder / "t.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return lambda: read_weights(folder / "t.safetensors")


@case("teacher.weights=")
def safetensors_nested_deep(folder: Path) -> Work:
    header = b'{"a":' + b"[" * 10**6
    (folder / "t.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return lambda: read_weights(folder / "t.safetensors")


STUDENT = {
    "model": "vit_tiny_patch16_224", "image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3,
    "kwargs": {"img_size": 32, "num_classes": 0, "embed_dim": 24, "depth": 2, "num_heads": 3},
}  # fmt: skip


def _student(name: str, refused: str, *, quick: bool = False, kwargs: Optional[dict] = None, **changes: Any) -> None:
    def make(folder: Path) -> Work:
        save_file({"a": torch.zeros(2)}, folder / "student.safetensors")
        (folder / "secret.bin").write_bytes(pickle.dumps(Evil(folder)))
        record = {**STUDENT, "kwargs": {**STUDENT["kwargs"], **(kwargs or {})}, **changes}
        text = json.dumps(record).replace("FOLDER", str(folder))
        (folder / "student.json").write_text(text)
        return lambda: load_student(folder)

    CASES.append(Case(f"student_{name}", make, refused, quick))


_student("of_the_hub", "none of timm", model="hf-hub:somebody/model", quick=True)
_student("of_the_old_hub", "none of timm", model="hf_hub:somebody/model")
_student("of_a_folder", "none of timm", model="local-dir:FOLDER")
_student("of_a_path", "none of timm", model="../../x")
_student("of_a_list", "none of timm", model=["vit_tiny_patch16_224"])
_student("with_a_file", "kwargs.checkpoint_path", kwargs={"checkpoint_path": "FOLDER/secret.bin"})
_student("pretrained", "kwargs.pretrained", kwargs={"pretrained": True})
_student("with_a_config", "kwargs.pretrained_cfg", kwargs={"pretrained_cfg": {"file": "FOLDER/secret.bin"}})
_student("with_an_overlay", "kwargs.pretrained_cfg_overlay", kwargs={"pretrained_cfg_overlay": {"url": "http://x"}})
_student("with_a_cache", "kwargs.cache_dir", kwargs={"cache_dir": "FOLDER"})
_student("with_a_nested_path", "no plain argument", kwargs={"a": [{"b": "/etc/passwd"}]})
_student("of_a_billion_blocks", "no plain argument", kwargs={"depth": 10**9})
_student("of_a_million_channels", "not the weights of its record", kwargs={"embed_dim": 3 * 10**5, "depth": 1})
_student("of_a_thousand_blocks", "not the weights of its record", kwargs={"depth": 300})
_student("of_texts", "cannot be loaded", kwargs={"depth": "2"})
_student("of_a_billion_pixels", "image_size", image_size=10**9)
_student("of_negative_pixels", "image_size", image_size=-1)
_student("of_tiny_crops", "crop_pct", crop_pct=1e-9)
_student("of_two_colours", "mean", mean=[0.5, 0.5])
_student("of_another_model", "not the weights of its record")


@case("no readable record")
def student_nested_deep(folder: Path) -> Work:
    save_file({"a": torch.zeros(2)}, folder / "student.safetensors")
    (folder / "student.json").write_text("[" * 10**6)
    return lambda: load_student(folder)


@case("no readable record")
def student_record_is_a_pipe(folder: Path) -> Work:
    save_file({"a": torch.zeros(2)}, folder / "student.safetensors")
    os.mkfifo(folder / "student.json")
    return lambda: load_student(folder)


# ---- configs


def _config(name: str, text: str, refused: str, *, quick: bool = False) -> None:
    def make(folder: Path) -> Work:
        (folder / "run.yaml").write_text(text.replace("FOLDER", str(folder)))
        (folder / "secret.txt").write_text("password: hunter2\nother: [hunter2\n")
        (folder / "secret.yaml").write_text("hunter2: 1\n")

        def read() -> Config:
            try:
                return load(folder / "run.yaml", [])
            except UserError as error:
                assert "hunter2" not in str(error) and "root:" not in str(error), error
                raise

        return read

    CASES.append(Case(f"config_{name}", make, refused, quick))


_LAUGHS = "l0: &l0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
_config("of_a_billion_laughs", _LAUGHS, "anchors stand for more than", quick=True)
_config("that_is_its_own_part", "student: &a {kwargs: *a}\n", "nested deeper")
_config("nested_deep", "a: " + "[" * 5000 + "]" * 5000, "nested deeper|not readable as YAML")
_config("that_runs_python", "a: !!python/object/apply:os.mkdir [FOLDER/../canary]\n", "not readable as YAML")
_config("that_reads_the_environment", "output: x-${oc.env:HOME}\n", "not taken from a file", quick=True)
_config("of_doubling_texts", "student: {kwargs: {a: '${b}${b}'}}\n", "not taken from a file")
_config("on_a_text", "base: secret.txt\n", "the name of a .yaml file", quick=True)
_config("on_passwd", "base: /etc/passwd\n", "the name of a .yaml file")
_config("on_another_yaml", "base: secret.yaml\n", "has a key that is no option")
_config("broken", "password: [hunter2\n", "not readable as YAML .line")


@case("no regular file")
def config_is_a_pipe(folder: Path) -> Work:
    os.mkfifo(folder / "run.yaml")
    return lambda: load(folder / "run.yaml", [])


@case("no regular file")
def config_on_dev_zero(folder: Path) -> Work:
    (folder / "run.yaml").symlink_to("/dev/zero")
    return lambda: load(folder / "run.yaml", [])


@case("not taken from a file")
def sweep_that_reads_the_environment(folder: Path) -> Work:
    (folder / "sweep.yaml").write_text("base: b.yaml\nrows: {a: ['output=${oc.env:HOME}']}\n")
    return lambda: read_plan(folder / "sweep.yaml", None, ())


# ---- sources of images


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
