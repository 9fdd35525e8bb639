"""Where a teacher's blocks should live, and what that costs: arithmetic on plain numbers, without torch.

Bytes are per rank unless said otherwise; blocks up to 1-indexed `block` are active.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

from leap_dist.config import TeacherConfig
from leap_dist.errors import UserError

GIB = 2**30


def partition(costs: Sequence[float], stages: int, first: float = 0.0) -> list[int]:
    """Cut blocks into `stages` runs of neighbours whose costliest run is as cheap as can be.

    Args:
        costs: of each block, from the shallowest on. first: what the first stage does besides (the embedding).

    Returns:
        bounds, of length stages + 1: stage i has the 0-indexed blocks bounds[i] to bounds[i + 1] - 1. Where cuts are
        equally good, earlier stages take less. A stage may be empty, as some must be with fewer blocks than stages.
    """
    upto = [0.0, *accumulate(costs)]
    ends = range(len(upto))
    worst, cuts = [first + total for total in upto], []  # by number of blocks that the stages so far share
    for _ in range(1, stages):
        best = [min((max(worst[cut], upto[end] - upto[cut]), cut) for cut in range(end + 1)) for end in ends]
        worst = [cost for cost, _ in best]
        cuts.append([cut for _, cut in best])
    bounds = [len(costs)]
    for cut in reversed(cuts):
        bounds.append(cut[bounds[-1]])
    return [0, *bounds[::-1]]


def stage_sums(values: Sequence[float], bounds: Sequence[int]) -> list[float]:
    """Sum of a per-block value over each stage of `partition`'s bounds."""
    return [sum(values[low:high]) for low, high in pairwise(bounds)]


@dataclass(frozen=True)
class TeacherCosts:
    """FLOPs per image, bytes of weights, and bytes per image of what travels.

    embed: the patch embedding; stem_bytes: all that is not a block; tokens: between two blocks; pixels: one image.
    """

    embed_flops: int
    block_flops: tuple[int, ...]
    stem_bytes: int
    block_bytes: tuple[int, ...]
    token_bytes: int
    pixel_bytes: int

    def bounds(self, block: int, stages: int) -> list[int]:
        """Rebalanced stages for target `block`."""
        return partition(self.block_flops[:block], stages, first=self.embed_flops)


def resident_bytes(costs: TeacherCosts, placement: str, block: int, *, stages: int, ranks: int) -> int:
    """Most bytes of weights that any rank holds at once: with `sharded` that includes two blocks being whole."""
    active = costs.block_bytes[:block]
    if placement == "replicated":
        return costs.stem_bytes + sum(active)
    if placement == "pipelined":
        return costs.stem_bytes + int(max(stage_sums(active, costs.bounds(block, stages))))
    return costs.stem_bytes + -(-sum(active) // ranks) + 2 * max(active)


class Choice(NamedTuple):
    """A placement, and in words why."""

    placement: str
    reason: str


def choose(costs: TeacherCosts, block: int, *, budget: float, stages: int, ranks: int) -> Choice:
    """Cheapest placement whose weights fit `budget` bytes: replicated, then pipelined within a node, then sharded.

    Raises UserError if none does.
    """
    options = ["replicated", *(["pipelined"] if stages > 1 else []), *(["sharded"] if ranks > 1 else [])]
    refused = []
    for placement in options:
        needed = resident_bytes(costs, placement, block, stages=stages, ranks=ranks)
        if needed <= budget:
            why = "; ".join([*refused, f"{placement} {needed / GIB:.3g} of {budget / GIB:.3g} GiB"])
            return Choice(placement, why)
        refused.append(f"{placement} would take {needed / GIB:.3g} GiB")
    said = "; ".join(refused)
    raise UserError(f"teacher.memory_budget={budget / GIB:.3g}: too little for block {block} on {ranks} ranks: {said}")


def pipeline_size(config: TeacherConfig, local_size: int) -> int:
    """Ranks in one pipeline: `teacher.stages`, or those of a node."""
    return config.stages or local_size


def check_pipelines(config: TeacherConfig, *, ranks: int, local_size: int, batch: int) -> None:
    """Raise UserError where ranks and images do not make pipelines. batch: images per forward on each rank."""
    if config.placement not in ("pipelined", "auto"):
        return
    stages, parts = pipeline_size(config, local_size), config.microbatches
    if ranks % stages or (stages < 2 and config.placement == "pipelined"):
        raise UserError(f"teacher.stages={stages}: must be at least 2 and divide the number of ranks, {ranks}")
    if (batch * stages) % parts:
        raise UserError(
            f"teacher.microbatches={parts}: must divide the {batch * stages} images of a pipeline "
            f"({batch} per rank x {stages} stages)"
        )


# ---------------------------------------------------------------------------------------------------------------------
# What a placement costs on a cluster


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """nodes of `gpus` GPUs each; memory: GiB per GPU; inside, between: GB/s of one GPU in a node, to another node;
    tflops: peak of a GPU in the teacher's dtype; mfu: share of it that a ViT reaches.
    """

    nodes: int
    gpus: int
    memory: float
    inside: float
    between: float
    tflops: float
    mfu: float

    @property
    def ranks(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus

    def seconds(self, flops: float) -> float:
        """Of one GPU."""
        return flops / (self.tflops * 1e12 * self.mfu)


class Cost(NamedTuple):
    """One teacher pass of every rank on its own images. resident, sent: bytes held, and received or sent on, per rank;
    bubble: share of the pass in which the costliest stage waits; seconds: of the pass.
    """

    resident: int
    sent: int
    bubble: float
    seconds: float


def cost(
    costs: TeacherCosts, cluster: Cluster, placement: str, block: int, *, batch: int, stages: int, parts: int
) -> Cost:
    """Predict a placement at 1-indexed target `block`. batch: images per rank; parts: micro-batches of a pipeline.

    Compute is FLOPs over what the GPU reaches. `sharded` gathers a block while the one before it runs, over the slowest
    link of all ranks. A pipeline of P stages and m parts takes m + P - 1 turns of its costliest stage and its send,
    after the images have come to the first stage and before the tokens go back.
    """
    resident = resident_bytes(costs, placement, block, stages=stages, ranks=cluster.ranks)
    active = costs.block_flops[:block]
    if placement == "replicated":
        return Cost(resident, 0, 0.0, cluster.seconds(batch * (costs.embed_flops + sum(active))))
    if placement == "sharded":
        link = (cluster.inside if cluster.nodes == 1 else cluster.between) * 1e9
        gathers = [size * (cluster.ranks - 1) // cluster.ranks for size in costs.block_bytes[:block]]
        runs = [cluster.seconds(batch * flops) for flops in active]
        overlapped = sum(max(run, sent / link) for run, sent in zip(runs, [*gathers[1:], 0], strict=True))
        seconds = cluster.seconds(batch * costs.embed_flops) + gathers[0] / link + overlapped
        return Cost(resident, sum(gathers), 0.0, seconds)
    link = (cluster.inside if stages <= cluster.gpus else cluster.between) * 1e9
    images, turns = batch * stages, parts + stages - 1
    sums = stage_sums(active, costs.bounds(block, stages))
    turn = cluster.seconds(images / parts * max(costs.embed_flops + sums[0], *sums[1:]))
    turn += images / parts * costs.token_bytes / link
    ends = images * (costs.pixel_bytes + costs.token_bytes) / link
    return Cost(resident, images * costs.token_bytes, (stages - 1) / turns, turns * turn + ends)
