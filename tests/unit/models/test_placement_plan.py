"""Stages against every possible cut, choices against arithmetic by hand."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from leap_dist.config import TeacherConfig
from leap_dist.errors import UserError
from leap_dist.models.placement_plan import (
    GIB,
    Cluster,
    Cost,
    TeacherCosts,
    check_pipelines,
    choose,
    cost,
    partition,
    resident_bytes,
    stage_sums,
)


def costliest(costs: list[float], bounds: list[int], first: float) -> float:
    sums = stage_sums(costs, bounds)
    return max([first + sums[0], *sums[1:]])


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("count", range(1, 9))
def test_no_cut_is_better(count: int, stages: int) -> None:
    draw = random.Random(100 * count + stages)
    for first in (0, 3, 40):
        costs = [draw.randint(1, 20) for _ in range(count)]
        bounds = partition(costs, stages, first)
        assert bounds[0] == 0 and bounds[-1] == count and len(bounds) == stages + 1 and bounds == sorted(bounds)
        every = ([0, *cut, count] for cut in itertools.combinations_with_replacement(range(count + 1), stages - 1))
        assert costliest(costs, bounds, first) == min(costliest(costs, other, first) for other in every)


# Stages -> numbers of equal blocks, four per stage or more, that no cut between blocks brings to 1.15 x the mean.
UNEVEN = {2: [], 3: [13], 4: [17], 5: [21, 26], 6: [25, 26, 31], 7: [29, 30, 36], 8: [33, 34, 41]}


@pytest.mark.parametrize("stages", UNEVEN)
def test_equal_blocks_are_within_a_seventh_of_the_mean_wherever_whole_blocks_allow(stages: int) -> None:
    uneven = []
    for blocks in range(4 * stages, 65):
        sums = stage_sums([1.0] * blocks, partition([1.0] * blocks, stages))
        fewest = -(-blocks // stages)  # no cut has a costliest stage of less than the mean, rounded up
        assert max(sums) == fewest and min(sums) >= 1
        if max(sums) > 1.15 * blocks / stages:
            uneven.append(blocks)
    assert uneven == UNEVEN[stages]


def test_a_heavy_embedding_takes_the_place_of_blocks() -> None:
    assert partition([2.0] * 6, 2, first=0) == [0, 3, 6]
    assert partition([2.0] * 6, 2, first=4) == [0, 2, 6]
    assert partition([2.0] * 6, 2, first=12) == [0, 0, 6]


def costs(blocks: int = 8) -> TeacherCosts:
    return TeacherCosts(
        embed_flops=0, block_flops=(10,) * blocks, stem_bytes=GIB, block_bytes=(GIB,) * blocks,
        token_bytes=100, pixel_bytes=50,
    )  # fmt: skip


def test_resident_bytes_by_hand() -> None:
    sizes = {
        placement: resident_bytes(costs(), placement, 8, stages=2, ranks=8) / GIB
        for placement in ("replicated", "pipelined", "sharded")
    }
    assert sizes == {"replicated": 1 + 8, "pipelined": 1 + 4, "sharded": 1 + 1 + 2}


@pytest.mark.parametrize(
    ("block", "budget", "placement"),
    [(4, 5, "replicated"), (5, 5, "pipelined"), (8, 5, "pipelined"), (8, 4, "sharded"), (8, 9, "replicated")],
)
def test_choice_follows_the_budget(block: int, budget: float, placement: str) -> None:
    choice = choose(costs(), block, budget=budget * GIB, stages=2, ranks=8)
    assert choice.placement == placement
    assert ("replicated would take" in choice.reason) == (placement != "replicated")


def test_a_hopeless_budget_says_what_would_be_needed() -> None:
    with pytest.raises(
        UserError, match=r"memory_budget=3: too little for block 8 on 8 ranks: .*sharded would take 4 GiB"
    ):
        choose(costs(), 8, budget=3 * GIB, stages=2, ranks=8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stages": 3}, r"teacher.stages=3: must be at least 2 and divide the number of ranks, 8"),
        ({"stages": 1}, r"teacher.stages=1: must be at least 2"),
        ({"stages": 2, "microbatches": 3}, r"microbatches=3: must divide the 8 images .* \(4 per rank x 2 stages\)"),
        ({"microbatches": 5}, r"microbatches=5: must divide the 16 images .* \(4 per rank x 4 stages\)"),
    ],
)
def test_pipelines_that_cannot_be_built_are_one_line(options: dict[str, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_pipelines(TeacherConfig(model="m", placement="pipelined", **options), ranks=8, local_size=4, batch=4)


@pytest.mark.parametrize("options", [{}, {"stages": 2, "microbatches": 8}, {"stages": 8, "microbatches": 32}])
def test_pipelines_that_fit(options: dict[str, int]) -> None:
    check_pipelines(TeacherConfig(model="m", placement="pipelined", **options), ranks=8, local_size=4, batch=4)
    check_pipelines(TeacherConfig(model="m", microbatches=7), ranks=3, local_size=3, batch=4)


CLUSTER = Cluster(nodes=1, gpus=4, memory=8, inside=1.0, between=0.1, tflops=1e-12, mfu=0.5)  # half a FLOP a second


def predicted(placement: str, block: int, cluster: Cluster = CLUSTER, parts: int = 4) -> Cost:
    return cost(costs(), cluster, placement, block, batch=2, stages=4, parts=parts)


def test_costs_by_hand() -> None:
    seconds_of_a_block = 2 * 10 / 0.5  # batch of 2, 10 FLOPs an image
    assert predicted("replicated", 8) == Cost(9 * GIB, 0, 0.0, pytest.approx(8 * seconds_of_a_block))
    sharded = predicted("sharded", 8)
    gather = 0.75 * GIB / 1e9  # hidden behind a block but for the first
    assert sharded.seconds == pytest.approx(8 * seconds_of_a_block + gather)
    assert sharded.sent == 8 * 3 * GIB // 4
    piped = predicted("pipelined", 8)
    turn = 2 * (2 * 10 / 0.5)  # 8 images in 4 parts, 2 blocks a stage
    assert piped.seconds == pytest.approx((4 + 3) * turn, rel=1e-6)
    assert piped.bubble == pytest.approx(3 / 7)


def test_a_pipeline_with_many_parts_comes_near_the_replicated_teacher() -> None:
    assert predicted("pipelined", 8, parts=1000).seconds == pytest.approx(predicted("replicated", 8).seconds, rel=0.01)


def test_sharding_over_nodes_pays_for_the_slow_link() -> None:
    spread = replace(CLUSTER, nodes=4, inside=1e-3, between=1e-4)
    assert predicted("sharded", 8, spread).seconds > 5 * predicted("sharded", 8, replace(spread, nodes=1)).seconds
