"""How far the student has come: linear CKA from merged moments (Kornblith et al. 2019; the score of LEAP, section 3).

Shapes: moments as in `leap_kernels.Moments`; W (Dt, Ds) the head's weight. The score needs no bias: centring drops it.

Bias of small samples. The biased (V-statistic) CKA that LEAP uses reads about D / (N + D) for independent features of
width D at N rows: 0.43 at N=512, D=384. The plain mean of per-rank scores carries the bias of the rows of one rank,
`merged_shares` that of the global batch, so a threshold means the same on 1 and on 64 GPUs.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from leap_kernels import Moments

# LEAP's guard: below this product of norms the score is 0 (features of scale 1e-9, say).
MIN_DENOMINATOR = 1e-12
# The longest chain of additions behind a mean: `leap_kernels` lets BLAS sum so many rows, one after another where BLAS
# does so. What sums more rows at once (torch's `mean`, any GPU) adds them up in trees, with less rounding.
LONGEST_SUM = 1024


@torch.no_grad()
def linear_cka(moments: Moments, weight: Optional[Tensor]) -> Tensor:
    """Linear CKA of the projected student S W^T and the teacher T, from the moments of (S, T).

        ||W Cst||_F^2 / (||W Css W^T||_F ||Ctt||_F)

    Never wider than Ds: with A = W^T W, ||W Cst||_F^2 = <Cts A, Cts> and ||W Css W^T||_F^2 = tr(Css A Css A).
    In float64, which neither overflows (LEAP's product of squared norms does in float32), nor is touched by autocast
    or TF32. 0-d float64 on the moments' device, no host synchronisation; 0 where the denominator is below 1e-12 or S or
    T is `constant`. weight=None: S is matched as it is, A is the identity.
    """
    css, cts = moments.css.double(), moments.cts.double()
    css_a, cts_a = css, cts
    if weight is not None:
        w = weight.double()
        a = w.T @ w
        css_a, cts_a = css @ a, cts @ a
    norm_p = (css_a * css_a.T).sum().clamp_min(0).sqrt()
    norm_t = torch.linalg.vector_norm(moments.ctt, dtype=torch.float64)
    sides = ((moments.mean_s, moments.css), (moments.mean_t, moments.ctt))
    flat = [constant(moments.n, mean, scatter.diagonal(), scatter.dtype) for mean, scatter in sides]
    return _ratio((cts_a * cts).sum(), norm_p, norm_t, flat[0] | flat[1])


@torch.no_grad()
def linear_cka_of_features(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA of x (N, Dx) and y (N, Dy) by its definition, three products. 0-d float64; 0 as for `linear_cka`."""
    flat = constant_rows(x) | constant_rows(y)
    x, y = x.double(), y.double()
    x, y = x - x.mean(0), y - y.mean(0)
    cross, norm_x, norm_y = (torch.linalg.matrix_norm(a.T @ b) for a, b in ((y, x), (x, x), (y, y)))
    return _ratio(cross.square(), norm_x, norm_y, flat)


def constant(n: Tensor, mean: Tensor, squares: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether n () rows of mean (..., D) are equal but for rounding: (...,) bool.

    squares (..., D): each channel's sum over rows of (x - mean)^2, by arithmetic in `dtype` (float32 for a narrower
    one, which is never summed in itself). NaN is not constant.

    How large the squares get although nothing varies: a sum of k equal numbers, in whatever order a BLAS takes them, is
    off by at most k u of itself, u the unit roundoff (Higham 2002, section 4.2; MKL reaches a quarter of it). The
    factor 1/k and the numbers themselves may be rounded too. So a channel of value c leaves |x - mean| <= (k + 2) u |c|
    in every row, k the rows of one sum, and squares of n ((k + 2) u c)^2. Sets of rows that are merged have means that
    differ by as much again, which adds at most the same between them: 2 n ((k + 2) u c)^2.
    One channel above that is spread that was there before: real features keep every bit of their score.
    """
    unit = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    n = n.double()
    rounding = (n.clamp_max(LONGEST_SUM) + 2) * unit * mean.double()
    return (squares.double() <= 2 * n * rounding.square()).all(-1)


def constant_rows(x: Tensor) -> Tensor:
    """Whether the rows of each (N, D) of x (..., N, D) are `constant`: (...,) bool."""
    exact = x.double()
    mean = exact.mean(-2, keepdim=True)
    n = mean.new_full((), x.shape[-2])
    return constant(n, mean.squeeze(-2), (exact - mean).square().sum(-2), x.dtype)


@torch.no_grad()
def mean_cosine(projected: Tensor, teacher: Tensor) -> Tensor:
    """LEAP's alternative score: mean over tokens of cos(projected, teacher), both (..., D). 0-d float32."""
    return F.cosine_similarity(projected.float(), teacher.float(), dim=-1).mean()


def _ratio(numerator: Tensor, norm_x: Tensor, norm_y: Tensor, flat: Tensor) -> Tensor:
    denominator = norm_x * norm_y
    nothing = (denominator < MIN_DENOMINATOR) | (flat & ~denominator.isnan())  # NaN on the other side is reported
    return torch.where(nothing, 0.0, numerator / denominator)


@torch.no_grad()
def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two disjoint sets of rows (Chan et al.), e.g. of two micro-batches."""
    n = a.n + b.n
    share = b.n / n
    delta_s, delta_t = b.mean_s - a.mean_s, b.mean_t - a.mean_t
    between_s, between_t = delta_s * (a.n * share), delta_t * (a.n * share)
    return Moments(
        n,
        a.mean_s + delta_s * share,
        a.mean_t + delta_t * share,
        a.css + b.css + torch.outer(delta_s, between_s),
        a.cts + b.cts + torch.outer(delta_t, between_s),
        a.ctt + b.ctt + torch.outer(delta_t, between_t),
    )


@torch.no_grad()
def share_of(moments: Moments, rank: int, ranks: int) -> Tensor:
    """What a rank adds to the one sum over ranks from which `merged_shares` takes the moments of all rows: (K,).

    K = ranks (1 + Ds + Dt) + Ds^2 + Dt Ds + Dt^2, in the moments' dtype. A rank's count and means have a row of their
    own, to which all others add zeros: so the sum that adds up the second moments also tells every rank all means.
    """
    own = torch.cat([moments.n[None], moments.mean_s, moments.mean_t])
    rows = own.new_zeros(ranks, len(own))
    rows[rank] = own
    return torch.cat([x.flatten() for x in (rows, moments.css, moments.cts, moments.ctt)])


@torch.no_grad()
def merged_shares(total: Tensor, like: Moments, ranks: int) -> Moments:
    """Moments of the rows of all ranks together, whatever each rank's share. total: the sum of `share_of` over ranks.

    Second moments about each rank's means are moved to the common ones: M = sum_r (M_r + n_r d_r d_r^T), d_r = mean_r -
    mean (Chan et al.).
    """
    seconds = (like.css, like.cts, like.ctt)
    widths = [1, like.mean_s.numel(), like.mean_t.numel()]
    first, *parts = total.split([ranks * sum(widths), *(x.numel() for x in seconds)])
    css, cts, ctt = (part.view_as(x) for part, x in zip(parts, seconds, strict=True))
    n, means_s, means_t = first.view(ranks, -1).double().split(widths, 1)
    rows = n.sum()
    mean_s, mean_t = ((n * means).sum(0) / rows for means in (means_s, means_t))
    delta_s, delta_t = (means_s - mean_s).to(css.dtype), (means_t - mean_t).to(css.dtype)
    between_s, between_t = delta_s * n.to(css.dtype), delta_t * n.to(css.dtype)
    return Moments(
        rows.to(like.n.dtype),
        mean_s.to(like.mean_s.dtype),
        mean_t.to(like.mean_t.dtype),
        torch.addmm(css, delta_s.T, between_s),
        torch.addmm(cts, delta_t.T, between_s),
        torch.addmm(ctt, delta_t.T, between_t),
    )
