"""Terms of the objective that are functions of two tensors (arXiv 2511.15572, and its predecessor 2412.19055).

Each takes low precision and answers in float32, or float64 for float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def spectral_loss(tokens: Tensor, target: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean squared error between the 2-D spectra of two maps (B, rows x columns, D): 0-d.

    Orthonormal real FFT over the token grid, channel by channel; real and imaginary parts count alike. It is linear,
    so the spectrum of the difference is taken, once.
    """
    difference = tokens.to(_wide(tokens)) - target.to(_wide(tokens))
    spectrum = torch.fft.rfft2(difference.unflatten(1, grid), dim=(1, 2), norm="ortho")
    return torch.view_as_real(spectrum).square().mean()


def soft_distillation(logits: Tensor, teacher_logits: Tensor, tau: float) -> Tensor:
    """tau^2 KL(teacher || student) of two (B, classes) softened by tau, the mean over images: 0-d (Hinton et al. 2015).

    The order is that of torch's KLDiv(student, teacher): the teacher's probabilities weigh the logarithms.
    """
    student = F.log_softmax(logits.to(_wide(logits)) / tau, dim=1)
    teacher = F.log_softmax(teacher_logits.to(student) / tau, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * tau**2


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
