"""Encoded image -> uint8 pixels: the whole image, or a random resized crop that decodes no more than it needs."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor

from leap_dist.data.pixels import is_deep, open_image, open_rgb, rgb

RATIO = (3 / 4, 4 / 3)  # width over height of a crop
TRIES = 10
REDUCTIONS = (8, 4, 2)  # what the JPEG decoder can shrink by on its way, by leaving out high frequencies


class Box(NamedTuple):
    """A part of an image, pixels from its upper left corner."""

    top: int
    left: int
    height: int
    width: int


def decode(data: bytes) -> Tensor:
    """Decode the bytes of an image to (3, H, W) uint8 RGB. Errors as of `pixels.open_rgb`."""
    # 1.5 ms for an ImageNet JPEG against 1.1 with torchvision's decoder, which is bound to be removed (0.29 says so).
    return pil_to_tensor(open_rgb(data))


def draw_box(random: np.random.Generator, height: int, width: int, scale: tuple[float, float]) -> Box:
    """The box of a random resized crop, distributed as torchvision's: area uniform in `scale`, log ratio uniform.

    Where ten draws do not fit into the image, its centre, cut to the nearest admissible ratio.
    """
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    for _ in range(TRIES):
        area = height * width * random.uniform(*scale)
        ratio = math.exp(random.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(random.integers(height - h + 1)), int(random.integers(width - w + 1)), h, w)
    h, w = min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def decode_crop(data: bytes, size: int, scale: tuple[float, float], random: np.random.Generator) -> Tensor:
    """A random resized crop of an encoded image as (3, size, size) uint8 RGB. Errors as of `pixels.open_rgb`.

    The box is drawn from the header. A JPEG whose crop is at least twice `size` both ways is decoded at 1/2, 1/4 or
    1/8, never below `size`.
    """
    image = open_image(data)
    return read_box(image, draw_box(random, image.height, image.width, scale), size)


def read_box(image: Image.Image, box: Box, size: int) -> Tensor:
    """`box` of an image that is open but not yet decoded, resized (antialiased bilinear): (3, size, size) uint8 RGB.

    The image is closed.
    At a reduced scale the box's edges move to the nearest pixels of that scale.
    """
    reduction = _reduce(image, min(box.height, box.width) // size)
    top, left = round(box.top / reduction), round(box.left / reduction)
    bottom, right = round((box.top + box.height) / reduction), round((box.left + box.width) / reduction)
    image = rgb(image) if is_deep(image) else image
    crop = image.crop((left, top, right, bottom))
    image.close()  # of a large one every copy counts
    crop = crop if crop.mode == "RGB" else rgb(crop)
    height, width, raw = crop.height, crop.width, crop.tobytes("raw", "RGBX")
    del crop
    # As PIL keeps them, four bytes a pixel: packing three takes longer than resizing one more. Seen as (1, 4, h, w)
    # they are torch's channels-last, whose uint8 resize takes 0.17 ms; PIL's takes 0.52.
    pixels = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    del raw
    planes = pixels.view(1, height, width, 4).permute(0, 3, 1, 2)
    return F.interpolate(planes, (size, size), mode="bilinear", antialias=True)[0, :3]


def _reduce(image: Image.Image, most: int) -> int:
    """Have a JPEG decoded at 1/2, 1/4 or 1/8, but not below 1/`most`; what it shrinks by, 1 for other formats."""
    for reduction in REDUCTIONS:
        if reduction <= most:
            width = image.width
            drafted = image.draft(None, (width // reduction, image.height // reduction))
            return 1 if drafted is None else round(width / drafted[1][2])
    return 1
