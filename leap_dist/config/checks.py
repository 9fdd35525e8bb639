"""Checks of a whole config that need no model, no data and no process group."""

from __future__ import annotations

import re
from operator import attrgetter
from pathlib import Path
from typing import Any

from leap_dist.config.options import (
    DEMO_TEACHER,
    DIGITS,
    HUB,
    NO_WEIGHTS,
    RANDOM,
    Config,
    CurriculumConfig,
    DataConfig,
    TelemetryConfig,
    is_remote,
    matching_head,
)
from leap_dist.config.paths import nameless, no_file_to_read, no_folder_to_write, short
from leap_dist.config.ranges import RANGES, complaint

SIZE = re.compile(r"\d+b?|\d+(\.\d+)? *[kmgtpezy]b")  # as streaming reads it

OWNED_BY_ENGINE = {
    "train_batch_size": "data.global_batch",
    "train_micro_batch_size_per_gpu": "data.global_batch",
    "gradient_accumulation_steps": "engine.accumulation",
    "gradient_clipping": "engine.clip",
    "optimizer": "optim.name",
    "scheduler": "optim.on_advance",
    "fp16": "engine.precision",
    "bf16": "engine.precision",
    "bfloat16": "engine.precision",  # an old name of it
    "managed_gradient_accumulation": "engine.accumulation",
    "torch_autocast": "engine.precision",
    "zero_optimization.stage": "engine.zero_stage",
    "checkpoint": "the options of checkpoint",  # a writer of its own would write on after its folder was renamed
    "datastates_ckpt": "the options of checkpoint",
    "nebula": "the options of checkpoint",
}


def problems(config: Config) -> list[str]:
    """Every impossible value or combination, one line each."""
    return _range_problems(config) or [  # combinations are those of numbers in range
        *_pixel_problems(config.data),
        *_mixing_problems(config.data),
        *_cache_problems(config.data),
        *_curriculum_problems(config.curriculum, config.epochs),
        *_matching_problems(config),
        *_label_problems(config),
        *_placement_problems(config),
        *_engine_problems(config),
        *_telemetry_problems(config.telemetry),
        *_evaluation_problems(config),
        *_path_problems(config),
    ]


def _range_problems(config: Config) -> list[str]:
    found = (complaint(key, attrgetter(key)(config), RANGES) for key in RANGES)
    return [problem for problem in found if problem is not None]


def _is_of_unit_range(data: DataConfig) -> bool:
    """Whether mean and deviation can be those of numbers between 0 and 1."""
    return all(0 <= mean <= 1 for mean in data.mean) and all(std <= 1 for std in data.std)


def _pixel_problems(data: DataConfig) -> list[str]:
    low, high = data.crop_scale
    said = f"data.mean={list(data.mean)}, data.std={list(data.std)}"
    return [
        *([] if _is_of_unit_range(data) else [f"{said}: must be of pixels from 0 to 1"]),
        *([] if low <= high else [f"data.crop_scale=[{low}, {high}]: must satisfy low <= high"]),
    ]


def _mixing_problems(data: DataConfig) -> list[str]:
    problems = []
    if data.cutmix_alpha and not data.mixup:
        problems.append(f"data.cutmix_alpha={data.cutmix_alpha}: only used with data.mixup=true")
    if data.mixup and data.mixup_group < 2:
        problems.append(
            f"data.mixup_group={data.mixup_group}: must be at least 2, or no image has another to be mixed with; "
            "data.mixup=false mixes none"
        )
    return problems


def _cache_problems(data: DataConfig) -> list[str]:
    if data.cache_limit is None:
        return []
    if data.cache is None:
        return [f"data.cache_limit={data.cache_limit}: only used with data.cache"]
    if not SIZE.fullmatch(data.cache_limit.strip().lower()):
        return [f"data.cache_limit={data.cache_limit}: expected a size in bytes, such as 500000000, 500mb or 1.5tb"]
    return []


def _curriculum_problems(curriculum: CurriculumConfig, epochs: float) -> list[str]:
    problems = []
    if curriculum.block is not None and curriculum.mode == "all_layers":
        problems.append(f"curriculum.block={curriculum.block}: only used with curriculum.mode=leap or fixed")
    if curriculum.start is not None and curriculum.mode != "leap":
        problems.append(f"curriculum.start={curriculum.start}: only used with curriculum.mode=leap")
    if curriculum.snap_to_last_at is not None and curriculum.mode != "leap":
        problems.append(f"curriculum.snap_to_last_at={curriculum.snap_to_last_at}: only used with curriculum.mode=leap")
    if curriculum.last_block_after is not None and curriculum.mode != "leap":
        problems.append(
            f"curriculum.last_block_after={curriculum.last_block_after}: only used with curriculum.mode=leap"
        )
    elif curriculum.last_block_after is not None and curriculum.last_block_after >= epochs:
        problems.append(
            f"curriculum.last_block_after={curriculum.last_block_after}: the run ends after epochs={epochs:g}"
        )
    if curriculum.replay is not None and curriculum.mode != "leap":
        problems.append(f"curriculum.replay={curriculum.replay}: only used with curriculum.mode=leap")
    return problems


