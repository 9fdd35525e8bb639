"""Bring a student, or a teacher of tools/train_teacher.py, into the format that another runtime takes.

    python tools/export.py runs/leap --to onnx                       # checked in ONNX Runtime against torch
    python tools/export.py runs/leap --to onnx --fp16 --int8 --benchmark
    python tools/export.py runs/leap --to hub                        # a folder for timm.create_model("local-dir:...")
    python tools/export.py runs/leap --to transformers               # plain vision transformers, as Dinov2
    python tools/export.py runs/leap --to pt2                        # a program of torch.export

MODEL is a run's folder or an exported file. What is written is compared with torch on images of the run's own shards,
and kept only if it is close enough; it replaces an earlier one whole. docs/use_the_student.md shows how to use each.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Optional

from leap_dist.errors import UserError

FORMATS = ("onnx", "hub", "transformers", "pt2")


def parse(argv: Optional[list[str]] = None) -> argparse.Namespace:
    """The command line."""
    raw = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(prog="export.py", description=__doc__, **raw)
    parser.add_argument("model", metavar="MODEL", type=Path, help="a run's folder, or an exported .safetensors file")
    parser.add_argument("--to", choices=FORMATS, required=True, help="the format")
    parser.add_argument("--out", type=Path, help="folder of what is written; default: export/ beside the student")
    parser.add_argument("--ema", action="store_true", help="the student with averaged weights")
    parser.add_argument("--own", metavar="MODULE:FUNCTION", help="of a student that is a module of your own")
    parser.add_argument("--fp16", action="store_true", help="with onnx: also a file in half precision")
    parser.add_argument("--int8", action="store_true", help="with onnx: also a file in 8 bits, calibrated on images")
    parser.add_argument("--train", metavar="SHARDS", help="images to check and calibrate on; default: the run's")
    parser.add_argument("--val", metavar="SHARDS", help="held-out labelled images for kNN; default: the run's")
    parser.add_argument("--images", type=int, default=512, help="for calibration, and for kNN (default: 512)")
    parser.add_argument("--tolerance", type=float, help="largest difference to torch that is let pass")
    parser.add_argument("--benchmark", action="store_true", help="images per second beside torch's, on this CPU")
    options = parser.parse_args(argv)
    if (options.fp16 or options.int8) and options.to != "onnx":
        parser.error("--fp16 and --int8 are files of --to onnx")
    if options.images < 1 or not (options.tolerance is None or options.tolerance > 0):
        parser.error("--images must be at least 1, and --tolerance above 0")
    if options.benchmark and options.to in ("hub", "transformers"):
        parser.error("--benchmark is of --to onnx and pt2: a folder runs in torch")
    return options


def run(options: argparse.Namespace) -> None:
    """Export, and say what was written."""
    from leap_dist.deployment.exporting import Order, export, speeds  # torch and timm: seconds
    from leap_dist.deployment.images import shown_to
    from leap_dist.deployment.loaded import load_distilled, weights_file

    weights = weights_file(options.model, options.ema)
    model = load_distilled(weights, own=options.own)
    order = Order(
        model, weights, options.out or weights.parent / "export",
        shown_to(model.spec, weights.parent, options.train, options.val), options.tolerance, options.images,
        options.fp16, options.int8,
    )  # fmt: skip
    runners = export(order, options.to)
    if options.benchmark:
        print(speeds(order, runners))


def main(argv: Optional[list[str]] = None) -> int:
    """Exit status: 0 done; 2 a user's mistake, one line."""
    options = parse(argv)
    try:
        run(options)
    except (UserError, FileNotFoundError) as error:
        print(f"export: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
