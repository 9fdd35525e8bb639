"""A step of several students in company, against one pass of their teacher and their own steps alone."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from leap_dist.benchmarking.harness import stopwatch
from leap_dist.benchmarking.steps import aim, batch_of, build_conducted, conduct, held_teacher, random_images
from leap_dist.config import Config
from leap_dist.learner import Retired
from leap_dist.runtime.distributed import World
from leap_dist.trainer import Trainer

SET_ASIDE = Retired(0, "set aside by a benchmark", None)


@dataclass(frozen=True, kw_only=True)
class Company:
    """Milliseconds, medians over rounds. together: a step of all students; teacher: its pass; alone: a step of each
    student with a pass of its own. over: median over rounds of together / (teacher + what each takes beside it) - 1.
    """

    students: int
    block: int
    together: float
    teacher: float
    alone: tuple[float, ...]
    over: float


def measure_company(config: Config, world: World, students: int, *, rounds: int, steps: int) -> Company:
    """Time a cohort of so many of the config's student, each with a seed of its own, at the last block.

    In turns in one process: the teacher alone, every student alone (the others set aside), all together.
    """
    seeds = {f"student{number}": {"student.seed": number} for number in range(students)}
    output = str(Path(config.output) / "company")
    config = replace(config, students=seeds, output=output)
    images = random_images(config, world.device)
    _, teacher = held_teacher(config, world.device)
    trainer = build_conducted(config, world, teacher, batch_of(images))
    names = list(trainer.cohort.learners)
    times: dict[str, list[float]] = defaultdict(list)

    def script() -> Iterator[None]:
        yield  # all begin
        for _ in range(rounds + 1):
            aim(trainer, teacher, teacher.spec.depth)
            times["teacher"].append(_passes(trainer, images, steps))
            for name, active in (*((name, [name]) for name in names), ("together", names)):
                _only(trainer, active)
                yield  # the step before is settled, and weights and caches are this company's
                stop = stopwatch(world.device, time.process_time)
                yield from [None] * steps
                times[name].append(stop() / steps)

    conduct(trainer, script())
    counted = {name: values[1:] for name, values in times.items()}  # the first round warmed up
    return _summed_up(counted, names, teacher.spec.depth)


def _passes(trainer: Trainer, images: Tensor, count: int) -> float:
    """Milliseconds of a pass of the teacher to its target."""
    trainer.teacher.retarget(trainer.teacher.spec.depth)
    stop = stopwatch(images.device, time.process_time)
    for _ in range(count):
        trainer.teacher.features(images)
    return stop() / count


def _only(trainer: Trainer, active: list[str]) -> None:
    """Let these students train and set the others aside."""
    for name, learner in trainer.cohort.learners.items():
        learner.retired = None if name in active else SET_ASIDE


def _summed_up(times: Mapping[str, list[float]], names: list[str], block: int) -> Company:
    rounds = zip(times["together"], times["teacher"], *(times[name] for name in names), strict=True)
    over = [together / (teacher + sum(one - teacher for one in alone)) - 1 for together, teacher, *alone in rounds]
    return Company(
        students=len(names),
        block=block,
        together=statistics.median(times["together"]),
        teacher=statistics.median(times["teacher"]),
        alone=tuple(statistics.median(times[name]) for name in names),
        over=statistics.median(over),
    )
