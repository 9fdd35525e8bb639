"""Token Spectral Energy Pattern (SEP): over which share of the channels' Fourier bins a token's energy is spread.

Per token |FFT over channels|^2, all D bins in frequency order, cumulated, normalised, averaged over tokens
(arXiv 2511.15572, section 3). Read it with two facts in mind. Tokens are real, so bins f and D - f hold the same
energy: half of it lies below D/2 whatever the token, and the curve is point-symmetric about its centre. And the order
of channels is arbitrary, so only what survives a permutation of channels is a property of the representation. White
noise gives the diagonal d/D.

Legend: B images, N tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from leap_dist.analysis.spectra import dims_at

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9)
NULL_TOKENS = 4096


def power(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over tokens (..., D) of the normalised power of bins 0 .. D//2, (D//2 + 1,), and the number of tokens, ().

    Both float64, so that batches and ranks add up. Tokens of zeros have no pattern and are not counted.
    """
    total = tokens.square().sum(-1) * tokens.shape[-1]  # Parseval
    # A token without energy has power 0, and adds nothing.
    share = torch.fft.rfft(tokens).abs().square() / torch.where(total > 0, total, 1)[..., None]
    return share.flatten(0, -2).sum(0, dtype=torch.float64), (total > 0).sum(dtype=torch.float64)


def curve(mean_power: Tensor, width: int) -> Tensor:
    """Cumulated energy over all `width` bins, (..., D), from the mean power of bins 0 .. D//2."""
    mirrored = mean_power[..., 1 : (width + 1) // 2].flip(-1)
    return torch.cat([mean_power, mirrored], -1).cumsum(-1)


def fractions(pattern: Tensor, levels: Sequence[float] = LEVELS) -> Tensor:
    """d/D, d the first bin at which `pattern` (..., D) reaches each level: (..., levels) float64."""
    return dims_at(pattern, levels).double() / pattern.shape[-1]


def permutations(width: int, count: int) -> Tensor:
    """`count` orders of `width` channels, (count, D), the same ones everywhere."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(width, generator=generator) for _ in range(count)])


def null(width: int) -> Tensor:
    """`fractions` of Gaussian white noise of `width` channels, of `NULL_TOKENS` tokens drawn the same everywhere."""
    noise = torch.randn(NULL_TOKENS, width, generator=torch.Generator().manual_seed(0))
    total, count = power(noise)
    return fractions(curve(total / count, width))
