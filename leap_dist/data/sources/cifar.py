"""CIFAR-10 and CIFAR-100 as torchvision unpacks them: pickled arrays, given out as PNG."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
from PIL import Image

from leap_dist.data.classes import MOST_CLASSES
from leap_dist.data.sources.images import Images
from leap_dist.errors import UserError
from leap_dist.runtime.plain_pickle import read_plain_pickle

SIDE = 32  # of an image, pixels


class _Layout(NamedTuple):
    splits: dict[str, list[str]]
    meta: str
    class_names: str
    labels: str


LAYOUTS = {
    "cifar-10-batches-py": _Layout(
        {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
        meta="batches.meta",
        class_names="label_names",
        labels="labels",
    ),
    "cifar-100-python": _Layout(
        {"train": ["train"], "test": ["test"]}, meta="meta", class_names="fine_label_names", labels="fine_labels"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Pixels(Images):
    """Images in memory, (N, H, W, 3) uint8, given out as PNG: lossless, and read by whatever reads images."""

    pixels: np.ndarray

    def reader(self, numbers: Sequence[int]) -> Callable[[int], bytes]:
        """See Images."""
        return self._encode

    def _encode(self, number: int) -> bytes:
        png = io.BytesIO()
        Image.fromarray(self.pixels[number]).save(png, "PNG")
        return png.getvalue()


def cifar_folder(folder: Path) -> Optional[Path]:
    """The folder of pickles: in `folder`, as torchvision has it, or `folder` itself."""
    places = [place for name in LAYOUTS for place in (folder / name, folder) if place.name == name and place.is_dir()]
    return places[0] if places else None


def open_cifar(folder: Path) -> dict[str, Images]:
    """Both splits of CIFAR-10, or of CIFAR-100 with its fine labels. UserError if a file holds something else."""
    layout = LAYOUTS[folder.name]
    classes = _unpickle(folder / layout.meta).get(layout.class_names)
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{folder / layout.meta}: a list of names, {layout.class_names!r}, is expected in it")
    return {split: _open_batches(folder, names, layout.labels, classes) for split, names in layout.splits.items()}


def _open_batches(folder: Path, names: list[str], labels: str, classes: list[str]) -> Pixels:
    batches = [_batch(folder / name, labels) for name in names]
    pixels = np.concatenate([data for data, _ in batches]).reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return Pixels(
        pixels=pixels,
        classes=classes,
        names=[f"{name}:{i}" for name, (data, _) in zip(names, batches, strict=True) for i in range(len(data))],
        labels=np.concatenate([numbers for _, numbers in batches]),
        sizes=np.full(len(pixels), 3 * SIDE**2),
    )


def _batch(path: Path, labels: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, 3072) uint8 and labels (N,) int64 of a file. UserError if it holds something else."""
    batch = _unpickle(path)
    data, numbers = batch.get("data"), batch.get(labels)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3 * SIDE**2,):
        raise UserError(f"{path}: pixels, 'data' of N x {3 * SIDE**2} bytes, are expected in it")
    if not isinstance(numbers, list) or len(numbers) != len(data) or not all(type(n) is int for n in numbers):
        raise UserError(f"{path}: {len(data)} whole numbers, {labels!r}, are expected in it")
    if any(not 0 <= number < MOST_CLASSES for number in numbers):
        raise UserError(f"{path}: {labels!r} has numbers of no class")
    return np.asarray(data), np.array(numbers, np.int64)


def _unpickle(path: Path) -> dict[str, Any]:
    what = "a pickle of CIFAR as torchvision unpacks it"
    content = read_plain_pickle(path, what, encoding="latin1")
    if not isinstance(content, dict):
        raise UserError(f"{path}: {what} is expected (it holds a {type(content).__name__})")
    return content
