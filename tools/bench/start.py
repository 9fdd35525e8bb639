"""What it costs a rank to be ready for the first batch of the middle of an epoch, by the size of the set.

python tools/bench/start.py                                      142 M samples in 250,000 shards
python tools/bench/start.py --shards 2000000 --samples 640       1.28 B
python tools/bench/start.py --shards 1300 --samples 985          ImageNet-1K

The index is made up, in folders of 10,000 shards where there are more; the shards have the size that it gives, and no
content. What is measured happens in a process of its own, after its imports: reading and checking the index, comparing
the shards' sizes, the order, the samples of the first batch. Nothing is left from an earlier start. CPU seconds hardly
depend on what else the machine does; `grows` is the peak of the process's memory over what its imports took. Then the
process reads 100,000 samples at random, and `reading grows` says by how much its memory has grown meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from leap_dist.config import DataConfig
from leap_dist.data import build_train_loader
from leap_dist.data.index import INDEX
from leap_dist.runtime.distributed import World

SHARD_BYTES = 1 << 26
FILES_A_FOLDER = 10_000
READS = 100_000


def write_set(folder: Path, shards: int, samples: int) -> None:
    """An index of `shards` shards of `samples` samples, and files of their size."""
    entry = {
        "column_encodings": ["bytes", "int"], "column_names": ["image", "label"], "column_sizes": [None, 8],
        "compression": None, "format": "mds", "hashes": ["xxh64"], "samples": samples, "size_limit": SHARD_BYTES,
        "version": 2, "zip_data": None,
    }  # fmt: skip
    with (folder / INDEX).open("w") as index:
        index.write('{"shards": [')
        for number in range(shards):
            parent = f"{number // FILES_A_FOLDER:05}" if shards > FILES_A_FOLDER else "."
            name = f"shard.{number:05}.mds" if parent == "." else f"{parent}/shard.{number % FILES_A_FOLDER:05}.mds"
            (folder / parent).mkdir(exist_ok=True)
            with (folder / name).open("wb") as shard:
                shard.truncate(SHARD_BYTES)
            raw = {"basename": name, "bytes": SHARD_BYTES, "hashes": {"xxh64": f"{number * 2654435761:016x}"}}
            index.write((", " if number else "") + json.dumps({**entry, "raw_data": raw}, sort_keys=True))
        index.write('], "version": 2}')


def peak_bytes() -> int:
    """The most memory that this process has held so far."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def measure(source: str, canonical_nodes: int) -> dict[str, float]:
    """From the imports to the first samples that workers are asked for, and what reading at random adds."""
    import leap_dist.data.store  # noqa: F401

    data = DataConfig(train=source, workers=0, canonical_nodes=canonical_nodes)
    before, wall, cpu = peak_bytes(), time.perf_counter(), time.process_time()
    loader = build_train_loader(data, seed=0, micro_batch=32, world=World(0, 1, 0, 1, torch.device("cpu")))
    opened = time.process_time()
    first = next(loader._epoch_requests(0, len(loader) // 2))
    assert len(first.ids) == 32
    done = time.process_time()
    figures: dict[str, float] = {
        "open": opened - cpu, "order": done - opened, "cpu": done - cpu, "wall": time.perf_counter() - wall,
        "grows": peak_bytes() - before,
    }  # fmt: skip
    return figures | {"reading grows": read_at_random(loader, READS)}


def read_at_random(loader: Any, reads: int) -> int:
    """By how many bytes this process grows between its first 1,000 reads and the last; what is read is no image."""
    store, process = loader._dataset.store, psutil.Process()
    held = 0
    for number, sample_id in enumerate(np.random.RandomState(0).randint(0, store.size, reads)):
        with contextlib.suppress(OSError, ValueError):  # a shard without content
            store.read(int(sample_id))
        if number == min(1000, reads // 2):
            held = process.memory_info().rss
    return process.memory_info().rss - held


def main(argv: list[str] | None = None) -> int:
    """Print a line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=250_000)
    parser.add_argument("--samples", type=int, default=568, help="in each shard")
    parser.add_argument("--canonical-nodes", type=int, default=8)
    parser.add_argument("--measure", metavar="SOURCE", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        print(json.dumps(measure(args.measure, args.canonical_nodes)))
        return 0
    with tempfile.TemporaryDirectory(prefix="bench_start-") as folder:
        write_set(Path(folder), args.shards, args.samples)
        done = subprocess.run(
            [sys.executable, __file__, "--measure", folder, "--canonical-nodes", str(args.canonical_nodes)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, check=True,
        )  # fmt: skip
    figures = json.loads(done.stdout)
    seconds = ", ".join(f"{key} {figures[key]:.2f} s" for key in ("open", "order", "cpu", "wall"))
    grown = ", ".join(f"{key} {figures[key] / 2**20:.0f} MiB" for key in ("grows", "reading grows"))
    print(f"{args.shards:,} shards of {args.samples}: {seconds}; {grown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
