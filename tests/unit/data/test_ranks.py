"""The data room over real processes (gloo). Run as a script, this file starts the ranks of one or more jobs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from forked import Forked
from leap_dist.config import DataConfig
from leap_dist.data import BadSamples, build_eval_loader, build_train_loader, draw_mix, resolve
from leap_dist.data.faults import BadSample
from leap_dist.errors import UserError
from leap_dist.runtime.distributed import World
from small_sets import ALONE, SIZE, config, flat, helpers_on_path, write

pytestmark = pytest.mark.seconds

TIMEOUT_S = 120


def checksum(image: torch.Tensor) -> str:
    return hashlib.blake2s(image.numpy().tobytes(), digest_size=8).hexdigest()


def read(data: DataConfig, world: World, *, accumulation: int = 1, starts: Sequence[tuple[int, int]]) -> list[Any]:
    """[id, checksum of the pixels, and of them mixed up] of every image of every step, by (epoch, first step)."""
    micro_batch = data.global_batch // world.size // accumulation
    loader = build_train_loader(data, seed=3, micro_batch=micro_batch, accumulation=accumulation, world=world)
    runs = []
    for epoch, start in starts:
        steps = [[] for _ in range(start, len(loader) // accumulation)]
        for index, batch in enumerate(loader.epoch(epoch, start * accumulation)):
            step = index // accumulation
            generator = torch.Generator().manual_seed(1000 * epoch + start + step)
            mixed = draw_mix(data, batch.positions, generator).images(batch.images.float())
            rows = zip(batch.ids.tolist(), map(checksum, batch.images), map(checksum, mixed), strict=True)
            steps[step] += [list(row) for row in rows]
        runs.append(steps)
    loader.close()
    return runs


def together(shares: Sequence[list[Any]]) -> list[list[Any]]:
    """The ranks' `read`s as one: the images of each step of all runs, in a fixed order."""
    return [sorted(flat(parts)) for runs in zip(*shares, strict=True) for parts in zip(*runs, strict=True)]


def fault(folder: str, world: World) -> str:
    try:
        build_train_loader(config(folder), seed=0, micro_batch=2, world=world)
    except UserError as error:
        return str(error)
    return "no error"


STARTS = ((0, 0), (1, 0), (1, 3), (0, 2))
DEIT = {"augment": "deit", "mixup_alpha": 0.8, "cutmix_alpha": 1.0}
EVERY_START = ((0, 0), (1, 0), *((epoch, step) for epoch in (0, 1) for step in range(1, 4)))


def run_together(world: World, folder: Path) -> dict[str, Any]:
    digits = resolve(DataConfig(train="digits", val="digits"), folder / "out", world)
    evaluation = build_eval_loader(str(folder / "whole"), config(""), batch=3, world=world, limit=None)
    ledger = BadSamples(folder / "bad.jsonl", 3, world)
    ledger.reopen(resumed=False)
    ledger.note([BadSample(7, "shard", "why"), BadSample(world.rank, "shard", "why")])
    ledger.share()
    return {
        "train": {workers: read(mixed(folder, workers=workers), world, starts=STARTS) for workers in (0, 2)},
        "deit": read(mixed(folder, workers=2, **DEIT), world, starts=STARTS),
        "eval": [batch.ids.tolist() for batch in evaluation],
        "fault": fault(str(folder / "broken"), world),
        "digits": [digits.train, digits.val],
        "bad": len(ledger),
    }


def run_grid(world: World, folder: Path) -> dict[str, Any]:
    return {
        f"{workers} workers, {parts} parts": read(
            mixed(folder, workers=workers), world, accumulation=parts, starts=EVERY_START if workers == 0 else STARTS
        )
        for workers in (0, 1, 2)
        for parts in (1, 2)
    }


def mixed(folder: Path, **options: Any) -> DataConfig:
    return config(folder / "whole", global_batch=16, mixup_group=2, **options)


def run_race(world: World, folder: Path) -> dict[str, Any]:
    """Open the set and read it all, over and over, while another job does the same through the same small cache."""
    (folder / f"ready-{os.getpid()}").touch()
    while len(list(folder.glob("ready-*"))) < 4:
        time.sleep(0.001)
    data = config(folder / "whole", cache=str(folder / "cache"), cache_limit="4kb", predownload=4)
    seen = []
    for epoch in range(3):
        loader = build_train_loader(data, seed=0, micro_batch=2, world=world)
        batches = list(loader.epoch(epoch))
        seen.append([batch.ids.tolist() for batch in batches])
        assert all(torch.equal(batch.ids, batch.labels) and not batch.bad for batch in batches)
        loader.close()
    return {"seen": seen}


RUNS = {"together": run_together, "grid": run_grid, "race": run_race}


def rank_main(mode: str, folder: Path, job: str, world: World) -> None:
    """One rank of a job."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/{job}-store", rank=world.rank, world_size=world.size)
    result = RUNS[mode](dataclasses.replace(world, control=dist.group.WORLD), folder)
    (folder / f"{job}-{world.rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def main(mode: str, folder: str, size: str, nodes: str, *jobs: str) -> None:
    """Fork the ranks of every job: the imports, most of a rank's start, are paid once."""
    context = multiprocessing.get_context("fork")
    local = int(size) // int(nodes)
    worlds = [World(rank, int(size), rank % local, local, torch.device("cpu")) for rank in range(int(size))]
    ranks = [
        context.Process(target=rank_main, args=(mode, Path(folder), job, world)) for job in jobs for world in worlds
    ]
    for rank in ranks:
        rank.start()
    while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
        time.sleep(0.01)
    for rank in ranks:
        rank.kill()  # none, unless one has failed
        rank.join()
    sys.exit(max(abs(rank.exitcode) for rank in ranks))


