"""From image bytes to a normalised tensor."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from leap_dist.config import DataConfig

EVAL_RESIZE = 256 / 224  # the usual evaluation crop: shorter side 256, centre 224


def decode(data: bytes) -> Tensor:
    """Decode the bytes of any image PIL reads to (3, H, W) uint8 RGB; raises whatever PIL raises where it cannot."""
    # 1.8 ms for an ImageNet JPEG against 1.2 with torchvision's decoder, which is bound to be removed (0.29 says so).
    return pil_to_tensor(Image.open(io.BytesIO(data)).convert("RGB"))


def _normalise(config: DataConfig) -> list[v2.Transform]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(config.mean, config.std)]


def eval_transform(config: DataConfig) -> v2.Transform:
    """Shorter side to 256/224 of `image_size`, centre crop, normalise: (3, H, W) uint8 -> (3, S, S) float32."""
    size = config.image_size
    return v2.Compose([v2.Resize(round(size * EVAL_RESIZE)), v2.CenterCrop(size), *_normalise(config)])


def _leap_colours() -> list[v2.Transform]:
    """Flip and colours of LEAP's augmentation.

    The published recipe also lists a vertical flip of probability 0 and a Gaussian blur whose kernel is one pixel wide:
    both do nothing, so neither is here.
    """
    jitter = v2.ColorJitter(brightness=(0.6, 1.4), contrast=(0.6, 1.4), saturation=(0.8, 1.2), hue=(-0.1, 0.1))
    return [v2.RandomHorizontalFlip(0.5), v2.RandomApply([jitter], p=0.8), v2.RandomGrayscale(0.2)]


def train_transform(config: DataConfig) -> v2.Transform:
    """The augmentation named by `config.augment` (LEAP, arXiv 2606.19483): (3, H, W) uint8 -> (3, S, S) float32.

    Pixels stay uint8 until they are normalised, as in the published code. Its area interpolation is, on shrinking,
    an antialiased resize; torchvision's antialiased bilinear takes that place.
    """
    if config.augment == "none":
        return eval_transform(config)
    crop = v2.RandomResizedCrop(config.image_size, scale=config.crop_scale, ratio=(3 / 4, 4 / 3), antialias=True)
    colours = _leap_colours() if config.augment == "leap" else []
    return v2.Compose([crop, *colours, *_normalise(config)])


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Run a block with torch's CPU generator seeded from the non-negative integers `key`, then put it back as it was.

    A sample's augmentation is thereby a function of (seed, epoch, sample id), whichever process draws it, and the
    process's own random stream is untouched. 10 us a sample; torch.random.fork_rng takes 130.
    """
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
    try:
        yield
    finally:
        generator.set_state(state)
