"""What a step costs the host, by target block: kernels launched, values waited for, milliseconds.

python tools/bench/host.py                                  ViT-g/14 -> ViT-S/14 as its launch config has it
python tools/bench/host.py --json host.json teacher.compile=true

Needs no GPU. The trainer's own steps, with the config's depths, optimizer and precision, but models so narrow and
images so small that arithmetic costs next to nothing. On a CPU operations are counted that are kernels to a GPU
(leap_dist/benchmarking/launches.py says how); on a GPU, the driver's calls. Collectives are not counted, what is copied
for them is: deepspeed --num_gpus 2 tools/bench/host.py.

launches  of one step, then by its phases; `other` is colours, mixup and what lies between the phases
reads     times that the host must wait for the device; the score's way to the host is none
host ms   the process' own time, median over rounds
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from leap_dist.benchmarking.harness import versions
from leap_dist.benchmarking.host import NARROW, PARTS, Row, measure
from leap_dist.benchmarking.skipping import chosen_blocks
from leap_dist.benchmarking.steps import load_for_steps, require_deepspeed
from leap_dist.errors import UserError
from leap_dist.runtime.distributed import device_name, initialise, shutdown
from leap_dist.teacher import describe_teacher

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "launch_configs" / "vitg14" / "leap_vitg14_vits14_imagenet1k.yaml"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG, help="a run's YAML")
    parser.add_argument("--blocks", default="1,10,20", help="all, or a list; always with the last")
    parser.add_argument("--batch", type=int, default=8, help="images per step on each rank")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each block; medians over them")
    parser.add_argument("--steps", type=int, default=5, help="steps in a row at each turn")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="win over the YAML")
    return parser.parse_intermixed_args(argv)


def table(rows: Sequence[Row]) -> str:
    """The rows for a terminal."""
    parts = [part for part in PARTS if any(row.parts[part] for row in rows)]
    titles = ("block", "launches", "reads", "host ms", *parts)
    lines = ["".join(f"{title:>17}" for title in titles)]
    for row in rows:
        cells = (row.block, row.launches, row.reads, f"{row.host_ms:.2f}", *(row.parts[part] for part in parts))
        lines.append("".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Print the table; return the exit status."""
    args = parse(argv)
    try:
        require_deepspeed()
        torch.set_num_threads(1)
        world = initialise()
        with tempfile.TemporaryDirectory() as scratch:
            overrides = [*NARROW, *args.overrides]
            config = load_for_steps(args.config, overrides, batch=args.batch * world.size, output=Path(scratch))
            blocks = chosen_blocks(args.blocks, describe_teacher(config.teacher, config.data.image_size).depth)
            rows = measure(config, world, blocks, rounds=args.rounds, steps=args.steps)
    except UserError as error:
        print(f"bench_host: error: {error}", file=sys.stderr)
        return 2
    if world.is_main:
        about = f"{device_name(world.device)}; {versions('deepspeed', 'timm')}; {config.teacher.model} blocks, "
        about += f"{config.student.model} {config.engine.precision}, {config.optim.name}, {world.size} ranks"
        print(about, table(rows), sep="\n")
        if args.json:
            args.json.write_text(json.dumps({"about": about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
