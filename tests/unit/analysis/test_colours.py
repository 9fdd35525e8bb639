"""Colours of tokens, against NumPy's SVD, SciPy's Procrustes and what can be said beforehand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from torch import Tensor

from leap_dist.analysis.colours import TokenMap, colours, foreground_of, principal, turn

GRID = (6, 5)
N = 30


def tokens(n: int, d: int, seed: int = 0) -> Tensor:
    """With directions of unlike strength, about a mean that is none of them."""
    random = torch.Generator().manual_seed(seed)
    strength = 3.0 * 0.7 ** torch.arange(d)
    return torch.randn(n, d, generator=random) * strength + torch.randn(d, generator=random)


def rotation(rows: int, columns: int) -> Tensor:
    """Orthonormal rows (rows, columns)."""
    return torch.linalg.qr(torch.randn(columns, rows, generator=torch.Generator().manual_seed(9)))[0].T


def close(one: Tensor, other: Tensor) -> bool:
    """But for the rounding of a colour to one of 256."""
    return bool(((one.int() - other.int()).abs() <= 1).all())


@pytest.mark.parametrize(("n", "d"), [(30, 8), (8, 30), (5, 5)])
def test_components_are_those_of_the_svd(n: int, d: int) -> None:
    found = principal(tokens(n, d)).numpy()
    exact = tokens(n, d).double().numpy()
    left, sigma, _ = np.linalg.svd(exact - exact.mean(0), full_matrices=False)
    expected = (left * sigma)[:, :3]
    expected *= np.sign(expected[np.abs(expected).argmax(0), range(3)])
    assert found == pytest.approx(expected, abs=1e-5 * sigma[0])


def test_few_directions_leave_columns_of_zeros() -> None:
    found = principal(tokens(30, 2))
    assert found[:, :2].abs().sum() > 0 and not found[:, 2].any()
    line = torch.arange(30.0)[:, None] * torch.randn(8, generator=torch.Generator().manual_seed(2))
    for n in (6, 30):  # tokens on a line, fewer than channels and more: what else there is, is rounding
        found = principal(line[:n])
        assert found[:, 0].abs().sum() > 0 and not found[:, 1:].any()
    assert not principal(tokens(1, 8)).any() and principal(torch.empty(0, 8)).shape == (0, 3)


def test_the_turn_is_scipys() -> None:
    one, other = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert turn(one, other).numpy() == pytest.approx(orthogonal_procrustes(one.numpy(), other.numpy())[0])


@pytest.mark.parametrize("width", [8, 12])
def test_a_rotated_scaled_and_shifted_teacher_gives_the_teachers_picture(width: int) -> None:
    teacher = tokens(N, 8)
    student = 7.5 * teacher @ rotation(8, width) + 3
    ours, theirs = colours(TokenMap(teacher, GRID), [TokenMap(student, GRID)])
    assert close(ours, theirs) and ours.float().std() > 50


def test_each_picture_is_on_its_own_grid() -> None:
    """A student of half the resolution, whose cells are those of a teacher that is flat within them."""
    student = tokens(12, 8)
    fine = student.view(4, 3, 8).repeat_interleave(2, 0).repeat_interleave(2, 1).reshape(48, 8)
    ours, theirs = colours(TokenMap(fine, (8, 6)), [TokenMap(student, (4, 3))])
    assert ours.shape == (8, 6, 3) and theirs.shape == (4, 3, 3)
    assert (ours[::2, ::2].int() - theirs.int()).abs().float().mean() < 16


def test_tokens_that_have_nothing_in_common_do_not_look_alike() -> None:
    """Though with more channels than tokens a rotation of all channels would make them so."""
    teacher, student = (torch.randn(N, 200, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    ours, theirs = colours(TokenMap(teacher, GRID), [TokenMap(student, GRID)])
    correlation = np.corrcoef(ours.flatten().numpy(), theirs.flatten().numpy())[0, 1]
    assert abs(correlation) < 0.6


@pytest.mark.parametrize("flat", [torch.zeros(N, 8), torch.full((N, 8), 0.1), torch.full((N, 8), 1e30)])
def test_constant_tokens_are_of_one_colour(flat: Tensor) -> None:
    varied = tokens(N, 8)
    for reference, other in ((flat, varied), (varied, flat), (flat, flat)):
        pictures = colours(TokenMap(reference, GRID), [TokenMap(other, GRID)])
        for picture, source in zip(pictures, (reference, other), strict=True):
            if source is flat:
                assert len(picture.view(-1, 3).unique(dim=0)) == 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_tokens_that_are_not_finite_are_black(bad: float) -> None:
    spoilt = tokens(N, 8)
    spoilt[3, 2] = bad
    ours, theirs = colours(TokenMap(tokens(N, 8), GRID), [TokenMap(spoilt, GRID)])
    assert ours.any() and not theirs.any()
    ours, theirs = colours(TokenMap(spoilt, GRID), [TokenMap(tokens(N, 8), GRID)])
    assert not ours.any()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_foreground_is_what_the_border_is_not(sign: int) -> None:
    """A square in the middle that stands out by a large step, whichever way; the same part of the student is drawn."""
    inside = torch.zeros(GRID, dtype=torch.bool)
    inside[2:4, 1:3] = True
    teacher = 0.1 * tokens(N, 8) + sign * 50.0 * inside.flatten()[:, None]
    assert foreground_of(TokenMap(teacher, GRID), 0.5).equal(inside.flatten())
    ours, theirs = colours(TokenMap(teacher, GRID), [TokenMap(tokens(N, 6, seed=4), GRID)], 0.5)
    for picture in (ours, theirs):
        assert not picture[~inside].any() and picture[inside].any()
    plain = colours(TokenMap(0.1 * tokens(N, 8)[inside.flatten()], (2, 2)), [])[0]
    assert close(ours[2:4, 1:3], plain)  # of the foreground's own directions


def test_without_anything_that_stands_out_all_is_foreground() -> None:
    assert foreground_of(TokenMap(torch.ones(N, 8), GRID), 0.5).all()
