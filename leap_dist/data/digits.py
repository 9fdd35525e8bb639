"""The embedded demo set: scikit-learn's 1,797 handwritten digits (8x8 pixels), as MDS shards."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from leap_dist.config import DIGITS, DataConfig
from leap_dist.data.classes import CLASSES
from leap_dist.data.shards import INDEX, write_shards
from leap_dist.errors import UserError
from leap_dist.runtime.distributed import World, on_first
from leap_dist.runtime.files import write_json

VAL_SIZE = 297  # 1,500 remain for training
SPLITS = ("train", "val")


def digit_samples(split: str) -> Iterator[tuple[bytes, int]]:
    """Yield (PNG bytes, label) of one split. Val is evenly strided over the set, which is ordered by writer."""
    from sklearn.datasets import load_digits  # half a second, and needed once

    digits = load_digits()
    total = len(digits.target)
    held_out = {i * total // VAL_SIZE for i in range(VAL_SIZE)}
    grey = (digits.images * (255 / 16)).round().astype("uint8")
    for i in range(total):
        if (i in held_out) == (split == "val"):
            png = io.BytesIO()
            Image.fromarray(grey[i]).convert("RGB").save(png, "PNG")
            yield png.getvalue(), int(digits.target[i])


def _write_once(folder: Path, split: str) -> None:
    if not (folder / INDEX).exists():
        try:
            write_shards(digit_samples(split), folder)
        except (UserError, OSError):  # another node that shares the file system was faster
            if not (folder / INDEX).exists():
                raise
    if not (folder / CLASSES).exists():
        write_json(folder / CLASSES, {f"digit {label}": label for label in range(10)})


def resolve(config: DataConfig, output: Path, world: World) -> DataConfig:
    """Replace 'digits' in `train` and `val` by folders under `output`/data/digits, written there if they are not.

    Local rank 0 writes and the others wait, so all ranks must call it. Any other source passes unchanged.
    """
    wanted = {split: output / "data" / DIGITS / split for split in SPLITS if getattr(config, split) == DIGITS}

    def write() -> None:
        for split, folder in wanted.items():
            _write_once(folder, split)

    on_first(write, world)
    return dataclasses.replace(config, **{split: str(folder) for split, folder in wanted.items()})
