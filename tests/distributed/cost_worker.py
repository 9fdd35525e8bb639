"""Run by test_placements.py on every rank: what a pass receives and takes, against the cost model of `planning`.

cost_worker.py PLACEMENT      bytes must agree; the shares of time are printed, for a quiet machine to be read on
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from leap_dist.config import TeacherConfig
from leap_dist.models.flops import teacher_costs, teacher_flops
from leap_dist.models.placement_plan import Cluster, cost
from leap_dist.runtime.distributed import initialise, shutdown
from leap_dist.teacher import Teacher, build_teacher

SIZE, BATCH, PARTS = 64, 8, 4
SHAPE = {"embed_dim": 128, "depth": 8, "num_heads": 2}


class Received:
    """Bytes that come to this rank through a pipeline's sends and ZeRO's gathers."""

    def __init__(self) -> None:
        self.bytes = 0
        zero = deepspeed.runtime.zero.partition_parameters
        self._gather, prepare = zero._dist_allgather_fn, dist.P2POp.__init__

        def prepared(operation: Any, *arguments: Any, **options: Any) -> None:
            prepare(operation, *arguments, **options)
            self.bytes += operation.tensor.nbytes if operation.op is dist.irecv else 0

        zero._dist_allgather_fn, dist.P2POp.__init__ = self.gather, prepared

    def gather(self, part: torch.Tensor, whole: torch.Tensor, *rest: Any, **options: Any) -> Any:
        self.bytes += whole.nbytes - part.nbytes
        return self._gather(part, whole, *rest, **options)


def seconds(teacher: Teacher, images: torch.Tensor) -> float:
    times = []
    for _ in range(8):
        began = time.perf_counter()
        teacher.features(images)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def main(placement: str) -> None:
    world = initialise()
    config = TeacherConfig(
        model="vit_small_patch16_224", kwargs=SHAPE, weights="random", placement=placement, microbatches=PARTS
    )
    costs = teacher_costs(config, SIZE, teacher_flops(config, SIZE))
    cluster = Cluster(nodes=1, gpus=world.size, memory=1, inside=1e3, between=1e3, tflops=0.05, mfu=1)
    teacher, images = build_teacher(config, SIZE, world.device, world), torch.randn(BATCH, 3, SIZE, SIZE)
    measured, predicted = {}, {}
    received = Received()
    for block in (2, 4, 6, 8):
        teacher.retarget(block)
        received.bytes = 0
        teacher.features(images)
        model = cost(costs, cluster, placement, block, batch=BATCH, stages=world.size, parts=PARTS)
        if placement == "sharded" or world.rank:  # a pipeline's first stage receives images, from all ranks
            assert received.bytes == model.sent, f"block {block}: {received.bytes} bytes, predicted {model.sent}"
        measured[block], predicted[block] = seconds(teacher, images), model.seconds
    if world.is_main:
        for block in measured:
            shares = f"{measured[block] / measured[8]:.2f} of the time, {predicted[block] / predicted[8]:.2f} predicted"
            print(f"{placement} block {block} of 8: {shares}", flush=True)
    print(f"rank {world.rank}: bytes as predicted", flush=True)
    shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
