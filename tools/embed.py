"""Features of a folder of images by a student, as a parquet file of `path` and `features`.

    python tools/embed.py runs/leap /data/photos --out photos.parquet
    torchrun --nproc-per-node 8 tools/embed.py runs/leap /data/photos --out photos.parquet

A stop loses the piece of 4,096 images under way; the same command goes on. Images that cannot be read are left out,
counted, and listed with the reason in OUT.bad.jsonl.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Optional

from leap_dist.errors import UserError


def parse(argv: Optional[list[str]] = None) -> argparse.Namespace:
    """The command line."""
    raw = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(prog="embed.py", description=__doc__, **raw)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher inserts it
    parser.add_argument("model", metavar="MODEL", type=Path, help="a run's folder, or an exported .safetensors file")
    parser.add_argument("images", metavar="IMAGES", type=Path, help="a folder of images, folders in it and all")
    parser.add_argument("--out", type=Path, required=True, help="the .parquet file to write")
    parser.add_argument("--tokens", choices=("pooled", "cls", "logits"), default="pooled", help="default: pooled")
    parser.add_argument("--ema", action="store_true", help="the student with averaged weights")
    parser.add_argument("--own", metavar="MODULE:FUNCTION", help="of a student that is a module of your own")
    parser.add_argument("--batch", type=int, default=64, help="images at a time (default: 64)")
    cores = min(4, len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--workers", type=int, default=cores, help="processes a rank that read images (default: 4, or a core each)"
    )
    options = parser.parse_args(argv)
    if not (1 <= options.batch <= 1 << 16 and 0 <= options.workers <= 256):
        parser.error("--batch must be at least 1, and --workers from 0 to 256")
    return options


def run(options: argparse.Namespace) -> None:
    """Embed, and say how many."""
    from leap_dist.deployment import load_distilled  # torch and timm: seconds
    from leap_dist.deployment.embedding import embed
    from leap_dist.runtime.distributed import initialise, shutdown

    world = initialise()
    model = load_distilled(options.model, ema=options.ema, device=world.device, own=options.own)
    done, bad = embed(
        model, options.images, options.out, world, tokens=options.tokens, batch=options.batch, workers=options.workers
    )
    if world.is_main:
        left = f"; {bad} cannot be read: {options.out}.bad.jsonl" if bad else ""
        print(f"{options.out}: features of {done} images{left}")
    shutdown()


def main(argv: Optional[list[str]] = None) -> int:
    """Exit status: 0 done; 2 a user's mistake, one line."""
    options = parse(argv)
    try:
        run(options)
    except (UserError, FileNotFoundError) as error:
        print(f"embed: error: {error}", file=sys.stderr, flush=True)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            os._exit(2)  # the others must not be waited for
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
