"""The data room over real processes (gloo). Run as a script, this file starts the ranks of one or more jobs."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_data_loader import ALONE, config, flat, write

from leap_dist.config import DataConfig
from leap_dist.data import build_eval_loader, build_train_loader, resolve
from leap_dist.distributed import World
from leap_dist.errors import UserError

TIMEOUT_S = 120


def read(data: DataConfig, world: World, global_batch: int) -> list[list[list[Any]]]:
    """[id, checksum] of every sample of every batch: epochs 0 and 1, 1 again from batch 3, all by one loader."""
    loader = build_train_loader(data, seed=3, micro_batch=global_batch // world.size, world=world)
    batches = [
        [[int(i), x.double().sum().item()] for i, x in zip(batch.ids, batch.images, strict=True)]
        for epoch, start in ((0, 0), (1, 0), (1, 3))
        for batch in loader.epoch(epoch, start)
    ]
    loader.close()
    return batches


def fault(folder: str, world: World) -> str:
    try:
        build_train_loader(config(folder), seed=0, micro_batch=2, world=world)
    except UserError as error:
        return str(error)
    return "no error"


def run_together(world: World, folder: Path) -> dict[str, Any]:
    digits = resolve(DataConfig(train="digits", val="digits"), folder / "out", world)
    evaluation = build_eval_loader(str(folder / "whole"), config(""), batch=3, world=world, limit=None)
    return {
        "train": {workers: read(config(folder / "whole", workers=workers), world, 8) for workers in (0, 2)},
        "eval": [batch.ids.tolist() for batch in evaluation],
        "fault": fault(str(folder / "broken"), world),
        "digits": [digits.train, digits.val],
    }


def run_race(world: World, folder: Path) -> dict[str, Any]:
    """Open datasets over and over while other jobs do the same."""
    (folder / f"ready-{os.getpid()}").touch()
    while len(list(folder.glob("ready-*"))) < 4:
        time.sleep(0.001)
    seen = []
    for _ in range(6):
        loader = build_train_loader(config(folder / "whole"), seed=0, micro_batch=2, world=world)
        seen.append(next(loader.epoch(0)).ids.tolist())
        loader.close()
    return {"seen": seen}


def rank_main(mode: str, folder: Path, job: str, rank: int) -> None:
    """One rank, with the environment a launcher would give it."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/{job}-store", rank=rank, world_size=2)
    world = World(rank, 2, rank, 2, torch.device("cpu"), dist.group.WORLD)
    result = {"together": run_together, "race": run_race}[mode](world, folder)
    (folder / f"{job}-{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def main(mode: str, folder: str, *jobs: str) -> None:
    """Fork two ranks per job: the imports, most of a rank's start, are paid once."""
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=rank_main, args=(mode, Path(folder), job, rank)) for job in jobs for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
        time.sleep(0.01)
    for rank in ranks:
        rank.kill()  # none, unless one has failed
        rank.join()
    sys.exit(max(abs(rank.exitcode) for rank in ranks))


def run_jobs(mode: str, folder: Path, *jobs: str) -> list[dict[str, Any]]:
    """The result of every rank of every job; whatever happens, no process outlives this."""
    command = [sys.executable, __file__, mode, str(folder), *jobs]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    host = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, log = host.communicate(timeout=TIMEOUT_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(host.pid, signal.SIGKILL)
    assert host.returncode == 0, log[-3000:]
    return [json.loads((folder / f"{job}-{rank}.json").read_text()) for job in jobs for rank in (0, 1)]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("ranks")
    write(folder / "whole")
    (write(folder / "broken") / "shard.00004.mds").unlink()
    yield folder, run_jobs("together", folder, "job")


def test_two_ranks_see_what_one_sees(together: tuple[Path, list[dict[str, Any]]]) -> None:
    """Global batches are equal sets, and each sample's pixels are the same, also when resumed and with workers."""
    folder, ranks = together
    alone = read(config(folder / "whole"), ALONE, 8)
    assert len(alone) == 8 + 8 + 5
    for workers in ("0", "2"):
        both = [flat(shares) for shares in zip(*(rank["train"][workers] for rank in ranks), strict=True)]
        assert [sorted(batch) for batch in both] == [sorted(batch) for batch in alone]


def test_two_ranks_evaluate_disjoint_halves(together: tuple[Path, list[dict[str, Any]]]) -> None:
    shares = [flat(rank["eval"]) for rank in together[1]]
    assert shares == [list(range(0, 64, 2)), list(range(1, 64, 2))]


def test_every_rank_raises_what_one_of_them_found(together: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, ranks = together
    shard = folder / "broken" / "shard.00004.mds"
    assert [rank["fault"] for rank in ranks] == [f"{shard} is missing, though index.json lists it"] * 2


def test_digits_are_written_by_one_rank_for_all(together: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, ranks = together
    data = folder / "out/data/digits"
    assert [rank["digits"] for rank in ranks] == [[str(data / "train"), str(data / "val")]] * 2
    assert sorted(path.name for path in data.iterdir()) == ["train", "val"]


def test_jobs_that_start_at_the_same_moment_do_not_collide(tmp_path: Path) -> None:
    """Without the lock around construction, one of these jobs dies or hangs."""
    write(tmp_path / "whole")
    results = run_jobs("race", tmp_path, "a", "b")
    assert results[0] == results[2] and results[1] == results[3]
    assert all(len(result["seen"]) == 6 for result in results)


if __name__ == "__main__":
    main(*sys.argv[1:])
