"""DeiT's augmentation (arXiv 2012.12877, table 9), which keeps an image's label, by timm's own transforms."""

from __future__ import annotations

import numpy as np
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor

from leap_dist.config import DataConfig
from leap_dist.data.chance import seeded
from leap_dist.data.pixels import open_rgb

# Of 10: at a full 10, which noise reaches for one image in 600, timm posterizes to 0 bits, and Pillow 13 refuses that.
MOST = 9.99


class Deit:
    """Random resized crop (bicubic), flip, RandAugment, normalise, random erasing.

    DeiT also lists colour jitter, which timm leaves out beside RandAugment, and shows every image three times in an
    epoch of a third as many (repeated augmentation), which the sample order here does not.
    """

    def __init__(self, config: DataConfig) -> None:
        mean, size = config.mean, config.image_size
        self._crop, _, self._normalise = create_transform(
            size, is_training=True, separate=True, scale=config.crop_scale, interpolation="bicubic", color_jitter=None,
            mean=mean, std=config.std, re_prob=0.25, re_mode="pixel",
        )  # fmt: skip
        # timm's create_transform gives the same but for the cap.
        parameters = {
            "translate_const": int(size * 0.45),
            "img_mean": tuple(round(255 * channel) for channel in mean),
            "interpolation": Image.Resampling.BICUBIC,
            "magnitude_max": MOST,
        }
        self._augment = rand_augment_transform("rand-m9-mstd0.5-inc1", parameters)

    def decode(self, data: bytes, random: np.random.Generator) -> Image.Image:
        """The whole image, RGB."""
        return open_rgb(data)

    def finish(self, image: Image.Image, random: np.random.Generator) -> Tensor:
        """(3, S, S) float32, normalised: what is erased becomes normal noise, which bytes could not hold."""
        with seeded(int(random.integers(2**63))):
            return self._normalise(self._augment(self._crop(image)))
