"""mIoU against a count pixel by pixel, sliding windows against the whole, at the mask's own resolution."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from leap_dist.evaluation.segmentation import IGNORED, confusion, miou, segment, windows


@pytest.mark.parametrize("seed", range(4))
def test_miou_is_that_of_sets_of_pixels(seed: int) -> None:
    """Six classes of which some are empty, ignored pixels, a whole set in two images."""
    random = np.random.default_rng(seed)
    truth = random.choice([0, 1, 3, 5, IGNORED], (2, 9, 7))
    predicted = random.choice([0, 1, 2, 5], (2, 9, 7))
    matrix = sum(confusion(torch.tensor(p), torch.tensor(t), 6) for p, t in zip(predicted, truth, strict=True))
    pixels = [index for index in np.ndindex(truth.shape) if truth[index] != IGNORED]
    shares = []
    for label in range(6):
        ours = {index for index in pixels if predicted[index] == label}
        theirs = {index for index in pixels if truth[index] == label}
        if ours | theirs:
            shares.append(len(ours & theirs) / len(ours | theirs))
    assert len(shares) == 5  # class 4 is in neither
    assert miou(matrix) == pytest.approx(sum(shares) / 5, abs=1e-6)
    assert matrix.sum() == len(pixels)


def test_miou_by_hand() -> None:
    """Class 0: 1 of 2 pixels, class 1: 2 of 3."""
    matrix = confusion(torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 0, 1, 1]]), 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 2, 0], [0, 0, 0]] and miou(matrix) == pytest.approx((1 / 2 + 2 / 3) / 2)


@pytest.mark.parametrize("length", [4, 5, 8, 13, 100])
def test_windows_cover_all_and_overlap_by_a_third(length: int) -> None:
    begins = windows(length, 4)
    assert begins[0] == 0 and begins[-1] == length - 4
    assert all(0 < after - before <= 3 for before, after in itertools.pairwise(begins))


@pytest.mark.parametrize("size", [(6, 10), (30, 50)])
def test_windows_are_put_together_at_the_masks_size(size: tuple[int, int]) -> None:
    """The left half of one class, the right of another: the mask has its border in the middle, at any resolution."""
    image = torch.zeros(3, 6, 10)
    image[0, :, 5:] = 1

    def by_colour(part: torch.Tensor) -> torch.Tensor:
        assert part.shape == (1, 3, 6, 6)
        return torch.cat([1 - part[:, :1], part[:, :1]], 1)

    found = segment(image, size, 6, 2, by_colour)
    expected = torch.zeros(size, dtype=torch.int64)
    expected[:, size[1] // 2 :] = 1
    assert torch.equal(found, expected)
