"""CIFAR-10 and CIFAR-100 as torchvision unpacks them: pickled arrays, given out as PNG."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
from PIL import Image

from leap_dist.data.sources.images import Images
from leap_dist.errors import UserError


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
    """Both splits of CIFAR-10, or of CIFAR-100 with its fine labels. A pickle can run code: use a copy you trust."""
    layout = LAYOUTS[folder.name]
    classes = _unpickle(folder / layout.meta)[layout.class_names]
    return {split: _open_batches(folder, names, layout.labels, classes) for split, names in layout.splits.items()}


def _open_batches(folder: Path, names: list[str], labels: str, classes: list[str]) -> Pixels:
    batches = [_unpickle(folder / name) for name in names]
    pixels = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Pixels(
        pixels=pixels,
        classes=classes,
        names=[f"{name}:{i}" for name, batch in zip(names, batches, strict=True) for i in range(len(batch["data"]))],
        labels=np.concatenate([batch[labels] for batch in batches]),
        sizes=np.full(len(pixels), pixels[0].size),
    )


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        return pickle.loads(path.read_bytes(), encoding="latin1")
    except (OSError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{path}: a pickle of CIFAR as torchvision unpacks it is expected ({error})") from None
