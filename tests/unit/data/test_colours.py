"""Colours: every operation, in every order, against torchvision's functions; and what is drawn, against its classes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, chisquare, ks_2samp
from torch._inductor import metrics
from torchvision.transforms import v2

from leap_dist.data.colours import (
    HUE,
    RANGES,
    ROUNDS,
    Crops,
    draw_colours,
    finish,
    jitter,
    normalise_,
    recolour,
    untouched,
)

OPERATIONS = (
    v2.functional.adjust_brightness,
    v2.functional.adjust_contrast,
    v2.functional.adjust_saturation,
    v2.functional.adjust_hue,
)
ORDERS = list(itertools.permutations(range(4)))


def every_colour() -> torch.Tensor:
    """(3, 64, 64) uint8: 16 levels of each channel, the greys and the pure colours among them."""
    level = torch.arange(16, dtype=torch.uint8) * 17
    return torch.stack(torch.meshgrid(level, level, level, indexing="ij")).reshape(3, 64, 64)


def pixels(images: torch.Tensor, rows: list[np.ndarray]) -> torch.Tensor:
    return recolour(Crops(images, torch.from_numpy(np.stack(rows))))


def reference(image: torch.Tensor, factors: list[float], order: tuple[int, ...], grey: bool) -> torch.Tensor:
    for index in order:
        image = OPERATIONS[index](image, factors[index])
    return v2.functional.rgb_to_grayscale(image, 3) if grey else image


def drawn_factors(seed: int) -> list[float]:
    random = np.random.default_rng(seed)
    return [random.uniform(*limits) for limits in RANGES]


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_gives_torchvisions_pixels(order: tuple[int, ...]) -> None:
    """Equal but for float rounding just below a whole number, which a later operation can stretch."""
    for seed, grey in ((0, False), (1, True), (2, False)):
        factors = drawn_factors(100 * ORDERS.index(order) + seed)
        ours = pixels(every_colour()[None], [jitter(factors, order, grey)])[0]
        difference = (ours - reference(every_colour(), factors, order, grey).float()).abs()
        assert difference.mean() < 0.1 and (difference > 1.01).float().mean() < 0.002 and difference.max() < 4


@pytest.mark.parametrize("operation", range(4))
def test_each_operation_alone_is_within_one_level(operation: int) -> None:
    for factor in (*RANGES[operation], sum(RANGES[operation]) / 2, 0.0, 0.1):
        factors = [1.0, 1.0, 1.0, 0.0]
        factors[operation] = factor
        row = jitter(factors, range(4))
        if operation != HUE:
            row[-1] = ROUNDS
        difference = (pixels(every_colour()[None], [row])[0] - OPERATIONS[operation](every_colour(), factor)).abs()
        assert difference.max() < 1.01 and difference.mean() < 0.1, factor


def test_untouched_pixels_are_normalised_exactly_as_torchvision_does() -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    ours = normalise_(recolour(Crops(every_colour()[None], torch.from_numpy(untouched())[None])), mean, std)[0]
    theirs = v2.functional.normalize(every_colour() / 255, mean, std)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 24, 24), dtype=torch.uint8, generator=generator)
    random = np.random.default_rng(0)
    rows = [draw_colours(random) for _ in images]
    whole = pixels(images, rows)
    for i in range(len(images)):
        assert torch.equal(pixels(images[i : i + 1], rows[i : i + 1])[0], whole[i])
    for some in ([3, 1], [39, 0, 17, 5, 6]):
        assert torch.equal(pixels(images[some], [rows[i] for i in some]), whole[some])


def test_crops_stay_as_they_are() -> None:
    crops = Crops(every_colour()[None], torch.from_numpy(jitter(drawn_factors(0), range(4)))[None])
    recolour(crops)
    assert torch.equal(crops.pixels[0], every_colour())


def test_factors_and_order_are_drawn_as_torchvision_draws_them() -> None:
    """Kolmogorov-Smirnov on the factors of both, chi-square on the 24 orders, a binomial test on both chances."""
    count, random = 6000, np.random.default_rng(0)
    rows = np.stack([draw_colours(random) for _ in range(count)])
    touched = rows[rows[:, -1] < ROUNDS]
    assert binomtest(len(touched), count, 0.8).pvalue > 0.01
    assert binomtest(int((rows[:, 3] == 0).sum()), count, 0.2).pvalue > 0.01
    assert binomtest(int((touched[:, 3] == 0).sum()), len(touched), 0.2).pvalue > 0.01

    torch.manual_seed(0)
    theirs = v2.ColorJitter(**dict(zip(("brightness", "contrast", "saturation", "hue"), RANGES, strict=True)))
    reference = [theirs.make_params([]) for _ in range(1500)]
    kinds = touched[:, ROUNDS : ROUNDS + 3]
    for kind, name in enumerate(("brightness", "contrast", "saturation")):
        ours = touched[:, :3][kinds == kind]
        assert ks_2samp(ours, [params[f"{name}_factor"] for params in reference]).pvalue > 0.01
    assert ks_2samp(touched[:, 2 * ROUNDS] / 6, [params["hue_factor"] for params in reference]).pvalue > 0.01

    orders = [list(row[ROUNDS : ROUNDS + 3]) for row in touched.astype(int)]
    for order, row in zip(orders, touched, strict=True):
        order.insert(int(row[-1]), HUE)
    assert chisquare([orders.count(list(order)) for order in ORDERS]).pvalue > 0.01


def test_hue_goes_all_the_way_round() -> None:
    """A shift on from 350 degrees, and back from 10, against the colour wheel."""
    wheel = [[255, 0, 0], [255, 0, 128], [128, 255, 0], [0, 0, 255]]
    image = torch.tensor(wheel, dtype=torch.uint8).T[:, :, None].contiguous()
    turned = pixels(image[None], [jitter((1, 1, 1, 1 / 12), range(4))])[0, :, :, 0].T
    expected = torch.tensor([[255, 128, 0], [255, 0, 0], [0, 255, 0], [128, 0, 255]])
    assert (turned - expected).abs().max() < 1.6
    back = pixels(image[None], [jitter((1, 1, 1, -1 / 12), range(4))])[0, :, 0, 0]
    assert (back - torch.tensor([255, 0, 128])).abs().max() < 1.6 and math.isclose(back[0], 255, abs_tol=1e-3)


def some_of_everything() -> Crops:
    """Every order, with and without grey, pure jitters of one kind, and samples that nothing is done to."""
    rows = [jitter(drawn_factors(i), order, i % 3 == 0) for i, order in enumerate(ORDERS)]
    rows += [untouched(), untouched(grey=True), jitter((1.3, 1, 1, 0), ORDERS[0]), jitter((1, 1, 0.8, 0.1), ORDERS[5])]
    images = torch.randint(
        0, 256, (len(rows), 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    images[::4, :, :8, :8] = every_colour()[:, 10:18, 20:28]
    return Crops(images, torch.from_numpy(np.stack(rows)))


def test_choosing_on_the_device_gives_the_same_pixels() -> None:
    crops, mean, std = some_of_everything(), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    torch.testing.assert_close(finish(*crops, mean, std), normalise_(recolour(crops), mean, std), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_compiled_colours_are_few_kernels_and_the_same_pixels() -> None:
    """But for rounding just below a whole number: a compiler may contract a product and a sum."""
    crops, mean, std = some_of_everything(), (0.0, 0.0, 0.0), (1 / 255,) * 3  # levels of 0 to 255 again
    torch.compiler.reset()
    metrics.reset()
    compiled = torch.compile(finish, dynamic=False, fullgraph=True)(*crops, mean, std)
    assert 0 < metrics.generated_kernel_count <= 40  # 16 with torch 2.14; the eager functions launch 200
    difference = (compiled - recolour(crops)).abs()
    assert difference.max() < 4 and (difference > 0.01).float().mean() < 0.01
