"""Crops: their boxes against torchvision's, and their pixels against a full decode resized by torchvision."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torch.nn import functional as F
from torchvision.transforms import v2

from leap_dist.data.crops import RATIO, Box, decode, decode_crop, draw_box, read_box

SCALE = (0.14, 1.0)


def picture(height: int, width: int) -> Image.Image:
    """Noise with as much contrast in coarse structure as in fine, as photographs have it."""
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(1, 3, 2**k, 2**k, generator=generator) for k in range(1, 9)]
    noise = sum(F.interpolate(layer, (height, width), mode="bilinear") * 0.6**k for k, layer in enumerate(layers))
    return Image.fromarray((128 + 40 * noise[0]).clamp(0, 255).byte().permute(1, 2, 0).numpy())


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def resized(data: bytes, box: Box, size: int) -> torch.Tensor:
    """What reading all pixels gives."""
    return v2.functional.resized_crop(decode(data), *box, [size, size])


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal where torchvision resizes bytes, as we do. Without AVX2 it resizes floats: within one level."""
    bytewise = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    assert ours.shape == theirs.shape and (ours.int() - theirs.int()).abs().max() <= (0 if bytewise else 1)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (64, 64), (100, 700), (700, 100)])
def test_boxes_are_distributed_as_torchvisions(height: int, width: int) -> None:
    """Kolmogorov-Smirnov on area, ratio and position, at 1 % over all twenty; long images often get the fallback."""
    count, tests = 3000, 5 * 4
    random, image = np.random.default_rng(0), torch.empty(3, height, width)
    reference = v2.RandomResizedCrop(224, scale=SCALE, ratio=RATIO)
    torch.manual_seed(0)
    drawn = [reference.make_params([image]) for _ in range(count)]
    theirs = np.array([[params[name] for name in Box._fields] for params in drawn], dtype=float)
    ours = np.array([draw_box(random, height, width, SCALE) for _ in range(count)], dtype=float)
    for what in (
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 3] / box[:, 2],
        lambda box: box[:, 0] + box[:, 2] / 2,
        lambda box: box[:, 1] + box[:, 3] / 2,
    ):
        assert ks_2samp(what(ours), what(theirs)).pvalue > 0.01 / tests
    assert (ours[:, :2] >= 0).all() and (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()


def test_a_box_that_cannot_fit_is_the_centre_at_the_nearest_ratio() -> None:
    random = np.random.default_rng(0)
    assert draw_box(random, 30, 600, (1.0, 1.0)) == Box(0, 280, 30, 40)
    assert draw_box(random, 600, 30, (1.0, 1.0)) == Box(280, 0, 40, 30)


@pytest.mark.parametrize("size", [48, 200])
def test_small_crops_are_exactly_torchvisions(size: int) -> None:
    """Less than twice the output size: nothing to reduce, and enlarging too."""
    data, random = encoded(picture(90, 130)), np.random.default_rng(1)
    for _ in range(5):
        box = draw_box(random, 90, 130, SCALE)
        assert_same(read_box(Image.open(io.BytesIO(data)), box, size), resized(data, box, size))


@pytest.mark.parametrize(("size", "reduction"), [(150, 2), (70, 4), (50, 8), (20, 8)])
def test_large_crops_are_decoded_smaller_and_look_the_same(size: int, reduction: int) -> None:
    data, box = encoded(picture(720, 960), quality=92), Box(160, 240, 400, 480)  # on the grid of every reduction
    image = Image.open(io.BytesIO(data))
    difference = (read_box(image, box, size).float() - resized(data, box, size).float()).abs()
    assert image.size == (960 // reduction, 720 // reduction)
    assert difference.mean() < 1.5 and difference.max() < 16


def test_a_reduced_crop_is_moved_by_at_most_half_a_reduced_pixel() -> None:
    ramp = np.zeros((800, 800, 3), dtype=np.uint8)
    ramp[..., 0], ramp[..., 1] = np.linspace(0, 255, 800), np.linspace(0, 255, 800)[:, None]
    data, random = encoded(Image.fromarray(ramp), quality=100), np.random.default_rng(2)
    for _ in range(20):
        box = draw_box(random, 800, 800, (0.3, 0.9))
        moved = read_box(Image.open(io.BytesIO(data)), box, 50).float() - resized(data, box, 50).float()
        assert moved.mean((1, 2)).abs().max() < 4.5 * 255 / 800 + 1  # half of eight pixels of the ramp, and rounding


def test_other_formats_and_modes_are_read_as_ever() -> None:
    """RGB without EXIF rotation, whatever is in the file: the pixels of `decode`, which are PIL's."""
    colours, box = picture(64, 96), Box(8, 16, 48, 64)
    grey16 = Image.fromarray((np.arange(64 * 96, dtype=np.uint16) * 10).reshape(64, 96))
    rotated = colours.getexif()
    rotated[0x0112] = 6
    for data in (
        encoded(colours, "PNG"),
        encoded(colours.quantize(), "PNG"),
        encoded(colours.convert("RGBA"), "PNG"),
        encoded(colours.convert("LA"), "PNG"),
        encoded(grey16, "PNG"),
        encoded(colours, "WEBP", lossless=True),
        encoded(colours, "GIF"),
        encoded(colours.convert("L")),
        encoded(colours.convert("CMYK")),
        encoded(colours, progressive=True),
        encoded(colours, exif=rotated),
    ):
        small = read_box(Image.open(io.BytesIO(data)), box, 40)
        assert_same(small, resized(data, box, 40))
    for mode in ("L", "CMYK"):  # reduced
        data = encoded(colours.resize((384, 256)).convert(mode), quality=95)
        difference = read_box(Image.open(io.BytesIO(data)), Box(32, 64, 192, 256), 40).float()
        difference -= resized(data, Box(32, 64, 192, 256), 40).float()
        assert difference.shape == (3, 40, 40) and difference.abs().mean() < 1.5


def test_decode_gives_rgb_of_every_mode() -> None:
    for mode, kind in (("L", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("CMYK", "JPEG"), ("RGB", "WEBP")):
        pixels = decode(encoded(Image.new("RGB", (6, 4), (204, 204, 204)).convert(mode), kind))
        assert pixels.shape == (3, 4, 6) and pixels.dtype == torch.uint8
        assert (pixels.int() - 204).abs().max() <= 3, mode


@pytest.mark.parametrize("data", [b"", b"not an image", b"\xff\xd8\xff\xe0 cut"])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(OSError, match=r"cannot identify|Truncated"):
        decode(data)
    with pytest.raises(OSError, match=r"cannot identify|Truncated"):
        decode_crop(data, 8, SCALE, np.random.default_rng(0))


def test_a_truncated_image_is_refused_at_any_scale() -> None:
    data = encoded(picture(256, 256))
    for size in (24, 200):
        with pytest.raises(OSError, match="truncated"):
            decode_crop(data[: len(data) // 2], size, (1.0, 1.0), np.random.default_rng(0))
