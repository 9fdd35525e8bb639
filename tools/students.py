#!/usr/bin/env python
"""Try every timm architecture as a student, and write the list of docs/students.md.

    python tools/students.py --record runs/students.jsonl --write docs/students.md

Each is built with random weights at the smallest images it takes, trained for a step, exported, and read back by this
package and by plain timm. Hundreds of them take an hour or more on two cores: with --record what has been tried is not
tried again.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from leap_dist.errors import UserError


def parse(argv: Optional[list[str]]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="timm names; by default all below --most")
    parser.add_argument("--most", type=float, default=30.0, help="millions of parameters that one may have")
    parser.add_argument("--sample", type=int, help="only so many of them, evenly spread")
    parser.add_argument("--record", type=Path, help="JSON lines of what has been tried; added to")
    parser.add_argument("--write", type=Path, help="the page whose list is to be made anew, from all that was tried")
    return parser.parse_args(argv)


def main(argv: Optional[list[str]] = None) -> int:
    """Exit status: 0 all train or are refused in a line; 2 a user's mistake."""
    from leap_dist.benchmarking.architectures import Verdict, architectures, evenly, page_with, try_out

    args = parse(argv)
    lines = args.record.read_text().splitlines() if args.record and args.record.is_file() else []
    done = {verdict.name: verdict for verdict in (Verdict(**json.loads(line)) for line in lines)}
    names = args.names or list(architectures(args.most * 1e6))
    if args.sample:
        names = evenly(names, args.sample)
    for name in names:
        if name in done:
            continue
        done[name] = verdict = try_out(name)
        print(f"{name}: {verdict.refusal or 'trains'}", flush=True)
        if args.record:
            with args.record.open("a") as record:
                record.write(json.dumps(asdict(verdict)) + "\n")
    if args.write:
        try:
            args.write.write_text(page_with(args.write.read_text(), list(done.values())))
        except UserError as error:
            print(f"students: error: {args.write}: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
