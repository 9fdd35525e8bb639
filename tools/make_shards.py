"""Turn a tree of images, SRC/<class>/... or SRC/{train,val}/<class>/..., into MDS shards. JPEG bytes stay as they are.

    python tools/make_shards.py /data/imagenet /data/imagenet-mds --workers 16

Every image is decoded once, to be sure that it can be; if one cannot, all such are listed and nothing is written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Optional

import torch
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from leap_dist.data.crops import decode
from leap_dist.data.shards import complete_or_absent, write_shards
from leap_dist.errors import UserError

SPLITS = ("train", "val")
CLASSES = "class_to_idx.json"


def read_image(path: str) -> Optional[bytes]:
    """The file's bytes, or None if they are no image."""
    data = Path(path).read_bytes()
    try:
        decode(data)
    except Exception:  # PIL raises OSError, SyntaxError, struct.error, ...
        return None
    return data


def open_tree(folder: Path) -> ImageFolder:
    """The images of `folder`/<class>/..., read by `read_image`."""
    try:
        return ImageFolder(str(folder), loader=read_image)
    except FileNotFoundError as error:
        raise UserError(f"{folder}: {' '.join(str(error).split())}") from None


def shuffled_samples(tree: ImageFolder, workers: int) -> Iterator[tuple[bytes, int]]:
    """Every image and its label, in an order that is fixed and mixes the classes; UserError if any is unreadable."""
    order = torch.randperm(len(tree), generator=torch.Generator().manual_seed(0)).tolist()
    loader = DataLoader(Subset(tree, order), batch_size=None, num_workers=workers)
    unreadable = []
    for index, (data, label) in zip(order, tqdm(loader, unit="image", desc=Path(tree.root).name), strict=True):
        if data is None:
            unreadable.append(tree.samples[index][0])
        elif not unreadable:
            yield data, label
    if unreadable:
        print(*sorted(unreadable), sep="\n", file=sys.stderr)
        raise UserError(f"{tree.root}: the {len(unreadable)} images listed above do not decode; nothing was written")


def convert(source: Path, out: Path, workers: int) -> None:
    """Write the shards of `source` to `out`, or of its splits to `out`/<split>, and the class index beside them."""
    if not source.is_dir():
        raise UserError(f"{source} is not a folder")
    with complete_or_absent(out) as part:
        splits = [split for split in SPLITS if (source / split).is_dir()] or ["."]
        trees = {split: open_tree(source / split) for split in splits}
        classes = trees[splits[0]].class_to_idx
        for split, tree in trees.items():
            if tree.class_to_idx != classes:
                raise UserError(f"{source / split}: its classes differ from those of {source / splits[0]}")
        for split, tree in trees.items():
            write_shards(shuffled_samples(tree, workers), part / split)
        (part / CLASSES).write_text(json.dumps(classes, indent=1) + "\n")


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Parse the command line and convert; 2 after a mistake in the input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SRC", help="folder of class folders, or of train/ and val/")
    parser.add_argument("out", type=Path, metavar="OUT", help="new or empty folder for the shards")
    parser.add_argument("--workers", type=int, default=8, help="processes that read and check images (8)")
    options = parser.parse_args(arguments)
    try:
        convert(options.source, options.out, options.workers)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
