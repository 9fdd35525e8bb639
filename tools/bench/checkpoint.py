"""What it costs that a checkpoint can be told from a damaged one: processor time of saves and loads, in pairs.

    python tools/bench/checkpoint.py [--mib 500]

before: torch.save and torch.load as they come. now: saved without the zip's CRCs and hashed, as
`leap_dist.runtime.checkpoint` does; hashed, then loaded.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import torch

from leap_dist.runtime.checkpoint import without_crc
from leap_dist.runtime.integrity import mark_of

PAIRS = 5


def seconds(work: Callable[[], Any], gone: Optional[Path] = None) -> float:
    """Of processor time, user's and system's. gone: a file that is removed before, as every checkpoint is a new one."""
    if gone is not None:
        gone.unlink(missing_ok=True)
    begin = time.process_time()
    work()
    return time.process_time() - begin


def measure(path: Path, mib: int) -> dict[str, float]:
    """Medians over pairs of: save now / before, load now / before."""
    state = {str(index): torch.randn(2**18) for index in range(mib)}
    ratios: dict[str, list[float]] = {"save": [], "load": []}

    def save() -> None:
        with without_crc():
            torch.save(state, path)
        mark_of(path)

    for _ in range(PAIRS):
        before = seconds(lambda: torch.save(state, path), gone=path)
        ratios["save"].append(seconds(save, gone=path) / before)
        before = seconds(lambda: torch.load(path))
        ratios["load"].append(seconds(lambda: (mark_of(path), torch.load(path))) / before)
    return {name: statistics.median(found[1:]) for name, found in ratios.items()}  # the first pair warms up


def main() -> None:
    """Print the two ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=500, help="size of the checkpoint")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder) / "state.pt", args.mib)
    print(
        f"{args.mib} MiB, processor time with hashes over without: save {found['save']:.3f}, load {found['load']:.3f}"
    )


if __name__ == "__main__":
    main()
