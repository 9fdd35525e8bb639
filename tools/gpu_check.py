"""The first nine minutes on a GPU: is everything right there, and how fast?

python tools/gpu_check.py                       on one H100 or H200; writes docs/benchmarks/gpu.md, .json and .logs
python tools/gpu_check.py --out runs/check.md --only kernels,match
python tools/gpu_check.py --dry --out runs/dry.md        the same on a CPU, tiny: shows that the check itself works

Parts come in the order of what is worth most, so that a check which is cut short has said the most. Each runs in a
process of its own, with a limit and a log, and a part that fails or is cut does not stop the others. The page is
written after each of them; Ctrl-C leaves what there is. Exit status: 0 if all is well, 1 if a bar was missed, a part
broke down or was cut, 2 for a mistake.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ONE = "--part"  # NAME FINDING FOLDER: run this part here


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "gpu.md", help="the page")
    parser.add_argument("--only", help="names of parts, such as kernels,match; default: all")
    parser.add_argument("--minutes", type=float, default=9, help="for all parts together")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with tiny sizes; no figure means anything")
    parser.add_argument(ONE, nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the parts, or the one that this process is for; return the exit status."""
    args = parse(argv)
    if args.dry:
        os.environ["DS_ACCELERATOR"] = "cpu"
    from leap_dist.benchmarking.device_check import Check, command_of, failed, hand_over
    from leap_dist.benchmarking.device_parts import PARTS
    from leap_dist.benchmarking.harness import versions
    from leap_dist.errors import UserError
    from leap_dist.runtime.distributed import device_name, uses_gpus

    parts = {part.name: part for part in PARTS}
    if args.part:
        name, found, folder = args.part
        hand_over(parts[name].run(args.dry, Path(folder)), Path(found))
        return 0
    try:
        chosen = args.only.split(",") if args.only else list(parts)
        for name in chosen:
            if name not in parts:
                raise UserError(f"--only {name}: no such part; there are {', '.join(parts)}")
        if not (args.dry or uses_gpus()):
            raise UserError("no GPU that torch can use; --dry goes through the parts on the CPU")
        if args.out.suffix != ".md":
            raise UserError(f"--out {args.out}: a page's name ends in .md")
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except (UserError, OSError) as error:
        print(f"gpu_check: error: {error}", file=sys.stderr)
        return 2
    command = command_of(Path(__file__), *["--dry"] * args.dry, ONE)
    check = Check([parts[name] for name in chosen], command, args.out, dry=args.dry, total=60 * args.minutes)
    import torch

    check.about = f"{device_name(torch.device('cpu' if args.dry else 'cuda'))}; {versions('deepspeed', 'timm')}"
    results = check.run(gpu=not args.dry)
    print(f"written to {args.out}")
    return int(failed(results))


if __name__ == "__main__":
    sys.exit(main())
