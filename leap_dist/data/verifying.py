"""Read finished shards from the first byte to the last, as training would."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from leap_dist.data.classes import CLASSES
from leap_dist.data.columns import ShardReader
from leap_dist.data.index import INDEX, ShardIndex, is_inside, read_index
from leap_dist.data.parallel import parallel
from leap_dist.data.sharding import QUARANTINE, RUN
from leap_dist.data.shards import HASH
from leap_dist.data.sources import WHOLE
from leap_dist.data.transforms import decode
from leap_dist.errors import UserError
from leap_dist.runtime.files import read_json, read_regular


@dataclass(frozen=True)
class StoredShard:
    """A shard in a folder's index."""

    folder: Path
    index: ShardIndex
    number: int

    @property
    def path(self) -> Path:
        """Its file."""
        return self.folder / self.index.raw.names[self.number]

    @property
    def samples(self) -> int:
        """How many it has."""
        return int(self.index.samples[self.number])


def stored_shards(out: Path) -> list[StoredShard]:
    """All shards that the indices of `out`, or of the folders in it, list. UserError if a split or images are missing.

    What was to be written is known from sharding.json, if tools/make_shards.py wrote `out`.
    """
    planned = _planned(out / RUN) if (out / RUN).exists() else None
    if planned is None:
        folders = [path.parent for path in (out / INDEX, *sorted(out.glob(f"*/{INDEX}"))) if path.exists()]
    else:  # a set that was made in parts has indices of these as well
        folders = [out / split for split in planned if (out / split / INDEX).exists()]
    if not folders:
        parts = next(out.glob("part-*-of-*.json"), None)
        hint = "its parts are to be merged first: --merge" if parts else "no shards, or not all of them yet"
        raise UserError(f"neither {out} nor a folder in it has an {INDEX}: {hint}")
    indices = [(folder, read_index(folder, HASH)) for folder in folders]
    shards = [StoredShard(folder, index, number) for folder, index in indices for number in range(len(index))]
    if planned is not None:
        _check_planned(out, planned, shards)
    return shards


def _planned(path: Path) -> dict[str, Optional[int]]:
    """How many images each split should have, as sharding.json says; None where that was not known beforehand.

    UserError if it says no such thing.
    """
    try:
        planned = {split: plan.get("images") for split, plan in read_json(path)["splits"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error!r:.200}") from None
    counts = (type(images) is int or images is None for images in planned.values())
    if not all(counts) or not all(split == WHOLE or is_inside(split) for split in planned):
        raise UserError(f"{path}: a number of images is expected for every split")
    return planned


def _check_planned(out: Path, planned: dict[str, Optional[int]], shards: list[StoredShard]) -> None:
    """Compare the indices with the number of images that each split should have."""
    for split in planned:
        if not (out / split / INDEX).exists():
            raise UserError(f"{out / split / INDEX} is missing, though {RUN} lists the split")
    if None in planned.values():
        return
    left_out = 0
    if (out / QUARANTINE).exists():
        with open(out / QUARANTINE, newline="", encoding="utf-8") as file:
            left_out = sum(1 for _ in csv.reader(file)) - 1
    stored, wanted = sum(shard.samples for shard in shards), sum(planned.values())
    if stored + left_out != wanted:
        raise UserError(f"{out}: {stored} images in shards and {left_out} in quarantine, but {RUN} says {wanted}")


def verify(shards: list[StoredShard], classes: int, workers: int) -> Iterator[Counter[int]]:
    """Check every shard with `workers` processes; yield the labels of each as it is done. UserError at the first fault.

    A shard must have its size and its hash, every image must decode, and every label be in 0 ... `classes` - 1.
    """
    import streaming  # noqa: F401  # 3 s to import: once, for all workers

    for shard, labels in zip(shards, parallel(_read, shards, workers), strict=True):
        strange = [label for label in labels if not 0 <= label < classes]
        if strange:
            raise UserError(f"{shard.path} has the label {strange[0]}, but {CLASSES} lists {classes} classes")
        yield labels


def count_classes(out: Path) -> int:
    """How many classes the class index of `out` has."""
    try:
        return len(read_json(out / CLASSES))
    except (OSError, ValueError) as error:
        raise UserError(f"{out / CLASSES} cannot be read: {error}") from None


def _read(shard: StoredShard) -> Counter[int]:
    from streaming.base.hashing import get_hash

    index, number, path = shard.index, shard.number, shard.path
    if index.columns_of(number).compression is not None:
        raise UserError(f"{path} is compressed: only shards as tools/make_shards.py writes them can be verified")
    data = read_regular(path)
    if len(data) != index.raw.sizes[number]:
        raise UserError(f"{path} has {len(data)} bytes where {INDEX} says {index.raw.sizes[number]}")
    if get_hash(HASH, data) != index.raw.hashes[number]:
        raise UserError(f"{path} is corrupt: its {HASH} is not the one in {INDEX}")
    reader = ShardReader(path, index.columns_of(number), len(data))
    labels = Counter()
    for i in range(int(index.samples[number])):
        sample = reader.sample(i)
        try:
            decode(sample["image"])
        except Exception as error:  # PIL raises OSError, SyntaxError, struct.error, ...
            raise UserError(f"{path}: sample {i} does not decode ({type(error).__name__}: {error})") from None
        labels[int(sample["label"])] += 1
    return labels
