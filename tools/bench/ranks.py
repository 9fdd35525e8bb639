"""What a step asks of one rank besides its models, by ranks and size of the set: order, decision, bytes.

python tools/bench/ranks.py
python tools/bench/ranks.py --ranks 8 4096 --samples 1.28e6 5e9

order ms    to build the order of an epoch, once; order MB: what is kept of it
ids ms      sample ids of this rank's micro-batches of one step, in the middle of the epoch
merge ms    to add moments of all ranks to one, after their sum has come
compare ms  to see that all ranks stand at the same step, and to read their rows
sum MB      what a rank puts into the sum of losses and moments; of this, rows: one of means for every rank
rows kB     the table of rows that rank 0 gives to every rank over the host's network

Times are of this machine's CPU, medians; bytes are arithmetic. Nothing is sent.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from leap_dist.benchmarking.harness import versions
from leap_dist.data.order import EpochOrder, Share
from leap_dist.matching import cka
from leap_dist.runtime.distributed import ROW_BYTES, World, device_name, rows_apart
from leap_kernels import Moments

SHARD = 640  # samples: 64 MiB of 100 kB
TITLES = (
    "ranks",
    "samples",
    "order ms",
    "order MB",
    "ids ms",
    "merge ms",
    "compare ms",
    "sum MB",
    "of this rows",
    "rows kB",
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512], help="eight to a node")
    parser.add_argument("--samples", type=float, nargs="+", default=[1.28e6, 142e6, 1e9])
    parser.add_argument("--batch", type=int, default=32, help="images per rank")
    parser.add_argument("--student", type=int, default=384, help="width of a student's token")
    parser.add_argument("--teacher", type=int, default=1536, help="width of a teacher's token")
    return parser.parse_args(argv)


def timed(work: Callable[[], Any], rounds: int = 7) -> float:
    """Median milliseconds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def merging(ranks: int, student: int, teacher: int) -> tuple[float, int, int]:
    """Milliseconds to merge, bytes of a rank's share, and those of them that are rows of ranks."""
    draw = torch.Generator().manual_seed(0)
    s, t = torch.randn(64, student, generator=draw), torch.randn(64, teacher, generator=draw)
    moments = Moments(torch.tensor(64.0), s.mean(0), t.mean(0), s.T @ s, t.T @ s, t.T @ t)
    total = cka.share_of(moments, 0, ranks)
    rows = total.element_size() * ranks * (1 + student + teacher)
    return timed(lambda: cka.merged_shares(total, moments, ranks), 3), total.nbytes, rows


def comparing(ranks: int) -> float:
    """Milliseconds to compare and read the rows of all ranks."""
    rows = torch.zeros(ranks, ROW_BYTES, dtype=torch.uint8)
    return timed(lambda: (rows_apart(rows).any(), rows.tolist()))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return the exit status."""
    args = parse(argv)
    torch.set_num_threads(1)
    if any(ranks < 8 or ranks % 8 for ranks in args.ranks) or min(args.samples) < 8 * SHARD:
        print(f"bench_ranks: error: --ranks in eights, --samples at least {8 * SHARD}", file=sys.stderr)
        return 2
    print(f"{device_name(torch.device('cpu'))}; {versions()}; {args.student} -> {args.teacher}")
    print("".join(f"{title:>14}" for title in TITLES))
    for ranks in args.ranks:
        world = World(ranks // 2, ranks, 0, 8, torch.device("cpu"))
        share = Share(args.batch, 1, world)
        merge_ms, sum_bytes, row_bytes = merging(ranks, args.student, args.teacher)
        compare_ms = comparing(ranks)
        for samples in args.samples:
            sizes = np.full(int(samples) // SHARD, SHARD)
            start = time.perf_counter()
            order = EpochOrder(sizes, canonical_nodes=max(ranks // 8, 8), seed=0, epoch=0)
            order_ms = 1e3 * (time.perf_counter() - start)
            middle = order.size // 2
            positions = middle + share.positions(0)
            ids_ms = timed(functools.partial(order, positions))
            cells = (
                f"{ranks}", f"{samples:,.0f}", f"{order_ms:.1f}", f"{order.nbytes / 1e6:.1f}", f"{ids_ms:.2f}",
                f"{merge_ms:.1f}", f"{compare_ms:.2f}", f"{sum_bytes / 1e6:.1f}", f"{row_bytes / 1e6:.2f}",
                f"{ranks * ROW_BYTES / 1e3:.1f}",
            )  # fmt: skip
            print("".join(f"{cell:>14}" for cell in cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
