"""Supervised training of a small ViT on the embedded digits: the demo's teacher.

A teacher is worth a curriculum if its blocks do different work. The initial weights see to that (`initial.py`).
Measured on 64 validation images, final norm applied: neighbouring blocks have a linear CKA of 0.90 to 0.97 and the
first and last one of 0.03, at 97 % accuracy. With timm's own initial weights the same training gives 0.97 to 1.00, 0.18
and 57 %.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2
from tqdm import tqdm

from leap_dist.config import DIGITS, DataConfig, OptimConfig
from leap_dist.data.crops import RATIO, decode
from leap_dist.data.digits import digit_samples
from leap_dist.data.transforms import eval_transform
from leap_dist.models.records import images_of
from leap_dist.monitoring import bar_interval
from leap_dist.pretraining.initial import initialise
from leap_dist.pretraining.recipe import InitialWeights
from leap_dist.runtime.distributed import uses_gpus
from leap_dist.runtime.integrity import Damaged, check_recorded, record_of, write_recorded
from leap_dist.runtime.optim import build_optimizer, lr_factor
from leap_dist.runtime.provenance import provenance

log = logging.getLogger(__name__)

CACHE, WEIGHTS = "demo-teacher", "teacher.safetensors"


@dataclass(frozen=True, kw_only=True)
class TeacherTraining(InitialWeights):
    """What is trained, and how. A cached teacher of another recipe is not reused."""

    model: str = "vit_tiny_patch16_224"
    kwargs: dict[str, Any] = field(
        default_factory=lambda: {"patch_size": 4, "embed_dim": 96, "depth": 12, "num_heads": 3, "mlp_ratio": 2}
    )
    classes: int = 10
    image_size: int = 32
    crop_scale: tuple[float, float] = (0.65, 1.0)
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    epochs: int = 6
    batch: int = 25
    lr: float = 1e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    seed: int = 0


def train_teacher(config: TeacherTraining, out: Path) -> float:
    """Train on the digits' training split and write `out` (safetensors) and a .json of the same stem beside it.

    The file holds what timm.create_model(model, img_size=image_size, num_classes=classes, **kwargs) takes.
    Returns the accuracy of the class token on the validation split, 0 to 1. The caller's random state is kept.
    """
    device = torch.device("cuda" if uses_gpus() else "cpu")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        model = _initial_model(config).to(device)
        _fit(model, config, device)
    accuracy = _accuracy(model, config, device)
    state = {key: value.cpu() for key, value in model.state_dict().items()}
    record_of(out).unlink(missing_ok=True)  # of another recipe: what it knows must not pass for this one
    about = images_of(_data(config), config.image_size) | _about(config) | provenance()
    write_recorded(out, lambda partial: save_file(state, partial), {**about, "val_accuracy": accuracy})
    return accuracy


def demo_cache(output: Path) -> Path:
    """Folder of the demo teacher for a run in `output`: beside the run, or above it in the working directory if one is
    there already, so that a sweep takes the demo's.
    """
    here = Path.cwd()
    known = [folder / CACHE for folder in output.parents if folder.absolute().is_relative_to(here)]
    return next((folder for folder in known if (folder / WEIGHTS).is_file()), output.parent / CACHE)


def ensure_demo_teacher(cache: Path, seed: int = 0) -> Path:
    """The demo teacher's weights in the folder `cache`, trained first if they are missing or of another recipe."""
    config = TeacherTraining(seed=seed)
    weights = cache / WEIGHTS
    about = _about(config)
    if weights.is_file():
        recorded = _recorded(weights)
        if {key: recorded.get(key) for key in about} == about:
            return weights
    train_teacher(config, weights)
    return weights


def _about(config: TeacherTraining) -> dict[str, Any]:
    """What rebuilds the teacher, as of an exported student, and its recipe; as JSON gives it back."""
    about = {
        "model": config.model,
        "kwargs": _kwargs(config),
        "image_size": config.image_size,
        "mean": config.mean,
        "std": config.std,
        "recipe": dataclasses.asdict(config),
    }
    return json.loads(json.dumps(about))


def _recorded(weights: Path) -> dict[str, Any]:
    """What the record of cached weights says; nothing where the two are not what was written, which is said."""
    try:
        return check_recorded(weights)
    except Damaged as error:
        log.warning("the demo's teacher is trained anew: %s", error)
        return {}


def _kwargs(config: TeacherTraining) -> dict[str, Any]:
    """Arguments of timm.create_model."""
    return {"img_size": config.image_size, "num_classes": config.classes, "global_pool": "token", **config.kwargs}


def _initial_model(config: TeacherTraining) -> nn.Module:
    """timm's model with the recipe's initial weights."""
    model = timm.create_model(config.model, **_kwargs(config))
    initialise(model, config)
    return model


def _fit(model: nn.Module, config: TeacherTraining, device: torch.device) -> None:
    recipe = OptimConfig(lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.98))
    optimizer = build_optimizer(recipe, model)
    images, labels = _split("train")
    total = config.epochs * (len(labels) // config.batch)
    batches = _batches(images, labels, config)
    bar = {"disable": os.environ.get("RANK", "0") != "0", "mininterval": bar_interval(), "unit": "step"}
    for step, (x, y) in enumerate(tqdm(batches, "training the demo teacher", total, **bar)):
        factor = lr_factor(recipe, step=step, total_steps=total, epochs=config.epochs, advanced_at=None)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * factor
        optimizer.zero_grad()
        logits = model.head(model.forward_features(x.to(device)))
        _loss(logits, y.to(device), config.label_smoothing).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def _loss(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of the tokens' logits (B, 1+N, classes): one half for the class token, one for the mean patch."""
    cls, patches = logits[:, 0], logits[:, 1:]
    every = labels[:, None].expand(patches.shape[:2])
    token = F.cross_entropy(cls, labels, label_smoothing=smoothing)
    return (token + F.cross_entropy(patches.flatten(0, 1), every.flatten(), label_smoothing=smoothing)) / 2


def _data(config: TeacherTraining) -> DataConfig:
    return DataConfig(
        train=DIGITS,
        image_size=config.image_size,
        mean=config.mean,
        std=config.std,
    )


def _split(name: str) -> tuple[Tensor, Tensor]:
    """All images (N, 3, 8, 8) uint8 and labels (N,) of one split."""
    images, labels = zip(*((decode(data), label) for data, label in digit_samples(name)), strict=True)
    return torch.stack(images), torch.tensor(labels)


def _batches(images: Tensor, labels: Tensor, config: TeacherTraining) -> Iterator[tuple[Tensor, Tensor]]:
    """Every epoch's shuffled, augmented batches; the incomplete last one of an epoch is dropped."""
    crop = v2.RandomResizedCrop(config.image_size, scale=config.crop_scale, ratio=RATIO, antialias=True)
    normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(config.mean, config.std)])
    for _ in range(config.epochs):
        for rows in torch.randperm(len(labels)).split(config.batch):
            if len(rows) == config.batch:
                yield normalise(torch.stack([crop(image) for image in images[rows]])), labels[rows]


@torch.no_grad()
def _accuracy(model: nn.Module, config: TeacherTraining, device: torch.device) -> float:
    images, labels = _split("val")
    logits = model.eval()(eval_transform(_data(config))(images).to(device))
    return (logits.argmax(dim=1).cpu() == labels).double().mean().item()
