"""Write the shards of a whole source with several processes; a run that was killed is continued by the same call.

The order of the images and where one shard ends and the next begins are settled before anything is read, so that
nothing depends on who writes what. `OUT`/.sharding holds a record of every finished shard; index.json, without which
nobody can train, is written when all of them are there.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Optional

import numpy as np
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from leap_dist.data.classes import CLASSES
from leap_dist.data.names import printable
from leap_dist.data.parallel import end_if_orphaned, parallel
from leap_dist.data.pixels import open_rgb
from leap_dist.data.shards import COLUMNS, HASH, INDEX
from leap_dist.data.sources import WHOLE, Images
from leap_dist.errors import UserError
from leap_dist.runtime.files import lock, write_json, writing

QUARANTINE = "quarantine.csv"
RUN = "sharding.json"  # what the shards were made of: stays beside them
WORK = ".sharding"
LOCK_SECONDS = 10  # a killed run's workers are gone within the time of one image
JPEG_QUALITY = 90
JPEG_BYTES_PER_PIXEL = 0.4  # for the plan; ImageNet at quality 90 has 0.33
SAMPLE_OVERHEAD = 16  # bytes MDS adds to an image: its offset, its size, its label


@dataclass(frozen=True)
class Recipe:
    """How images become shards.

    resize: re-encode images whose shorter side, in pixels, is longer than this, as JPEG of `quality`; None keeps every
    image's own bytes. shard_mib: size of a shard, an estimate if images are re-encoded.
    """

    resize: Optional[int] = None
    quality: int = JPEG_QUALITY
    shard_mib: float = 64

    def encode(self, data: bytes) -> bytes:
        """The bytes to store. It decodes all, as training will. Errors as of `pixels.open_rgb`."""
        image = open_rgb(data)
        if self.resize is None or min(image.size) <= self.resize:
            return data
        jpeg = io.BytesIO()
        resize(image, [self.resize], InterpolationMode.BICUBIC).save(jpeg, "JPEG", quality=self.quality)
        return jpeg.getvalue()

    def stored_sizes(self, sizes: np.ndarray) -> np.ndarray:
        """Estimated bytes in a shard of images of `sizes` bytes."""
        if self.resize is not None:
            sizes = np.minimum(sizes, int(self.resize**2 * 4 / 3 * JPEG_BYTES_PER_PIXEL))
        return sizes + SAMPLE_OVERHEAD


@dataclass(frozen=True)
class Shard:
    """One shard to write: which images of which split, in which order."""

    split: str
    number: int
    images: np.ndarray

    def record(self, out: Path) -> Path:
        """Where it says what was written."""
        return out / WORK / self.split / f"{self.number:05}.json"


@dataclass(frozen=True)
class Plan:
    """What a source and a recipe become: the images of all splits, their labels in `classes`, and all shards.

    labels: (N,) per split, of all its images; those of classes that are left out are in no shard.
    """

    sources: Mapping[str, Images]
    recipe: Recipe
    classes: Mapping[str, int]
    labels: Mapping[str, np.ndarray]
    shards: list[Shard]

    @property
    def size(self) -> int:
        """Number of images."""
        return sum(len(shard.images) for shard in self.shards)

    def left_out(self, split: str, images: Images) -> dict[str, int]:
        """Why `images`, all those of a split, are in no shard, and how many; a split may be left out whole."""
        labels = self.labels[split]
        unlabelled = int(((images.labels < 0) | (images.labels >= len(images.classes))).sum())
        unwanted = int((labels < 0).sum()) - unlabelled
        return {reason: n for reason, n in (("without a label", unlabelled), ("of other classes", unwanted)) if n}

    def parameters(self) -> dict[str, Any]:
        """All that the bytes of the shards depend on, as it is recorded beside them."""
        splits = {}
        for split, images in self.sources.items():
            digest = hashlib.sha256("\n".join(images.names).encode(errors="surrogateescape"))
            for array in (self.labels[split], images.sizes):
                digest.update(array.astype("<i8").tobytes())
            splits[split] = {"images": int((self.labels[split] >= 0).sum()), "sha256": digest.hexdigest()}
        recipe = asdict(self.recipe) if self.recipe.resize else {"resize": None, "shard_mib": self.recipe.shard_mib}
        return {"version": 1, **recipe, "classes": len(self.classes), "splits": splits}


def check_apart(source: Path, out: Path) -> None:
    """UserError if `out` lies in `source`, whose images it would be among when the same command continues."""
    if out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{out} lies in {source}: shards would be found there as images; name a folder outside")


def plan(sources: Mapping[str, Images], recipe: Recipe, wanted: Optional[list[str]] = None) -> Plan:
    """Settle classes, order and shards; a function of its arguments alone. `wanted`: names of the classes to take.

    Classes keep the order of the source, also when they are a part of it. A split without a labelled image is dropped.
    UserError if a split lacks a wanted class, the splits' classes differ, or two have one name.
    """
    names = _common_classes(sources, wanted)
    classes = {name: label for label, name in enumerate(names)}
    labels = {split: _relabelled(images, classes) for split, images in sources.items()}
    sources = {split: images for split, images in sources.items() if (labels[split] >= 0).any()}
    shards = [
        Shard(split, number, chosen)
        for split, images in sources.items()
        for number, chosen in enumerate(_cut(images, labels[split], recipe))
    ]
    if not shards:
        raise UserError("there are no images to write")
    return Plan(sources, recipe, classes, labels, shards)


def _common_classes(sources: Mapping[str, Images], wanted: Optional[list[str]]) -> list[str]:
    first = next(iter(sources.values())).classes
    for split, images in sources.items():
        twice = [name for name, count in Counter(images.classes).items() if count > 1]
        if twice:
            raise UserError(f"two classes are named {twice[0]!r}: a class index needs names that differ")
        if wanted is None:
            wrong, what = set(images.classes) ^ set(first), "not in all splits"
        else:
            place = "the set" if split == WHOLE else f"split {split!r}"
            wrong, what = set(wanted) - set(images.classes), f"wanted but not in {place}"
        if wrong:
            raise UserError(f"classes {', '.join(sorted(wrong)[:3])} ({len(wrong)} in all) are {what}")
    return [name for name in first if wanted is None or name in set(wanted)]


def _relabelled(images: Images, classes: Mapping[str, int]) -> np.ndarray:
    """Labels in `classes`; -1 where the image's class, or any label, is absent."""
    table = np.array([classes.get(name, -1) for name in images.classes] + [-1], dtype=np.int64)
    known = (images.labels >= 0) & (images.labels < len(images.classes))
    return table[np.where(known, images.labels, len(images.classes))]


