"""Judge a vision transformer by its frozen features: kNN, probe, retrieval, segmentation, robustness, side by side.

    python tools/evaluate.py runs/leap knn probe --train /data/pets/train --test /data/pets/test --out runs/leap/pets
    python tools/evaluate.py runs/leap retrieval compare --retrieval /data/roxford5k --out runs/leap/retrieval
    python tools/evaluate.py vit_small_patch14_dinov2 robustness --train /data/imagenet-mds/train \\
        --robustness /data/imagenet-a /data/imagenet-c --out runs/dinov2-small

MODEL is one of

    RUN                               a run's folder: the student that it exported
    PATH/student.safetensors          the same, with its .json beside it
    PATH/config.yaml                  the teacher of a run, as its config names it
    NAME, NAME=random, NAME=FILE      a timm model with its pretrained, with random or with a file's weights

TASK is one or more of knn, probe, retrieval, segmentation, robustness, pictures and, beside these, compare: the
teacher of the run that MODEL is, by the same code. --beside MODEL adds any other model. The task pictures draws the
tokens of --images as colours, all models side by side; --pictures has the other tasks draw what they find.

    python tools/evaluate.py runs/leap pictures compare --images dog.jpg holiday/ --out runs/leap/seen

Also under torchrun or deepspeed, on several processes. The same command continues what was killed: features lie in
OUT/features, or in --cache. OUT gets results.json, table.txt and pictures/. docs/evaluation.md explains the tasks.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from leap_dist.config import DataConfig, EvaluationConfig, is_remote
from leap_dist.errors import UserError
from leap_dist.judging.command import leave, status_of
from leap_dist.judging.requests import Request, at_scale, named_apart, open_subjects, request

if TYPE_CHECKING:
    from leap_dist.analysis import Subject
    from leap_dist.judging.pictures import Portrait
    from leap_dist.judging.tasks import Rows
    from leap_dist.runtime.distributed import World

TASKS = ("knn", "probe", "retrieval", "segmentation", "robustness", "pictures", "compare")
NEEDS = {
    "knn": ("train", "test"),
    "probe": ("train", "test"),
    "retrieval": ("retrieval",),
    "segmentation": ("segmentation",),
    "robustness": ("train", "robustness"),
    "pictures": ("images",),
}
RUN_CONFIG = "config.yaml"
KINDS = ("cls", "patch", "cls_patch")


def parse(argv: Optional[list[str]] = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher inserts it
    add("model", metavar="MODEL")
    add("tasks", nargs="+", metavar="TASK", choices=TASKS)
    add("--out", required=True, type=Path, help="folder of results; the same again continues")
    add("--beside", action="append", default=[], metavar="MODEL", help="another model for the table; may be repeated")
    add("--train", help="labelled images that kNN and probe know: shards, or class folders and the like")
    add("--test", help="labelled images that they are judged on, likewise")
    add("--retrieval", type=Path, nargs="+", default=[], help="revisited sets: folders with gnd_NAME.pkl and jpg/")
    add("--distractors", type=Path, help="folder of further database images, such as the million of revisitop1m")
    add("--scales", type=float, nargs="+", default=[1.0], help="of retrieval, such as 1 0.7071 0.5 (default: 1)")
    add("--segmentation", type=Path, nargs="+", default=[], help="ADE20K or VOC 2012, as downloaded")
    add(
        "--segmentation-blocks", type=int, choices=(1, 4), default=1, help="blocks whose tokens the head sees, the last"
    )
    add("--segmentation-steps", type=int, default=10_000, help="steps of the head, 16 crops each (default: 10000)")
    add("--robustness", type=Path, nargs="+", default=[], help="ImageNet-V2, -A, -R, -Sketch, -C as downloaded")
    add("--images", type=Path, nargs="+", default=[], help="of the task pictures: files, or folders of them")
    add("--foreground", type=float, help="of the task pictures: leave the rest black, such as 0.5 (default: draw all)")
    add("--pictures", action="store_true", help="draw neighbours, retrieved images and segmentations to OUT/pictures")
    add("--protocol", choices=("swept", "leap"), default="swept", help="as evaluation.protocol (default: swept)")
    add("--features", nargs="+", choices=KINDS, help="as evaluation.features (default: all there are)")
    add("--knn-k", type=int, default=20, help="neighbours that kNN asks (default: 20)")
    add("--probe-epochs", type=int, default=100, help="epochs of the probe (default: 100)")
    add("--batch", type=int, default=64, help="images per process at a time (default: 64)")
    add("--image-size", type=int, help="pixels, for timm models; default: a run's own, else the model's")
    add("--workers", type=int, default=2, help="loader processes per rank (default: 2)")
    add("--cache", type=Path, help="folder for features, seen by all ranks (default: OUT/features)")
    add("--shard-cache", help="local folder for the shards of a URI")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> list[Request]:
    """Everything that can be wrong before anything is loaded. UserError in one line."""
    for task in args.tasks:
        for option in NEEDS.get(task, ()):
            if not getattr(args, option):
                raise UserError(f"{task}: needs --{option}")
    if set(args.tasks) == {"compare"}:
        raise UserError("compare: goes beside other tasks, such as knn")
    for option in ("segmentation_steps", "knn_k", "probe_epochs", "batch", "image_size"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            raise UserError(f"--{option.replace('_', '-')} {getattr(args, option)}: at least 1")
    for option, (given, tasks) in {
        "scales": (args.scales != [1.0], {"retrieval"}),
        "images": (args.images, {"pictures"}),
        "foreground": (args.foreground is not None, {"pictures"}),
        "pictures": (args.pictures, {"knn", "retrieval", "segmentation"}),
    }.items():
        if given and not tasks & set(args.tasks):
            raise UserError(f"--{option}: only used by {' and '.join(sorted(tasks))}")
    for scale in args.scales:
        if not 0.1 <= scale <= 4:
            raise UserError(f"--scales {scale:g}: from 0.1 to 4")
    if len(set(args.scales)) < len(args.scales):
        raise UserError("--scales: each once")
    if args.foreground is not None and not 0 < args.foreground < 1:
        raise UserError(f"--foreground {args.foreground:g}: above 0 and below 1")
    if args.workers < 0:
        raise UserError(f"--workers {args.workers}: at least 0")
    for option in ("train", "test"):
        source = getattr(args, option)
        if source and is_remote(source) and not args.shard_cache:
            raise UserError(f"--{option} {source}: a URI needs --shard-cache, a local folder for its shards")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is no folder")
    models = [args.model, *args.beside]
    if "compare" in args.tasks:
        record = (Path(args.model) if Path(args.model).is_dir() else Path(args.model).parent) / RUN_CONFIG
        if not record.is_file():
            raise UserError(f"compare: {record} is not there; it names a run's teacher. Use --beside MODEL instead")
        models.append(str(record))
    return [request(model) for model in models]


def evaluate(args: argparse.Namespace) -> None:
    """From the command line to the folder of results."""
    requests = named_apart(check(args), teacher="compare" in args.tasks)
    from leap_dist.judging.pictures import draw_tokens, image_paths, opened, portrait
    from leap_dist.runtime.distributed import initialise, shutdown

    squares = opened(image_paths(args.images)) if "pictures" in args.tasks else []
    world = initialise()
    rows: Rows = []
    portraits: list[Portrait] = []
    for asked in requests:  # one at a time: two giants need not fit side by side
        (subject,) = open_subjects([asked], args.image_size, world)
        rows += judge_one(args, asked, subject, world)
        if world.is_main:
            write(rows, args)
            portraits += [portrait(subject, squares, world)] if squares else []
    if portraits:
        reference = len(portraits) - 1 if "compare" in args.tasks else 0
        draw_tokens(args.out, squares, portraits, reference, args.foreground)
    if world.is_main:
        print(f"{table(rows)}\n\n{args.out}" if rows else args.out)
    shutdown()


def judge_one(args: argparse.Namespace, asked: Request, subject: Subject, world: World) -> Rows:
    """All tasks of one model. Collective; rows on rank 0."""
    from leap_dist.evaluation import Pooling, protocol_of
    from leap_dist.judging.features import View
    from leap_dist.judging.pictures import FOLDER
    from leap_dist.judging.segmentation import open_masked
    from leap_dist.judging.sets import open_labelled, open_retrieval
    from leap_dist.judging.tasks import Bench, judge_labelled, judge_masks, judge_retrieval, judge_robustness

    options = EvaluationConfig(
        protocol=args.protocol, features=args.features, knn_k=args.knn_k, probe_epochs=args.probe_epochs
    )
    expected = subject.preprocessing
    data = DataConfig(
        train="", cache=args.shard_cache, image_size=subject.image_size, crop_pct=expected.crop_pct,
        workers=args.workers, augment="none", mean=expected.mean, std=expected.std,
    )  # fmt: skip
    loose = replace(data, cache=None)
    cache = args.cache or args.out / "features"
    view = View(data, protocol_of(options).bicubic, args.batch, cache)
    bench = Bench(subject, Pooling(subject.final), view, options, world, args.out / FOLDER if args.pictures else None)
    rows: Rows = []
    train = open_labelled(args.train, ("train",), data, world) if args.train else None
    if train is not None and {"knn", "probe"} & set(args.tasks):
        test = open_labelled(args.test, ("val", "test"), data, world)
        rows += judge_labelled(bench, train, test, args.tasks)
    if "retrieval" in args.tasks:
        # LEAP's retrieval resizes bicubically, whatever the probe's protocol.
        published = replace(bench, view=view._replace(bicubic=True, config=loose))
        scaled = (at_scale(asked, subject, scale, world) for scale in args.scales)
        benches = (replace(published, subject=one, pooling=Pooling(one.final)) for one in scaled)
        rows += judge_retrieval(benches, [open_retrieval(folder, args.distractors) for folder in args.retrieval])
    if "segmentation" in args.tasks:
        for folder in args.segmentation:
            rows += judge_masks(
                bench, open_masked(folder), args.segmentation_blocks, args.segmentation_steps, args.workers
            )
    if train is not None and "robustness" in args.tasks:
        rows += judge_robustness(bench, train, args.robustness)
    return rows


def table(rows: Rows) -> str:
    """A line for each task, kind of features and measure; a column for each model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        for measure, value in row.items():
            if measure not in ("model", "task", "features"):
                lines.setdefault((row["task"], row["features"], measure), {})[row["model"]] = _shown(measure, value)
    cells = [["task", "features", "measure", *models]]
    cells += [[*key, *(found.get(model, "") for model in models)] for key, found in lines.items()]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    padded = [[text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in cells]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def _shown(measure: str, value: Any) -> str:
    if measure in ("lr", "classes") or measure.endswith("queries"):
        return f"{value:g}"
    return f"{value:.1%}"


def write(rows: Rows, args: argparse.Namespace) -> None:
    """results.json and table.txt, each whole."""
    from leap_dist.runtime.files import write_json, write_text

    asked = {key: str(value) for key, value in vars(args).items() if value not in (None, [])}
    write_json(args.out / "results.json", {"arguments": asked, "rows": rows})
    write_text(args.out / "table.txt", table(rows) + "\n")


def main(argv: Optional[list[str]] = None) -> int:
    """Exit status: 0 done; 2 a user's mistake, one line; 1 a bug."""
    return status_of("evaluate", lambda: evaluate(parse(argv)))


if __name__ == "__main__":
    leave(main())
