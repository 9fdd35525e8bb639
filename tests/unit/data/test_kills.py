"""A run that is killed twenty times goes on exactly and leaves nothing behind. As a script: the host of its ranks."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from leap_dist.data import build_train_loader
from leap_dist.data.store import STAGING
from leap_dist.runtime.distributed import World, barrier
from leap_dist.runtime.files import write_text
from small_sets import config, helpers_on_path, write

KILLS, SAMPLES, BATCH, EPOCHS, RANKS = 20, 640, 16, 3, 2
STEPS = SAMPLES // BATCH


def rank_main(folder: Path, life: int, rank: int) -> None:
    """Train, as it were, from the saved step to the end: note what each step has read; save the place every third."""
    os.setpgid(0, 0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{life}", rank=rank, world_size=RANKS)
    world = World(rank, RANKS, rank, RANKS, torch.device("cpu"), dist.group.WORLD)
    data = config(folder / "set", workers=2, cache=str(folder / "cache"), cache_limit="9kb", predownload=16)
    loader = build_train_loader(data, seed=1, micro_batch=BATCH // RANKS, world=world)
    position = folder / "position"
    first = int(position.read_text()) if position.exists() else 0
    barrier(world)
    with (folder / f"read-{rank}.jsonl").open("a") as log:
        for epoch in range(first // STEPS, EPOCHS):
            start = max(0, first - epoch * STEPS)
            for step, batch in enumerate(loader.epoch(epoch, start), epoch * STEPS + start):
                assert not batch.bad
                log.write(json.dumps([step, batch.ids.tolist(), batch.images.double().sum((1, 2, 3)).tolist()]) + "\n")
                log.flush()
                barrier(world)
                if rank == 0 and step % 3 == 2:
                    write_text(position, str(step + 1))
                time.sleep(0.03)
    loader.close()
    dist.destroy_process_group()


def main(folder: str) -> None:
    """Start the ranks, kill them at a random moment, start them again, ...; the last life is left to end."""
    context, moments = multiprocessing.get_context("fork"), random.Random(0)
    for life in range(KILLS + 1):
        ranks = [context.Process(target=rank_main, args=(Path(folder), life, rank)) for rank in range(RANKS)]
        for rank in ranks:
            rank.start()
        if life < KILLS:
            if life % 2:  # some are killed in their start, the others once they have read
                wait_for_growth(Path(folder) / "read-0.jsonl")
            time.sleep(moments.uniform(0, 0.25))
            for rank in ranks:
                if moments.random() < 0.5:  # else its workers have to find out by themselves
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(rank.pid, signal.SIGKILL)
                rank.kill()
        for rank in ranks:
            rank.join()
    sys.exit(max(abs(rank.exitcode) for rank in ranks))


def wait_for_growth(path: Path) -> None:
    size = path.stat().st_size if path.exists() else 0
    while not path.exists() or path.stat().st_size == size:
        time.sleep(0.001)


def left_in_shared_memory(before: set[str], folder: Path) -> list[str]:
    """New names, but for those of StreamingDatasets elsewhere on the machine: theirs say which folder they are of.

    What other processes hold while this one looks goes again in a while.
    """
    left = []
    for name in set(os.listdir("/dev/shm")) - before:
        prefix = re.match(r"\d{6}_", name)
        if re.fullmatch(r"sem\.\w{6}", name):  # a kill inside sem_open, of whichever process: the C library's to mend
            continue
        if prefix is None:
            left.append(name)
        else:
            with contextlib.suppress(FileNotFoundError):
                if str(folder).encode() in Path(f"/dev/shm/{prefix[0]}locals").read_bytes():
                    left.append(name)
    return left


@pytest.mark.slow
def test_twenty_kills_lose_nothing_and_leave_nothing(tmp_path: Path) -> None:
    write(tmp_path / "set", size=SAMPLES, compression="zstd")
    before = set(os.listdir("/dev/shm"))
    host = subprocess.Popen(
        [sys.executable, __file__, str(tmp_path)], env=helpers_on_path(),
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    _, log = host.communicate(timeout=300)
    assert host.returncode == 0, log[-3000:]
    lines = [
        json.loads(line) for rank in range(RANKS) for line in (tmp_path / f"read-{rank}.jsonl").read_text().splitlines()
    ]
    read: dict[int, set[tuple[int, float]]] = {step: set() for step in range(EPOCHS * STEPS)}
    for step, ids, pixels in lines:
        read[step] |= set(zip(ids, pixels, strict=True))
    assert len(lines) > RANKS * EPOCHS * STEPS, "no step was ever repeated"
    for epoch in range(EPOCHS):
        steps = [read[step] for step in range(epoch * STEPS, (epoch + 1) * STEPS)]
        assert all(len(step) == BATCH for step in steps), "a repeated step was not the same"
        assert sorted(i for step in steps for i, _ in step) == list(range(SAMPLES))
    (cached,) = (tmp_path / "cache").iterdir()
    assert not list((cached / STAGING).iterdir())
    deadline = time.monotonic() + 60
    while left_in_shared_memory(before, tmp_path) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left_in_shared_memory(before, tmp_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
