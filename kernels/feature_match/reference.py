"""The definition of the op in plain PyTorch: what every other implementation is tested and benchmarked against.

Shapes: S (M, Ds) student, W (Dt, Ds) weight, b (Dt,) bias, T (M, Dt) teacher, P = S W^T + b (M, Dt) projection.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Norms below this count as this (F.cosine_similarity's default).
COSINE_EPS = 1e-8


class Moments(NamedTuple):
    """First and second moments of one set of (student, teacher) rows, centred about their own means.

    Centred, because float32 sums of raw products lose the digits that matter when the mean is large against the
    spread (DINOv2 features); centred moments of disjoint sets still merge exactly (Chan, Golub, LeVeque 1983).
    All float32 (float64 for float64 inputs), outside the autograd graph.

    n:      ()         number of rows
    mean_s: (Ds,)      mean student row
    mean_t: (Dt,)      mean teacher row
    css:    (Ds, Ds)   sum over rows of (s - mean_s)(s - mean_s)^T
    cts:    (Dt, Ds)   sum over rows of (t - mean_t)(s - mean_s)^T
    ctt:    (Dt, Dt)   sum over rows of (t - mean_t)(t - mean_t)^T
    """

    n: Tensor
    mean_s: Tensor
    mean_t: Tensor
    css: Tensor
    cts: Tensor
    ctt: Tensor


class Result(NamedTuple):
    """Loss (), gradients of M * loss in S, W and b, and moments; None where not asked for.

    The 1/M is left to the backward pass: in float16 a gradient that already carries it (1/65536 rows) is below the
    smallest number before the loss scale can lift it.
    """

    loss: Tensor
    d_student: Tensor | None = None
    d_weight: Tensor | None = None
    d_bias: Tensor | None = None
    moments: Moments | None = None


def loss_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of sums, loss and moments: float64 where any input is, else float32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def mse(student: Tensor, weight: Tensor, bias: Tensor | None, teacher: Tensor) -> Tensor:
    """mean((P - T)^2) over all M * Dt elements; P in the inputs' dtype, the difference and the mean in float32."""
    projected, teacher = _operands(student, weight, bias, teacher)
    return F.mse_loss(projected, teacher)


def normalised(student: Tensor, weight: Tensor, bias: Tensor | None, teacher: Tensor) -> Tensor:
    """`mse` against layer-normalised teacher rows: a few channels with massive activations no longer dominate."""
    projected, teacher = _operands(student, weight, bias, teacher)
    return F.mse_loss(projected, normalise(teacher))


def cosine(student: Tensor, weight: Tensor, bias: Tensor | None, teacher: Tensor) -> Tensor:
    """mean over rows of 1 - cos(P, T)."""
    projected, teacher = _operands(student, weight, bias, teacher)
    return 1 - F.cosine_similarity(projected, teacher, dim=1, eps=COSINE_EPS).mean()


def normalise(teacher: Tensor) -> Tensor:
    """Each row of T (M, Dt) to mean 0 and variance 1, as LayerNorm does, without affine parameters."""
    return F.layer_norm(teacher, teacher.shape[1:])


OBJECTIVES = {"mse": mse, "normalised": normalised, "cosine": cosine}


def _operands(student: Tensor, weight: Tensor, bias: Tensor | None, teacher: Tensor) -> tuple[Tensor, Tensor]:
    dtype = loss_dtype(student, weight, bias, teacher)
    return F.linear(student, weight, bias).to(dtype), teacher.detach().to(dtype)


@torch.no_grad()
def moments(student: Tensor, teacher: Tensor, objective: str = "mse") -> Moments:
    """Alignment moments of the rows, in two passes (mean, then centred products)."""
    dtype = loss_dtype(student, teacher)
    s, t = student.to(dtype), teacher.to(dtype)
    t = normalise(t) if objective == "normalised" else t
    mean_s, mean_t = s.mean(0), t.mean(0)
    s, t = s - mean_s, t - mean_t
    n = torch.full((), student.shape[0], dtype=dtype, device=student.device)
    return Moments(n, mean_s, mean_t, s.T @ s, t.T @ s, t.T @ t)
