"""Losses, gradients and moments from Gram matrices, in plain PyTorch: P and P - T are never formed.

For rows centred about any reference pair (s0, t0), with s = s0 + u, t = t0 + v and r0 = W s0 + b - t0,

    P - T = u W^T - v + 1 r0^T
    dS ~ (P - T) W = u (W^T W) - v W + 1 (r0^T W)

and, centred about the means (C the centred Grams, r0 the residual of the mean row),

    |P - T|^2 = <W, W Css> - 2 <W, Cts> + tr Ctt + M |r0|^2
    dW ~ W Css - Cts + M r0 mean_s^T        db ~ M r0

The rows are read once, in chunks that stay in cache, each centred about its own mean; the chunks then merge exactly.
All arithmetic is float32 (float64 for float64 inputs) whatever the dtype of the inputs: in low precision the
differences above would cancel.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from leap_kernels.feature_match.reference import COSINE_EPS, Moments, Result, loss_dtype, normalise

# Measured at 384->1536 on an AVX-512 core: 256 rows and all 8192 at once are 10-15 % slower, 512 to 2048 equal.
# A GPU, whose caches hold no chunk anyway, takes larger ones to launch fewer kernels.
CHUNK_ROWS = 1024
CUDA_CHUNK_ROWS = 16384
# Symmetric products are formed in column strips of this width, upper triangle only: 0.58 of the work at Dt = 1536.
STRIP_COLUMNS = 256


def add_symmetric_(out: Tensor, x: Tensor) -> None:
    """out (D, D) += x^T x for x (m, D), the strips' upper triangle only."""
    for i in range(0, x.shape[1], STRIP_COLUMNS):
        out[i : i + STRIP_COLUMNS, i:].addmm_(x[:, i : i + STRIP_COLUMNS].T, x[:, i:])


def mirror_(out: Tensor) -> None:
    """Fill what `add_symmetric_` left out."""
    for i in range(STRIP_COLUMNS, out.shape[0], STRIP_COLUMNS):
        out[i:, i - STRIP_COLUMNS : i] = out[i - STRIP_COLUMNS : i, i:].T


