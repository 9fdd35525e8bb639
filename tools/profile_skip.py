"""What skipping teacher blocks saves: every target block of a run's config, timed without training.

python tools/profile_skip.py --config launch_configs/demo.yaml --out runs/skip
python tools/profile_skip.py --config launch_configs/vitg14/leap_vitg14_vits14_imagenet1k.yaml --batch 64 --steps 10 \\
    --out runs/skip-vitg engine.precision=bf16 optim.name=adamw

It takes the trainer's own steps on random images: teacher, student, loss, score, optimizer, telemetry. The teacher's
weights are random unless teacher.weights is given. It goes in rounds over the blocks, so that a busy moment of the
machine hits all alike, and gives medians. The last block is always among them: it is what the others save on.

    FLOPs saved      1 - F(k) / F(L)     F(k): of a step at block k, teacher up to k plus student (three forwards)
    time saved       1 - t(k) / t(L)
    skip efficiency  time saved / FLOPs saved; 1 is the ideal line (LEAP, arXiv 2606.19483: 21 % / 25.1 % = 0.84)

Writes skip.csv, skip.png and TensorBoard (scalars whose step is the block, the figure, hparams) to --out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from leap_dist.benchmarking.harness import versions
from leap_dist.benchmarking.skipping import chosen_blocks, measure, rows, shown, write
from leap_dist.benchmarking.steps import load_for_steps, require_deepspeed
from leap_dist.errors import UserError
from leap_dist.runtime.distributed import device_name, initialise, shutdown
from leap_dist.teacher import describe_teacher


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a run's YAML")
    parser.add_argument("--blocks", default="all", help="all, or a list such as 1,4,8")
    parser.add_argument("--batch", type=int, default=32, help="images per step")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each block; medians over them")
    parser.add_argument(
        "--steps", type=int, default=1, help="steps in a row at each turn; on a GPU take 10: they overlap"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/skip"), help="folder for CSV, PNG and TensorBoard")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="win over the YAML")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Sweep, write, print; return the exit status."""
    args = parse(argv)
    try:
        require_deepspeed()
        with tempfile.TemporaryDirectory() as scratch:
            config = load_for_steps(args.config, args.overrides, batch=args.batch, output=Path(scratch))
            blocks = chosen_blocks(args.blocks, describe_teacher(config.teacher, config.data.image_size).depth)
            world = initialise()
            memory, samples = measure(config, world, blocks, rounds=args.rounds, steps=args.steps)
        table = rows(config, samples, memory, args.batch)
        models = f"{config.teacher.model} {config.teacher.dtype} -> {config.student.model} {config.engine.precision}"
        about = f"{device_name(world.device)}; {versions('deepspeed', 'timm')}"
        about += f"; {models}, {args.batch} x {config.data.image_size} px"
        write(args.out, table, config, about)
    except UserError as error:
        print(f"profile_skip: error: {error}", file=sys.stderr)
        return 2
    print(about, shown(table), f"written to {args.out}", sep="\n")
    shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