def run_jobs(mode: str, folder: Path, *jobs: str, size: int = 2, nodes: int = 1) -> list[dict[str, Any]]:
    """The result of every rank of every job; whatever happens, no process outlives this."""
    arguments = [mode, str(folder), str(size), str(nodes), *jobs]
    with Forked(Path(__file__), arguments, [{}], helpers_on_path()) as host:
        log, _ = host.communicate(timeout=TIMEOUT_S)
    assert host.returncode == 0, log[-3000:]
    return [json.loads((folder / f"{job}-{rank}.json").read_text()) for job in jobs for rank in range(size)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("ranks")
    write(folder / "whole")
    (write(folder / "broken") / "shard.00004.mds").unlink()
    yield folder, run_jobs("together", folder, "job")


def test_two_ranks_see_what_one_sees(pair: tuple[Path, list[dict[str, Any]]]) -> None:
    """The same samples, pixels and mixup pairs in every step, also when resumed and with workers."""
    folder, ranks = pair
    alone = together([read(mixed(folder), ALONE, starts=STARTS)])
    assert len(alone) == 4 + 4 + 1 + 2
    assert len({pixels for step in alone[:8] for _, pixels, _ in step}) > 100, "hardly augmented"
    for workers in ("0", "2"):
        assert together([rank["train"][workers] for rank in ranks]) == alone
    deit = together([read(mixed(folder, **DEIT), ALONE, starts=STARTS)])
    assert together([rank["deit"] for rank in ranks]) == deit != alone


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_steps_see_what_one_batch_sees(pair: tuple[Path, Any], accumulation: int) -> None:
    folder, _ = pair
    parts = read(mixed(folder), ALONE, accumulation=accumulation, starts=STARTS)
    assert together([parts]) == together([read(mixed(folder), ALONE, starts=STARTS)])


@pytest.mark.slow
@pytest.mark.parametrize(("size", "nodes"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
def test_any_world_continues_any_step_exactly(tmp_path: Path, size: int, nodes: int) -> None:
    """World sizes 1, 2, 4 on one or more nodes, 0, 1, 2 workers, 1 and 2 accumulation steps; two epochs."""
    write(tmp_path / "whole")
    alone = {starts: together([read(mixed(tmp_path), ALONE, starts=starts)]) for starts in (STARTS, EVERY_START)}
    truth = dict(zip([(e, s) for e in (0, 1) for s in range(4)], alone[STARTS][:8], strict=True))
    assert [sorted(i for step in range(4) for i, *_ in truth[epoch, step]) for epoch in (0, 1)] == [[*range(SIZE)]] * 2
    ranks = run_jobs("grid", tmp_path, "job", size=size, nodes=nodes)
    assert len(ranks[0]) == 6
    for case in ranks[0]:
        starts = EVERY_START if case.startswith("0") else STARTS
        seen = together([rank[case] for rank in ranks])
        assert seen == alone[starts], case
    resumed = [(epoch, step) for epoch, start in EVERY_START for step in range(start, 4)]
    for position, step in zip(resumed, alone[EVERY_START], strict=True):
        assert [row[:2] for row in step] == [row[:2] for row in truth[position]]


def test_two_ranks_evaluate_disjoint_halves(pair: tuple[Path, list[dict[str, Any]]]) -> None:
    shares = [flat(rank["eval"]) for rank in pair[1]]
    assert shares == [list(range(32)), list(range(32, 64))]


def test_every_rank_raises_what_one_of_them_found(pair: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, ranks = pair
    shard = folder / "broken" / "shard.00004.mds"
    assert [rank["fault"] for rank in ranks] == [f"{shard} is missing, though index.json lists it"] * 2


def test_bad_samples_of_all_ranks_are_known_to_all(pair: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, ranks = pair
    assert [rank["bad"] for rank in ranks] == [3, 3]
    assert [json.loads(line)["id"] for line in (folder / "bad.jsonl").read_text().splitlines()] == [0, 1, 7]


def test_digits_are_written_by_one_rank_for_all(pair: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, ranks = pair
    data = folder / "out/data/digits"
    assert [rank["digits"] for rank in ranks] == [[str(data / "train"), str(data / "val")]] * 2
    assert sorted(path.name for path in data.iterdir()) == ["train", "val"]


def test_jobs_that_start_at_the_same_moment_share_a_cache(tmp_path: Path) -> None:
    """Most of whose shards are evicted under their hands; what they fetch at once does not pass the limit either."""
    write(tmp_path / "whole")
    size = sum(path.stat().st_size for path in (tmp_path / "whole").glob("shard.*"))
    results = run_jobs("race", tmp_path, "a", "b")
    assert results[0] == results[2] and results[1] == results[3]
    assert all(
        sorted(flat(one) + flat(other)) == [*range(SIZE)]
        for one, other in zip(results[0]["seen"], results[1]["seen"], strict=True)
    )
    (cached,) = (tmp_path / "cache").iterdir()
    assert 0 < sum(path.stat().st_size for path in cached.glob("shard.*")) <= 4 * 1024 < size


if __name__ == "__main__":
    main(*sys.argv[1:])
