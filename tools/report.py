"""A run as one page in HTML, or several runs side by side; from the files of their folders alone.

    python tools/report.py runs/demo
    python tools/report.py runs/leap runs/baseline --out both.html

A run writes its page, report.html, at its end. This makes it anew, also of a run that still goes on, or was killed. Of
a run with several students there is a page for all and one for each. Several runs, or a folder with runs in it, such as
a sweep's, give one page that compares them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from leap_dist.errors import UserError, one_line
from leap_dist.monitoring.comparison import names
from leap_dist.report import REPORT, is_run, runs_in, write_comparison, write_report


def report(folders: Sequence[Path], out: Optional[Path]) -> Path:
    """Write the page that these folders ask for; return where it is."""
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
    if len(folders) == 1 and is_run(folders[0]):
        return write_report(folders[0], out)
    runs = [run for folder in folders for run in ([folder] if is_run(folder) else runs_in(folder))]
    path = out or (folders[0] / REPORT if len(folders) == 1 else Path(REPORT))
    write_comparison(runs, names(runs), path)
    return path


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Exit status: 0 written; 2 a mistake in the input, or the disk refuses the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, or folders with runs in them")
    parser.add_argument("--out", type=Path, help="the page; default: report.html of the folder, or here for several")
    args = parser.parse_args(argv)
    try:
        path = report(args.runs, args.out)
    except UserError as error:
        print(f"report: error: {one_line(str(error))}", file=sys.stderr)
        return 2
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
