"""From a config to the parts of a run, cheapest checks first: nothing but the demo's own teacher and
data is written before everything fits together.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Optional

import torch
from timm.layers import convert_sync_batchnorm

from leap_dist.analysis.album import Album
from leap_dist.config import DEMO_TEACHER, DIGITS, HUB, RANDOM, Config, DataConfig, matching_head, members
from leap_dist.curriculum import build_curriculum
from leap_dist.curriculum.coordinator import Coordinator
from leap_dist.curriculum.ledger import Schedule, replayed_schedule
from leap_dist.data import BadSamples, build_train_loader, check_groups, check_sources, resolve
from leap_dist.data.classes import check_outputs, numbered
from leap_dist.errors import UserError
from leap_dist.evaluation import Validation
from leap_dist.learner import StudentParts
from leap_dist.matching import Objective, check_impl, check_widths
from leap_dist.models import DTYPES, StepFlops, Student, build_student, step_flops, warm_start
from leap_dist.models.placement_plan import check_pipelines
from leap_dist.monitoring import check_window
from leap_dist.runtime.average import WeightAverage
from leap_dist.runtime.checkpoint import Checkpoints, find_resume
from leap_dist.runtime.distributed import World, check_nodes, on_first
from leap_dist.runtime.engine import build_engine, micro_batch
from leap_dist.runtime.optim import build_optimizer
from leap_dist.runtime.progress import total_steps
from leap_dist.runtime.run_lock import Claim
from leap_dist.runtime.running_stats import running_stats
from leap_dist.runtime.timing import PhaseTimer
from leap_dist.teacher import TeacherSpec, build_teacher, describe_teacher
from leap_dist.teacher.record import CLASSES, read_record
from leap_dist.trainer import Parts, Trainer

BAD_SAMPLES = "bad_samples.jsonl"  # in the run folder

log = logging.getLogger(__name__)


def build_trainer(config: Config, world: World, claim: Claim) -> tuple[Config, Trainer]:
    """Check, build and, if asked to, restore. Returns the config with its embedded parts resolved to paths.

    claim: on the run's folder, held.

    Raises:
        UserError: the first thing that does not fit, in one line.
    """
    check_nodes(world)
    resume = find_resume(config, world)
    batch = micro_batch(config, world)
    if config.data.mixup:
        check_groups(config.data.mixup_group, batch)
    check_pipelines(config.teacher, ranks=world.size, local_size=world.local_size, batch=batch)
    spec = describe_teacher(config.teacher, config.data.image_size)
    _check_students(config, spec, world, batch)
    if world.is_main:
        warn_of_normalisation(config, spec)
    config = with_demo_teacher(config, world)
    students = members(config)
    flops = {name: step_flops(own) for name, own in students.items()}
    classes = max(own.teacher_classes for own in students.values())
    deepest = next(flops[name].teacher for name, own in students.items() if own.teacher_classes == classes)
    teacher = build_teacher(config.teacher, config.data.image_size, world.device, world, deepest, classes)
    data = resolve(config.data, Path(config.output), world)
    loader = build_train_loader(
        data, seed=config.seed, micro_batch=batch, accumulation=config.engine.accumulation, world=world
    )
    most_bad = int(config.data.max_bad_fraction * loader.num_samples)
    steps = total_steps(config.epochs, len(loader) // config.engine.accumulation)
    check_window(config, steps)
    schedules = {}
    for name, own in students.items():
        with _of(name):
            schedules[name] = replayed_schedule(own.curriculum.replay, spec.depth, steps, world)
    checkpoints = Checkpoints(
        config, world, loader.layout, teacher.fingerprint, claim, teacher.marks,
        contents=loader.contents, order=loader.order,
    )  # fmt: skip
    if resume is not None:
        checkpoints.needs_conversion(resume)  # what does not fit is said before the engines are built
    parts = Parts(
        teacher=teacher,
        students={
            name: build_parts(own, world, spec, schedules[name], flops[name], data, batch, fresh=resume is None)
            for name, own in students.items()
        },
        loader=loader,
        bad_samples=BadSamples(Path(config.output) / BAD_SAMPLES, most_bad, world),
        checkpoints=checkpoints,
        timer=PhaseTimer(world.device),
        album=Album(replace(config, data=data), world) if config.telemetry.pictures_every else None,
    )
    trainer = Trainer(config, world, parts)
    if resume is not None:
        trainer.restore(resume)
        log.info("continues at step %d of %d (%s)", trainer.progress.step, trainer.total_steps, resume)
    return replace(config, data=data), trainer


def build_parts(
    config: Config,
    world: World,
    spec: TeacherSpec,
    schedule: Optional[Schedule],
    flops: StepFlops,
    data: DataConfig,
    batch: int,
    fresh: bool = True,
) -> StudentParts:
    """One student's parts. data: the run's, resolved; batch: images of a micro-batch on a rank; fresh: no checkpoint is
    loaded after this.
    """
    timer = PhaseTimer(world.device)
    objective = build_objective(config, spec, fresh)
    engine = build_engine(config, objective, build_optimizer(config.optim, objective), batch)
    if config.student.compile:
        objective.compile_student()
    if config.student.ema_decay:
        objective.average = WeightAverage(objective.student.backbone, config.student.ema_decay)
    return StudentParts(
        config=config,
        engine=engine,
        coordinator=Coordinator(build_curriculum(config.curriculum, spec.depth), world, schedule, timer),
        flops=flops,
        timer=timer,
        validation=Validation(replace(config, data=data), world),
    )


@contextmanager
def _of(name: str) -> Iterator[None]:
    """What is wrong in this block is wrong with the student of that name."""
    try:
        yield
    except UserError as error:
        raise UserError(f"students.{name}: {error}" if name else str(error)) from error


def _check_students(config: Config, spec: TeacherSpec, world: World, batch: int) -> None:
    """Raise UserError where a student does not go with the teacher or the data, before anything is built."""
    students = members(config)
    for name, own in students.items():
        with _of(name):
            build_curriculum(own.curriculum, spec.depth)
            check_pair(own, spec, world.device, batch)
    for classes in sorted({own.student.num_classes for own in students.values()}):
        check_sources(config.data, world, classes)
    learns_logits = next((own for own in students.values() if own.objective.kd_alpha), None)
    if learns_logits is not None:
        check_class_order(learns_logits, world)


def build_objective(config: Config, spec: TeacherSpec, fresh: bool = True) -> Objective:
    """Student and heads, initialised from the seed alone, so that every rank and world size starts equal.

    fresh: no checkpoint is loaded after this, so the student takes `student.weights`.
    """
    torch.manual_seed(config.student_seed)
    student = build_student(config.student, config.data.image_size, spec.dim)
    if fresh:
        warm_start(student, config.student.weights)
    targets = spec.depth if config.curriculum.mode == "all_layers" else 1
    objective = Objective(student, spec.dim, spec.grid, config.objective, config.curriculum.metric, targets)
    if config.student.sync_batchnorm:
        student.backbone = convert_sync_batchnorm(student.backbone)
    return objective


def check_pair(config: Config, spec: TeacherSpec, device: torch.device, batch: int) -> None:
    """Raise UserError where teacher and student do not go together on this device, before either is loaded.

    batch: images per forward on each rank.
    """
    student: Student = build_student(config.student, config.data.image_size, spec.dim, torch.device("meta"))
    if student.recipe.map_at:
        student = build_student(config.student, config.data.image_size, spec.dim)  # which tries it on one image
    if config.curriculum.mode == "all_layers" and student.depth not in (0, spec.depth):
        raise UserError(
            f"curriculum.mode=all_layers: needs equal depths, student.model={config.student.model} has {student.depth} "
            f"blocks and teacher.model={config.teacher.model} {spec.depth}"
        )
    ends_before = config.curriculum.block not in (None, spec.depth) and config.curriculum.last_block_after is None
    if config.objective.kd_alpha and ends_before:
        raise UserError(
            f"objective.kd_alpha={config.objective.kd_alpha} with curriculum.block={config.curriculum.block}: the "
            f"teacher has logits at its last block only, which is {spec.depth}"
        )
    check_batchnorm(config, student, device)
    check_training(config, student, batch)
    check_widths(matching_head(config.objective, config.student.remedy), student.width, spec.dim)
    products, targets = DTYPES[config.engine.precision], DTYPES[config.teacher.dtype]
    check_impl(config.objective.impl, student.width, products, targets, device)
    if config.objective.cls_weight and student.cls_width != student.width:
        check_widths(matching_head(config.objective, config.student.remedy), student.cls_width, spec.dim)
        check_impl(config.objective.impl, student.cls_width, products, targets, device)
    has_cls = {"teacher": spec.has_cls}
    if config.curriculum.mode == "all_layers":
        check_layers(config, student)
        has_cls["student"] = student.has_cls  # a pooled output is there at the last layer only
    for side, has in has_cls.items():
        if config.objective.cls_weight and not has:
            model = getattr(config, side).model
            raise UserError(
                f"objective.cls_weight={config.objective.cls_weight}: {side}.model={model} has no class token at its "
                "intermediate blocks; set objective.cls_weight=0"
            )


def check_class_order(config: Config, world: World) -> None:
    """UserError if logits that the student is to learn from the teacher are not in the order of data.train's labels."""
    if not config.objective.kd_alpha or config.data.train == DIGITS:
        return
    from leap_dist.data.store import class_names  # 3 s to import

    known = config.teacher.weights not in (HUB, RANDOM, DEMO_TEACHER)
    path, record = read_record(Path(config.teacher.weights)) if known else (None, {})
    outputs = numbered(record[CLASSES], str(path)) if CLASSES in record else None
    told = check_outputs(
        class_names(config.data.train, config.data),
        outputs,
        (f"data.train={config.data.train}", f"teacher.weights={config.teacher.weights}"),
    )
    if told and world.is_main:
        log.warning("objective.kd_alpha=%s: %s", config.objective.kd_alpha, told)


