"""The op as Triton kernels: neither P nor P - T reaches memory; no atomics, so with the same tiles results repeat bit
for bit.

`_match_kernel`  a block of student rows stays on chip while the teacher's channels stream by, as keys do in
                 FlashAttention: P tile, residual R in float32 registers, |R|^2 per row and dS += R W in one pass.
`_gram_kernel`   X^T Y over rows, each operand scaled per row and shifted by a vector on load: the moments, and dW,
                 which costs Dt Ds more per row from the Grams against 2 Dt Ds for a second pass over P.
`_column_sum_kernel`  the means that `_gram_kernel` shifts by.

Tile sizes are tuned once per (Ds, Dt, dtypes, mode), not per M, and kept on disk: a ragged last batch or an advance of
the curriculum tunes nothing. Legend: m rows, n teacher channels, d student channels; BLOCK_* tile sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from leap_kernels.feature_match.reference import COSINE_EPS, Moments, Result

TARGET_PROGRAMS = 264  # two per SM of an H100: below it `_gram_kernel` splits the rows


# numpy has no bfloat16, and the interpreter would multiply bit patterns; float32 holds the same values.
_INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, products in the operands' dtype, sum in float32."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc=acc, input_precision=PRECISION)


@triton.jit
def _load_rows(ptr, stride, rows, cols, mask, scale_ptr, offset_ptr, M, AFFINE: tl.constexpr):
    """Tile of a row-major matrix in float32, x_i * scale_i + offset_i per row if AFFINE, 0 outside the mask."""
    x = tl.load(ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if AFFINE:
        scale = tl.load(scale_ptr + rows, mask=rows < M, other=0.0)
        offset = tl.load(offset_ptr + rows, mask=rows < M, other=0.0)
        x = tl.where(mask, x * scale[:, None] + offset[:, None], 0.0)
    return x


@triton.jit(do_not_specialize=["M"])
def _match_kernel(
    s_ptr, w_ptr, b_ptr, t_ptr, alpha_ptr, beta_ptr, gamma_ptr, ds_ptr, sums_ptr,
    M, stride_s, stride_w, stride_t, scale,
    DS: tl.constexpr, DT: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    HAS_BIAS: tl.constexpr, AFFINE: tl.constexpr, GRADIENTS: tl.constexpr, STATS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """R = P - T, or alpha_m P + beta_m T + gamma_m if AFFINE; sums (3, M): |R|^2 and, if STATS, |P|^2, P.T, |T|^2.

    dS = scale * R W. The student's channels are held as two power-of-two segments, D0 + D1 >= Ds (384 = 256 + 128):
    padding 384 to 512 would cost a third more products and registers.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d0, d1 = tl.arange(0, D0), D0 + tl.arange(0, D1 if D1 > 0 else 16)
    s_rows = s_ptr + rows.to(tl.int64)[:, None] * stride_s
    s0 = tl.load(s_rows + d0[None, :], mask=(rows < M)[:, None] & (d0 < DS)[None, :], other=0.0)
    acc0 = tl.zeros((BLOCK_M, D0), tl.float32)
    if D1 > 0:
        s1 = tl.load(s_rows + d1[None, :], mask=(rows < M)[:, None] & (d1 < DS)[None, :], other=0.0)
        acc1 = tl.zeros((BLOCK_M, D1), tl.float32)
    sum0 = tl.zeros((BLOCK_M,), tl.float32)
    sum1, sum2 = sum0, sum0
    for n in range(0, DT, BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        w_rows = w_ptr + cols[:, None] * stride_w
        w0 = tl.load(w_rows + d0[None, :], mask=(cols < DT)[:, None] & (d0 < DS)[None, :], other=0.0)
        p = _dot(s0, tl.trans(w0), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        if D1 > 0:
            w1 = tl.load(w_rows + d1[None, :], mask=(cols < DT)[:, None] & (d1 < DS)[None, :], other=0.0)
            p = _dot(s1, tl.trans(w1), p, PRECISION)
        if HAS_BIAS:
            p += tl.load(b_ptr + cols, mask=cols < DT, other=0.0).to(tl.float32)[None, :]
        mask = (rows < M)[:, None] & (cols < DT)[None, :]
        t = tl.load(t_ptr + rows.to(tl.int64)[:, None] * stride_t + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if STATS:
            sum0 += tl.sum(p * p, 1)
            sum1 += tl.sum(p * t, 1)
            sum2 += tl.sum(t * t, 1)
        else:
            if AFFINE:
                alpha = tl.load(alpha_ptr + rows, mask=rows < M, other=0.0)[:, None]
                beta = tl.load(beta_ptr + rows, mask=rows < M, other=0.0)[:, None]
                gamma = tl.load(gamma_ptr + rows, mask=rows < M, other=0.0)[:, None]
                r = tl.where(mask, alpha * p + beta * t + gamma, 0.0)
            else:
                r = p - t
            sum0 += tl.sum(r * r, 1)
            if GRADIENTS:
                acc0 = _dot(r.to(w0.dtype), w0, acc0, PRECISION)
                if D1 > 0:
                    acc1 = _dot(r.to(w1.dtype), w1, acc1, PRECISION)
    tl.store(sums_ptr + rows, sum0, mask=rows < M)
    if STATS:
        tl.store(sums_ptr + M + rows, sum1, mask=rows < M)
        tl.store(sums_ptr + 2 * M + rows, sum2, mask=rows < M)
    if GRADIENTS:
        out = ds_ptr + rows.to(tl.int64)[:, None] * DS
        value = (acc0 * scale).to(ds_ptr.dtype.element_ty)
        tl.store(out + d0[None, :], value, mask=(rows < M)[:, None] & (d0 < DS)[None, :])
        if D1 > 0:
            value = (acc1 * scale).to(ds_ptr.dtype.element_ty)
            tl.store(out + d1[None, :], value, mask=(rows < M)[:, None] & (d1 < DS)[None, :])


@triton.jit(do_not_specialize=["M", "split_rows"])
def _gram_kernel(
    a_ptr, b_ptr, mean_a_ptr, mean_b_ptr, scale_a_ptr, offset_a_ptr, scale_b_ptr, offset_b_ptr, like_ptr, out_ptr,
    M, split_rows, stride_a, stride_b,
    DA: tl.constexpr, DB: tl.constexpr, AFFINE_A: tl.constexpr, AFFINE_B: tl.constexpr, SYMMETRIC: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[split] (DA, DB) = sum over the split's rows of (a - mean_a)(b - mean_b)^T; SYMMETRIC: upper tiles only.

    The difference is taken in float32 and only then rounded to the dtype of the products, that of `like_ptr`.
    """
    pid_a, pid_b, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if SYMMETRIC and pid_b < pid_a:
        return
    cols_a, cols_b = pid_a * BLOCK_D + tl.arange(0, BLOCK_D), pid_b * BLOCK_D + tl.arange(0, BLOCK_D)
    mean_a = tl.load(mean_a_ptr + cols_a, mask=cols_a < DA, other=0.0)
    mean_b = tl.load(mean_b_ptr + cols_b, mask=cols_b < DB, other=0.0)
    first = split * split_rows
    last = tl.minimum(first + split_rows, M)
    acc = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    for m in range(first, last, BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        mask_a = (rows < last)[:, None] & (cols_a < DA)[None, :]
        mask_b = (rows < last)[:, None] & (cols_b < DB)[None, :]
        a = _load_rows(a_ptr, stride_a, rows, cols_a, mask_a, scale_a_ptr, offset_a_ptr, M, AFFINE_A)
        b = _load_rows(b_ptr, stride_b, rows, cols_b, mask_b, scale_b_ptr, offset_b_ptr, M, AFFINE_B)
        a = tl.where(mask_a, a - mean_a[None, :], 0.0).to(like_ptr.dtype.element_ty)
        b = tl.where(mask_b, b - mean_b[None, :], 0.0).to(like_ptr.dtype.element_ty)
        acc = _dot(tl.trans(a), b, acc, PRECISION)
    out = out_ptr + split.to(tl.int64) * DA * DB + cols_a[:, None] * DB + cols_b[None, :]
    tl.store(out, acc, mask=(cols_a < DA)[:, None] & (cols_b < DB)[None, :])


@triton.jit(do_not_specialize=["M", "split_rows"])
def _column_sum_kernel(
    x_ptr, scale_ptr, offset_ptr, out_ptr, M, split_rows, stride,
    D: tl.constexpr, AFFINE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[split] (D,) = sum of the split's rows of x in float64, scaled and offset per row if AFFINE."""
    cols, split = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.program_id(1)
    first = split * split_rows
    last = tl.minimum(first + split_rows, M)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float64)
    for m in range(first, last, BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        mask = (rows < last)[:, None] & (cols < D)[None, :]
        acc += _load_rows(x_ptr, stride, rows, cols, mask, scale_ptr, offset_ptr, M, AFFINE).to(tl.float64)
    tl.store(out_ptr + split.to(tl.int64) * D + cols, tl.sum(acc, 0), mask=cols < D)


def _configs(tiles: Sequence[tuple[dict[str, int], int, int]], interpreted: dict[str, int]) -> list[triton.Config]:
    """Candidate (tiles, warps, stages); the interpreter cannot time, it takes one small tile."""
    if knobs.runtime.interpret:
        return [triton.Config(interpreted)]
    return [triton.Config(tile, num_warps=warps, num_stages=stages) for tile, warps, stages in tiles]


# Tiles with up to this many float32 accumulators a thread keep them in registers; 192 spill (sm_80, sm_89, sm_90).
MAX_ACCUMULATORS = 96


def _fitting(configs: list[triton.Config], _: dict[str, Any], **constants: Any) -> list[triton.Config]:
    """Drop tiles whose accumulators (BLOCK_M x Ds) cannot fit, before compiling them; the last one stays.

    What exceeds shared memory is left to the tuner, which passes over it: how much a tile takes depends on the GPU.
    """
    width = constants["D0"] + constants["D1"]

    def fits(config: triton.Config) -> bool:
        return config.kwargs["BLOCK_M"] * width <= MAX_ACCUMULATORS * 32 * config.num_warps

    return [config for config in configs[:-1] if fits(config)] + configs[-1:]


# P feeds a second product, so all warps of a program lie along one axis of its tile. None computes a part of P twice if
# BLOCK_N >= 8 warps (mma.sync: A100, L40S, and H100 below 64 rows) or BLOCK_M >= 16 warps (wgmma).
_MATCH_TILES = [  # the comments: which student widths a tile is for; the last one fits everywhere
    ({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 2),  # 192
    ({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 3),  # 192
    ({"BLOCK_M": 64, "BLOCK_N": 64}, 8, 2),  # 384 on A100 and H100
    ({"BLOCK_M": 32, "BLOCK_N": 32}, 4, 3),  # 384
    ({"BLOCK_M": 32, "BLOCK_N": 64}, 8, 2),  # 384 on L40S
    ({"BLOCK_M": 32, "BLOCK_N": 32}, 8, 3),  # 768 on A100 and H100
    ({"BLOCK_M": 16, "BLOCK_N": 64}, 8, 2),  # 768 on A100, 1024 on H100
    ({"BLOCK_M": 32, "BLOCK_N": 32}, 16, 2),  # 1024 on A100
    ({"BLOCK_M": 16, "BLOCK_N": 32}, 4, 2),  # 768 on L40S
    ({"BLOCK_M": 16, "BLOCK_N": 16}, 4, 1),  # 1024 on L40S
]
_GRAM_TILES = [
    ({"BLOCK_M": 64, "BLOCK_D": 128}, 8, 3),
    ({"BLOCK_M": 32, "BLOCK_D": 128}, 8, 4),
    ({"BLOCK_M": 32, "BLOCK_D": 128}, 4, 3),
    ({"BLOCK_M": 64, "BLOCK_D": 64}, 4, 3),
    ({"BLOCK_M": 32, "BLOCK_D": 64}, 4, 2),
]
match_tuner = triton.autotune(
    configs=_configs(_MATCH_TILES, {"BLOCK_M": 16, "BLOCK_N": 32}),
    key=["DS", "DT", "HAS_BIAS", "AFFINE", "GRADIENTS", "STATS", "PRECISION"],
    prune_configs_by={"early_config_prune": _fitting},
    cache_results=True,
)(_match_kernel)
gram_tuner = triton.autotune(
    configs=_configs(_GRAM_TILES, {"BLOCK_M": 32, "BLOCK_D": 32}),
    key=["DA", "DB", "AFFINE_A", "AFFINE_B", "SYMMETRIC", "PRECISION"],
    cache_results=True,
)(_gram_kernel)


def segments(width: int) -> tuple[int, int]:
    """Two powers of two (the second may be 0) that cover `width` channels with the least padding, each at least 16."""
    whole = max(16, triton.next_power_of_2(width))
    first = whole // 2
    if first < 16 or width <= first:
        return whole, 0
    second = max(16, triton.next_power_of_2(width - first))
    return (whole, 0) if second == first else (first, second)


def _precision() -> str:
    """How float32 products are taken: three TF32 products (float32 accuracy), or one where the user allows TF32."""
    if torch.version.hip is not None:
        return "ieee"
    # Both of torch's ways to allow it are seen here; torch.get_float32_matmul_precision raises after the newer one.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


class _Rows:
    """A matrix (M, D) as the kernels read it: row i is x_i * scale_i + offset_i, or x_i where there is no scale."""

    def __init__(self, x: Tensor, scale: Tensor | None = None, offset: Tensor | None = None) -> None:
        self.x = x if x.stride(1) == 1 else x.contiguous()
        self.affine = scale is not None
        if scale is None:  # pointers that the kernel never follows
            self.scale = self.offset = x
        else:
            self.scale, self.offset = scale, torch.zeros_like(scale) if offset is None else offset

    def mean(self) -> Tensor:
        """Column means (D,) in float64, see `_mse`."""
        m, d = self.x.shape
        split_rows = 256
        splits = triton.cdiv(m, split_rows)
        out = self.x.new_empty(splits, d, dtype=torch.float64)
        tile = {"BLOCK_M": 16, "BLOCK_D": 128}
        _column_sum_kernel[(triton.cdiv(d, 128), splits)](
            self.x, self.scale, self.offset, out, m, split_rows, self.x.stride(0), D=d, AFFINE=self.affine, **tile
        )
        return out.sum(0) / m


def _gram(a: _Rows, b: _Rows, mean_a: Tensor, mean_b: Tensor, like: Tensor) -> Tensor:
    """sum over rows of (a - mean_a)(b - mean_b)^T, (DA, DB) float32, products in the dtype of `like`."""
    m, da, db = a.x.shape[0], a.x.shape[1], b.x.shape[1]
    tiles = triton.cdiv(da, 128) * triton.cdiv(db, 128)
    splits = max(1, min(triton.cdiv(TARGET_PROGRAMS, tiles), triton.cdiv(m, 1024)))
    symmetric = a is b
    out = a.x.new_empty(splits, da, db, dtype=torch.float32)
    gram_tuner[lambda meta: (triton.cdiv(da, meta["BLOCK_D"]), triton.cdiv(db, meta["BLOCK_D"]), splits)](
        a.x,
        b.x,
        mean_a,
        mean_b,
        a.scale,
        a.offset,
        b.scale,
        b.offset,
        like,
        out,
        m,
        triton.cdiv(m, splits),
        a.x.stride(0),
        b.x.stride(0),
        DA=da,
        DB=db,
        AFFINE_A=a.affine,
        AFFINE_B=b.affine,
        SYMMETRIC=symmetric,
        PRECISION=_precision(),
    )
    total = out.sum(0)
    return total.triu() + total.triu(1).T if symmetric else total


def _match(
    s: _Rows,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    rows: tuple[Tensor, Tensor, Tensor] | None,
    scale: float,
    *,
    gradients: bool,
    stats: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Launch `_match_kernel`: its sums (1 or 3, M) and dS (M, Ds) or None. `rows`: alpha, beta, gamma, each (M,)."""
    (m, ds), dt = s.x.shape, weight.shape[0]
    d0, d1 = segments(ds)
    sums = teacher.new_empty(3 if stats else 1, m, dtype=torch.float32)
    d_student = torch.empty_like(s.x, memory_format=torch.contiguous_format) if gradients else None
    match_tuner[lambda meta: (triton.cdiv(m, meta["BLOCK_M"]),)](
        s.x,
        weight,
        weight if bias is None else bias.contiguous(),
        teacher,
        *((sums,) * 3 if rows is None else rows),
        sums if d_student is None else d_student,
        sums,
        m,
        s.x.stride(0),
        weight.stride(0),
        teacher.stride(0),
        scale,
        DS=ds,
        DT=dt,
        D0=d0,
        D1=d1,
        HAS_BIAS=bias is not None,
        AFFINE=rows is not None,
        GRADIENTS=gradients,
        STATS=stats,
        PRECISION=_precision(),
    )
    return sums, d_student


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
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    with torch.cuda.device_of(student):  # Triton launches on the current device
        if objective == "cosine":
            return _cosine(_Rows(student), weight, bias, _Rows(teacher), gradients, moments)
        return _mse(_Rows(student), weight, bias, _target(teacher, objective == "normalised"), gradients, moments)


@torch.no_grad()
def moments(student: Tensor, teacher: Tensor, compute: torch.dtype) -> Moments:
    """Alignment moments alone, as `reference.moments` defines them, of products in the dtype `compute`."""
    with torch.cuda.device_of(student):
        return _all_moments(_Rows(student), _Rows(teacher), student.new_empty(0, dtype=compute))


def _target(teacher: Tensor, normalised: bool) -> _Rows:
    if not normalised:
        return _Rows(teacher)
    variance, mean = torch.var_mean(teacher.float(), dim=1, correction=0)
    rstd = (variance + 1e-5).rsqrt()  # F.layer_norm's eps
    return _Rows(teacher, rstd, -mean * rstd)


def _mse(s: _Rows, weight: Tensor, bias: Tensor | None, t: _Rows, gradients: bool, moments: bool) -> Result:
    (m, _), dt = s.x.shape, weight.shape[0]
    scale = 2.0 / dt
    rows = (torch.ones_like(t.scale), -t.scale, -t.offset) if t.affine else None
    sums, d_student = _match(s, weight, bias, t.x, rows, scale, gradients=gradients)
    loss = sums[0].sum() / (m * dt)
    if not (gradients or moments):
        return Result(loss)
    exact_s, exact_t = s.mean(), t.mean()
    mean_s, mean_t = exact_s.float(), exact_t.float()
    css, cts = _gram(s, s, mean_s, mean_s, s.x), _gram(t, s, mean_t, mean_s, s.x)
    stats = _moments(mean_s, mean_t, css, cts, t, s.x) if moments else None
    if not gradients:
        return Result(loss, moments=stats)
    # In float64: once the head has learnt the means this is a difference of equals, and dW multiplies it by mean_s.
    r0 = (weight.double() @ exact_s - exact_t + (0.0 if bias is None else bias.double())).float()
    d_weight = torch.addmm(cts, weight.float(), css, beta=-scale, alpha=scale).addr_(r0, mean_s, alpha=scale * m)
    return Result(loss, d_student, d_weight, r0 * (scale * m), stats)


def _moments(mean_s: Tensor, mean_t: Tensor, css: Tensor, cts: Tensor, t: _Rows, like: Tensor) -> Moments:
    n = torch.full_like(mean_s[0], t.x.shape[0])
    return Moments(n, mean_s, mean_t, css, cts, _gram(t, t, mean_t, mean_t, like))


def _all_moments(s: _Rows, t: _Rows, like: Tensor) -> Moments:
    mean_s, mean_t = s.mean().float(), t.mean().float()
    css, cts = _gram(s, s, mean_s, mean_s, like), _gram(t, s, mean_t, mean_s, like)
    return _moments(mean_s, mean_t, css, cts, t, like)


def _cosine(s: _Rows, weight: Tensor, bias: Tensor | None, t: _Rows, gradients: bool, moments: bool) -> Result:
    (m, ds), dt = s.x.shape, weight.shape[0]
    (pp, pt, tt), _ = _match(s, weight, bias, t.x, None, 0.0, gradients=False, stats=True)
    norm_p, norm_t = pp.sqrt().clamp_min(COSINE_EPS), tt.sqrt().clamp_min(COSINE_EPS)
    beta = -1 / (norm_p * norm_t)
    cos = -pt * beta
    loss, alpha = (1 - cos).mean(), cos / pp.clamp_min(COSINE_EPS**2)
    stats = _all_moments(s, t, s.x) if moments else None
    if not gradients:
        return Result(loss, moments=stats)
    # Times Dt, so that the residual and the scaled rows sit near 1 where float16 has its digits.
    alpha, beta = alpha * dt, beta * dt
    _, d_student = _match(s, weight, bias, t.x, (alpha, beta, torch.zeros_like(beta)), 1 / dt, gradients=True)
    zero_s, zero_t = alpha.new_zeros(ds), alpha.new_zeros(dt)
    scaled_s, scaled_t = _Rows(s.x, alpha), _Rows(t.x, beta)
    w = weight.float()
    sas, bts = _gram(scaled_s, s, zero_s, zero_s, s.x), _gram(scaled_t, s, zero_t, zero_s, s.x)
    sum_as, sum_bt = (scaled_s.mean() * m).float(), (scaled_t.mean() * m).float()
    b = zero_t if bias is None else bias.float()
    d_weight = torch.addmm(bts, w, sas).addr_(b, sum_as)
    return Result(loss, d_student, d_weight / dt, (w @ sum_as + b * alpha.sum() + sum_bt) / dt, stats)