def _cut(images: Images, labels: np.ndarray, recipe: Recipe) -> list[np.ndarray]:
    """Numbers of the labelled images, shuffled within their windows, cut where a shard is full."""
    keys = np.random.RandomState(0).permutation(len(labels))  # this generator's stream is frozen (numpy's NEP 19)
    order = np.lexsort((keys,) if images.windows is None else (keys, images.windows))
    order = order[labels[order] >= 0]
    ends = np.cumsum(recipe.stored_sizes(images.sizes[order]))
    limit, bounds = recipe.shard_mib * 2**20, [0]
    while bounds[-1] < len(order):
        start = ends[bounds[-1] - 1] if bounds[-1] else 0
        bounds.append(max(int(np.searchsorted(ends, start + limit, "right")), bounds[-1] + 1))
    return [order[start:stop] for start, stop in pairwise(bounds)]


# ---- one shard, in a worker


@dataclass(frozen=True)
class ShardWriter:
    """Writes any shard of a plan, and its record after it."""

    plan: Plan
    out: Path

    def __call__(self, shard: Shard) -> dict[str, Any]:
        """Write the shard; return its record. UserError if the disk refuses."""
        with writing(self.out):
            return self._write(shard)

    def _write(self, shard: Shard) -> dict[str, Any]:
        from streaming import MDSWriter  # 3 s to import

        scratch = shard.record(self.out).with_suffix(".tmp")
        shutil.rmtree(scratch, ignore_errors=True)
        bad = []
        with MDSWriter(out=str(scratch), columns=COLUMNS, hashes=[HASH], size_limit=None) as writer:
            for sample in self._samples(shard, bad):
                writer.write(sample)
        written = json.loads((scratch / INDEX).read_text())["shards"]
        for info in written:
            name = f"shard.{shard.number:05}.mds"
            os.replace(scratch / info["raw_data"]["basename"], self.out / shard.split / name)
            info["raw_data"]["basename"] = name
        shutil.rmtree(scratch)
        record = {"images": len(shard.images), "shards": written, "bad": bad}
        write_json(shard.record(self.out), record)
        return record

    def _samples(self, shard: Shard, bad: list[list[str]]) -> Iterator[dict[str, Any]]:
        """The images that can be read and decoded; (name, reason) of the others go to `bad`."""
        images, labels = self.plan.sources[shard.split], self.plan.labels[shard.split]
        read = images.reader(shard.images)
        for number in shard.images.tolist():
            end_if_orphaned()
            try:
                data = self.plan.recipe.encode(read(number))
            except Exception as error:  # PIL raises OSError, SyntaxError, struct.error, ...
                # Without the address of the object in memory, which some messages have.
                reason = re.sub(r"\s*<[^>]*>", "", f"{type(error).__name__}: {error}")
                bad.append([printable(images.names[number]), printable(" ".join(reason.split()))])
            else:
                yield {"image": data, "label": int(labels[number])}


# ---- the whole run


