"""What an analysis costs beyond the forward passes it needs, and whether its memory grows with the images.

python tools/bench/analysis.py                                      ViT-S/16, 1,000 images of noise, against the bar
python tools/bench/analysis.py --teacher vit_base_patch16_224       with the CKA of all pairs of blocks
python tools/bench/analysis.py --images 64 --model vit_tiny_patch16_224 --image-size 64

The same images go through the bare models and through `survey`, in one process, without a loader. It prints both times,
wall and CPU, and the resident memory after a quarter of the images and after all.

It exits with 1 if the analysis takes more than 1.3 times the bare passes plus 60 s. It also does if the memory grows by
more than 64 MiB between a quarter and the end. The pixels of the sample do not count: they are kept as they come, and
their number does not depend on that of the images.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import torch

from leap_dist.analysis import Subject, SurveyOptions, survey, timm_subject
from leap_dist.benchmarking.harness import versions
from leap_dist.config import RANDOM, TeacherConfig
from leap_dist.data import Batch
from leap_dist.runtime.distributed import World, device_name

RATIO, SECONDS = 1.3, 60.0
PAIRS = 64
GROWTH = 64  # MiB: what the allocator moves by itself


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--teacher", help="a timm model")
    parser.add_argument("--image-size", type=int, default=224, help="pixels")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16, help="images at a time")
    return parser.parse_args(argv)


class Noise:
    """Batches of random images, drawn as they are asked for, and the memory at a quarter and at the end."""

    def __init__(self, images: int, batch: int, size: int) -> None:
        self.num_samples, self._batch, self._size = images, batch, size
        self.resident: list[float] = []

    def __len__(self) -> int:
        return -(-self.num_samples // self._batch)

    def __iter__(self) -> Iterator[Batch]:
        for number, ids in enumerate(torch.arange(self.num_samples).split(self._batch), 1):
            yield Batch(torch.randn(len(ids), 3, self._size, self._size), torch.zeros_like(ids), ids, ids)
            if number in (max(2, len(self) // 4), len(self)):
                gc.collect()
                self.resident.append(psutil.Process().memory_info().rss / 2**20)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def main(argv: list[str] | None = None) -> int:
    """Print the table; return the exit status."""
    args = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = [args.model, *([args.teacher] if args.teacher else [])]
    subjects: list[Subject] = [
        timm_subject(TeacherConfig(model=name, weights=RANDOM), name, args.image_size, device) for name in names
    ]
    noise = Noise(args.images, args.batch, args.image_size)
    world = World(0, 1, 0, 1, device)

    def bare() -> None:
        for batch in Noise(args.images, args.batch, args.image_size):
            last = [subject.layers(batch.images.to(device))[-1] for subject in subjects]
        torch.stack([tokens.sum() for tokens in last]).tolist()  # waits for the device

    def analysis() -> None:
        options = SurveyOptions(pairs=PAIRS, batch=args.batch, k=8)
        survey(subjects[:1], subjects[1] if args.teacher else None, noise, world, options)

    rows = {"bare forward passes": timed(bare), "analysis": timed(analysis)}
    print(f"{device_name(device)}; {versions()}; {' and '.join(names)}, {args.images} x {args.image_size} pixels")
    for name, (wall, cpu) in rows.items():
        print(f"{name:22}{wall:9.1f} s wall {cpu:9.1f} s CPU {wall / args.images * 1e3:9.1f} ms per image")
    allowed = RATIO * rows["bare forward passes"][0] + SECONDS
    growth = noise.resident[-1] - noise.resident[0]
    print(f"allowed: {RATIO} x bare + {SECONDS:.0f} s = {allowed:.1f} s")
    print(
        f"resident: {noise.resident[0]:.0f} MiB after a quarter, {noise.resident[-1]:.0f} MiB at the end of the images"
    )
    kept = min(2 * PAIRS, args.images) * 3 * args.image_size**2 * 4 / 2**20
    print(f"grown by {growth:.0f} MiB; the sample's pixels: {kept:.0f} MiB")
    return 1 if rows["analysis"][0] > allowed or growth > GROWTH + kept else 0


if __name__ == "__main__":
    sys.exit(main())
