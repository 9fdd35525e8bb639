"""What it costs a rank to open ImageNet's 1.28 million samples. As a script: that rank, alone in its process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from leap_dist.config import DataConfig
from leap_dist.data import build_train_loader, preflight
from leap_dist.runtime.distributed import World

SHARDS, SAMPLES, SHARD_BYTES = 1300, 985, 1 << 26
MOST_BYTES = 64 * 2**20  # 5 MiB were measured


def write_index(folder: Path) -> None:
    """Shards without content, but of the size that the index gives."""
    entries = []
    for i in range(SHARDS):
        name = f"shard.{i:05d}.mds"
        with (folder / name).open("wb") as shard:
            shard.truncate(SHARD_BYTES)
        entries.append(
            {
                "column_encodings": ["bytes", "int"], "column_names": ["image", "label"], "column_sizes": [None, 8],
                "compression": None, "format": "mds", "hashes": ["xxh64"], "samples": SAMPLES,
                "raw_data": {"basename": name, "bytes": SHARD_BYTES, "hashes": {"xxh64": "0" * 16}}, "version": 2,
                "size_limit": SHARD_BYTES, "zip_data": None,
            }
        )  # fmt: skip
    (folder / "index.json").write_text(json.dumps({"shards": entries, "version": 2}))


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main(folder: str, canonical_nodes: str) -> None:
    """From the imports to the first samples that workers are asked for."""
    import leap_dist.data.streaming  # noqa: F401

    data = DataConfig(train=folder, workers=0, canonical_nodes=int(canonical_nodes))
    before, began = peak_bytes(), time.perf_counter()
    loader = build_train_loader(data, seed=0, micro_batch=32, world=World(0, 1, 0, 1, torch.device("cpu")))
    opened = time.perf_counter()
    first = next(loader._epoch_requests(0, len(loader) // 2))
    assert len(first.ids) == 32 and loader.num_samples == SHARDS * SAMPLES
    ordered = time.perf_counter()
    figures = {"open_s": opened - began, "order_s": ordered - opened, "bytes": peak_bytes() - before}
    sys.stdout.write(json.dumps(figures))


@pytest.mark.slow
@pytest.mark.parametrize("canonical_nodes", [1, 8, 64])
def test_a_rank_opens_imagenet_in_little_memory(tmp_path: Path, canonical_nodes: int) -> None:
    """The time is printed, not judged: `pytest -s`."""
    write_index(tmp_path)
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path), str(canonical_nodes)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, timeout=120, check=True,
    )  # fmt: skip
    figures = json.loads(done.stdout)
    print(figures)
    assert 0 < figures["bytes"] < MOST_BYTES


if __name__ == "__main__":
    main(*sys.argv[1:])


def test_a_look_at_labels_that_cannot_be_read_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreadable:
        fetches, size, reads = False, 10**5, 0

        def read(self, _: int) -> None:
            self.reads += 1
            raise OSError("bit rot")

    store = Unreadable()
    monkeypatch.setattr(preflight, "LOOK_SECONDS", 0)
    preflight._look_at_labels("data.train=set", store, preflight.Task(10, "student.num_classes"), None, True)
    assert store.reads < store.size / 2
