"""How fast images come out of the loader, against the usual ways to load them; and how fast training would eat them.

python tools/bench/loader.py imagenet-samples.tar                     SRC: a folder or a tar of JPEGs
python tools/bench/loader.py /data/imagenet/val --tflops 400 \\
    --config launch_configs/vitg14/leap_vitg14_vits14_imagenet1k.yaml

The same images go through all pipelines, with the same augmentations (`data.augment=leap`), batch and workers:

    leap_dist               MDS shards, this project's loader, for a CPU: colours in the workers, normalised here
    leap_dist for a GPU     the same, but the workers leave colours and normalisation to the device
    ImageFolder, PIL        torchvision's ImageFolder, v2 transforms on PIL images, DataLoader
    ImageFolder, tensors    the same, with v2 transforms on tensors
    StreamingDataset        MDS shards, MosaicML's own dataset and loader, PIL decode, v2 transforms on PIL images
    leap_dist, deit         as for a GPU, with the augmentation of --config if that is another

Rounds are interleaved, an epoch of each pipeline in turn, so that a busy moment of the machine hits all alike; ratios
are medians over the rounds, against the faster ImageFolder. Images per core-second count the CPU time of this process
and its workers, and so hardly depend on what else the machine does. Files are read from the page cache: it is the
CPU's work that is measured, not the disk's.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import tarfile
import tempfile
import time
import warnings
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Optional

import psutil
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from leap_dist.benchmarking.harness import versions
from leap_dist.config import Config, DataConfig, load_without_files
from leap_dist.data import Feed, TrainLoader, build_train_loader, write_shards
from leap_dist.data.colours import GREY, JITTER, RANGES
from leap_dist.data.crops import RATIO
from leap_dist.data.transforms import FLIP
from leap_dist.errors import UserError
from leap_dist.models import step_flops
from leap_dist.runtime.distributed import World, device_name

SUFFIXES = (".jpg", ".jpeg")
OURS, FOR_GPU, PIL, TENSORS, STREAMING = (
    "leap_dist", "leap_dist for a GPU", "ImageFolder, PIL", "ImageFolder, tensors", "StreamingDataset",
)  # fmt: skip
STALL_MS = (1, 3, 10, 30, 100, 300)  # upper edges of the histogram
DEMAND = 0.8  # of what the loader delivers, asked for by the simulated consumer
Epoch = Callable[[int], Iterable[Any]]  # number -> batches, whose second field has a label for each image


class Pass(NamedTuple):
    """One epoch: images, wall seconds, CPU seconds of all processes."""

    images: int
    wall: float
    cpu: float


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SRC", help="folder or tar of JPEGs, in class folders or not")
    parser.add_argument("--image-size", type=int, help="pixels (that of --config, or 224)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32, help="images per batch")
    parser.add_argument("--rounds", type=int, default=7, help="epochs of each pipeline, after one that warms up")
    parser.add_argument("--copies", type=int, default=5, help="times that each image stands in an epoch")
    parser.add_argument("--limit", type=int, help="use that many images of SRC")
    parser.add_argument("--config", type=Path, help="a run whose need for images is to be shown, by target block")
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--tflops", type=float, default=400.0, help="TFLOP/s that a device reaches in it (400)")
    speed.add_argument("--images-per-s", type=float, help="images/s of a device at the last block, as measured")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------------
# The images, as files and as shards


def read_images(source: Path) -> Iterator[tuple[str, bytes]]:
    """(class, JPEG) of every file; the class is the name of its folder."""
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            if path.suffix.lower() in SUFFIXES:
                yield path.parent.name, path.read_bytes()
        return
    try:
        with tarfile.open(source) as archive:
            for member in archive:
                if member.isfile() and member.name.lower().endswith(SUFFIXES):
                    yield Path(member.name).parent.name or "all", archive.extractfile(member).read()
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{source}: neither a folder nor a tar ({type(error).__name__})") from None


def write_sets(source: Path, out: Path, copies: int, limit: Optional[int]) -> int:
    """Write `out`/tree (class folders) and `out`/shards of the same images; return how many an epoch has."""
    images = list(read_images(source))[:limit]
    if not images:
        raise UserError(f"{source}: no *.jpg or *.jpeg in it")
    classes = sorted({name for name, _ in images})
    for index, (name, data) in enumerate(images):
        folder = out / "tree" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index}.jpg").write_bytes(data)
    samples = ((data, classes.index(name)) for _ in range(copies) for name, data in images)
    write_shards(samples, out / "shards")
    return copies * len(images)


# ---------------------------------------------------------------------------------------------------------------------
# The pipelines


def reference_transform(config: DataConfig, *, on_tensors: bool) -> v2.Transform:
    """LEAP's augmentation as torchvision offers it, on a PIL image."""
    names = ("brightness", "contrast", "saturation", "hue")
    jitter = v2.ColorJitter(**dict(zip(names, RANGES, strict=True)))
    augment = [
        v2.RandomResizedCrop(config.image_size, scale=config.crop_scale, ratio=RATIO, antialias=True),
        v2.RandomHorizontalFlip(FLIP),
        v2.RandomApply([jitter], JITTER),
        v2.RandomGrayscale(GREY),
    ]
    to_tensor = [v2.PILToTensor()]
    steps = [*to_tensor, *augment] if on_tensors else [*augment, *to_tensor]
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(config.mean, config.std)])


