"""The recipe of a teacher that is trained on labelled shards: options, a YAML with what differs, checks.

Data and optimizer are the sections of a distillation run's config and mean the same, with `data.mixup` for images and
labels. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

from leap_dist.config import (
    HUB,
    RANDOM,
    Config,
    DataConfig,
    OptimConfig,
    StudentConfig,
    TeacherConfig,
    differences,
    merge,
    option,
    problems,
)
from leap_dist.config.paths import no_folder_to_write, short
from leap_dist.config.ranges import RECIPE_RANGES, complaint
from leap_dist.errors import UserError


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """See `leap_dist.pretraining.initial`.

    The defaults are for 12 blocks of width 96. What a block writes stays as strong if init_std shrinks as
    1 / sqrt(width); with more blocks the growths must be smaller, for the last block has the 11th power of them here.
    """

    init_std: Optional[float] = option(0.1, "standard deviation of the blocks' linear weights; null = timm's weights")
    attention_scale: float = option(0.14, "factor on the weights of attention's output in the first block")
    attention_growth: float = option(1.44, "and a further factor for each block after it")
    mlp_scale: float = option(0.7, "as attention_scale, for the output of the MLPs")
    mlp_growth: float = option(1.25, "as attention_growth, for the output of the MLPs")
    embed_std: float = option(0.5, "standard deviation of position embedding and class token")


@dataclass(frozen=True, kw_only=True)
class TeacherRecipe(InitialWeights):
    """How a teacher is trained on labelled shards."""

    init: str = option(
        RANDOM, "weights to start from: random; hub: timm's pretrained ones; or a file, as teacher.weights takes it"
    )
    init_std: Optional[float] = option(
        None,
        "standard deviation of the blocks' linear weights; the options below make them grow with depth. For 12 blocks: "
        "0.1 at a width of 96, 0.07 at 192. null = timm's weights, or those of init",
    )
    output: str = option("runs/teacher", "folder of the weights, their record and the checkpoint")
    seed: int = option(0, "initial weights, sample order, augmentation, mixing")
    epochs: int = option(100, "passes over data.train")
    model: str = option("vit_tiny_patch16_224", "timm VisionTransformer with a class token")
    kwargs: dict[str, Any] = field(default_factory=dict, metadata={"doc": "further arguments of timm.create_model"})
    classes: int = option(10, "labels are 0 to classes - 1")
    label_smoothing: float = option(0.1, "smoothing of the cross-entropy's targets")
    mix_prob: float = option(0.5, "share of the batches that are mixed, with data.mixup")
    layer_decay: float = option(
        1.0, "a block's rate is this share of the next one's; for init=hub or a file 0.65 to 0.9; 1 = one rate for all"
    )
    freeze_patch_embed: bool = option(False, "leave the patch embedding as it starts")
    ema_decay: float = option(0.999, "decay of the moving average of the weights; that average is the teacher")
    clip: float = option(1.0, "gradient-norm clip")
    precision: Literal["fp32", "bf16"] = option("fp32", "autocast dtype; weights stay fp32")
    evaluate_every: int = option(5, "epochs between two evaluations; each leaves a teacher that can be used")
    save_minutes: float = option(10.0, "minutes between two checkpoints; SIGTERM, Ctrl-C and the end save too")
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


# What may change when a training is continued, beside what may in a distillation run.
_OPERATIONAL = ("evaluate_every", "save_minutes")


def load_recipe(path: Optional[Path], overrides: list[str], check: bool = True) -> TeacherRecipe:
    """Defaults, the YAML at `path`, then ``key=value`` overrides. UserError in one line for what cannot be.

    check=False skips what depends on this moment's files, to read an earlier run's recipe.
    """
    recipe = merge(TeacherRecipe, path, overrides)
    for problem in _problems(recipe) if check else []:
        raise UserError(problem)
    return recipe


def changes(old: TeacherRecipe, new: TeacherRecipe) -> list[str]:
    """What would make the continued training another one, as ``key: old -> new``."""
    return [change for change in differences(old, new) if not change.startswith(_OPERATIONAL)]


def _problems(recipe: TeacherRecipe) -> list[str]:
    """Every impossible value or combination, one line each."""
    out_of_range = (complaint(key, getattr(recipe, key), RECIPE_RANGES) for key in RECIPE_RANGES)
    output = no_folder_to_write(recipe.output)
    return [
        *filter(None, out_of_range),
        *([f"output={short(recipe.output)}: {output}"] if output else []),
        *_init_problems(recipe),
        *(["data.val is required: held-out labelled shards"] if recipe.data.val is None else []),
        *problems(_as_run(recipe)),
    ]


def _init_problems(recipe: TeacherRecipe) -> list[str]:
    """What does not go together at the start."""
    if recipe.init == RANDOM:
        return []
    if recipe.init_std is not None:
        return [f"init_std={recipe.init_std} draws initial weights, and init={recipe.init} reads them; set one of them"]
    if recipe.init != HUB and not Path(recipe.init).is_file():
        return [f"init={recipe.init}: no such file (nor {RANDOM}, nor {HUB})"]
    return []


def _as_run(recipe: TeacherRecipe) -> Config:
    """A distillation run with the recipe's data and optimizer, whose checks are the recipe's too."""
    return Config(
        seed=recipe.seed,
        epochs=recipe.epochs,
        teacher=TeacherConfig(model=recipe.model, weights=RANDOM),
        student=StudentConfig(model=recipe.model),
        data=recipe.data,
        optim=recipe.optim,
    )
