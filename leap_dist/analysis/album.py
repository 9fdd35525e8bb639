"""`telemetry.pictures_every`: what student and target make of the same few images, as pictures, while they train.

A look changes nothing that the run computes. The student's weights are copied, as an export copies them, into a model
of rank 0's own: so there is no second mode, no second set of ZeRO's hooks, and no batch norm that gathers statistics.
The teacher runs as in a step, on a micro-batch of the usual size, so that no compiled block or pipeline is made anew.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leap_dist.analysis.colours import TokenMap, colours
from leap_dist.analysis.sheets import Cell, contact_sheet, save_sheet
from leap_dist.config import Config
from leap_dist.data.specimens import fixed_images
from leap_dist.errors import UserError
from leap_dist.models import Student, current_state, empty_twin
from leap_dist.runtime.distributed import World
from leap_dist.runtime.engine import micro_batch
from leap_dist.teacher import Teacher

IMAGES = 4
FOLDER, LATEST = "pictures", "tokens.png"  # in the run folder
LEAST_SIDE, MOST_SIDE = 128, 256  # of an image in a picture, pixels
log = logging.getLogger(__name__)


class Sitter(NamedTuple):
    """A student to be drawn beside the teacher's 1-indexed `block`; folder: where its pictures go."""

    engine: Any
    block: int
    folder: Path


class Album:
    """Draws the students of a run, on rank 0; built and called by all ranks together.

    Args:
        config: of the run, with data.train and data.val resolved to paths.

    Raises:
        UserError: none of the images can be read.
    """

    def __init__(self, config: Config, world: World) -> None:
        self._options = config.telemetry
        self._world = world
        self._batch = micro_batch(config, world)
        self._images = fixed_images(config.data.val or config.data.train, config.data, IMAGES, world)
        mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (config.data.mean, config.data.std))
        self._photos = [as_pixels(image * std + mean) for image in self._images]
        self._twins: dict[str, Student] = {}
        self._drawn = 0
        self._told = False

    def is_due(self, steps: int) -> bool:
        """Whether pictures are to be made after so many steps of the run."""
        return steps > 0 and steps % self._options.pictures_every == 0

    def draw(self, teacher: Teacher, sitters: Mapping[str, Sitter], steps: int) -> dict[str, NDArray[np.uint8]]:
        """Draw everyone after `steps` steps and write the files: pictures (H, W, 3) on rank 0, by student. Collective.

        Nothing, if that has just been done. teacher: its target is no shallower than any sitter's block.
        """
        if steps == self._drawn:
            return {}
        self._drawn = steps
        targets = self._targets(teacher, {sitter.block for sitter in sitters.values()})
        found = {}
        for name, sitter in sitters.items():
            tokens = self._tokens(name, sitter.engine)
            if tokens is None:
                continue
            headings = ("image", f"teacher, block {sitter.block} of {teacher.spec.depth}", f"student, step {steps:,}")
            student = [TokenMap(one, self._twins[name].grid) for one in tokens]
            target = [TokenMap(one, teacher.spec.grid) for one in targets[sitter.block]]
            sheet = token_sheet(self._photos, [target, student], headings, self._options.pictures_foreground)
            self._save(sheet, sitter.folder / FOLDER, steps)
            found[name] = np.asarray(sheet)
        return found

    def _targets(self, teacher: Teacher, blocks: Iterable[int]) -> dict[int, Tensor]:
        """Block -> patch tokens (n, N, D) of the images. Collective where the teacher is."""
        wanted, parts = sorted(blocks), []
        for images in self._images.split(self._batch):
            rows = torch.arange(self._batch) % len(images)
            features = teacher.features_of(images[rows].to(self._world.device), wanted)
            parts.append({block: features[block].patch[: len(images)].float().cpu() for block in wanted})
        return {block: torch.cat([part[block] for part in parts]) for block in wanted}

    def _tokens(self, name: str, engine: Any) -> Optional[Tensor]:
        """The student's patch tokens (n, N, D) of the images, in fp32, on rank 0. Collective."""
        state = current_state(engine, self._world)
        if not self._world.is_main:
            return None
        device = self._world.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            if name not in self._twins:
                self._twins[name] = empty_twin(engine).to(device).eval()
            twin = self._twins[name]
            twin.backbone.load_state_dict(state)
            return torch.cat(
                [twin(images.to(device)).patch.float().cpu() for images in self._images.split(self._batch)]
            )

    def _save(self, sheet: Any, folder: Path, steps: int) -> None:
        """A run can do without: where a picture cannot be written, it says so once and goes on."""
        try:
            if self.is_due(steps):
                save_sheet(sheet, folder / f"tokens_step_{steps:07d}.png")
            save_sheet(sheet, folder / LATEST)
        except (UserError, OSError) as error:
            if not self._told:
                log.warning("pictures cannot be written (%s); the run goes on without", error)
            self._told = True


def token_sheet(
    photos: list[NDArray[np.uint8]],
    models: list[list[TokenMap]],
    headings: tuple[str, ...],
    foreground: Optional[float] = None,
    reference: int = 0,
) -> Any:
    """A row for each image: the photo (H, W, 3), then the tokens of each model, all in the colours of `reference`.

    models: by model the maps of all images. Returns an image of PIL's.
    """
    rows = []
    for photo, *maps in zip(photos, *models, strict=True):
        first, *rest = colours(maps[reference], maps[:reference] + maps[reference + 1 :], foreground)
        drawn = [*rest[:reference], first, *rest[reference:]]
        rows.append([Cell(photo), *(Cell(picture.numpy(), smooth=False) for picture in drawn)])
    side = min(max(LEAST_SIDE, *(max(photo.shape[:2]) for photo in photos)), MOST_SIDE)
    return contact_sheet(rows, headings, side)


def as_pixels(image: Tensor) -> NDArray[np.uint8]:
    """An image (3, H, W) in [0, 1] as (H, W, 3) uint8."""
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
