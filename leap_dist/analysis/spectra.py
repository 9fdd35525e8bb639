"""How many dimensions the tokens of one image fill, and which: energies, effective rank, bases, principal angles.

Singular values come from the eigenvalues of the smaller Gram matrix of X (N, D), which a batch of images takes in one
call. Squaring halves the digits, so Grams are float64: singular values are then right to 1e-8 of the largest, finer
than float32 tokens are themselves (measured against LAPACK's SVD, in the tests).

Legend: B images, N tokens, D channels, R = min(N, D), L levels of energy, k dimensions of a subspace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from leap_dist.matching import constant

LEVELS = (0.80, 0.90, 0.95, 0.99)
# Shares of energy this close below a level count as reaching it: four of five equal singular values hold 80 %.
TIE = 1e-6
CENTRINGS = ("uncentred", "centred")


def views(tokens: Tensor) -> dict[str, Tensor]:
    """tokens (B, N, D) as they are, and about each image's mean token; keys `CENTRINGS`.

    Where all tokens of an image are the same, what rounding leaves of them about their mean is no spectrum: zeros.
    """
    mean = tokens.mean(1, keepdim=True)
    centred = tokens - mean
    n = mean.new_full((), tokens.shape[1], dtype=torch.float64)
    flat = constant(n, mean.squeeze(1), centred.square().sum(1), tokens.dtype)
    return {"uncentred": tokens, "centred": centred.masked_fill(flat[:, None, None], 0)}


def energies(tokens: Tensor) -> Tensor:
    """Squared singular values of each (N, D) of tokens (..., N, D): (..., R) float64, descending."""
    return _in_threads(torch.linalg.eigvalsh, _small_gram(tokens.double())).flip(-1).clamp_min(0)


def cumulative(energy: Tensor) -> Tensor:
    """Share of the total that the first 1, 2, ... of `energy` (..., R) hold; 1 throughout where there is none."""
    total = energy.sum(-1, keepdim=True)
    return torch.where(total > 0, energy.cumsum(-1) / total.clamp_min(torch.finfo(energy.dtype).tiny), 1.0)


def dims_at(share: Tensor, levels: Sequence[float] = LEVELS) -> Tensor:
    """Smallest number of dimensions whose cumulated share (..., R) reaches each level: (..., L) int64, at most R."""
    below = share[..., None, :] < share.new_tensor(levels)[:, None] - TIE
    return (below.sum(-1) + 1).clamp_max(share.shape[-1])


def effective_rank(energy: Tensor) -> Tensor:
    """exp(-sum p ln p) with p the singular values over their sum (Roy & Vetterli 2007): (..., R) energies to (...).

    r for r equal singular values; 1 for a matrix of zeros.
    """
    sigma = energy.sqrt()
    share = sigma / sigma.sum(-1, keepdim=True).clamp_min(torch.finfo(sigma.dtype).tiny)
    return torch.special.entr(share).sum(-1).exp()


def top_basis(tokens: Tensor, k: int) -> Tensor:
    """Orthonormal basis (..., D, k) of the k directions in which tokens (..., N, D) have most energy, k <= R.

    float64, strongest first. Where singular values k and k+1 are equal the subspace is not unique, and where fewer than
    k are positive it is completed arbitrarily.
    """
    tokens = tokens.double()
    vectors = _in_threads(lambda gram: torch.linalg.eigh(gram).eigenvectors[..., -k:], _small_gram(tokens)).flip(-1)
    return torch.linalg.qr(tokens.mT @ vectors).Q if tokens.shape[-2] < tokens.shape[-1] else vectors


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Angles between the spans of two orthonormal bases (..., D, k): (..., k) degrees, smallest first (to 1e-6)."""
    return torch.linalg.svdvals(a.mT @ b).clamp(max=1).acos().rad2deg()


def overlap(angles: Tensor) -> Tensor:
    """Mean squared cosine of principal angles (..., k) in degrees: 1 for equal subspaces, k / D for random ones."""
    return angles.deg2rad().cos().square().mean(-1)


def captured(tokens: Tensor, basis: Tensor) -> Tensor:
    """Share of the energy of tokens (B, N, D) in the first 1, 2, ... columns of an orthonormal `basis` (D, K): (B, K).

    |X V_d|^2 / |X|^2; K < D columns need not reach 1.
    """
    energy = (tokens @ basis.to(tokens.dtype)).square().sum(-2, dtype=torch.float64).cumsum(-1)
    total = tokens.square().sum((-2, -1), dtype=torch.float64)[:, None]
    return torch.where(total > 0, energy / total.clamp_min(torch.finfo(torch.float64).tiny), 1.0)


def _small_gram(x: Tensor) -> Tensor:
    return x @ x.mT if x.shape[-2] < x.shape[-1] else x.mT @ x


def _in_threads(solve: Callable[[Tensor], Tensor], grams: Tensor) -> Tensor:
    """`solve` a batch (..., R, R); on CPU every thread takes a share of it.

    LAPACK's own threads make such small matrices slower (measured at R = 196, two threads: 2.2 to 15 times the CPU time
    of one, the worse the busier the machine), so it gets one.
    """
    threads = torch.get_num_threads()
    if grams.is_cuda or grams.dim() < 3 or threads == 1:
        return solve(grams)
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return torch.cat(list(pool.map(solve, grams.detach().chunk(threads))))
    finally:
        torch.set_num_threads(threads)
