"""Run by test_host_reads.py on every rank: steps of a run in which reading a tensor is an error."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from leap_dist.benchmarking.steps import (
    aim,
    batch_of,
    build_conducted,
    conduct,
    held_teacher,
    load_for_steps,
    random_images,
)
from leap_dist.runtime.distributed import initialise, shutdown
from leap_dist.runtime.host_copy import HostCopy
from leap_dist.teacher.lookahead import Work

SHAPE = "embed_dim: 12, num_heads: 2, patch_size: 4"
TINY = [
    f"teacher.kwargs={{{SHAPE}, depth: 3}}", f"student.kwargs={{{SHAPE}, depth: 2}}", "teacher.weights=random",
    "teacher.model=vit_tiny_patch16_224", "student.model=vit_tiny_patch16_224", "data.image_size=16",
    "telemetry.every=1",
]  # fmt: skip
READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim")
METHODS = {"tolist", "item", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__"}


class Read(AssertionError):
    """Something wanted to know a tensor's values."""


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.name.removeprefix("aten::") in READS:
            raise Read(function._schema.name)
        return function(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in METHODS and args and isinstance(args[0], Tensor):
            raise Read(function.__name__)
        return function(*args, **(kwargs or {}))


@contextmanager
def no_reads() -> Iterator[None]:
    """Every read in the body raises, of whatever tensor: on a CPU none can be told from a device's."""
    with _Methods(), _Operations():
        yield


def main(output: Path, overrides: list[str]) -> None:
    world = initialise()
    for read in (Tensor.item, Tensor.tolist, Tensor.cpu, bool, float, torch.nonzero, HostCopy.read):
        value = HostCopy(torch.ones(1)) if read is HostCopy.read else torch.ones(1)
        with suppress(Read), no_reads():
            read(value)
            raise SystemExit(f"{read} went unnoticed")
    config = load_for_steps(None, [*TINY, *overrides], batch=4, output=output)
    teacher = held_teacher(config, world.device)[1]
    trainer = build_conducted(config, world, teacher, batch_of(random_images(config, world.device)))
    step, features_of, seen = trainer.cohort.step, teacher.features_of, []

    def watched(work: Work) -> None:
        batches = list(work.micro_batches)  # mixup draws from the host's own generator
        with no_reads():
            step(work._replace(micro_batches=iter(batches)))
        seen.extend(work.blocks)

    def watched_teacher(*given: Any) -> Any:
        with no_reads():
            return features_of(*given)

    trainer.cohort.step, teacher.features_of = watched, watched_teacher

    def script() -> Iterator[None]:
        for block in (1, 1, 2, 2):
            aim(trainer, teacher, block)
            yield

    conduct(trainer, script())
    assert seen == [1, 1, 2, 2]
    print(f"rank {world.rank} of {world.size}: no reads", flush=True)
    shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