class _Sums:
    """Centred sums over chunks of rows. Cst is kept as (Ds, Dt): that product runs 10 % faster than its transpose."""

    def __init__(self, student: Tensor, teacher: Tensor, dtype: torch.dtype, *, with_ctt: bool) -> None:
        (rows, ds), dt = student.shape, teacher.shape[1]
        rows = min(rows, _chunk_rows(student))
        self._u, self._v = (student.new_empty(rows, d, dtype=dtype) for d in (ds, dt))  # reused: no page faults
        self._counts: list[int] = []
        self._means: list[tuple[Tensor, Tensor]] = []
        self.css = student.new_zeros(ds, ds, dtype=dtype)
        self.cst = student.new_zeros(ds, dt, dtype=dtype)
        self.ctt = student.new_zeros(dt, dt, dtype=dtype) if with_ctt else None
        self.trace_tt = student.new_zeros((), dtype=dtype)

    def add(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Add rows s (m, Ds), t (m, Dt); return them centred, in buffers the next call overwrites, and their means."""
        m = s.shape[0]
        average = s.new_full((m,), 1 / m)
        mean_s, mean_t = s.T @ average, t.T @ average  # in half the time of mean(0)
        u, v = torch.sub(s, mean_s, out=self._u[:m]), torch.sub(t, mean_t, out=self._v[:m])
        self._counts.append(m)
        # What rounding left of the mean in u and v makes the means exact beyond float32, see `_mse`.
        self._means.append((mean_s.double() + u.T @ average, mean_t.double() + v.T @ average))
        self._add_products(u, v)
        return u, v, mean_s, mean_t

    def _add_products(self, u: Tensor, v: Tensor) -> None:
        add_symmetric_(self.css, u)
        self.cst.addmm_(u.T, v)
        # Row by row: over a whole chunk CPU vector_norm is 5e-5 off in float32.
        self.trace_tt += torch.linalg.vector_norm(v, dim=1).square().sum()
        if self.ctt is not None:
            add_symmetric_(self.ctt, v)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Merge the chunks, adding what lies between their means, and return n, mean_s, mean_t in float64."""
        if len(self._means) == 1:  # nothing lies between: a quarter of the launches of a match, saved
            mean_s, mean_t = self._means[0]
            n = mean_s.new_full((), self._counts[0])
        else:
            n, mean_s, mean_t = self._merge()
        mirror_(self.css)
        return n, mean_s, mean_t

    def _merge(self) -> tuple[Tensor, Tensor, Tensor]:
        means_s, means_t = (torch.stack(column) for column in zip(*self._means, strict=True))
        # Filled on the device: a tensor made of Python numbers would wait for it.
        counts = torch.stack([means_s.new_full((1,), count) for count in self._counts])
        n, roots = counts.sum(), counts.sqrt()
        mean_s, mean_t = (counts * means_s).sum(0) / n, (counts * means_t).sum(0) / n
        between_s, between_t = roots * (means_s - mean_s), roots * (means_t - mean_t)
        self._add_products(between_s.to(self.css.dtype), between_t.to(self.css.dtype))
        return n, mean_s, mean_t

    def moments(self, n: Tensor, mean_s: Tensor, mean_t: Tensor) -> Moments | None:
        if self.ctt is None:
            return None
        mirror_(self.ctt)
        n, mean_s, mean_t = (x.to(self.css.dtype) for x in (n, mean_s, mean_t))
        return Moments(n, mean_s, mean_t, self.css, self.cst.T.contiguous(), self.ctt)


@torch.no_grad()
def forward(
    student: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    *,
    objective: str,
    gradients: bool,
    moments: bool,
) -> Result:
    """Loss, and on request the gradients of M * loss and the moments, of one `reference.OBJECTIVES`."""
    if objective == "cosine":
        return _cosine(student, weight, bias, teacher, gradients, moments)
    return _mse(student, weight, bias, teacher, objective == "normalised", gradients, moments)


def _mse(
    student: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    normalised: bool,
    gradients: bool,
    moments: bool,
) -> Result:
    dtype = loss_dtype(student, weight, bias, teacher)
    dt = teacher.shape[1]
    scale = 2.0 / dt
    w = weight.to(dtype)
    b = torch.zeros_like(w[:, 0]) if bias is None else bias.to(dtype)
    sums = _Sums(student, teacher, dtype, with_ctt=moments)
    d_student = torch.empty_like(student, memory_format=torch.contiguous_format) if gradients else None
    wtw = (w.T @ w).mul_(scale)
    for rows, s, t in _chunks(student, teacher, dtype):
        u, v, mean_s, mean_t = sums.add(s, normalise(t) if normalised else t)
        if d_student is not None:
            r0 = torch.addmv(b, w, mean_s) - mean_t
            d = d_student[rows] if d_student.dtype == dtype else torch.empty_like(u)
            torch.mm(u, wtw, out=d).addmm_(v, w, alpha=-scale).add_(r0 @ w, alpha=scale)
            d_student[rows] = d
    n, mean_s, mean_t = sums.finish()
    # In float64: once the head has learnt the means this is a difference of equals, and dW multiplies it by mean_s.
    r0 = (torch.addmv(b.double(), w.double(), mean_s) - mean_t).to(dtype)
    wcss, cts, rows_r0 = w @ sums.css, sums.cst.T, r0 * student.shape[0]
    total = (w * wcss).sum() - 2 * (w * cts).sum() + sums.trace_tt + rows_r0 @ r0
    loss = (total / teacher.numel()).clamp_min(0)  # rounding may leave an exact fit just below zero
    stats = sums.moments(n, mean_s, mean_t)
    if d_student is None:
        return Result(loss, moments=stats)
    d_weight = wcss.sub_(cts).addr_(rows_r0, mean_s.to(dtype)).mul_(scale)
    return Result(loss, d_student, d_weight, rows_r0 * scale, stats)


def _cosine(
    student: Tensor, weight: Tensor, bias: Tensor | None, teacher: Tensor, gradients: bool, moments: bool
) -> Result:
    """With h = P W = S W^T W + b^T W and k = T W, both (M, Ds), a row's |p|^2, p.t and gradient need no P.

    |p|^2 = h.s + p.b, p.t = k.s + t.b, dP = alpha p + beta t, dS = alpha h + beta k, where alpha = cos / |p|^2 and
    beta = -1 / (|p| |t|).
    """
    dtype = loss_dtype(student, weight, bias, teacher)
    w = weight.to(dtype)
    b = torch.zeros_like(w[:, 0]) if bias is None else bias.to(dtype)
    wtw, wtb = w.T @ w, w.T @ b
    sums = _Sums(student, teacher, dtype, with_ctt=True) if moments else None
    d_student = torch.empty_like(student, memory_format=torch.contiguous_format) if gradients else None
    total, sum_a = w.new_zeros(()), w.new_zeros(())
    sas, bts, as_, bt = torch.zeros_like(wtw), torch.zeros_like(w), torch.zeros_like(w[0]), torch.zeros_like(w[:, 0])
    for rows, s, t in _chunks(student, teacher, dtype):
        h, k = torch.addmm(wtb, s, wtw), t @ w
        norm_p = ((h * s).sum(1) + s @ wtb + b @ b).clamp_min(0).sqrt().clamp_min(COSINE_EPS)
        norm_t = torch.linalg.vector_norm(t, dim=1).clamp_min(COSINE_EPS)
        beta = -1 / (norm_p * norm_t)
        cos = -((k * s).sum(1) + t @ b) * beta
        alpha = cos / norm_p.square()
        total += (1 - cos).sum()
        if d_student is not None:
            d_student[rows] = h.mul_(alpha[:, None]).addcmul_(k, beta[:, None])
            weighted = s * alpha[:, None]
            sas.addmm_(s.T, weighted)
            bts.addmm_(t.T, s * beta[:, None])
            as_ += weighted.sum(0)
            bt.addmv_(t.T, beta)
            sum_a += alpha.sum()
        if sums is not None:
            sums.add(s, t)
    loss, stats = total / student.shape[0], None if sums is None else sums.moments(*sums.finish())
    if not gradients:
        return Result(loss, moments=stats)
    return Result(loss, d_student, bts.addmm_(w, sas).addr_(b, as_), bt.addmv_(w, as_).add_(b * sum_a), stats)


@torch.no_grad()
def moments(student: Tensor, teacher: Tensor) -> Moments:
    """Alignment moments alone, as `reference.moments` defines them, without whole float32 copies of the rows."""
    dtype = loss_dtype(student, teacher)
    sums = _Sums(student, teacher, dtype, with_ctt=True)
    for _, s, t in _chunks(student, teacher, dtype):
        sums.add(s, t)
    return sums.moments(*sums.finish())


def _chunk_rows(x: Tensor) -> int:
    return CUDA_CHUNK_ROWS if x.is_cuda else CHUNK_ROWS


def _chunks(student: Tensor, teacher: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor]]:
    step = _chunk_rows(student)
    for start in range(0, student.shape[0], step):
        rows = slice(start, start + step)
        yield rows, student[rows].to(dtype), teacher[rows].to(dtype)