def write_planned(plan: Plan, out: Path, workers: int, max_bad: float) -> Iterator[int]:
    """Write what is not written yet with `workers` processes; yield numbers of images as they are done.

    Images that cannot be read or decoded are left out and listed in quarantine.csv. UserError if there are more than
    the fraction `max_bad` of them, if `out` holds anything else or what was begun otherwise, and if somebody is at it.
    """
    import streaming  # noqa: F401  # once, for all workers

    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    if _begun(plan, out) and _complete(plan, out):
        shutil.rmtree(out / WORK, ignore_errors=True)
        yield plan.size
        return
    with writing(out), _sole_writer(out):
        if not _begun(plan, out):
            _publish(out, RUN, plan.parameters())
        for split in plan.sources:
            (out / WORK / split).mkdir(parents=True, exist_ok=True)
            (out / split).mkdir(exist_ok=True)
        yield from _write_missing(plan, out, workers, max_bad)
        _finish(plan, out)


def check_out(plan: Plan, out: Path) -> None:
    """UserError if `out` holds anything else, or what was begun otherwise."""
    if out.is_dir():
        _begun(plan, out)


def _begun(plan: Plan, out: Path) -> bool:
    """Whether `out` was begun with the same plan; UserError if with another one, or if it holds something else."""
    if not (out / RUN).exists():
        if any(path.name != WORK for path in out.iterdir()):
            raise UserError(f"{out} exists and is not empty: name a new folder")
        return False
    found, wanted = json.loads((out / RUN).read_text()), plan.parameters()
    for key in wanted:
        if found.get(key) != wanted[key]:
            what = "from other images" if key == "splits" else f"with {key}={found.get(key)}, not {wanted[key]}"
            raise UserError(f"{out} was begun {what}: give what it was begun with, or name a new folder")
    return True


def _complete(plan: Plan, out: Path) -> bool:
    return all((out / split / INDEX).exists() for split in plan.sources)


@contextmanager
def _sole_writer(out: Path) -> Iterator[None]:
    """Hold the lock of `out`; UserError if somebody else does. Workers inherit it, so it outlives a killed parent."""
    (out / WORK).mkdir(exist_ok=True)
    try:
        held = lock(out / WORK / "lock", LOCK_SECONDS)
    except BlockingIOError:
        raise UserError(f"{out}: another process is writing shards here") from None
    with held:
        yield


def _write_missing(plan: Plan, out: Path, workers: int, max_bad: float) -> Iterator[int]:
    missing, bad = [], []
    for shard in plan.shards:
        record = _finished(shard, out)
        if record is None or record["bad"]:  # what could not be read may only have been out of reach
            missing.append(shard)
        else:
            yield record["images"]
    for record in parallel(ShardWriter(plan, out), missing, workers):
        bad += record["bad"]
        _check_bad(plan, out, bad, max_bad)
        yield record["images"]


def _finished(shard: Shard, out: Path) -> Optional[dict[str, Any]]:
    """The record of a shard whose file is there."""
    try:
        record = json.loads(shard.record(out).read_text())
    except FileNotFoundError:
        return None
    for info in record["shards"]:
        path = out / shard.split / info["raw_data"]["basename"]
        if not path.is_file() or path.stat().st_size != info["raw_data"]["bytes"]:
            return None
    return record


def _check_bad(plan: Plan, out: Path, bad: list[list[str]], max_bad: float) -> None:
    if len(bad) > max_bad * plan.size:
        _publish_quarantine(out, bad)
        first = "; ".join(": ".join(entry) for entry in bad[:3])
        raise UserError(
            f"{len(bad)} of {plan.size} images cannot be read, more than --max-bad {max_bad:g} allows: {first}; "
            f"all so far are in {out / QUARANTINE}"
        )


def _finish(plan: Plan, out: Path) -> None:
    """Put the records together, and only then let index.json appear. Doing it again changes nothing."""
    records = [(shard.split, json.loads(shard.record(out).read_text())) for shard in plan.shards]
    bad = [entry for _, record in records for entry in record["bad"]]
    (out / QUARANTINE).unlink(missing_ok=True)
    if bad:
        _publish_quarantine(out, bad)
    _publish(out, CLASSES, dict(plan.classes))
    for split in plan.sources:
        shards = [info for owner, record in records if owner == split for info in record["shards"]]
        _publish(out, f"{split}/{INDEX}", {"version": 2, "shards": shards})
    shutil.rmtree(out / WORK, ignore_errors=True)  # NFS keeps a name for the lock while it is open


def _publish(out: Path, name: str, content: Any) -> None:
    """Write JSON inside the work folder and rename it, so that a kill leaves nothing beside the shards."""
    write_json(out / WORK / "publish", content)
    os.replace(out / WORK / "publish", out / name)


def _publish_quarantine(out: Path, bad: list[list[str]]) -> None:
    with open(out / WORK / "publish", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "reason"), *bad])
    os.replace(out / WORK / "publish", out / QUARANTINE)