def folder_epochs(tree: Path, config: DataConfig, batch: int, copies: int, *, on_tensors: bool) -> Epoch:
    """ImageFolder and DataLoader."""
    dataset = ImageFolder(str(tree), reference_transform(config, on_tensors=on_tensors))
    dataset.samples = dataset.samples * copies
    options = {"num_workers": config.workers, "persistent_workers": config.workers > 0}
    loader = DataLoader(dataset, batch, shuffle=True, drop_last=True, **options)
    return lambda _: loader


def streaming_epochs(config: DataConfig, batch: int) -> Epoch:
    """MosaicML Streaming as its documentation shows it."""
    from streaming import StreamingDataLoader, StreamingDataset

    class Plain(StreamingDataset):
        transform = reference_transform(config, on_tensors=False)

        def __getitem__(self, at: int) -> tuple[torch.Tensor, int]:
            sample = super().__getitem__(at)
            return self.transform(Image.open(io.BytesIO(sample["image"])).convert("RGB")), sample["label"]

    dataset = Plain(local=config.train, shuffle=True, batch_size=batch)
    options = {"num_workers": config.workers, "persistent_workers": config.workers > 0}
    loader = StreamingDataLoader(dataset, batch_size=batch, drop_last=True, **options)
    return lambda _: loader


def fed_epochs(loader: TrainLoader, config: DataConfig) -> Epoch:
    """The loader's batches as a trainer on a CPU takes them: images normalised in its own process."""
    feed = Feed(config, torch.device("cpu"))
    return lambda number: ((feed.images(batch), batch.labels) for batch in loader.epoch(number))


def our_loader(config: DataConfig, batch: int, device: str) -> TrainLoader:
    """This project's loader, as the trainer opens it on one rank with such a device."""
    return build_train_loader(config, seed=0, micro_batch=batch, world=World(0, 1, 0, 1, torch.device(device)))


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def cpu_seconds() -> float:
    """CPU time so far of this process and its workers."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def one_pass(batches: Iterable[Any]) -> Pass:
    """Read all batches as fast as they come.

    CPU time of other processes is counted in ticks, 10 ms as a rule. What reads as none took up to one: it counts so.
    """
    cpu, begin = cpu_seconds(), time.perf_counter()
    images = sum(len(batch[1]) for batch in batches)
    wall, tick = time.perf_counter() - begin, 1 / os.sysconf("SC_CLK_TCK")
    return Pass(images, wall, max(tick, cpu_seconds() - cpu))


def interleaved_passes(pipelines: Mapping[str, Epoch], rounds: int) -> dict[str, list[Pass]]:
    """`rounds` epochs of every pipeline in turn, after one that starts workers and fills caches."""
    passes: dict[str, list[Pass]] = {name: [] for name in pipelines}
    for number in range(rounds + 1):
        for name, epoch in pipelines.items():
            measured = one_pass(epoch(number))
            if number:
                passes[name].append(measured)
    return passes


def stalls(batches: Iterable[Any], step_s: float) -> list[float]:
    """Milliseconds for which a consumer that works `step_s` on each batch waits for the next; not for the first."""
    waits, stream = [], iter(batches)
    next(stream)
    while True:
        time.sleep(step_s)
        begin = time.perf_counter()
        if next(stream, None) is None:
            return waits
        waits.append((time.perf_counter() - begin) * 1e3)


# ---------------------------------------------------------------------------------------------------------------------
# Showing


def median_ratio(passes: list[Pass], baseline: list[Pass], field: str) -> float:
    """Median over the rounds of how many times the baseline's rate this is, by `wall` or `cpu` seconds."""
    pairs = zip(passes, baseline, strict=True)
    return statistics.median((a.images / getattr(a, field)) / (b.images / getattr(b, field)) for a, b in pairs)


def core_rate(passes: list[Pass]) -> float:
    """Images per CPU second, median."""
    return statistics.median(one.images / one.cpu for one in passes)


def rate_rows(passes: Mapping[str, list[Pass]], workers: int) -> list[str]:
    """A line per pipeline: images/s, images per core-second, and both against the faster ImageFolder."""
    baseline = max(PIL, TENSORS, key=lambda name: statistics.median(one.images / one.wall for one in passes[name]))
    lines = [f"{'':22}{f'images/s, {workers} workers':>20}{'of it':>8}{'images/core-s':>15}{'of it':>8}"]
    for name, measured in passes.items():
        wall = statistics.median(one.images / one.wall for one in measured)
        ratios = [median_ratio(measured, passes[baseline], field) for field in ("wall", "cpu")]
        lines.append(f"{name:22}{wall:20.1f}{ratios[0]:8.2f}{core_rate(measured):15.1f}{ratios[1]:8.2f}")
    return [*lines, f"'of it': of {baseline!r}, the faster ImageFolder; medians of {len(measured)} interleaved rounds"]


