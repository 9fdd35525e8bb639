"""Configuration: one frozen dataclass per component, merged by OmegaConf, checked before anything is built.

Imports no torch, so a mistyped key is reported in well under a second.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from leap_dist.errors import UserError

DIGITS = "digits"  # data.train / data.val: the embedded demo set
HUB = "hub"  # teacher.weights: timm's pretrained weights
RANDOM = "random"  # teacher.weights: untrained, for tests and throughput work only
DEMO_TEACHER = "demo"  # teacher.weights: the small ViT trained here on the digits


def _option(default: Any, doc: str) -> Any:
    """A dataclass field that carries its own help line (shown by ``--help``)."""
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The frozen teacher."""

    model: str = _option(MISSING, "timm model name, e.g. vit_giant_patch14_dinov2")
    kwargs: dict[str, Any] = field(default_factory=dict, metadata={"doc": "further arguments of timm.create_model"})
    weights: str = _option(HUB, "hub | random | demo | path of a .safetensors/.pth state dict")
    placement: Literal["replicated", "sharded", "pipelined", "auto"] = _option(
        "replicated",
        "replicated: a copy on every rank; sharded: split by ZeRO-3; pipelined: stages over ranks; auto: by memory",
    )
    stages: Optional[int] = _option(None, "pipelined: ranks in one pipeline; null = those of a node")
    microbatches: int = _option(1, "pipelined: parts in which a pipeline's images travel; must divide them")
    rebalance: bool = _option(True, "pipelined: spread the blocks up to the target anew over all stages at an advance")
    memory_budget: Optional[float] = _option(None, "auto: GiB of teacher weights that a rank may hold")
    prefetch: Literal[0, 1] = _option(
        0, "1: the teacher works on the next batch while the student trains; an advance comes one step later"
    )
    compile: bool = _option(False, "torch.compile each block; once for all of them where they are alike")
    dtype: Literal["fp32", "bf16", "fp16"] = _option("fp32", "weights and arithmetic of the teacher")


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The student backbone."""

    model: str = _option(MISSING, "timm model name, e.g. vit_small_patch14_dinov2")
    kwargs: dict[str, Any] = field(
        default_factory=dict,
        metadata={"doc": "further arguments of timm.create_model, e.g. {embed_dim: 192, num_heads: 3}"},
    )


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Feature matching (LEAP, section 3)."""

    cls_weight: float = _option(0.05, "weight of the MSE on the class token, through the same head; 0 = off")
    impl: Literal["auto", "reference", "gram", "triton"] = _option("auto", "implementation of the feature-matching op")


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """Which teacher block is imitated, and when the next one is."""

    mode: Literal["leap", "fixed", "all_layers"] = _option(
        "leap", "leap: from shallow to deep; fixed: one block for ever; all_layers: every block at once, one head each"
    )
    block: Optional[int] = _option(None, "mode=fixed: the 1-indexed target block; null = the last (the baseline)")
    start: Optional[int] = _option(None, "mode=leap: first target block; null = calibrate on the first batch")
    threshold: float = _option(0.85, "advance when the score's EMA reaches this")
    ema_alpha: float = _option(1.0, "weight of the newest score in the EMA; 1 = no smoothing")
    max_epochs_per_block: int = _option(5, "advance after this many epochs whatever the score")
    snap_to_last_at: Optional[int] = _option(None, "from this block on, jump straight to the last; null = off")
    metric: Literal["cka", "cosine"] = _option("cka", "linear CKA, or the mean cosine per token")
    reduction: Literal["exact", "mean"] = _option(
        "exact", "exact: CKA of the global batch; mean: mean of per-rank CKAs (LEAP; biased upward at few tokens)"
    )
    reset_head: bool = _option(False, "re-initialise the linear head at each advance")
    replay: Optional[str] = _option(None, "curriculum.jsonl of another run, whose blocks to take step by step")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """MDS shards and augmentation."""

    train: str = _option(MISSING, "folder or remote URI (s3://, gs://, ...) of MDS shards, or 'digits'")
    val: Optional[str] = _option(None, "held-out labelled shards for kNN and linear probe; null = no evaluation")
    cache: Optional[str] = _option(None, "local folder for shards of a remote URI (required with one)")
    cache_limit: Optional[str] = _option(None, "evict cached shards beyond this size, e.g. 200gb; null = keep all")
    predownload: int = _option(1024, "images of each rank whose shards are fetched into the cache ahead of reading")
    image_size: int = _option(224, "side of the square image teacher and student see, pixels")
    global_batch: int = _option(256, "images per optimizer step over all ranks and accumulation steps")
    workers: int = _option(8, "loader processes per rank")
    augment: Literal["leap", "crop", "none"] = _option(
        "leap", "leap: the published recipe; crop: random resized crop only; none: resize and centre crop"
    )
    crop_scale: tuple[float, float] = _option((0.14, 1.0), "area range of the random resized crop")
    mixup: bool = _option(True, "blend each image with another of its group, one lambda ~ U(0,1) per optimizer step")
    mixup_group: int = _option(8, "images that are mixed among themselves; must divide the micro-batch of a rank")
    mean: tuple[float, float, float] = _option((0.485, 0.456, 0.406), "normalisation mean, RGB in [0,1]")
    std: tuple[float, float, float] = _option((0.229, 0.224, 0.225), "normalisation standard deviation")
    canonical_nodes: int = _option(8, "streaming's num_canonical_nodes: part of the sample order, keep it for a run")
    validate_hash: Optional[str] = _option(None, "check shards against this hash of the index, e.g. xxh64")
    max_bad_fraction: float = _option(0.001, "of the training samples that may be unreadable before the run stops")
    timeout_s: int = _option(300, "a loader worker silent for this long ends the run")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and learning rate."""

    name: Literal["adamw", "lars"] = _option("adamw", "lars: LEAP's settings, ZeRO stage 0 only")
    lr: float = _option(1e-3, "base learning rate")
    batch_reference: Optional[int] = _option(1536, "lr is scaled by sqrt(global_batch / this); null = no scaling")
    weight_decay: float = _option(0.05, "not applied to biases, norms, position embeddings and prefix tokens")
    betas: tuple[float, float] = _option((0.9, 0.999), "adamw")
    momentum: float = _option(0.9, "lars")
    trust_coefficient: float = _option(0.001, "lars")
    warmup_epochs: float = _option(10.0, "linear warm-up; never more than a tenth of the epochs")
    final_lr_fraction: float = _option(0.001, "the cosine ends at this fraction of the peak")
    on_advance: Literal["keep", "restart", "envelope", "warmup", "constant"] = _option(
        "keep",
        "schedule after an advance. keep: one cosine over the run; restart: from the peak; envelope: from the run's "
        "cosine at that step; warmup: a new warm-up, then cosine; constant: warm-up, then no decay",
    )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The DeepSpeed engine that trains the student."""

    zero_stage: Literal[0, 1, 2, 3] = _option(0, "ZeRO stage of the student")
    precision: Literal["fp32", "bf16", "fp16"] = _option("fp32", "autocast dtype of the student; weights stay fp32")
    accumulation: int = _option(1, "micro-batches per optimizer step")
    silence_s: int = _option(20, "a rank that gives no sign of life for this long ends the run by name; 0 = no watch")
    clip: float = _option(1.0, "global gradient-norm clip; 0 = off")
    deepspeed: dict[str, Any] = field(
        default_factory=dict, metadata={"doc": "merged over the generated config, in DeepSpeed's own schema"}
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save."""

    every_epochs: int = _option(1, "0 = never")
    every_steps: int = _option(0, "0 = never; the end of the run and SIGTERM always save")
    keep: int = _option(2, "newest checkpoints kept")


@dataclass(frozen=True, kw_only=True)
class TelemetryConfig:
    """TensorBoard and the terminal."""

    every: int = _option(10, "steps between TensorBoard points")
    spectra_every: int = _option(0, "steps between looks at the spectra of student tokens and target; 0 = never")
    progress: bool = _option(True, "progress bar on rank 0")
    profile_steps: Optional[tuple[int, int]] = _option(
        None, "first and last step of a torch.profiler trace, e.g. [20,30]"
    )
    peak_tflops: Optional[float] = _option(None, "one device's dense peak, for MFU; null = that of a GPU we know")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured at the end of the run, and between its epochs (needs data.val)."""

    knn_k: int = _option(20, "neighbours")
    probe_epochs: int = _option(100, "epochs of the linear probe on frozen features")
    probe_lr: float = _option(0.1, "SGD learning rate of the probe")
    max_train_images: Optional[int] = _option(50_000, "training images used for kNN and probe; null = all")
    teacher: bool = _option(True, "evaluate the teacher's last block too")
    every_epochs: int = _option(0, "epochs between evaluations by kNN while training; 0 = only at the end")
    quick_images: int = _option(5_000, "images of data.train and of data.val used for those, at most")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole run."""

    output: str = _option("runs/leap", "run folder: TensorBoard, checkpoints, resolved config, export, summary")
    resume: str = _option("none", "auto: continue the run in `output` if there is one; none; or a checkpoint's path")
    seed: int = _option(0, "initialisation, sample order, augmentation, mixup")
    epochs: int = _option(100, "passes over data.train")
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load(path: Optional[Path], overrides: list[str], check: bool = True) -> Config:
    """Merge defaults, the YAML at `path` and ``section.key=value`` overrides, in that order, and check the result.

    A YAML may build on another: ``base: other.yaml``, relative to itself.
    check=False skips what depends on this moment's files, to read the config of an earlier run.

    Raises:
        UserError: unknown key, wrong type, missing value or impossible combination; one line that names it.
    """
    config = OmegaConf.structured(Config)
    for source, layer in (*_yaml_layers(path), *_override_layers(overrides)):
        for key, value in _leaves(layer):
            _require_known(key, source)
            try:
                config = OmegaConf.merge(config, _nested(key, value))
            except OmegaConfBaseException:
                raise UserError(f"{key}={value!r} ({source}): expected {_expected(key)}") from None
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"{missing[0]} is required: {option_fields()[missing[0]].metadata['doc']}")
    resolved = _to_object(config)
    for problem in _problems(resolved) if check else []:
        raise UserError(problem)
    return resolved


def _to_object(config: Any) -> Config:
    try:
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise UserError(str(error).splitlines()[0]) from None


def _yaml_layers(path: Optional[Path], seen: tuple[Path, ...] = ()) -> list[tuple[str, Any]]:
    """The YAML at `path`, after the one its `base` names (relative to it), if any."""
    if path is None:
        return []
    if not path.is_file():
        raise UserError(f"--config {path}: no such file")
    if path.resolve() in seen:
        raise UserError(f"--config {path}: is its own base")
    try:
        layer = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:  # yaml has no common base for what a broken file raises
        raise UserError(f"--config {path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(layer, dict):
        raise UserError(f"--config {path}: expected a mapping of sections")
    base = layer.pop("base", None)
    base_layers = [] if base is None else _yaml_layers(path.parent / str(base), (*seen, path.resolve()))
    return [*base_layers, (str(path), layer)]


def _override_layers(overrides: list[str]) -> list[tuple[str, Any]]:
    layers = []
    for text in overrides:
        if "=" not in text:
            raise UserError(f"{text!r}: expected section.key=value")
        try:
            layers.append(("command line", OmegaConf.to_container(OmegaConf.from_dotlist([text]))))
        except Exception as error:
            raise UserError(f"{text!r}: {str(error).splitlines()[0]}") from None
    return layers


def option_fields(owner: type = Config, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Every leaf option by its dotted key."""
    found: dict[str, dataclasses.Field] = {}
    for option in dataclasses.fields(owner):
        section = option.default_factory if "doc" not in option.metadata else None
        if section is not None:
            found |= option_fields(section, f"{prefix}{option.name}.")
        else:
            found[prefix + option.name] = option
    return found


def _leaves(layer: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of a nested mapping, stopping at options that are mappings themselves."""
    known, leaves = option_fields(), []
    for name, value in layer.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in known:
            leaves += _leaves(value, f"{key}.") if value else [(key, value)]
        else:
            leaves.append((key, value))
    return leaves


def _nested(key: str, value: Any) -> dict[str, Any]:
    """``a.b``, v -> ``{a: {b: v}}``."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def _require_known(key: str, source: str) -> None:
    known = list(option_fields())
    if key in known:
        return
    sections = {name.split(".")[0] for name in known if "." in name}
    if key in sections:
        raise UserError(f"{key} ({source}): is a section; set one of its keys, e.g. {_nearest(key + '.', known)}")
    raise UserError(f"{key} ({source}): unknown key; did you mean {_nearest(key, known)}?")


def _nearest(key: str, known: list[str]) -> str:
    by_name = {name.split(".")[-1]: name for name in known}
    close = difflib.get_close_matches(key, known, 1, 0.6) or [
        by_name[name] for name in difflib.get_close_matches(key.split(".")[-1], by_name, 1, 0.6)
    ]
    return close[0] if close else difflib.get_close_matches(key, known, 1, 0.0)[0]


def _expected(key: str) -> str:
    """What a value of this option must be, in words, from its annotation."""
    words = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}
    words["tuple[int, int]"] = "two whole numbers"
    annotation = str(option_fields()[key].type)
    optional = annotation.startswith("Optional[")
    annotation = annotation.removeprefix("Optional[").removesuffix("]") if optional else annotation
    if annotation.startswith("Literal"):
        text = "one of " + annotation.removeprefix("Literal[").removesuffix("]").replace('"', "")
    else:
        text = words.get(annotation, annotation)
    return f"{text} or null" if optional else text


# ---------------------------------------------------------------------------------------------------------------------
# Checks that need no model, no data and no process group

OWNED_BY_ENGINE = {
    "train_batch_size": "data.global_batch",
    "train_micro_batch_size_per_gpu": "data.global_batch",
    "gradient_accumulation_steps": "engine.accumulation",
    "gradient_clipping": "engine.clip",
    "optimizer": "optim.name",
    "scheduler": "optim.on_advance",
    "fp16": "engine.precision",
    "bf16": "engine.precision",
    "torch_autocast": "engine.precision",
    "zero_optimization.stage": "engine.zero_stage",
}


def _problems(config: Config) -> list[str]:
    """Every impossible value or combination, one line each."""
    return [
        *_range_problems(config),
        *_curriculum_problems(config.curriculum),
        *_placement_problems(config),
        *_engine_problems(config),
        *_telemetry_problems(config.telemetry),
        *_path_problems(config),
    ]


def _range_problems(config: Config) -> list[str]:
    data, optim, evaluation = config.data, config.optim, config.evaluation
    at_least_one = {
        "epochs": config.epochs,
        "data.image_size": data.image_size,
        "data.global_batch": data.global_batch,
        "data.canonical_nodes": data.canonical_nodes,
        "data.timeout_s": data.timeout_s,
        "data.mixup_group": data.mixup_group,
        "curriculum.max_epochs_per_block": config.curriculum.max_epochs_per_block,
        "teacher.stages": 1 if config.teacher.stages is None else config.teacher.stages,
        "teacher.microbatches": config.teacher.microbatches,
        "engine.accumulation": config.engine.accumulation,
        "checkpoint.keep": config.checkpoint.keep,
        "telemetry.every": config.telemetry.every,
        "evaluation.knn_k": evaluation.knn_k,
        "evaluation.probe_epochs": evaluation.probe_epochs,
        "evaluation.quick_images": evaluation.quick_images,
        "evaluation.max_train_images": 1 if evaluation.max_train_images is None else evaluation.max_train_images,
        "optim.batch_reference": 1 if optim.batch_reference is None else optim.batch_reference,
    }
    at_least_zero = {
        "seed": config.seed,
        "data.workers": data.workers,
        "data.predownload": data.predownload,
        "objective.cls_weight": config.objective.cls_weight,
        "optim.weight_decay": optim.weight_decay,
        "optim.warmup_epochs": optim.warmup_epochs,
        "engine.clip": config.engine.clip,
        "engine.silence_s": config.engine.silence_s,
        "checkpoint.every_epochs": config.checkpoint.every_epochs,
        "checkpoint.every_steps": config.checkpoint.every_steps,
        "telemetry.spectra_every": config.telemetry.spectra_every,
        "evaluation.every_epochs": evaluation.every_epochs,
    }
    above_zero = {"optim.lr": optim.lr, "evaluation.probe_lr": evaluation.probe_lr, "data.std": min(data.std)}
    fractions = {
        "data.max_bad_fraction": data.max_bad_fraction,
        "optim.final_lr_fraction": optim.final_lr_fraction,
        "optim.momentum": optim.momentum,
    }
    low, high = data.crop_scale
    betas_hold = all(0 <= beta < 1 for beta in optim.betas)
    return [
        *(f"{key}={value}: must be at least 1" for key, value in at_least_one.items() if not value >= 1),
        *(f"{key}={value}: must not be negative" for key, value in at_least_zero.items() if not 0 <= value < math.inf),
        *(f"{key}={value}: must be above 0" for key, value in above_zero.items() if not 0 < value < math.inf),
        *(f"{key}={value}: must be between 0 and 1" for key, value in fractions.items() if not 0 <= value <= 1),
        *([] if config.seed < 2**32 else [f"seed={config.seed}: must be below 2**32"]),
        *([] if betas_hold else [f"optim.betas={list(optim.betas)}: each must be in [0, 1)"]),
        *([] if 0 < low <= high <= 1 else [f"data.crop_scale=[{low}, {high}]: must satisfy 0 < low <= high <= 1"]),
    ]


def _curriculum_problems(curriculum: CurriculumConfig) -> list[str]:
    problems = []
    if curriculum.block is not None and curriculum.mode != "fixed":
        problems.append(f"curriculum.block={curriculum.block}: only used with curriculum.mode=fixed")
    if curriculum.start is not None and curriculum.mode != "leap":
        problems.append(f"curriculum.start={curriculum.start}: only used with curriculum.mode=leap")
    if curriculum.snap_to_last_at is not None and curriculum.mode != "leap":
        problems.append(f"curriculum.snap_to_last_at={curriculum.snap_to_last_at}: only used with curriculum.mode=leap")
    if curriculum.replay is not None and curriculum.mode != "leap":
        problems.append(f"curriculum.replay={curriculum.replay}: only used with curriculum.mode=leap")
    if not 0 < curriculum.ema_alpha <= 1:
        problems.append(f"curriculum.ema_alpha={curriculum.ema_alpha}: must be in (0, 1]")
    if not math.isfinite(curriculum.threshold):
        problems.append(f"curriculum.threshold={curriculum.threshold}: must be a finite number")
    return problems


def _telemetry_problems(telemetry: TelemetryConfig) -> list[str]:
    problems = []
    if telemetry.profile_steps is not None:
        first, last = telemetry.profile_steps
        if not 0 <= first <= last:
            problems.append(f"telemetry.profile_steps=[{first}, {last}]: must satisfy 0 <= first <= last")
    if telemetry.peak_tflops is not None and not 0 < telemetry.peak_tflops < math.inf:
        problems.append(f"telemetry.peak_tflops={telemetry.peak_tflops}: must be above 0")
    return problems


def _placement_problems(config: Config) -> list[str]:
    teacher, mode = config.teacher, config.curriculum.mode
    problems = []
    if (teacher.memory_budget is None) == (teacher.placement == "auto"):
        problems.append(
            f"teacher.memory_budget={teacher.memory_budget} with teacher.placement={teacher.placement}: "
            "auto needs it, the others do not use it"
        )
    elif teacher.memory_budget is not None and not 0 < teacher.memory_budget < math.inf:
        problems.append(f"teacher.memory_budget={teacher.memory_budget}: must be above 0")
    if teacher.placement in ("pipelined", "auto") and mode == "all_layers":
        problems.append(
            f"teacher.placement={teacher.placement} with curriculum.mode=all_layers: only a pipeline's last stage "
            "gives features; use teacher.placement=sharded or replicated"
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
    if config.data.global_batch % config.engine.accumulation:
        problems.append(
            f"data.global_batch={config.data.global_batch}: must be a multiple of "
            f"engine.accumulation={config.engine.accumulation}"
        )
    return problems


def is_remote(source: str) -> bool:
    """Whether a data source is a URI that streaming must download from."""
    return "://" in source


def _path_problems(config: Config) -> list[str]:
    problems = []
    if config.evaluation.every_epochs and config.data.val is None:
        problems.append(f"evaluation.every_epochs={config.evaluation.every_epochs}: needs data.val")
    for key, source in (("data.train", config.data.train), ("data.val", config.data.val)):
        if source is None or source == DIGITS:
            continue
        if is_remote(source) and config.data.cache is None:
            problems.append(f"{key}={source}: a remote source needs data.cache, a local folder for its shards")
        if not is_remote(source) and not Path(source).is_dir():
            problems.append(f"{key}={source}: no such folder (nor '{DIGITS}', nor a remote URI)")
    if config.teacher.weights not in (HUB, RANDOM, DEMO_TEACHER) and not Path(config.teacher.weights).is_file():
        problems.append(
            f"teacher.weights={config.teacher.weights}: no such file (nor {HUB}, {RANDOM} or {DEMO_TEACHER})"
        )
    replay = config.curriculum.replay
    if replay is not None and not Path(replay).is_file():
        problems.append(f"curriculum.replay={replay}: no such file")
    if config.resume not in ("auto", "none") and not Path(config.resume).is_dir():
        problems.append(f"resume={config.resume}: no such checkpoint folder (nor auto or none)")
    return problems


# ---------------------------------------------------------------------------------------------------------------------
# Showing, saving and comparing

# What may change between the two halves of one run: where things are and how they are watched, not what is computed.
OPERATIONAL = (
    "output", "resume", "checkpoint.", "telemetry.", "evaluation.", "data.train", "data.val", "data.cache",
    "data.cache_limit", "data.predownload", "data.workers", "data.timeout_s", "data.validate_hash",
    "data.max_bad_fraction", "teacher.weights",
    "teacher.placement", "teacher.stages", "teacher.microbatches", "teacher.rebalance", "teacher.memory_budget",
    "engine.silence_s",
)  # fmt: skip


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that `load` takes back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def flat(config: Config) -> dict[str, Any]:
    """Dotted key -> value."""
    values = {}
    for key in option_fields():
        node: Any = config
        for part in key.split("."):
            node = getattr(node, part)
        values[key] = node
    return values


def differences(old: Config, new: Config) -> list[str]:
    """Keys whose change would make the continued run another run, as ``key: old -> new``."""
    before, after = flat(old), flat(new)
    return [
        f"{key}: {before[key]} -> {after[key]}"
        for key in before
        if before[key] != after[key] and not key.startswith(OPERATIONAL)
    ]


def describe() -> str:
    """All options with their defaults, by section: the body of ``--help``."""
    lines, section = [], None
    for key, option in option_fields().items():
        owner = key.rpartition(".")[0]
        if owner != section:
            section = owner
            lines.append(f"\n{section or 'run'}:")
        lines.append(f"  {key + '=' + _shown_default(option):<44} {option.metadata['doc']}")
    return "\n".join(lines)


def _shown_default(option: dataclasses.Field) -> str:
    default = option.default_factory() if option.default is dataclasses.MISSING else option.default
    if default == MISSING:
        return "(required)"
    return "null" if default is None else str(default)
