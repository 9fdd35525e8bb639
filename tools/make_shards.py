"""Turn a set of images into MDS shards, or verify shards. JPEG bytes stay as they are, unless --resize is given.

    python tools/make_shards.py /data/imagenet /data/imagenet-mds --workers 16
    python tools/make_shards.py /data/imagenet /data/imagenet100-mds --classes imagenet100 --resize 256
    python tools/make_shards.py --verify /data/imagenet-mds

SRC holds class folders or just images (under train/ and val/, or not), the tars of ILSVRC2012 with the devkit, CIFAR as
torchvision unpacks it, or parquet files with images. A run that was killed is continued by the same command. Every
image is decoded once; those that cannot be are left out and listed in OUT/quarantine.csv.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Optional

from tqdm import tqdm

from leap_dist.config.ranges import Range
from leap_dist.data.names import printable
from leap_dist.data.sharding import JPEG_QUALITY, QUARANTINE, Plan, Recipe, check_apart, check_out, plan, write_planned
from leap_dist.data.sources import WHOLE, Images, counted, open_source
from leap_dist.data.verifying import count_classes, stored_shards, verify
from leap_dist.errors import UserError

RANGES = {
    "workers": Range(0, 1024),
    "resize": Range(1, 65_535),  # JPEG has no more pixels a side
    "quality": Range(1, 100),
    "max_bad": Range(0, 1),
    "shard_mib": Range(1e-6, 4095),  # MDS counts a shard's bytes in 32 bits
}
CLASS_LISTS = {"imagenet100": files("leap_dist.data") / "imagenet100.txt"}


def parse(arguments: Optional[Sequence[str]]) -> argparse.Namespace:
    """Read the command line; `paths` are SRC and OUT, or OUT alone with --verify."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="make_shards.py SRC OUT [options]\n       make_shards.py --verify OUT [--workers N]",
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="SRC OUT", help="images, and a new folder for shards")
    parser.add_argument("--verify", action="store_true", help="read OUT: sizes, hashes, every image, labels")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (one a core)")
    parser.add_argument("--resize", type=int, help="re-encode images whose shorter side is longer than this (pixels)")
    parser.add_argument("--quality", type=int, help="JPEG quality of --resize (90)")
    parser.add_argument("--classes", help="take these only: imagenet100, or a file with a class name per line")
    parser.add_argument(
        "--layout",
        choices=("splits", "classes"),
        help="what folders in SRC are, where names like train may mean either",
    )
    parser.add_argument("--max-bad", type=float, default=0.001, help="fail beyond this fraction of bad images (0.001)")
    parser.add_argument("--shard-mib", type=float, default=64, help="size of a shard (64)")
    options = parser.parse_args(arguments)
    if len(options.paths) != (1 if options.verify else 2):
        parser.error("give SRC and OUT, or --verify and OUT")
    if options.quality is not None and options.resize is None:
        parser.error("--quality is about --resize, which is not given")
    for name, wanted in RANGES.items():
        value = getattr(options, name)
        if value is not None and not wanted.holds(value):
            parser.error(f"--{name.replace('_', '-')} {value}: {wanted.words}")
    return options


def read_classes(name: str) -> list[str]:
    """The class names of a list we ship or of a file; # starts a comment."""
    try:
        lines = CLASS_LISTS.get(name, Path(name)).read_bytes().decode(errors="surrogateescape").splitlines()
    except OSError as error:
        raise UserError(f"--classes {name}: neither {', '.join(CLASS_LISTS)} nor a readable file ({error})") from None
    names = [printable(line.split("#")[0].strip()) for line in lines]
    return [name for name in names if name]


def progress(total: int, description: str) -> tqdm:
    """A bar with images/s and the time left; silent where no one watches."""
    return tqdm(total=total, desc=description, unit="image", smoothing=0.05, disable=None)


def describe(planned: Plan, sources: Mapping[str, Images]) -> Iterator[str]:
    """What is going to be written and what is left out, a line per split."""
    for split, images in sources.items():
        sizes = [len(shard.images) for shard in planned.shards if shard.split == split]
        name = "all" if split == WHOLE else split
        left_out = {**images.left_out, **planned.left_out(split, images)}
        told = f"; left out: {printable(counted(left_out))}" if left_out else ""
        yield (
            f"{name}: {sum(sizes)} of {len(images.names)} images, {len(planned.classes)} classes, "
            f"{len(sizes)} shards{told}"
        )


def make(options: argparse.Namespace) -> None:
    """Write the shards of SRC to OUT, or of its splits to OUT/<split>."""
    source, out = options.paths
    wanted = read_classes(options.classes) if options.classes else None
    recipe = Recipe(options.resize, options.quality or JPEG_QUALITY, options.shard_mib)
    check_apart(source, out)
    print(f"listing {source}", flush=True)
    sources = open_source(source, options.workers, options.layout)
    planned = plan(sources, recipe, wanted)
    check_out(planned, out)
    print(*describe(planned, sources), sep="\n", flush=True)
    with progress(planned.size, out.name) as bar:
        for images in write_planned(planned, out, options.workers, options.max_bad):
            bar.update(images)
    if (out / QUARANTINE).exists():
        print(f"some images could not be read and were left out: {out / QUARANTINE}")


def check(options: argparse.Namespace) -> None:
    """Verify OUT and say what is in it."""
    (out,) = options.paths
    shards = stored_shards(out)
    counts = defaultdict(Counter)
    with progress(sum(shard.info["samples"] for shard in shards), f"verify {out.name}") as bar:
        for shard, labels in zip(shards, verify(shards, count_classes(out), options.workers), strict=True):
            counts[shard.folder] += labels
            bar.update(shard.info["samples"])
    for folder, labels in counts.items():
        sizes = labels.values()
        print(f"{folder}: {sum(sizes)} images, {len(sizes)} classes of {min(sizes)} to {max(sizes)} images, all sound")


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Parse the command line and work; 2 after a mistake in the input, 1 if shards are not sound."""
    options = parse(arguments)
    sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold bytes that are no text, as stderr knows
    try:
        (check if options.verify else make)(options)
    except (UserError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1 if options.verify else 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