def check_training(config: Config, student: Student, batch: int) -> None:
    """Raise UserError where a student cannot train on micro-batches of `batch` images a rank."""
    together = config.data.global_batch // config.engine.accumulation if config.student.sync_batchnorm else batch
    if running_stats(student) and together == 1:
        raise UserError(
            f"data.global_batch={config.data.global_batch}: one image a rank and micro-batch, and the batch "
            f"norms of student.model={config.student.model} need more"
        )
    student.check_trains(min(together, 2))


def check_batchnorm(config: Config, student: Student, device: torch.device) -> None:
    """Raise UserError where batch norms cannot be synchronised as asked for."""
    if not config.student.sync_batchnorm:
        return
    if not running_stats(student):
        raise UserError(f"student.sync_batchnorm=true: student.model={config.student.model} has no batch norm")
    if device.type == "cpu":
        raise UserError(
            "student.sync_batchnorm=true: torch synchronises batch norms on GPUs only, and this run has none"
        )


def check_layers(config: Config, student: Student) -> None:
    """Raise UserError where a student cannot give its tokens layer by layer."""
    what = f"curriculum.mode=all_layers: student.model={config.student.model}"
    if not student.depth:
        raise UserError(f"{what} is no plain vision transformer, whose layers all have one width and grid")
    if "return_prefix_tokens" not in inspect.signature(student.backbone.forward_intermediates).parameters:
        raise UserError(f"{what} cannot give every layer")


