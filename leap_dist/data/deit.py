"""DeiT's augmentation (arXiv 2012.12877, table 9), which keeps an image's label, by timm's own transforms."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from leap_dist.config import DataConfig
from leap_dist.data.chance import seeded


class Deit:
    """Random resized crop (bicubic), flip, RandAugment, normalise, random erasing.

    DeiT also lists colour jitter, which timm leaves out beside RandAugment, and shows every image three times in an
    epoch of a third as many (repeated augmentation), which the sample order here does not.
    """

    def __init__(self, config: DataConfig) -> None:
        self._steps = create_transform(
            config.image_size, is_training=True, scale=config.crop_scale, interpolation="bicubic",
            auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25, re_mode="pixel", mean=config.mean, std=config.std,
        )  # fmt: skip

    def decode(self, data: bytes, random: np.random.Generator) -> Image.Image:
        """The whole image, RGB."""
        return Image.open(io.BytesIO(data)).convert("RGB")

    def finish(self, image: Image.Image, random: np.random.Generator) -> Tensor:
        """(3, S, S) float32, normalised: what is erased becomes normal noise, which bytes could not hold."""
        with seeded(int(random.integers(2**63))):
            return self._steps(image)
