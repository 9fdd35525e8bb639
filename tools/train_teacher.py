"""Train a teacher: a vision transformer of one's own on labelled shards, or the demo's on scikit-learn's digits.

    python tools/train_teacher.py shards --config launch_configs/cifar10/teacher_vit.yaml \\
        data.train=/data/cifar10-mds/train data.val=/data/cifar10-mds/test output=runs/teacher
    python tools/train_teacher.py demo --out runs/demo-teacher/teacher.safetensors

It saves every few minutes and when SIGTERM or Ctrl-C ends it; the same command goes on. docs/teachers.md says what it
writes and how to see whether the teacher is worth a curriculum.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Optional

from leap_dist.config import describe
from leap_dist.errors import UserError, one_line
from leap_dist.pretraining.recipe import TeacherRecipe, load_recipe


def parse(argv: Optional[list[str]] = None) -> argparse.Namespace:
    """The command line."""
    raw = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(prog="train_teacher.py", description=__doc__, **raw)
    commands = parser.add_subparsers(dest="command", required=True)
    shards = commands.add_parser("shards", help="a teacher of one's own", epilog=describe(TeacherRecipe), **raw)
    shards.add_argument("--config", type=Path, help="YAML with what differs from the defaults")
    shards.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="wins over the YAML")
    demo = commands.add_parser("demo", help="the demo's teacher", **raw)
    demo.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    for option, kind in (("--epochs", int), ("--lr", float), ("--seed", int)):
        demo.add_argument(option, type=kind, help="default: the demo's own")
    for command, run in ((shards, train_shards), (demo, train_demo)):
        command.set_defaults(run=run)
    return parser.parse_args(argv)


def train_shards(options: argparse.Namespace) -> None:
    """Train on shards, or go on with it."""
    recipe = load_recipe(options.config, options.overrides)
    from leap_dist.pretraining.training import train_on_shards  # torch: seconds, only for a recipe that holds

    accuracy = train_on_shards(recipe)
    if accuracy is None:
        print(f"{recipe.output}: stopped, everything is saved; the same command goes on")
    else:
        print(f"{recipe.output}: validation accuracy {accuracy:.1%}")


def train_demo(options: argparse.Namespace) -> None:
    """The recipe of the demo, once."""
    from leap_dist.pretraining.demo import TeacherTraining, train_teacher

    given = {key: getattr(options, key) for key in ("epochs", "lr", "seed") if getattr(options, key) is not None}
    accuracy = train_teacher(TeacherTraining(**given), options.out)
    print(f"{options.out}: validation accuracy {accuracy:.1%}")


def main(argv: Optional[list[str]] = None) -> int:
    """Exit status: 0 done or stopped with everything saved; 2 a user's mistake, one line."""
    options = parse(argv)
    try:
        options.run(options)
    except UserError as error:
        print(f"train_teacher: error: {one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train_teacher: stopped before its first step; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
