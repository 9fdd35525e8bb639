"""The options of a run: one frozen dataclass per component, with a line of help for each field."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Optional, Union

MISSING: Any = (
    "???"  # OmegaConf's word for a value that must be given; spelt out, since reading options needs no config
)

Source = Union[str, dict[str, float]]  # a folder or URI of shards, or several with their proportions
DIGITS = "digits"  # data.train / data.val: the embedded demo set
HUB = "hub"  # teacher.weights: timm's pretrained weights
NO_WEIGHTS = "none"  # student.weights: random initialisation
RANDOM = "random"  # teacher.weights: untrained, for tests and throughput work only
DEMO_TEACHER = "demo"  # teacher.weights: the small ViT trained here on the digits


def option(default: Any, doc: str) -> Any:
    """A dataclass field that carries its own help line (shown by ``--help``)."""
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The frozen teacher."""

    model: str = option(MISSING, "timm model name, e.g. vit_giant_patch14_dinov2")
    kwargs: dict[str, Any] = field(default_factory=dict, metadata={"doc": "further arguments of timm.create_model"})
    weights: str = option(HUB, "hub | random | demo | path of a .safetensors/.pth state dict")
    placement: Literal["replicated", "sharded", "pipelined", "auto"] = option(
        "replicated",
        "replicated: a copy on every rank; sharded: split by ZeRO-3; pipelined: stages over ranks; auto: by memory",
    )
    stages: Optional[int] = option(None, "pipelined: ranks in one pipeline; null = those of a node")
    microbatches: int = option(1, "pipelined: parts in which a pipeline's images travel; must divide them")
    rebalance: bool = option(True, "pipelined: spread the blocks up to the target anew over all stages at an advance")
    memory_budget: Optional[float] = option(None, "auto: GiB of teacher weights that a rank may hold")
    prefetch: Literal[0, 1] = option(
        0, "1: the teacher works on the next batch while the student trains; an advance comes one step later"
    )
    compile: bool = option(False, "torch.compile each block; once for all of them where they are alike")
    dtype: Literal["fp32", "bf16", "fp16", "fp8"] = option(
        "fp32",
        "weights and arithmetic of the teacher; fp8: bf16, but for the linear layers of every block that `fp8_bound` "
        "allows, on GPUs that have FP8",
    )
    fp8_bound: float = option(
        0.999, "dtype=fp8: a block whose final-normed tokens have a mean cosine below this with bf16's stays in bf16"
    )


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The student backbone."""

    model: str = option(
        MISSING,
        "timm model name, e.g. vit_small_patch14_dinov2 or convnext_tiny; or package.module:function of one's own",
    )
    kwargs: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "doc": "further arguments of timm.create_model, e.g. {embed_dim: 192, num_heads: 3}; null takes one away "
            "that a base has given"
        },
    )
    weights: str = option(
        NO_WEIGHTS, "what training starts from: none | hub | path of a timm checkpoint or of an earlier run's export"
    )
    image_size: Optional[int] = option(
        None, "side of the images it sees, pixels, resized on the device from the teacher's; null = the teacher's"
    )
    reduction: Optional[int] = option(
        None, "pixels of a side that one token stands for, which picks the stage, e.g. 16; null = the deepest stage"
    )
    ema_decay: float = option(0.0, "average its weights over the steps with this decay, for a second export; 0 = off")
    compile: bool = option(
        False, "torch.compile its part of a training step, as one graph; not with engine.zero_stage=3"
    )
    sync_batchnorm: bool = option(False, "batch norms normalise by the images of all ranks; on GPUs only")
    num_classes: int = option(0, "outputs of a classifier on the kept features; 0 = none")
    seed: Optional[int] = option(
        None, "of initial weights, drop path and dropout alone, not of the data; null = the run's `seed`"
    )
    remedy: Literal["none", "lift", "wide_last"] = option(
        "none",
        "widen what the student gives to the teacher's width, for good (arXiv 2511.15572). lift: project the tokens of "
        "the last block; wide_last: make the last block itself that wide",
    )


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Feature matching (LEAP, section 3) and, with student.num_classes, labels (arXiv 2511.15572)."""

    feature: Literal["mse", "spectral"] = option(
        "mse", "error of the patch tokens: mean square, or that of the 2-D spectra over the token grid"
    )
    feature_weight: float = option(1.0, "weight of feature matching beside the labels' terms")
    kd_alpha: float = option(
        0.0,
        "share of soft distillation from the teacher's logits; the labels' cross-entropy has the rest. Only the last "
        "block has logits: until it is the target the cross-entropy has all",
    )
    kd_tau: float = option(1.0, "temperature of soft distillation")
    label_smoothing: float = option(0.0, "smoothing of the labels in the cross-entropy; DeiT: 0.1")
    head: Optional[Literal["linear", "none", "pooled"]] = option(
        None,
        "how tokens meet the teacher's. linear: a learned projection, dropped after training; none: as they are; "
        "pooled: the teacher's channels averaged to the student's width; null = linear, or none with student.remedy",
    )
    cls_weight: float = option(0.05, "weight of the MSE on the class token, through the same head; 0 = off")
    impl: Literal["auto", "reference", "gram", "triton"] = option("auto", "implementation of the feature-matching op")


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """Which teacher block is imitated, and when the next one is."""

    mode: Literal["leap", "fixed", "all_layers"] = option(
        "leap", "leap: from shallow to deep; fixed: one block for ever; all_layers: every block at once, one head each"
    )
    block: Optional[int] = option(
        None, "deepest target block, 1-indexed: where mode=leap ends, what mode=fixed imitates; null = the last"
    )
    start: Optional[int] = option(None, "mode=leap: first target block; null = calibrate on the first batch")
    threshold: float = option(0.85, "advance when the score's EMA reaches this")
    ema_alpha: float = option(1.0, "weight of the newest score in the EMA; 1 = no smoothing")
    max_epochs_per_block: int = option(
        5, "advance after this many epochs whatever the score; the one in which a block was entered counts whole"
    )
    snap_to_last_at: Optional[int] = option(None, "from this block on, jump to `block`, or the last; null = off")
    last_block_after: Optional[int] = option(
        None, "after this many epochs of the run the last block is the target, wherever the run is by then; null = off"
    )
    metric: Literal["cka", "cosine"] = option("cka", "linear CKA, or the mean cosine per token")
    reduction: Literal["exact", "mean"] = option(
        "exact", "exact: CKA of the global batch; mean: mean of per-rank CKAs (LEAP; biased upward at few tokens)"
    )
    reset_head: bool = option(False, "re-initialise the linear head at each advance")
    replay: Optional[str] = option(None, "curriculum.jsonl of another run, whose blocks to take step by step")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """MDS shards and augmentation."""

    train: Any = field(  # a `Source`: OmegaConf knows no union of text and mapping
        default=MISSING,
        metadata={
            "doc": "folder or remote URI (s3://, gs://, ...) of MDS shards, or 'digits'; or several with the "
            "proportions in which they are mixed: {/data/a: 3, /data/b: 1}"
        },
    )
    val: Optional[str] = option(None, "held-out labelled shards for kNN and linear probe; null = no evaluation")
    cache: Optional[str] = option(None, "local folder for shards of a remote URI (required with one)")
    cache_limit: Optional[str] = option(None, "evict cached shards beyond this size, e.g. 200gb; null = keep all")
    predownload: int = option(1024, "images of each rank whose shards are fetched into the cache ahead of reading")
    image_size: int = option(224, "side of the square image teacher and student see, pixels")
    global_batch: int = option(256, "images per optimizer step over all ranks and accumulation steps")
    workers: int = option(8, "loader processes per rank")
    augment: Literal["leap", "deit", "crop", "none"] = option(
        "leap",
        "leap: the published recipe; deit: DeiT's, with RandAugment and random erasing; crop: random resized crop "
        "only; none: resize and centre crop",
    )
    crop_scale: tuple[float, float] = option((0.14, 1.0), "area range of the random resized crop")
    crop_pct: float = option(0.875, "share of a side that evaluation's centre crop sees (timm's name); 0.875 = 224/256")
    mixup: bool = option(True, "blend each image with another of its group, one lambda per optimizer step")
    mixup_alpha: float = option(1.0, "mixup's lambda is drawn from Beta(this, this); 1 = uniform, as LEAP; DeiT: 0.8")
    cutmix_alpha: float = option(
        0.0, "above 0: half of the steps are CutMix, with lambda from Beta(this, this); 0 = off; DeiT: 1"
    )
    mixup_group: int = option(8, "images that are mixed among themselves; must divide the micro-batch of a rank")
    mean: tuple[float, float, float] = option((0.485, 0.456, 0.406), "normalisation mean, RGB in [0,1]")
    std: tuple[float, float, float] = option((0.229, 0.224, 0.225), "normalisation standard deviation")
    canonical_nodes: int = option(8, "parts that shards are dealt to, one node's each: it changes the order, keep it")
    validate_hash: Optional[str] = option(None, "check shards against this hash of the index, e.g. xxh64")
    max_bad_fraction: float = option(
        0.001, "share of the training samples that may be unreadable; beyond it the run stops"
    )
    timeout_s: int = option(900, "a loader worker silent for this long ends the run")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and learning rate."""

    name: Literal["adamw", "lars"] = option("adamw", "lars: LEAP's, with lr 6 and weight_decay 1e-6; ZeRO stage 0 only")
    lr: float = option(1e-3, "base learning rate")
    batch_reference: Optional[int] = option(1536, "lr is scaled by sqrt(global_batch / this); null = no scaling")
    weight_decay: float = option(0.05, "not applied to biases, norms, position embeddings and prefix tokens")
    betas: tuple[float, float] = option(
        (0.9, 0.999), "adamw: decay of the running means of gradient and squared gradient"
    )
    momentum: float = option(0.9, "lars: momentum")
    trust_coefficient: float = option(0.001, "lars: factor of each layer's trust ratio")
    warmup_epochs: float = option(10.0, "linear warm-up; never more than a tenth of the epochs")
    final_lr_fraction: float = option(0.001, "the cosine ends at this fraction of the peak")
    on_advance: Literal["keep", "restart", "envelope", "warmup", "constant"] = option(
        "keep",
        "schedule after an advance. keep: one cosine over the run; restart: from the peak; envelope: from the run's "
        "cosine at that step; warmup: a new warm-up, then cosine; constant: warm-up, then no decay",
    )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The DeepSpeed engine that trains the student."""

    zero_stage: Literal[0, 1, 2, 3] = option(0, "ZeRO stage of the student")
    precision: Literal["fp32", "bf16", "fp16"] = option("fp32", "autocast dtype of the student; weights stay fp32")
    accumulation: int = option(1, "micro-batches per optimizer step")
    silence_s: int = option(20, "a rank that gives no sign of life for this long ends the run by name; 0 = no watch")
    clip: float = option(1.0, "global gradient-norm clip; 0 = off")
    deepspeed: dict[str, Any] = field(
        default_factory=dict, metadata={"doc": "merged over the generated config, in DeepSpeed's own schema"}
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save."""

    every_epochs: int = option(1, "epochs between two saves; 0 = never")
    every_steps: int = option(
        0, "steps between two saves; 0 = never. The end of the run, SIGTERM and Ctrl-C always save"
    )
    keep: int = option(2, "newest checkpoints kept")


@dataclass(frozen=True, kw_only=True)
class TelemetryConfig:
    """TensorBoard and the terminal."""

    every: int = option(10, "steps between TensorBoard points")
    spectra_every: int = option(0, "steps between looks at the spectra of student tokens and target; 0 = never")
    pictures_every: int = option(
        0, "steps between pictures of what student and target make of four images, and one at the end; 0 = none"
    )
    pictures_foreground: Optional[float] = option(
        None, "share of the first component's range above which a token of them is foreground; null = draw all tokens"
    )
    progress: bool = option(True, "progress bar on rank 0")
    report: bool = option(True, "report.html at the end: the run as one page")
    profile_steps: Optional[tuple[int, int]] = option(
        None, "first and last step of a torch.profiler trace, e.g. [20,30]"
    )
    peak_tflops: Optional[float] = option(None, "one device's dense peak, for MFU; null = that of a GPU we know")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured at the end of the run, and between its epochs (needs data.val)."""

    protocol: Literal["swept", "leap"] = option(
        "swept",
        "what null stands for in the next options. swept: every kind of feature, the probe's best of several rates; "
        "leap: as published, class token, one rate, all images, bicubic, and the probe's best epoch beside its last",
    )
    features: Optional[list[Literal["cls", "patch", "cls_patch"]]] = field(
        default=None,
        metadata={"doc": "what kNN and probe see: class token, mean patch, both side by side; null = all, or cls"},
    )
    probe_lrs: Optional[list[float]] = field(
        default=None,
        metadata={"doc": "rates that probes try, chosen on a tenth of the training images; null = 0.01 to 1, or 0.1"},
    )
    max_train_images: Optional[int] = option(
        None, "training images used for kNN and probe; 0 = all; null = 50,000, or all"
    )
    knn_k: int = option(20, "neighbours that kNN asks")
    probe_epochs: int = option(100, "epochs of the linear probe on frozen features")
    teacher: bool = option(
        True, "kNN and probe of the teacher's last block too. Its CKA with the student is always measured"
    )
    every_epochs: int = option(0, "epochs between evaluations by kNN while training; 0 = only at the end")
    quick_images: int = option(5_000, "images of data.train, and of data.val, that these evaluations use at most")

    @property
    def interpolation(self) -> Literal["bilinear", "bicubic"]:
        """How images are resized, antialiased in any case."""
        return "bicubic" if self.protocol == "leap" else "bilinear"


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole run."""

    output: str = option("runs/leap", "run folder: TensorBoard, checkpoints, resolved config, export, summary")
    resume: str = option("none", "auto: continue the run in `output` if there is one; none; or a checkpoint's path")
    seed: int = option(0, "initialisation, sample order, augmentation, mixup")
    epochs: float = option(100.0, "passes over data.train; need not be whole")
    students: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "doc": "several students of one pass of the teacher: a name for each, and what of student, objective, "
            "curriculum, optim and seed differs from the run's, e.g. {tiny: {curriculum.threshold: 0.9}}"
        },
    )
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

    @property
    def student_seed(self) -> int:
        """Of the student's initial weights and of what it draws while it trains."""
        return self.seed if self.student.seed is None else self.student.seed

    @property
    def teacher_classes(self) -> int:
        """Classes of the logits that the teacher is to give; 0 = it gives none."""
        return self.student.num_classes if self.objective.kd_alpha else 0


def matching_head(objective: ObjectiveConfig, remedy: str) -> str:
    """`objective.head`, or what null stands for: a student with a remedy has the teacher's width already."""
    return objective.head or ("linear" if remedy == "none" else "none")


def is_remote(source: str) -> bool:
    """Whether a data source is a URI that streaming must download from."""
    return "://" in source
