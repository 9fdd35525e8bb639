"""The loss terms against float64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from leap_dist.matching.losses import soft_distillation, spectral_loss


def softmax(logits: np.ndarray) -> np.ndarray:
    exponents = np.exp(logits - logits.max(1, keepdims=True))
    return exponents / exponents.sum(1, keepdims=True)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (5, 2), (1, 1)])
def test_spectral_is_the_error_of_numpys_spectra(grid: tuple[int, int]) -> None:
    rows, columns = grid
    tokens, target = np.random.default_rng(0).normal(size=(2, 3, rows, columns, 7))
    parts = []
    for each in (tokens, target):
        spectrum = np.fft.rfft2(each, axes=(1, 2), norm="ortho")
        parts.append(np.stack([spectrum.real, spectrum.imag]))
    expected = ((parts[0] - parts[1]) ** 2).mean()
    flat = [torch.from_numpy(each.reshape(3, rows * columns, 7)) for each in (tokens, target)]
    assert spectral_loss(*flat, grid).item() == pytest.approx(expected, rel=1e-12)
    single = spectral_loss(*(each.float() for each in flat), grid)
    assert single.dtype == torch.float32 and single.item() == pytest.approx(expected, rel=1e-5)
    assert spectral_loss(flat[0].bfloat16(), flat[1].bfloat16(), grid).item() == pytest.approx(expected, rel=0.02)


def test_spectral_weighs_a_pure_tone_by_how_often_the_half_spectrum_holds_it() -> None:
    """A cosine along columns has two coefficients of which the real FFT keeps one; along rows it keeps both."""
    phase = 2 * torch.pi * torch.arange(8, dtype=torch.float64) / 8
    along_columns, along_rows = (each.cos().reshape(1, 64, 1) for each in (phase.repeat(8), phase.repeat_interleave(8)))
    zero = torch.zeros(1, 64, 1)
    assert spectral_loss(along_columns, zero, (8, 8)).item() == pytest.approx(16 / 80, rel=1e-9)
    assert spectral_loss(along_rows, zero, (8, 8)).item() == pytest.approx(32 / 80, rel=1e-9)


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_soft_distillation_is_the_divergence_by_hand(tau: float) -> None:
    student, teacher = 2 * np.random.default_rng(1).normal(size=(2, 6, 10))
    p, q = softmax(teacher / tau), softmax(student / tau)
    expected = (p * np.log(p / q)).sum(1).mean() * tau**2
    assert soft_distillation(torch.from_numpy(student), torch.from_numpy(teacher), tau).item() == pytest.approx(
        expected
    )
    half = soft_distillation(torch.from_numpy(student).bfloat16(), torch.from_numpy(teacher).bfloat16(), tau)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(expected, rel=0.02)
    same = torch.from_numpy(teacher)
    assert soft_distillation(same, same + 5, tau).item() == pytest.approx(0, abs=1e-12)  # logits have no level


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    tokens, target = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True), torch.randn(2, 6, 3).double()
    assert gradcheck(lambda x: spectral_loss(x, target, (2, 3)), tokens)
    logits, teacher = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), torch.randn(4, 5).double()
    assert gradcheck(lambda x: soft_distillation(x, teacher, 2.0), logits)
