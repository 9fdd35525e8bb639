"""The command line of a run: a YAML and ``section.key=value``, or neither, which is the embedded demo."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from leap_dist.config.demo import load_demo
from leap_dist.config.loading import describe, load
from leap_dist.config.options import Config

DEMO = Path(__file__).resolve().parents[2] / "launch_configs" / "demo.yaml"


def parse(argv: list[str], description: str) -> Config:
    """Command line -> checked config. No --config means the embedded demo, whose schedule overrides may change.

    description: what `--help` says before the options. Raises UserError as `load` and `load_demo`.
    """
    parser = argparse.ArgumentParser(
        prog="leap_dist/train.py",
        usage="%(prog)s [--config YAML] [section.key=value ...]",
        description=description,
        epilog=f"options and their defaults:\n{describe()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", type=Path, metavar="YAML", help="what differs from the defaults; without it: the demo"
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher appends it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="win over the YAML")
    args = parser.parse_intermixed_args(argv)
    if args.config is not None:
        return load(args.config, args.overrides)
    config = load_demo(DEMO, args.overrides)
    if os.environ.get("RANK", "0") == "0":
        print(f"leap_dist: no --config, so the settings are the demo's, of launch_configs/{DEMO.name}", file=sys.stderr)
    return config
