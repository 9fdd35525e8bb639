"""From image bytes to what a batch is made of, by the transform that the config names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from leap_dist.config import DataConfig
from leap_dist.data.colours import Crops, draw_colours, recolour, untouched
from leap_dist.data.crops import decode, decode_crop
from leap_dist.data.deit import Deit

FLIP = 0.5


class Transform(Protocol):
    """One sample's way from bytes to pixels, in two parts: what bad data can break, and the rest."""

    def decode(self, data: bytes, random: np.random.Generator) -> Any:
        """What `finish` takes, (3, H, W) uint8 or an image of PIL's; raises whatever PIL raises."""

    def finish(self, pixels: Any, random: np.random.Generator) -> Tensor | Crops:
        """(3, S, S): float32 and normalised, or uint8 still to be; or a crop whose colours are still to come."""


def sample_stream(seed: int, epoch: int, sample_id: int) -> np.random.Generator:
    """The random numbers of one sample in one epoch: a counter-based stream, whichever process asks for it."""
    return np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, 0, sample_id, epoch]))


def eval_transform(config: DataConfig, *, bicubic: bool = False) -> v2.Transform:
    """Shorter side to `image_size / crop_pct`, centre crop, normalise: (3, H, W) uint8 -> (3, S, S) float32.

    bicubic: how it is resized, else bilinearly; antialiased in any case.
    """
    size = config.image_size
    kernel = v2.InterpolationMode.BICUBIC if bicubic else v2.InterpolationMode.BILINEAR
    normalise = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(config.mean, config.std)]
    return v2.Compose([v2.Resize(round(size / config.crop_pct), kernel), v2.CenterCrop(size), *normalise])


@dataclass(frozen=True)
class Whole:
    """The whole image through a torchvision transform that leaves nothing to chance."""

    steps: v2.Transform

    def decode(self, data: bytes, random: np.random.Generator) -> Tensor:
        return decode(data)

    def finish(self, pixels: Tensor, random: np.random.Generator) -> Tensor:
        return self.steps(pixels)


@dataclass(frozen=True)
class Augment:
    """Random resized crop and, with `augment=leap`, flip and colours: LEAP's augmentation (arXiv 2606.19483).

    Its published recipe also lists a vertical flip of probability 0 and a Gaussian blur whose kernel is one pixel wide:
    both do nothing, so neither is here. Its area interpolation is, on shrinking, an antialiased resize; antialiased
    bilinear takes that place. Pixels stay uint8 until they are normalised, as in the published code.

    on_device: leave the colours to the device that gets the batch; normalising is left to it in any case.
    """

    config: DataConfig
    on_device: bool

    def decode(self, data: bytes, random: np.random.Generator) -> Tensor:
        return decode_crop(data, self.config.image_size, self.config.crop_scale, random)

    def finish(self, pixels: Tensor, random: np.random.Generator) -> Tensor | Crops:
        if self.config.augment == "leap":
            pixels = pixels.flip(-1) if random.random() < FLIP else pixels
            colours = draw_colours(random)
        else:
            colours = untouched()
        crop = Crops(pixels, torch.from_numpy(colours))
        if self.on_device:
            return crop
        return recolour(Crops(*(part[None] for part in crop)))[0].to(torch.uint8)


def train_transform(config: DataConfig, device: torch.device) -> Transform:
    """The augmentation named by `config.augment`. A GPU does the colours itself; for a CPU a loader worker does."""
    if config.augment == "none":
        return Whole(eval_transform(config))
    if config.augment == "deit":
        return Deit(config)
    return Augment(config, on_device=device.type == "cuda")
