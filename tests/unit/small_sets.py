"""A small set of flat images as MDS shards, what can happen to its files, and the config of a loader of it."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from streaming import MDSWriter

from leap_dist.config import DataConfig
from leap_dist.runtime.distributed import World

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
SIZE = 64


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (i % 256, 255 - i % 256, 7 * i % 256)).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, size: int = SIZE, compression: str | None = None, bad: int = -1, labels: bool = True) -> Path:
    """`size` flat images of different colours in about ten shards; number `bad` is no image."""
    columns = {"image": "bytes", "label": "int"} if labels else {"image": "bytes"}
    options = {"columns": columns, "compression": compression, "hashes": ["xxh64"], "size_limit": 1000}
    with MDSWriter(out=str(folder), **options) as writer:
        for i in range(size):
            sample = {"image": b"no image" if i == bad else png(i), "label": i}
            writer.write({name: sample[name] for name in columns})
    return folder


def config(folder: Path | str, **options: object) -> DataConfig:
    defaults = {"workers": 0, "image_size": 8, "canonical_nodes": 4, "timeout_s": 20}
    return DataConfig(train=str(folder), **{**defaults, **options})


def helpers_on_path() -> dict[str, str]:
    """The environment of a test file that runs as a script: one thread, and the helpers at hand that it imports."""
    here = Path(__file__).parent
    paths = [str(here), str(here.parent / "distributed"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def flat(batches: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-60:-40] = bytes(255 - value for value in data[-60:-40])
    path.write_bytes(data)


FAULTS = {"missing": Path.unlink, "cut": cut, "flipped": flip}
