"""Small sets as WebDataset tars, in the forms that such sets come in, and the tool that makes shards of them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Optional

import make_shards as tool

from small_sets import png


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            add(tar, name, data)
    return path


def members(first: int, count: int, kind: str = "cls") -> dict[str, bytes]:
    """`count` samples from number `first` on: sample i is `png(i)`, of class i % 7, with what its kind adds."""
    found: dict[str, bytes] = {}
    for i in range(first, first + count):
        label = i % 7
        about = {"cls": {}, "json": {"label": label, "width": 8}, "img2dataset": {"caption": "a cat", "key": f"{i:09}"}}
        found[f"{i:09}.png"] = png(i)
        if kind == "cls":
            found[f"{i:09}.cls"] = f"{label}\n".encode()
        else:
            found[f"{i:09}.json"] = json.dumps(about[kind]).encode()
        if kind == "img2dataset":
            found[f"{i:09}.txt"] = b"a cat"
    return found


def write_tars(
    folder: Path, tars: int = 6, each: int = 10, kind: str = "cls", prefix: str = ""
) -> list[tuple[bytes, int]]:
    """Tars of `each` samples; the truth, in order."""
    for number in range(tars):
        write_tar(folder / f"{prefix}{number:05}.tar", members(number * each, each, kind))
    return [(png(i), 0 if kind == "img2dataset" else i % 7) for i in range(tars * each)]


def make_shards(*arguments: object, workers: Optional[int] = 0) -> int:
    """The tool's exit status."""
    return tool.main([*map(str, arguments), *([] if workers is None else ["--workers", str(workers)])])


def tree_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stored(folder: Path) -> list[tuple[bytes, int]]:
    """(image, label) of all samples, in the order of the index, as streaming's own reader has them."""
    from streaming import LocalDataset

    dataset = LocalDataset(str(folder))
    return [(dataset[i]["image"], int(dataset[i]["label"])) for i in range(dataset.size)]