def stall_rows(waits: Mapping[str, list[float]]) -> list[str]:
    """A line per pipeline: share of the batches by the time they were waited for."""
    edges = ["<= 1 ms", *(f"<= {edge}" for edge in STALL_MS[1:]), f"> {STALL_MS[-1]}"]
    lines = [f"{'':22}" + "".join(f"{edge:>9}" for edge in edges)]
    for name, times in waits.items():
        counts = [0] * len(edges)
        for wait in times:
            counts[bisect(STALL_MS, wait)] += 1
        lines.append(f"{name:22}" + "".join(f"{count / len(times):9.1%}" for count in counts))
    return lines


def demand_rows(run: Config, tflops: float, images_per_s: Optional[float], per_core: float) -> list[str]:
    """A line per target block: images/s that one device eats there, and the loader cores that deliver them.

    A step costs the teacher up to the block and three times the student's forward pass, in FLOPs; the device reaches
    `tflops` at every block, or what `images_per_s` at the last block comes to.
    """
    flops = step_flops(run)
    teacher, student, depth = flops.teacher, 3 * flops.student.forward, len(flops.teacher.blocks)
    speed = tflops * 1e12 if images_per_s is None else images_per_s * (teacher.upto(depth) + student)
    lines = [f"{'block':>5}{'GFLOP/image':>13}{'images/s':>10}{'cores':>7}"]
    for block in sorted({1, *range(depth // 8, depth + 1, max(1, depth // 8)), depth} - {0}):
        needed = speed / (teacher.upto(block) + student)
        binds = "" if needed <= per_core * run.data.workers else f"  <- more than data.workers={run.data.workers} give"
        cost = (teacher.upto(block) + student) / 1e9
        lines.append(f"{block:5}{cost:13.1f}{needed:10.0f}{needed / per_core:7.1f}{binds}")
    return lines


def loader_of(augment: str) -> str:
    """Our pipeline for a GPU with this augmentation."""
    return FOR_GPU if augment == "leap" else f"leap_dist, {augment}"


def measure(args: argparse.Namespace, config: DataConfig, folder: Path, augment: str) -> dict[str, list[Pass]]:
    """Run every pipeline, and ours with `augment` too; print rates and stalls; return the passes."""
    loaders = {OURS: our_loader(config, args.batch, "cpu"), FOR_GPU: our_loader(config, args.batch, "cuda")}
    own = loader_of(augment)
    if own not in loaders:
        loaders[own] = our_loader(replace(config, augment=augment), args.batch, "cuda")
    tree = folder / "tree"
    pipelines: dict[str, Epoch] = {
        OURS: fed_epochs(loaders[OURS], config),
        FOR_GPU: loaders[FOR_GPU].epoch,
        PIL: folder_epochs(tree, config, args.batch, args.copies, on_tensors=False),
        TENSORS: folder_epochs(tree, config, args.batch, args.copies, on_tensors=True),
        STREAMING: streaming_epochs(config, args.batch),
        own: loaders[own].epoch,
    }
    try:
        passes = interleaved_passes(pipelines, args.rounds)
        print(*rate_rows(passes, args.workers), sep="\n")
        step_s = args.batch / DEMAND / statistics.median(one.images / one.wall for one in passes[OURS])
        waits = {name: stalls(pipelines[name](args.rounds + 1), step_s) for name in (OURS, PIL, TENSORS)}
        print(
            f"\nwaits of a consumer that works {step_s * 1e3:.0f} ms on each batch, {DEMAND:.0%} of leap_dist's rate:"
        )
        print(*stall_rows(waits), sep="\n")
    finally:
        for loader in loaders.values():
            loader.close()
    return passes


def main(argv: list[str] | None = None) -> int:
    """Print the tables; return the exit status."""
    args = parse(argv)
    # Without a GPU there is nothing to pin for; the workers' part is the same.
    warnings.filterwarnings("ignore", ".*pin_memory")
    try:
        run = None if args.config is None else load_without_files(args.config)
        size = args.image_size or (run.data.image_size if run else 224)
        with tempfile.TemporaryDirectory(prefix="bench_loader-") as folder:
            count = write_sets(args.source, Path(folder), args.copies, args.limit)
            config = DataConfig(
                train=f"{folder}/shards", image_size=size, workers=args.workers, canonical_nodes=1, augment="leap"
            )
            if count < args.batch * max(1, args.workers):
                raise UserError(
                    f"{args.source}: {count} images make no batch of {args.batch} for each worker: --copies"
                )
            print(f"{device_name(torch.device('cpu'))}; {versions()}; {count} images an epoch, {size} pixels")
            augment = run.data.augment if run else "leap"
            passes = measure(args, config, Path(folder), augment)
    except UserError as error:
        print(f"bench_loader: error: {error}", file=sys.stderr)
        return 2
    if run is not None:
        name = args.config.name
        print(f"\nwhat a device eats in {name}, and the cores that '{loader_of(augment)}' needs to feed it:")
        print(*demand_rows(run, args.tflops, args.images_per_s, core_rate(passes[loader_of(augment)])), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