def warn_of_normalisation(config: Config, spec: TeacherSpec) -> None:
    """Say so where the images are not normalised as the teacher's weights expect, or its features are not at all."""
    if not spec.has_norm:
        log.warning(
            "%s has no final norm: its blocks' tokens are matched as they are, at a scale that changes with depth",
            config.teacher.model,
        )
    seen = (tuple(config.data.mean), tuple(config.data.std))
    if config.teacher.weights != DEMO_TEACHER and seen != (tuple(spec.mean), tuple(spec.std)):
        log.warning(
            "teacher.model=%s expects images of another normalisation; set data.mean=%s data.std=%s",
            config.teacher.model,
            _typed(spec.mean),
            _typed(spec.std),
        )


def _typed(numbers: tuple[float, ...]) -> str:
    """As on a command line, without blanks."""
    return f"[{','.join(map(str, numbers))}]"


def with_demo_teacher(config: Config, world: World) -> Config:
    """Resolve teacher.weights=demo to the cached file, trained by the first rank of this node if it is missing."""
    if config.teacher.weights != DEMO_TEACHER:
        return config
    from leap_dist.pretraining.demo import demo_cache, ensure_demo_teacher

    cache = demo_cache(Path(config.output))
    on_first(lambda: ensure_demo_teacher(cache), world)
    return replace(config, teacher=replace(config.teacher, weights=str(ensure_demo_teacher(cache))))
