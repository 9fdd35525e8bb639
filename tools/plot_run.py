"""One run's climb, or runs side by side over steps, over the teacher's FLOPs and over seconds.

    python tools/plot_run.py runs/leap --out climb.png
    python tools/plot_run.py runs/leap runs/baseline --out runs.png

One run is drawn as in its own curriculum.png: target block, what was not run above it, and score. Several are drawn by
score, loss, target block and accuracy; leap_dist/monitoring/comparison.py says what is read of a run folder, and what
happens where a part is missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from leap_dist.errors import UserError, one_line
from leap_dist.monitoring import climb
from leap_dist.monitoring.comparison import draw, names, read
from leap_dist.runtime.files import write_whole


def side_by_side(folders: Sequence[Path]) -> Any:
    """Figure of several runs; what they lack is said on stderr."""
    runs = [read(folder, name) for folder, name in zip(folders, names(folders), strict=True)]
    for run in runs:
        if run.missing:
            print(f"plot_run: {run.name}: without {', '.join(run.missing)}", file=sys.stderr)
    return draw(runs)


def main(argv: list[str] | None = None) -> int:
    """Draw; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--out", type=Path, default=Path("runs.png"), help="the picture to write")
    args = parser.parse_args(argv)
    try:
        figure = climb.draw(climb.read(args.runs[0])) if len(args.runs) == 1 else side_by_side(args.runs)
        kind = args.out.suffix.removeprefix(".") or "png"
        write_whole(args.out, lambda partial: figure.savefig(partial, dpi=120, format=kind))
    except UserError as error:
        print(f"plot_run: error: {one_line(str(error))}", file=sys.stderr)
        return 2
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
