"""Tokens as colours: an image's tokens in their three strongest directions, as red, green and blue.

These are the pictures of DINOv2 (Oquab et al. 2023, arXiv 2304.07193), made so that two models can be compared. Every
map is drawn in its own three directions, which say most of it. Only then are a student's colours turned, by the 3 x 3
orthogonal matrix that brings them nearest to the teacher's (orthogonal Procrustes). A map of all channels, fitted so,
would be no picture of the student: with more channels than tokens, any tokens can be turned into any others.

Legend: N tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from leap_dist.matching import constant_rows
from leap_dist.models import on_grid

RGB = 3
EDGE = 0.01  # of the reference's tokens at either end of a colour's range: a few outliers would make all others grey
FINEST = 1e-6  # of the strongest direction: what is weaker may be the rounding of float32 tokens


class TokenMap(NamedTuple):
    """Patch tokens (N, D) of one image, float32 on the host, row by row of the grid (rows, columns)."""

    tokens: Tensor
    grid: tuple[int, int]


def colours(reference: TokenMap, others: Sequence[TokenMap], foreground: Optional[float] = None) -> list[Tensor]:
    """Pictures (rows, columns, 3) uint8 of one image's tokens, the reference's first, each on its own grid.

    Red, green and blue have the range that they take in the reference, but for EDGE of its tokens at either end. The
    others are scaled by one number to the reference's mean square. A map with a number that is not finite is black.

    foreground: None, or a number in (0, 1) as `foreground_of` takes it: the rest is black, and directions and ranges
    are those of the foreground alone.
    """
    mask = torch.ones(len(reference.tokens), dtype=torch.bool)
    if foreground is not None:
        mask = foreground_of(reference, foreground)
    ours = _scores(reference, mask)
    low, high = ours[mask].quantile(EDGE, 0), ours[mask].quantile(1 - EDGE, 0)
    pictures = [_shown(reference, ours, mask, low, high)]
    for other in others:
        kept = _on_grid(mask, reference.grid, other.grid)
        theirs = _scores(other, kept)
        theirs = theirs * (_rms(ours[mask]) / _rms(theirs[kept]).clamp_min(torch.finfo(theirs.dtype).tiny))
        met = on_grid(theirs[None], other.grid, reference.grid)[0]
        pictures.append(_shown(other, theirs @ turn(met[mask], ours[mask]), kept, low, high))
    return pictures


def principal(tokens: Tensor) -> Tensor:
    """Tokens (N, D) about their mean in their three strongest directions: (N, 3) float64, the strongest first.

    The largest number of each column is positive. Columns are zeros where there are fewer directions, where all tokens
    are equal but for rounding, and where a number is not finite. As in `spectra.py` it is the smaller Gram matrix that
    is solved.
    """
    if not len(tokens) or not tokens.isfinite().all() or constant_rows(tokens):
        return tokens.new_zeros(len(tokens), RGB, dtype=torch.float64)
    centred = tokens.double() - tokens.double().mean(0)
    if centred.shape[0] <= centred.shape[1]:
        energy, axes = torch.linalg.eigh(centred @ centred.T)
        scores = axes * energy.clamp_min(0).sqrt()
    else:
        scores = centred @ torch.linalg.eigh(centred.T @ centred)[1]
    strongest = scores.flip(1)[:, :RGB]
    size = strongest.norm(dim=0)
    strongest = strongest.where(size > FINEST * size[0], 0)
    largest = strongest.gather(0, strongest.abs().argmax(0, keepdim=True))
    return F.pad(torch.where(largest < 0, -strongest, strongest), (0, RGB - strongest.shape[1]))


def turn(scores: Tensor, onto: Tensor) -> Tensor:
    """The orthogonal R (3, 3) for which |scores R - onto| is least, of two (N, 3): Schönemann 1966."""
    left, _, right = torch.linalg.svd(scores.T @ onto)
    return left @ right


def foreground_of(reference: TokenMap, threshold: float) -> Tensor:
    """Which tokens (N,) are the foreground: those whose first component lies above `threshold` of its range, 0 to 1.

    The side that the border of the image lies on is the background. All tokens, where none is above.
    """
    first = principal(reference.tokens)[:, 0]
    rows, columns = reference.grid
    border = torch.ones(rows, columns, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    if first[border.flatten()].mean() > first.mean():
        first = -first
    spread = first.max() - first.min()
    mask = first - first.min() > threshold * spread
    return mask if mask.any() else torch.ones_like(mask)


def _scores(of: TokenMap, mask: Tensor) -> Tensor:
    scores = torch.zeros(len(of.tokens), RGB, dtype=torch.float64)
    scores[mask] = principal(of.tokens[mask])
    return scores


def _rms(scores: Tensor) -> Tensor:
    """Root of the mean square; 0 of nothing."""
    return scores.square().sum().div(max(1, len(scores))).sqrt()


def _on_grid(mask: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """A mask (N,) on another grid, cell by nearest cell."""
    image = mask.view(1, 1, *grid).float()
    return F.interpolate(image, wanted, mode="nearest-exact").flatten() > 0


def _shown(of: TokenMap, scores: Tensor, mask: Tensor, low: Tensor, high: Tensor) -> Tensor:
    spread = high - low
    share = torch.where(spread > 0, (scores - low) / spread.clamp_min(torch.finfo(spread.dtype).tiny), 0.5)
    picture = (share.clamp(0, 1) * 255).round().to(torch.uint8)
    picture[~mask] = 0
    if not of.tokens.isfinite().all():
        picture.zero_()
    return picture.view(*of.grid, RGB)
