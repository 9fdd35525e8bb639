"""What a supervised training consists of: weights, their average, optimizer, and how far they have come.

What is drawn in a step is a function of (seed, step), so a training that was killed and started again takes the steps
that it would have taken: on a CPU in fp32 the very same.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

from leap_dist.data import Batch, check_groups, draw_mix, soft_labels
from leap_dist.errors import UserError
from leap_dist.pretraining.recipe import TeacherRecipe
from leap_dist.runtime.integrity import check_recorded, record_of, write_recorded
from leap_dist.runtime.optim import build_optimizer, lr_factor, peak_lr
from leap_dist.runtime.schema import misfit

log = logging.getLogger(__name__)

LOSS_STEPS = 50  # between looks at the loss, for which the host waits for the device


@dataclass(frozen=True)
class _Saved:
    """What a checkpoint holds."""

    model: dict[str, Any]
    average: dict[str, Any]
    optimizer: dict[str, Any]
    step: int
    seconds: float
    history: list[dict[str, Any]]
    layout: str = ""
    contents: str = ""
    order: int = 1


class Session:
    """One training, in memory and in its checkpoint.

    step: optimizer steps taken; seconds: in them; loss: mean since the last look; history: a row per evaluation.

    Args:
        model: on its device. steps_per_epoch: in a pass over the shards. layout, contents, order: of the shards,
            without which `step` is no position in them; as `TrainLoader` has them. checkpoint: file to save to.
    """

    def __init__(
        self,
        recipe: TeacherRecipe,
        model: VisionTransformer,
        steps_per_epoch: int,
        layout: str,
        checkpoint: Path,
        *,
        contents: str = "",
        order: int = 1,
    ) -> None:
        self.recipe, self.model = recipe, model.train()
        self.steps_per_epoch, self.total_steps = steps_per_epoch, recipe.epochs * steps_per_epoch
        self.average = ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True)
        self.step, self.seconds, self.loss = 0, 0.0, math.nan
        self.history: list[dict[str, Any]] = []
        self._layout, self._contents, self._order = layout, contents, order
        self._checkpoint, self._saved_at = checkpoint, time.monotonic()
        self._device = next(model.parameters()).device
        self._optimizer = build_optimizer(recipe.optim, model, recipe.layer_decay)
        self._losses, self._looked_at = torch.zeros((), device=self._device), 0
        if recipe.data.mixup:
            check_groups(recipe.data.mixup_group, recipe.data.global_batch)
        if self._device.type == "cpu" and recipe.precision == "bf16":
            _unfuse_attention(model)

    def advance(self, images: Tensor, batch: Batch) -> None:
        """One optimizer step. images (B, 3, S, S): those of `batch`, normalised, on the device.

        UserError for labels that are no classes, and at a look at the loss if it is not finite.
        """
        images, targets = self._mixed(images, batch)
        self._set_lr()
        with self._autocast():
            logits = self.model.head(self.model.forward_features(images))
        loss = token_loss(logits.float(), targets, self.model.num_prefix_tokens)
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self._optimizer.step()
        self.step += 1
        self.average.update(self.model, self.step)
        self._losses += loss.detach()
        if self.step - self._looked_at >= LOSS_STEPS:
            self.look_at_loss()

    def look_at_loss(self) -> None:
        """Wait for the device and note the loss; UserError if it is not finite."""
        steps = self.step - self._looked_at
        if steps == 0:
            return
        self.loss = self._losses.item() / steps
        if not math.isfinite(self.loss):
            raise UserError(f"the loss is not finite by step {self.step}; try a lower optim.lr or clip")
        self._losses.zero_()
        self._looked_at = self.step

    def is_save_due(self) -> bool:
        """Whether `save_minutes` have passed since the last checkpoint."""
        return time.monotonic() - self._saved_at > 60 * self.recipe.save_minutes

    def save(self) -> None:
        """Replace the checkpoint by renaming; UserError instead if the loss is not finite."""
        self.look_at_loss()
        state = {
            "model": self.model.state_dict(),
            "average": self.average.module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "layout": self._layout,
            "contents": self._contents,
            "order": self._order,
        }
        about = {"step": self.step, "recipe": dataclasses.asdict(self.recipe)}
        write_recorded(self._checkpoint, lambda partial: torch.save(state, partial), about)
        self._saved_at = time.monotonic()

    def restore(self) -> None:
        """Become what was saved, if anything was; UserError if that was trained on other shards, or is damaged."""
        if not self._checkpoint.is_file():
            return
        state = self._saved_state()
        order = state.get("order", 1)  # the first did not say so
        if order != self._order:
            raise UserError(
                f"{self._checkpoint}: was saved by a version of leap_dist that takes the samples in another order "
                f"({order}, here {self._order}); go on with that version, or name another output"
            )
        layout = state.get("layout", self._layout)
        if layout != self._layout:
            raise UserError(
                f"{self._checkpoint}: data.train had {layout} and has {self._layout} now; train on those, or "
                "name another output"
            )
        if state.get("contents", self._contents) != self._contents:
            raise UserError(
                f"{self._checkpoint}: data.train has other images now; train on those, or name another output"
            )
        self.model.load_state_dict(state["model"])
        self.average.module.load_state_dict(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        self._looked_at = self.step

    def _saved_state(self) -> dict[str, Any]:
        """The content of the checkpoint, of which nothing is believed before all of it is known to be what was saved.

        Raises:
            UserError: it is not, or is no checkpoint at all.
        """
        if record_of(self._checkpoint).is_file():
            check_recorded(self._checkpoint)
        else:
            log.warning("%s has no record, as an older version wrote it: it is taken unchecked", self._checkpoint)
        try:
            state = torch.load(self._checkpoint, map_location=self._device, weights_only=True)
        except Exception as error:  # torch, pickle and zip each raise their own
            words = " ".join(str(error).split())[:200]
            raise UserError(
                f"{self._checkpoint}: cannot be read ({type(error).__name__}: {words}); put a whole copy back, or "
                "remove it to train from the start"
            ) from error
        if fault := misfit(state, _Saved):
            raise UserError(f"{self._checkpoint}: is no checkpoint of a teacher's training ({fault})")
        return state

    def _mixed(self, images: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images and soft labels (B, classes), in `mix_prob` of the steps mixed."""
        recipe = self.recipe
        targets = soft_labels(batch.labels, recipe.classes, recipe.label_smoothing, self._device, option="classes")
        seed = np.random.SeedSequence([recipe.seed, self.step]).generate_state(1).item()
        torch.manual_seed(seed)  # for drop path and dropout, of patches too
        generator = torch.Generator().manual_seed(seed)
        if not recipe.data.mixup or torch.rand((), generator=generator).item() >= recipe.mix_prob:
            return images, targets
        mix = draw_mix(recipe.data, batch.positions, generator)
        return mix.images(images), mix.labels(targets)

    def _set_lr(self) -> None:
        recipe = self.recipe
        factor = lr_factor(
            recipe.optim, step=self.step, total_steps=self.total_steps, epochs=recipe.epochs, advanced_at=None
        )
        for group in self._optimizer.param_groups:
            group["lr"] = group.get("lr_scale", 1.0) * factor * peak_lr(recipe.optim, recipe.data.global_batch)

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16")


def token_loss(logits: Tensor, targets: Tensor, prefix: int) -> Tensor:
    """Cross-entropy, one half for the class token, one for the mean patch, which kNN and probe look at.

    logits (B, P+N, classes) of all tokens, of which `prefix` = P precede the patches; targets (B, classes).
    """
    cls, patch = logits[:, 0], logits[:, prefix:].mean(1)
    return (F.cross_entropy(cls, targets) + F.cross_entropy(patch, targets)) / 2


def _unfuse_attention(model: nn.Module) -> None:
    """Let timm's attention be products and a softmax.

    torch 2.15's fused attention on a CPU takes half of a bf16 step in its backward: 75 against 133 images per
    core-second (12 blocks of width 192, 65 tokens; fp32: 54 and 57).
    """
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
