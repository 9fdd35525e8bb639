"""Does the teacher's time follow its depth? Time and FLOPs up to block k, as shares of the whole teacher.

python tools/bench/teacher.py                                          a small ViT, on whatever device there is
python tools/bench/teacher.py --model vit_giant_patch14_dinov2 --dtype bf16 --batch 64 --tolerance 0.08

Rounds are interleaved, so that a busy moment of the machine hits all depths alike. It exits with 1 if a share of time
is further from the share of FLOPs than the tolerance. Blocks before L/4 do not count.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable

import torch

from leap_dist.benchmarking.harness import interleaved, versions
from leap_dist.config import TeacherConfig
from leap_dist.models import teacher_flops
from leap_dist.runtime.distributed import device_name
from leap_dist.teacher.lazy_backbone import LazyBackbone


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--image-size", type=int, default=224, help="pixels")
    parser.add_argument("--batch", type=int, default=8, help="images per pass")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16", "fp8"], default="fp32")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tolerance", type=float, help="largest relative difference of the two shares")
    return parser.parse_args(argv)


def ratios(config: TeacherConfig, image_size: int, batch: int, repeats: int) -> list[tuple[int, float, float, float]]:
    """(block, milliseconds, share of the time of the last block, share of its FLOPs), from L/4 on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lazy = LazyBackbone(config, image_size, device)
    lazy.judge(depth := lazy.spec.depth)
    lazy.hold(range(depth))
    images = lazy.to_teacher(torch.randn(batch, 3, image_size, image_size))

    def forward(block: int) -> Callable[[], object]:
        return lambda: lazy.backbone(images, block)

    blocks = range(-(-depth // 4), depth + 1)
    with torch.no_grad():
        times = interleaved({str(block): lambda block=block: forward(block) for block in blocks}, device, repeats)
    medians = {block: statistics.median(times[str(block)]) for block in blocks}
    flops = teacher_flops(config, image_size)
    full = medians[depth], flops.upto(depth)
    return [(block, medians[block], medians[block] / full[0], flops.upto(block) / full[1]) for block in blocks]


def main(argv: list[str] | None = None) -> int:
    """Print the table; return the exit status."""
    args = parse(argv)
    config = TeacherConfig(model=args.model, weights="random", dtype=args.dtype)
    rows = ratios(config, args.image_size, args.batch, args.repeats)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{device_name(device)}; {versions()}; {args.model} {args.dtype}, {args.batch} x {args.image_size} pixels")
    print(f"{'block':>5} {'ms':>9} {'of time':>8} {'of FLOPs':>8} {'off by':>7}")
    for block, milliseconds, time_share, flop_share in rows:
        off = time_share / flop_share - 1
        print(f"{block:5} {milliseconds:9.2f} {time_share:8.3f} {flop_share:8.3f} {off:7.1%}")
    worst = max(abs(time_share / flop_share - 1) for _, _, time_share, flop_share in rows)
    print(f"worst: {worst:.1%}")
    return 1 if args.tolerance is not None and worst > args.tolerance else 0


if __name__ == "__main__":
    sys.exit(main())
