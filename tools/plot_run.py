"""Runs side by side: score, loss, target block and accuracy over steps, over the teacher's FLOPs and over seconds.

python tools/plot_run.py runs/leap runs/baseline --out runs.png

What it reads of a run folder, and what it does where a part is missing: leap_dist/monitoring/comparison.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from leap_dist.errors import UserError
from leap_dist.monitoring.comparison import draw, names, read


def main(argv: list[str] | None = None) -> int:
    """Draw; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--out", type=Path, default=Path("runs.png"), help="the picture to write")
    args = parser.parse_args(argv)
    try:
        runs = [read(folder, name) for folder, name in zip(args.runs, names(args.runs), strict=True)]
        for run in runs:
            if run.missing:
                print(f"plot_run: {run.name}: without {', '.join(run.missing)}", file=sys.stderr)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        draw(runs).savefig(args.out, dpi=120)
    except UserError as error:
        print(f"plot_run: error: {error}", file=sys.stderr)
        return 2
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
