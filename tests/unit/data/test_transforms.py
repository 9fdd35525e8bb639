"""What becomes of one sample, by augmentation, against closed forms and counted frequencies."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform

from leap_dist.config import DataConfig
from leap_dist.data.chance import seeded
from leap_dist.data.colours import Crops, recolour
from leap_dist.data.transforms import Transform, Whole, eval_transform, sample_stream, train_transform

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def config(**options: object) -> DataConfig:
    """A config whose normalisation is the identity, so that pixels can be read off the output."""
    return DataConfig(**{"train": "unused", "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), **options})


def png(image: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def ramps(height: int, width: int) -> torch.Tensor:
    """(3, H, W) uint8: red is the column, green the row."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[0] = torch.arange(width, dtype=torch.uint8)
    image[1] = torch.arange(height, dtype=torch.uint8)[:, None]
    return image


def run(transform: Transform, image: torch.Tensor, *key: int) -> torch.Tensor | Crops:
    stream = sample_stream(*key)
    return transform.finish(transform.decode(png(image), stream), stream)


def draws(transform: Transform, image: torch.Tensor, count: int) -> torch.Tensor:
    """(count, 3, S, S) float32, 0 to 255."""
    return torch.stack([run(transform, image, 0, 0, i) for i in range(count)]).float()


def test_evaluation_is_resize_centre_crop_normalise() -> None:
    image = torch.randint(0, 256, (3, 60, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    resized = F.interpolate(image[None].float(), (32, 48), mode="bilinear", antialias=True, align_corners=False)[0]
    expected = (resized[:, 2:30, 10:38] / 255 - mean[:, None, None]) / std[:, None, None]
    options = config(image_size=28, mean=tuple(mean.tolist()), std=tuple(std.tolist()), augment="none")
    for transform in (Whole(eval_transform(options)), train_transform(options, CPU), train_transform(options, CUDA)):
        out = run(transform, image, 0, 0, 0)
        torch.testing.assert_close(out, expected, rtol=0, atol=1 / 255 / 0.2)  # uint8 rounding


def test_an_evaluation_may_see_the_whole_image() -> None:
    image = ramps(24, 24)
    whole, usual = (eval_transform(config(image_size=24, crop_pct=share))(image) for share in (1.0, 0.75))
    torch.testing.assert_close(whole, image / 255, rtol=0, atol=1e-6)
    resized = F.interpolate(image[None].float(), (32, 32), mode="bilinear", antialias=True, align_corners=False)[0]
    torch.testing.assert_close(usual, resized[:, 4:28, 4:28] / 255, rtol=0, atol=1 / 255)


@pytest.mark.parametrize("augment", ["crop", "leap"])
def test_a_worker_finishes_for_a_cpu_and_leaves_the_rest_to_a_gpu(augment: str) -> None:
    """Both end in the same pixels: on a GPU the same function runs on the batch."""
    options = config(augment=augment, image_size=20, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    finished, crops = [], []
    for i in range(30):
        finished.append(run(train_transform(options, CPU), image, 3, 1, i))
        crops.append(run(train_transform(options, CUDA), image, 3, 1, i))
    assert finished[0].shape == (3, 20, 20) and finished[0].dtype == torch.uint8 and finished[0].is_contiguous()
    assert crops[0].pixels.dtype == torch.uint8
    batch = Crops(*map(torch.stack, zip(*crops, strict=True)))
    assert torch.equal(recolour(batch), torch.stack(finished).float())


def test_crops_cover_the_stated_areas_and_ratios() -> None:
    options = config(augment="crop", image_size=64, crop_scale=(0.25, 0.5))
    images = draws(train_transform(options, CPU), ramps(200, 200), 300)
    columns, rows = images[:, 0], images[:, 1]
    # A crop of w pixels shrunk or stretched to 64 spans about w - w/64 between the outermost pixel centres.
    width = (columns.amax((1, 2)) - columns.amin((1, 2))) / (1 - 1 / 64)
    height = (rows.amax((1, 2)) - rows.amin((1, 2))) / (1 - 1 / 64)
    area, ratio = width * height / 200**2, width / height
    assert area.min() > 0.23 and area.max() < 0.52 and area.max() - area.min() > 0.2
    assert ratio.min() > 0.72 and ratio.max() < 1.39 and (ratio > 1).float().mean().sub(0.5).abs() < 0.1


def test_leap_flips_left_right_half_the_time_and_never_upside_down() -> None:
    options = config(image_size=32, crop_scale=(1.0, 1.0))
    grey = draws(train_transform(options, CPU), ramps(60, 60) * 4, 200).mean(1)
    flipped = grey[:, :, :16].mean((1, 2)) > grey[:, :, 16:].mean((1, 2))
    assert 0.4 < flipped.float().mean() < 0.6
    assert (grey[:, :16].mean((1, 2)) < grey[:, 16:].mean((1, 2))).all()


def test_a_stream_depends_on_every_part_of_the_key_and_on_nothing_else() -> None:
    def draw(*key: int) -> list[float]:
        return sample_stream(*key).random(16).tolist()

    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2**40), (2**32 - 1, 0, 0)]
    values = {value for key in keys for value in draw(*key)}
    assert len(values) == 16 * len(keys)
    assert draw(3, 2, 1) == draw(3, 2, 1)
    assert torch.equal(torch.get_rng_state(), torch_state) and (np.random.get_state()[1] == numpy_state).all()


def test_deit_is_timms_recipe_with_draws_of_the_sample_alone() -> None:
    """Bit for bit what timm's transform makes of the same image, and the same whatever was drawn before.

    But for one image in 60, whose magnitude timm would cap at 10: none of these 40, and the last that is made here.
    """
    options = DataConfig(train="unused", augment="deit", image_size=24, crop_scale=(0.3, 0.9))
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    timms = create_transform(
        24, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic", re_prob=0.25,
        re_mode="pixel", color_jitter=0.3, scale=(0.3, 0.9), mean=options.mean, std=options.std,
    )  # fmt: skip
    outputs = []
    for i in range(40):
        with seeded(int(sample_stream(3, 1, i).integers(2**63))):
            expected = timms(Image.fromarray(image.permute(1, 2, 0).numpy()))
        with seeded(i):
            random_state, numpy_state = random.getstate(), np.random.get_state()[1].copy()
            torch_state = torch.get_rng_state()
            outputs.append(run(train_transform(options, CUDA if i % 2 else CPU), image, 3, 1, i))
            assert random.getstate() == random_state and (np.random.get_state()[1] == numpy_state).all()
            assert torch.equal(torch.get_rng_state(), torch_state)
        assert outputs[-1].dtype == torch.float32 and torch.equal(outputs[-1], expected)
    assert len({output.sum().item() for output in outputs}) == 40
    # What is erased is normal noise: beyond anything that white or black pixels become.
    beyond = [output.abs().amax() > 2.7 for output in outputs]
    assert 3 < sum(beyond) < 20
    assert run(train_transform(options, CPU), image, 3, 1, 374).isfinite().all()