def _matching_problems(config: Config) -> list[str]:
    remedy, head = config.student.remedy, matching_head(config.objective, config.student.remedy)
    problems = []
    if head == "pooled" and remedy != "none":
        problems.append(f"objective.head=pooled with student.remedy={remedy}: the widths are equal; use none or linear")
    if head != "linear" and config.curriculum.reset_head:
        problems.append(f"curriculum.reset_head=true with objective.head={head}: there is no head to reset")
    if head != "linear" and config.objective.impl != "auto":
        problems.append(f"objective.impl={config.objective.impl} with objective.head={head}: only used with linear")
    if remedy == "wide_last" and config.curriculum.mode == "all_layers":
        problems.append(
            "student.remedy=wide_last with curriculum.mode=all_layers: the blocks before the last have another width"
        )
    return problems


def _label_problems(config: Config) -> list[str]:
    objective, problems = config.objective, []
    for key, value in (("kd_alpha", objective.kd_alpha), ("label_smoothing", objective.label_smoothing)):
        if value and not config.student.num_classes:
            problems.append(f"objective.{key}={value}: needs a classifier; set student.num_classes")
    if not objective.feature_weight and not (objective.kd_alpha and config.curriculum.mode == "fixed"):
        problems.append(
            "objective.feature_weight=0: nothing would train what the curriculum scores; it may be 0 in soft "
            "distillation alone, with curriculum.mode=fixed and objective.kd_alpha above 0"
        )
    return problems


def _telemetry_problems(telemetry: TelemetryConfig) -> list[str]:
    problems = []
    if telemetry.profile_steps is not None:
        first, last = telemetry.profile_steps
        if first > last:
            problems.append(f"telemetry.profile_steps=[{first}, {last}]: must satisfy first <= last")
    if telemetry.pictures_foreground is not None and not telemetry.pictures_every:
        problems.append(
            f"telemetry.pictures_foreground={telemetry.pictures_foreground}: only used with telemetry.pictures_every"
        )
    return problems


def _evaluation_problems(config: Config) -> list[str]:
    options, found = config.evaluation, []
    if options.every_epochs and config.data.val is None:
        found.append(f"evaluation.every_epochs={options.every_epochs}: needs data.val")
    for key, asked in (("features", options.features), ("probe_lrs", options.probe_lrs)):
        if asked is not None and (not asked or len(set(asked)) < len(asked)):
            found.append(f"evaluation.{key}={asked}: at least one, and each once; null = what the protocol takes")
    return found


def _placement_problems(config: Config) -> list[str]:
    teacher, mode = config.teacher, config.curriculum.mode
    problems = []
    if (teacher.memory_budget is None) == (teacher.placement == "auto"):
        problems.append(
            f"teacher.memory_budget={teacher.memory_budget} with teacher.placement={teacher.placement}: "
            "auto needs it, the others do not use it"
        )
    if teacher.placement == "auto" and not teacher.rebalance:
        problems.append("teacher.rebalance=false with teacher.placement=auto: its budget counts on balanced stages")
    if teacher.placement in ("pipelined", "auto") and mode == "all_layers":
        problems.append(
            f"teacher.placement={teacher.placement} with curriculum.mode=all_layers: a pipeline would send the "
            "tokens of every block; use teacher.placement=sharded or replicated"
        )
    return problems


