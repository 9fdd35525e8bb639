"""Augmentation, against closed forms and counted frequencies."""

from __future__ import annotations

import colorsys
import io

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from leap_dist.config import DataConfig
from leap_dist.data.transforms import decode, eval_transform, seeded, train_transform


def config(**options: object) -> DataConfig:
    """A config whose normalisation is the identity, so that pixels can be read off the output."""
    return DataConfig(**{"train": "unused", "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), **options})


def ramps(height: int, width: int) -> torch.Tensor:
    """(3, H, W) uint8: red is the column, green the row."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[0] = torch.arange(width, dtype=torch.uint8)
    image[1] = torch.arange(height, dtype=torch.uint8)[:, None]
    return image


def draws(transform: object, image: torch.Tensor, count: int) -> torch.Tensor:
    out = []
    for i in range(count):
        with seeded(0, 0, i):
            out.append(transform(image))
    return torch.stack(out)


def test_decode_gives_rgb_of_every_mode() -> None:
    for mode, kind in (("L", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("CMYK", "JPEG"), ("RGB", "WEBP")):
        buffer = io.BytesIO()
        Image.new("RGB", (6, 4), (204, 204, 204)).convert(mode).save(buffer, kind)
        pixels = decode(buffer.getvalue())
        assert pixels.shape == (3, 4, 6) and pixels.dtype == torch.uint8
        assert (pixels.int() - 204).abs().max() <= 3, mode


@pytest.mark.parametrize("data", [b"", b"not an image", b"\xff\xd8\xff\xe0 cut"])
def test_decode_refuses_what_is_no_image(data: bytes) -> None:
    with pytest.raises(OSError, match=r"cannot identify|Truncated"):
        decode(data)


def test_eval_transform_is_resize_centre_crop_normalise() -> None:
    image = torch.randint(0, 256, (3, 60, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    resized = F.interpolate(image[None].float(), (32, 48), mode="bilinear", antialias=True, align_corners=False)[0]
    expected = (resized[:, 2:30, 10:38] / 255 - mean[:, None, None]) / std[:, None, None]
    options = {"image_size": 28, "mean": tuple(mean.tolist()), "std": tuple(std.tolist())}
    for transform in (eval_transform(config(**options)), train_transform(config(augment="none", **options))):
        torch.testing.assert_close(transform(image), expected, rtol=0, atol=1 / 255 / 0.2)  # uint8 rounding


@pytest.mark.parametrize("augment", ["crop", "leap"])
def test_output_shape_and_type(augment: str) -> None:
    out = train_transform(config(augment=augment, image_size=20))(ramps(50, 70))
    assert out.shape == (3, 20, 20) and out.dtype == torch.float32


def test_crops_cover_the_stated_areas_and_ratios() -> None:
    images = draws(train_transform(config(augment="crop", image_size=64, crop_scale=(0.25, 0.5))), ramps(200, 200), 300)
    columns, rows = images[:, 0] * 255, images[:, 1] * 255
    # A crop of w pixels shrunk or stretched to 64 spans about w - w/64 between the outermost pixel centres.
    width = (columns.amax((1, 2)) - columns.amin((1, 2))) / (1 - 1 / 64)
    height = (rows.amax((1, 2)) - rows.amin((1, 2))) / (1 - 1 / 64)
    area, ratio = width * height / 200**2, width / height
    assert area.min() > 0.23 and area.max() < 0.52 and area.max() - area.min() > 0.2
    assert ratio.min() > 0.72 and ratio.max() < 1.39 and (ratio > 1).float().mean().sub(0.5).abs() < 0.1


def test_leap_flips_left_right_half_the_time_and_never_upside_down() -> None:
    images = draws(train_transform(config(image_size=32, crop_scale=(1.0, 1.0))), ramps(60, 60) * 4, 200)
    grey = images.mean(1)
    flipped = grey[:, :, :16].mean((1, 2)) > grey[:, :, 16:].mean((1, 2))
    assert 0.4 < flipped.float().mean() < 0.6
    assert (grey[:, :16].mean((1, 2)) < grey[:, 16:].mean((1, 2))).all()


def test_leap_colours_have_the_stated_frequencies_and_ranges() -> None:
    flat = torch.tensor([120, 100, 80], dtype=torch.uint8)[:, None, None].expand(3, 40, 40).contiguous()
    pixels = draws(train_transform(config(image_size=8)), flat, 1000)[:, :, 4, 4] * 255
    is_grey = (pixels.amax(1) - pixels.amin(1)) < 0.5
    untouched = (pixels - torch.tensor([120.0, 100.0, 80.0])).abs().amax(1) < 0.5
    assert abs(is_grey.float().mean() - 0.2) < 0.04  # grayscale 0.2
    assert abs(untouched.float().mean() - 0.2 * 0.8) < 0.04  # jitter skipped 0.2, grayscale skipped 0.8
    luma = pixels @ torch.tensor([0.299, 0.587, 0.114])  # 103.7 before; contrast blends a flat image with its own mean
    assert 103.7 * 0.5 < luma.min() < 103.7 * 0.7 and 103.7 * 1.3 < luma.max() < 103.7 * 1.6
    hues = torch.tensor([colorsys.rgb_to_hsv(*rgb)[0] for rgb in pixels[~is_grey].tolist()])
    shift = (hues - colorsys.rgb_to_hsv(120, 100, 80)[0] + 0.5) % 1 - 0.5
    assert -0.125 < shift.min() < -0.08 and 0.08 < shift.max() < 0.125  # hue +-0.1, and rounding


def test_seeded_depends_on_every_part_of_the_key_and_restores_the_stream() -> None:
    def draw(*key: int) -> float:
        with seeded(*key):
            return torch.rand(()).item()

    before = torch.get_rng_state()
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2**40)]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert draw(3, 2, 1) == draw(3, 2, 1)
    assert torch.equal(torch.get_rng_state(), before)
