"""Look at the tokens of vision backbones: dimensions, subspace rotation, spectral energy, CKA between layers.

    python tools/analyze.py run runs/leap --teacher runs/leap/config.yaml \\
        --data /data/imagenet-mds/val --out runs/leap/analysis
    python tools/analyze.py run vit_small_patch14_dinov2 --data /data/imagenet-mds/val --out runs/dinov2-small
    python tools/analyze.py compare A.safetensors B.safetensors --teacher T --data ... --out runs/a-and-b
    python tools/analyze.py blocks runs/teacher/teacher.safetensors --train /data/cifar10-mds/train \\
        --data /data/cifar10-mds/test --out runs/teacher/blocks

MODEL is one of

    RUN                               a run's folder: the student that it exported
    PATH/student.safetensors          the same, with its .json beside it; or a teacher of tools/train_teacher.py
    PATH/config.yaml                  the teacher of a run, as its config names it
    NAME, NAME=random, NAME=FILE      a timm model with its pretrained, with random or with a file's weights; of one
                                      that is no plain vision transformer, every stage at its own width and grid

Also under torchrun or deepspeed, on several processes. OUT appears when everything is in it: blocks.csv, cka.csv,
curves.npz, analysis.json, figures as PNG and PDF, and tensorboard/. docs/analysis.md explains what they show, and
docs/teachers.md those of `blocks`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from leap_dist.config import DataConfig, EvaluationConfig, is_remote
from leap_dist.config.ranges import RANGES, Range
from leap_dist.errors import UserError
from leap_dist.judging.command import leave, say, status_of
from leap_dist.judging.requests import Request, named_apart, open_subjects, request

if TYPE_CHECKING:
    from leap_dist.analysis import Analysis, Subject
    from leap_dist.runtime.distributed import World

OPTION_RANGES = {
    **{option: Range(1, 10**9) for option in ("images", "train_images")},
    **{option: Range(1, 10**6) for option in ("pairs", "subspace", "batch")},
    **{option: RANGES[f"data.{option}"] for option in ("workers", "crop_pct", "image_size")},
}


def parse(argv: Optional[list[str]] = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="analyze.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher inserts it
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="one model, and how it relates to a teacher if one is named")
    run.add_argument("models", nargs=1, metavar="MODEL")
    compare = commands.add_parser("compare", help="two students on the same images, in one table and one picture")
    compare.add_argument("models", nargs=2, metavar="MODEL")  # a metavar of two breaks --help
    blocks = commands.add_parser("blocks", help="what each block of one model can do, and how alike they are")
    blocks.add_argument("models", nargs=1, metavar="MODEL")
    blocks.add_argument("--train", required=True, help="labelled shards on which a probe per block is trained")
    blocks.add_argument("--train-images", type=int, default=10_000, help="evenly strided over them (default: 10000)")
    for command in (run, compare, blocks):
        _add_common_options(command)
    for command in (run, compare):
        _add_survey_options(command)
    return parser.parse_args(argv)


def _add_common_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", required=True, help="folder or URI of MDS shards, or 'digits': its 297 held-out images")
    add("--out", required=True, type=Path, help="new folder for tables and figures")
    add("--images", type=int, default=1000, help="evenly strided over the set (default: 1000)")
    add("--batch", type=int, default=16, help="images per process at a time (default: 16)")
    add("--image-size", type=int, help="pixels, for timm models; default: a student's or a run's own, else the model's")
    add(
        "--crop-pct",
        type=float,
        help="share of a side the centre crop keeps; default: a student's or a run's own, or 0.875",
    )
    add("--workers", type=int, default=2, help="loader processes per rank (default: 2)")
    add("--cache", help="local folder for the shards of a URI")


def _add_survey_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--teacher", metavar="MODEL", help="for the CKA of every pair of blocks, and beside the others in every figure")
    add("--pairs", type=int, default=64, help="pairs of images whose subspaces are compared (default: 64)")
    add("--subspace", type=int, default=16, help="dimensions of those subspaces (default: 16)")


def check(args: argparse.Namespace) -> list[Request]:
    """Everything that can be wrong before anything is loaded. UserError in one line."""
    for option, wanted in OPTION_RANGES.items():
        value = getattr(args, option, None)
        if value is not None and not wanted.holds(value):
            raise UserError(f"--{option.replace('_', '-')} {value}: {wanted.words}")
    for option in ("data", "train"):
        if is_remote(getattr(args, option, "")) and not args.cache:
            raise UserError(f"--{option} {getattr(args, option)}: a URI needs --cache, a local folder for its shards")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UserError(f"--out {args.out}: exists and is not empty; name a new folder")
    if args.out.is_symlink() or args.out.is_mount():
        raise UserError(
            f"--out {args.out}: a link or mount point; name a new folder, for it appears when it is complete"
        )
    beside = next(folder for folder in args.out.absolute().parents if folder.exists())
    if not os.access(beside, os.W_OK):
        raise UserError(f"--out {args.out}: {beside} cannot be written")
    return [request(text) for text in (*args.models, *filter(None, [getattr(args, "teacher", None)]))]


def open_data(args: argparse.Namespace, subject: Subject, world: World) -> DataConfig:
    """The images as `subject` takes them."""
    from leap_dist.data import resolve

    expected = subject.preprocessing
    config = DataConfig(
        train=getattr(args, "train", args.data), val=args.data, cache=args.cache, image_size=subject.image_size,
        crop_pct=args.crop_pct or expected.crop_pct, workers=args.workers, augment="none",
        mean=expected.mean, std=expected.std,
    )  # fmt: skip
    return resolve(config, args.out.absolute().parent, world)


def analyse(args: argparse.Namespace) -> None:
    """From the command line to the folder of results."""
    requests = named_apart(check(args), teacher=getattr(args, "teacher", None) is not None)
    from leap_dist.runtime.distributed import initialise, shutdown

    world = initialise()
    subjects = open_subjects(requests, args.image_size, world)
    (look_at_blocks if args.command == "blocks" else look_at_tokens)(args, subjects, world)
    shutdown()


def look_at_blocks(args: argparse.Namespace, subjects: list[Subject], world: World) -> None:
    """Probe, kNN and CKA of one model's blocks, on labelled images."""
    from leap_dist.analysis import report_blocks, report_table, write_report
    from leap_dist.analysis.plots import block_figure
    from leap_dist.data import build_eval_loader, check_sources
    from leap_dist.data.shards import complete_or_absent
    from leap_dist.runtime.files import write_text

    data = open_data(args, subjects[0], world)
    check_sources(data, world)
    train, held_out = (
        build_eval_loader(source, data, batch=args.batch, world=world, limit=limit, numbered_as=data.train)
        for source, limit in ((data.train, args.train_images), (data.val, args.images))
    )
    report = report_blocks(subjects[0], train, held_out, EvaluationConfig(), world)
    if report is None:
        return
    text = report_table(report)
    with complete_or_absent(args.out) as folder:
        write_report(report, folder)
        write_text(folder / "table.txt", text + "\n")
        block_figure(report).savefig(folder / "blocks.png")
    print(f"{text}\n\n{args.out}")