def _engine_problems(config: Config) -> list[str]:
    problems = []
    for key, ours in OWNED_BY_ENGINE.items():
        node: Any = config.engine.deepspeed
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if node is not None:
            problems.append(f"engine.deepspeed.{key}: set {ours} instead")
    zero = config.engine.deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        problems.append(f"engine.deepspeed.zero_optimization={zero}: expected options, e.g. overlap_comm")
    if config.optim.name == "lars" and config.engine.zero_stage > 0:
        problems.append(
            f"optim.name=lars with engine.zero_stage={config.engine.zero_stage}: ZeRO flattens and splits the weights, "
            "which makes LARS' per-layer trust ratios wrong; use engine.zero_stage=0 or optim.name=adamw"
        )
    if config.engine.precision == "fp16" and config.engine.zero_stage > 0:
        problems.append(
            f"engine.precision=fp16 with engine.zero_stage={config.engine.zero_stage}: DeepSpeed 0.19 clips these "
            "gradients before it takes the loss scale off them; use engine.precision=bf16 or engine.zero_stage=0"
        )
    if config.student.compile and config.engine.zero_stage == 3:
        problems.append(
            "student.compile=true with engine.zero_stage=3: DeepSpeed gathers each layer's weights by hooks, which one "
            "graph cannot hold; use engine.zero_stage=2, or student.compile=false"
        )
    if config.student.compile and config.student.sync_batchnorm:
        problems.append(
            "student.compile=true with student.sync_batchnorm=true: batch norms that ask other ranks in the forward "
            "pass fit no one graph; set one of the two to false"
        )
    if config.data.global_batch % config.engine.accumulation:
        problems.append(
            f"data.global_batch={config.data.global_batch}: must be a multiple of "
            f"engine.accumulation={config.engine.accumulation}"
        )
    return problems


def _digits_problems(data: DataConfig) -> list[str]:
    sets = {"data.train": data.train, "data.val": data.val}
    digits = [key for key, source in sets.items() if source == DIGITS]
    if data.val is None or len(digits) != 1:
        return []
    (other,) = sets.keys() - digits
    return [
        f"{digits[0]}={DIGITS} with {other}={sets[other]}: the demo's digits are no classes of that set; set "
        f"{digits[0]} too, or data.val=null"
    ]


def _several_problems(data: DataConfig) -> list[str]:
    """What is wrong with a mapping of sources to proportions."""
    if isinstance(data.train, str):
        return []
    problems = [
        f"data.train: {short(source)}: {proportion} is no proportion: a number above 0, to 1e9, is expected"
        for source, proportion in data.train.items()
        if not 1e-9 <= proportion <= 1e9
    ]
    folders = [source.rstrip("/") for source in data.train]
    twice = [name for name in dict.fromkeys(folders) if folders.count(name) > 1]
    problems += [f"data.train: {short(name)} is there twice" for name in twice]
    if DIGITS in data.train:
        problems.append(f"data.train: {DIGITS} goes alone, not with other sources")
    if data.val is not None:
        problems.append(
            "data.val: several sources in data.train have no labels in common; train on one, or set data.val=null"
        )
    return problems


def _path_problems(config: Config) -> list[str]:
    problems = []
    for key, path in (("output", config.output), ("data.cache", config.data.cache)):
        if path is not None and path.startswith("~"):
            problems.append(f"{key}={path}: write the home folder out; no shell has seen this ~")
        elif path is not None and (fault := no_folder_to_write(path)):
            problems.append(f"{key}={short(path)}: {fault}")
    problems += _several_problems(config.data)
    trained_on = [config.data.train] if isinstance(config.data.train, str) else list(config.data.train)
    for key, source in (*(("data.train", source) for source in trained_on), ("data.val", config.data.val)):
        if source is None or source == DIGITS:
            continue
        if fault := nameless(source):
            problems.append(f"{key}={short(source)}: {fault}")
        elif is_remote(source) and config.data.cache is None:
            problems.append(f"{key}={source}: a remote source needs data.cache, a local folder for its shards")
        elif not is_remote(source) and not Path(source).is_dir():
            problems.append(f"{key}={source}: no such folder (nor '{DIGITS}', nor a remote URI)")
    problems += _digits_problems(config.data)
    weights, replay, resume = config.teacher.weights, config.curriculum.replay, config.resume
    if weights not in (HUB, RANDOM, DEMO_TEACHER) and (fault := no_file_to_read(weights)):
        problems.append(f"teacher.weights={short(weights)}: {fault} (nor {HUB}, {RANDOM} or {DEMO_TEACHER})")
    start = config.student.weights
    if start not in (NO_WEIGHTS, HUB) and (nameless(start) or not Path(start).exists()):
        problems.append(f"student.weights={short(start)}: no such file (nor {NO_WEIGHTS} or {HUB})")
    if replay is not None and (fault := no_file_to_read(replay)):
        problems.append(f"curriculum.replay={short(replay)}: {fault}")
    if resume not in ("auto", "none") and (nameless(resume) or not Path(resume).is_dir()):
        problems.append(f"resume={short(resume)}: no such checkpoint folder (nor auto or none)")
    return problems
