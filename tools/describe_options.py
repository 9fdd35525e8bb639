"""Every option of a run as Markdown tables, from leap_dist/config/options.py: the last part of docs/configuration.md.

python tools/describe_options.py                                  print the tables
python tools/describe_options.py --write docs/configuration.md    put them in the place of those in the page
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from leap_dist.config import tables

HEADING = "# All options\n"


def rewritten(page: str) -> str:
    """`page` with the tables of now below its heading. ValueError: it has no such heading, or several."""
    written_by_hand, _ = page.split(f"\n{HEADING}")
    return (
        f"{written_by_hand}\n{HEADING}\n"
        f"Made by `python tools/{Path(__file__).name} --write docs/configuration.md`. Do not edit below this line.\n"
        f"{tables()}"
    )


def main(argv: list[str] | None = None) -> int:
    """Print or write; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="a page with the heading 'All options'")
    args = parser.parse_args(argv)
    if args.write is None:
        print(tables())
        return 0
    try:
        page = rewritten(args.write.read_text())
    except (OSError, ValueError) as error:
        print(f"describe_options: error: {args.write}: {error}", file=sys.stderr)
        return 2
    args.write.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
