"""Turn a set of images into MDS shards, or verify shards. JPEG bytes stay as they are, unless --resize is given.

    python tools/make_shards.py /data/imagenet /data/imagenet-mds --workers 16
    python tools/make_shards.py /data/imagenet /data/imagenet100-mds --classes imagenet100 --resize 256
    python tools/make_shards.py --verify /data/imagenet-mds

    python tools/make_shards.py /data/datacomp /data/datacomp-mds --part 3/64     # on the third of 64 machines
    python tools/make_shards.py --merge /data/datacomp-mds                        # when all 64 are done

SRC holds class folders or just images (under train/ and val/, or not), the tars of ILSVRC2012 with the devkit, CIFAR as
torchvision unpacks it, parquet files with images, WebDataset tars, or parquet files with paths of images. A run that
was killed is continued by the same command. Every image is decoded once; those that cannot be are left out and listed
in OUT/quarantine.csv.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Optional

from tqdm import tqdm

from leap_dist.config.ranges import Range
from leap_dist.data.merging import merge
from leap_dist.data.names import printable
from leap_dist.data.plans import JPEG_QUALITY, AnyPlan, Recipe, plan, plan_stream
from leap_dist.data.sharding import (
    MOST_PARTS,
    QUARANTINE,
    Part,
    check_apart,
    check_begun,
    check_out,
    share_of,
    write_planned,
)
from leap_dist.data.sources import WHOLE, open_source, open_stream
from leap_dist.data.verifying import count_classes, stored_shards, verify
from leap_dist.errors import UserError

RANGES = {
    "workers": Range(0, 1024),
    "resize": Range(1, 65_535),  # JPEG has no more pixels a side
    "quality": Range(1, 100),
    "max_bad": Range(0, 1),
    "shard_mib": Range(1e-6, 4095),  # MDS counts a shard's bytes in 32 bits
}
PIECE_SHARDS = 4  # WebDataset tars are read by the tar, or by as many as make up so many shards
CLASS_LISTS = {"imagenet100": files("leap_dist.data") / "imagenet100.txt"}


def parse(arguments: Optional[Sequence[str]]) -> argparse.Namespace:
    """Read the command line; `paths` are SRC and OUT, or OUT alone with --verify."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="make_shards.py SRC OUT [options]\n       make_shards.py OUT [--merge] [--verify] [--workers N]",
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="SRC OUT", help="images, and a new folder for shards")
    parser.add_argument("--verify", action="store_true", help="read OUT: sizes, hashes, every image, labels")
    parser.add_argument("--part", type=part_of, metavar="K/N", help="write the K-th of N parts, for N machines")
    parser.add_argument("--merge", action="store_true", help="put the parts in OUT together")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (one a core)")
    parser.add_argument("--resize", type=int, help="re-encode images whose shorter side is longer than this (pixels)")
    parser.add_argument("--quality", type=int, help="JPEG quality of --resize (90)")
    parser.add_argument("--classes", help="take these only: imagenet100, or a file with a class name per line")
    parser.add_argument(
        "--layout",
        choices=("splits", "classes"),
        help="what folders in SRC are, where names like train may mean either",
    )
    parser.add_argument("--root", type=Path, help="where the images of a list of paths lie (the list's own folder)")
    parser.add_argument("--max-bad", type=float, default=0.001, help="fail beyond this fraction of bad images (0.001)")
    parser.add_argument("--shard-mib", type=float, default=64, help="size of a shard (64)")
    options = parser.parse_args(arguments)
    if len(options.paths) != (1 if options.verify or options.merge else 2):
        parser.error("give SRC and OUT, or OUT with --merge or --verify")
    if options.part and (options.verify or options.merge):
        parser.error("--part is about writing: give SRC and OUT")
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


def progress(total: int, unit: str, description: str) -> tqdm:
    """A bar with images/s or bytes/s and the time left; silent where no one watches."""
    return tqdm(total=total, desc=description, unit=unit, unit_scale=unit == "B", smoothing=0.05, disable=None)


def part_of(text: str) -> Part:
    """3/64: the third of 64 parts."""
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of) <= MOST_PARTS):
        raise argparse.ArgumentTypeError(f"{text!r}: K/N is expected, from 1/N to N/N, N at most {MOST_PARTS}")
    return Part(int(number), int(of))


def planned(options: argparse.Namespace, scratch: Path) -> tuple[AnyPlan, Iterator[str]]:
    """What SRC becomes, and a line for each of its splits."""
    source, recipe = options.paths[0], Recipe(options.resize, options.quality or JPEG_QUALITY, options.shard_mib)
    wanted = read_classes(options.classes) if options.classes else None
    print(f"listing {source}", flush=True)
    stream = open_stream(source, int(PIECE_SHARDS * options.shard_mib * 2**20), options.root)
    if stream is not None:
        if options.layout:
            raise UserError(f"--layout {options.layout}: {source} holds no class folders")
        streamed = plan_stream(stream, recipe, wanted)
        return streamed, streamed.describe()
    images = open_source(source, options.workers, options.layout, scratch)
    listed = plan(images, recipe, wanted, scratch)
    return listed, listed.describe(images)


def make(options: argparse.Namespace) -> None:
    """Write the shards of SRC to OUT, or of its splits to OUT/<split>; or a part of them."""
    source, out = options.paths
    part = None if options.part is None or options.part.of == 1 else options.part
    check_apart(source, out)
    check_out(out)
    scratch = next(place for place in (out, *out.absolute().parents) if place.is_dir())
    plan, told = planned(options, scratch)
    check_begun(plan, out, part)
    print(*map(printable, told), sep="\n", flush=True)
    with progress(share_of(plan, part), plan.unit, out.name) as bar:
        for weight in write_planned(plan, out, options.workers, options.max_bad, part):
            bar.update(weight)
    if part is not None:
        print(f"part {part.number} of {part.of} is done; when all are: make_shards.py --merge {out}")
    elif (out / QUARANTINE).exists():
        print(f"some images could not be read and were left out: {out / QUARANTINE}")


def put_together(options: argparse.Namespace) -> None:
    """Merge the parts in OUT and say what they hold."""
    (out,) = options.paths
    for split, samples in merge(out).items():
        print(f"{'all' if split == WHOLE else split}: {samples} images")
    if (out / QUARANTINE).exists():
        print(f"some images could not be read and were left out: {out / QUARANTINE}")


def check(options: argparse.Namespace) -> None:
    """Verify OUT and say what is in it."""
    (out,) = options.paths
    shards = stored_shards(out)
    counts = defaultdict(Counter)
    with progress(sum(shard.samples for shard in shards), "image", f"verify {out.name}") as bar:
        for shard, labels in zip(shards, verify(shards, count_classes(out), options.workers), strict=True):
            counts[shard.folder] += labels
            bar.update(shard.samples)
    for folder, labels in counts.items():
        sizes = labels.values()
        print(f"{folder}: {sum(sizes)} images, {len(sizes)} classes of {min(sizes)} to {max(sizes)} images, all sound")


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Parse the command line and work; 2 after a mistake in the input, 1 if shards are not sound."""
    options = parse(arguments)
    tasks = {put_together: options.merge, check: options.verify}
    sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold bytes that are no text, as stderr knows
    try:
        for task in [task for task, wanted in tasks.items() if wanted] or [make]:
            task(options)
    except (UserError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1 if options.verify else 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
