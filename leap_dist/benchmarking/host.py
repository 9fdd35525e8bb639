"""What a step costs the host, by target block: launches, values it waits for, and its own time.

The trainer's own steps on a batch as a loader hands it to a GPU: pixels whose colours are still to be changed. Models
keep their depths and lose their width, so that arithmetic costs next to nothing and what is left is the host's part.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np
import torch
from PIL import Image

from leap_dist.benchmarking.harness import stopwatch
from leap_dist.benchmarking.launches import OTHER, Counts, counted, showing_kernels
from leap_dist.benchmarking.steps import HeldTeacher, aim, build_conducted, conduct, held_teacher
from leap_dist.config import Config
from leap_dist.data import Batch
from leap_dist.data.batch import Request
from leap_dist.runtime.distributed import World
from leap_dist.runtime.timing import PHASES
from leap_dist.trainer import Trainer

# Depths, families and everything else are the config's.
NARROW = (
    "teacher.kwargs.embed_dim=48", "teacher.kwargs.num_heads=6", "student.kwargs.embed_dim=48",
    "student.kwargs.num_heads=6", "data.image_size=56", "teacher.weights=random", "data.train=digits", "data.val=null",
)  # fmt: skip
PARTS = (OTHER, *(phase for phase in PHASES if phase not in ("data", "decide", "broadcast")))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One target block. launches, reads: of a step; parts: launches by phase of the step, `PARTS`.

    host_ms: of a step, median over rounds: the process' own time, and on a GPU the step's; device_ms: within the step
    that was counted, those in which a GPU worked.
    """

    block: int
    launches: int
    reads: int
    host_ms: float
    device_ms: Optional[float]
    parts: dict[str, int]


def measure(
    config: Config,
    world: World,
    blocks: Sequence[int],
    *,
    rounds: int,
    steps: int,
    teacher: Optional[HeldTeacher] = None,
) -> list[Row]:
    """A row for each 1-indexed block. Time is taken in rounds over the blocks, so that a busy moment hits all alike.

    teacher: None: the config's.
    """
    teacher = teacher or held_teacher(config, world.device)[1]
    trainer = build_conducted(config, world, teacher, raw_batch(config))
    _as_on_a_gpu(trainer)
    timers = [trainer.timer, *(learner.timer for learner in trainer.cohort.learners.values())]
    times: dict[int, list[float]] = {block: [] for block in blocks}
    found: dict[int, Counts] = {}

    def script() -> Iterator[None]:
        for block in blocks:
            aim(trainer, teacher, block)
            yield from [None] * 2  # code is compiled, states are made
            for timer in timers:
                timer.tracing = True
            with counted(PARTS) as found[block]:
                yield
            for timer in timers:
                timer.tracing = False
        for number in range(rounds + 1):
            for block in blocks:
                aim(trainer, teacher, block)
                yield  # the first step at a block
                stop = stopwatch(world.device, time.process_time)
                yield from [None] * steps
                if number:
                    times[block].append(stop() / steps)

    with showing_kernels():
        conduct(trainer, script())
    return [row(block, found[block], times[block]) for block in blocks]


def _as_on_a_gpu(trainer: Trainer) -> None:
    """LARS goes over lists of tensors, as timm's does by itself there, and with a compiled student colours are compiled
    too, as they are wherever Triton is.
    """
    if trainer.config.student.compile:
        trainer.feed.compile()
    for learner in trainer.cohort.learners.values():
        for group in learner.engine.optimizer.param_groups:
            if "foreach" in group:
                group["foreach"] = True


def row(block: int, counts: Counts, times: Sequence[float]) -> Row:
    """What was counted of a step, and the median of its milliseconds."""
    return Row(
        block=block,
        launches=counts.launches.total(),
        reads=counts.reads.total(),
        host_ms=statistics.median(times) if times else float("nan"),
        device_ms=counts.device_ms,
        parts={part: counts.launches[part] for part in PARTS},
    )


class _Photographs:
    """Random images where a loader expects a set of them. Stands in for `ShardStore`."""

    size, source = 2**20, "random images"

    def __init__(self, side: int) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (side + 8, side + 8, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "png")
        self._data = buffer.getvalue()

    def read(self, sample_id: int) -> dict[str, object]:
        return {"image": self._data, "label": sample_id % 10}

    def fetch_ahead(self, shards: object) -> None:
        """Nothing is far away."""


def raw_batch(config: Config) -> Batch:
    """A batch of random images as a loader worker makes it for a GPU, colours still to be changed; always the same."""
    from leap_dist.data.streaming import ImageDataset  # seconds to import
    from leap_dist.data.transforms import train_transform

    transform = train_transform(config.data, torch.device("cuda"))
    dataset = ImageDataset(_Photographs(config.data.image_size), transform, seed=config.seed, substitutes=False)
    ids = np.arange(config.data.global_batch)
    return dataset.__getitems__(Request(0, ids, ids, np.empty(0, np.int64)))