def look_at_tokens(args: argparse.Namespace, subjects: list[Subject], world: World) -> None:
    """Spectra, rotation and SEP of every model, and the CKA of students' blocks with a teacher's."""
    from leap_dist.analysis import SurveyOptions, survey
    from leap_dist.data import build_eval_loader

    for subject in subjects[1:]:
        if subject.preprocessing != subjects[0].preprocessing and world.is_main:
            say(
                "analyze",
                f"{subject.name} expects another normalisation or crop than {subjects[0].name}, whose images it gets",
            )
    students, teacher = (subjects[:-1], subjects[-1]) if args.teacher else (subjects, None)
    options = SurveyOptions(pairs=args.pairs, k=args.subspace, batch=args.batch)
    data = open_data(args, subjects[0], world)
    images = build_eval_loader(data.val, data, batch=args.batch, world=world, limit=args.images)
    found = survey(students, teacher, images, world, options)
    if found is not None:
        write(found, args)


def write(found: Analysis, args: argparse.Namespace) -> None:
    """Write the folder, whole or not at all, and print the table of the last blocks."""
    from leap_dist.analysis import last_block_table, write_tables
    from leap_dist.analysis.plots import write_figures
    from leap_dist.data.shards import complete_or_absent
    from leap_dist.runtime.files import write_json, write_text

    text = last_block_table(found)
    asked: dict[str, Any] = {key: str(value) for key, value in vars(args).items() if value is not None}
    with complete_or_absent(args.out) as folder:
        write_tables(found, folder)
        write_figures(found, folder)
        write_json(folder / "analysis.json", {"images": found.images, "sample": found.sample, "arguments": asked})
        write_text(folder / "table.txt", text + "\n")
    print(f"{found.images} images, {found.sample // 2} pairs of them\n\n{text}\n\n{args.out}")


def main(argv: Optional[list[str]] = None) -> int:
    """Exit status: 0 done; 2 a user's mistake, one line; 1 a bug."""
    return status_of("analyze", lambda: analyse(parse(argv)))


if __name__ == "__main__":
    leave(main())
