"""The analyses against NumPy's and SciPy's own float64 results, closed forms, and the invariances each one has."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from leap_dist.analysis import sep, spectra, token_summary
from leap_dist.analysis.moments import CrossMoments, LayerCka, principal_axes
from leap_dist.matching.cka import linear_cka_of_features

CPU = torch.device("cpu")
SHAPES = [(12, 20), (20, 12), (16, 16)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Tokens with a falling spectrum and a mean, as a network's are."""
    x = torch.randn(*shape, generator=generator(seed), dtype=torch.float64)
    return x * torch.linspace(2, 0.01, shape[-1], dtype=torch.float64) + 0.5


def rotation(size: int, seed: int = 1) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=generator(seed), dtype=torch.float64)).Q


def numpy_dims(x: np.ndarray, levels: tuple[float, ...] = spectra.LEVELS) -> list[int]:
    """By the definition: the smallest r whose squared singular values hold the level."""
    squared = np.linalg.svd(x, compute_uv=False) ** 2
    share = np.cumsum(squared) / squared.sum()
    return [int(np.argmax(share >= level)) + 1 for level in levels]


# --- spectra of single images ---


@pytest.mark.parametrize("shape", SHAPES)
def test_energies_and_dims_are_those_of_lapacks_svd(shape: tuple[int, int]) -> None:
    x = tokens(5, *shape)
    energy = spectra.energies(x)
    sigma = np.linalg.svd(x.numpy(), compute_uv=False)
    np.testing.assert_allclose(energy.sqrt(), sigma, atol=1e-7 * sigma.max())
    assert spectra.dims_at(spectra.cumulative(energy)).tolist() == [numpy_dims(image) for image in x.numpy()]
    share = sigma / sigma.sum(-1, keepdims=True)
    np.testing.assert_allclose(spectra.effective_rank(energy), np.exp(-(share * np.log(share)).sum(-1)), rtol=1e-6)


def test_threads_change_nothing_and_are_given_back() -> None:
    x, before = tokens(5, 12, 20), torch.get_num_threads()
    expected = spectra.energies(x), spectra.top_basis(x, 3)
    torch.set_num_threads(3)
    try:
        found = spectra.energies(x), spectra.top_basis(x, 3)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.abs(), b.abs())


def test_float32_tokens_of_low_rank_keep_their_dims_and_effective_rank() -> None:
    # Singular values from 1 to 1e-7, the rest of a 256 x 384 map zero: where a float32 Gram would see noise of 1e-4.
    sigma = torch.logspace(0, -7, 40, dtype=torch.float64)
    x = rotation(256)[:, :40] * sigma @ rotation(384, seed=2)[:40]
    energy = spectra.energies(x.float()[None])
    assert spectra.dims_at(spectra.cumulative(energy))[0].tolist() == numpy_dims(x.numpy())
    exact = spectra.effective_rank(sigma.square()).item()
    assert spectra.effective_rank(energy).item() == pytest.approx(exact, rel=2e-5)
    rounded = spectra.effective_rank(_float32_energies(x)).item()
    assert abs(rounded / exact - 1) > 1e-2  # the reason for float64


def _float32_energies(x: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(x.float() @ x.float().T).flip(-1).clamp_min(0).double()


def test_equal_singular_values_and_hand_made_ones() -> None:
    five = rotation(12)[:, :5] @ rotation(20)[:5]
    energy = spectra.energies(five[None].float())
    assert spectra.dims_at(spectra.cumulative(energy), (0.2, 0.79, 0.80, 0.81, 0.99)).tolist() == [[1, 4, 4, 5, 5]]
    assert spectra.effective_rank(energy).item() == pytest.approx(5, abs=1e-4)
    # Rounding must not cost a dimension, or a bin.
    assert spectra.dims_at(torch.tensor([0.8 - 1e-7, 0.9, 1.0]), (0.8,)).tolist() == [1]
    assert sep.fractions(torch.tensor([0.5 - 1e-7, 1.0]), (0.5,)).tolist() == [0.5]
    energy = torch.tensor([16.0, 9.0, 4.0, 1.0], dtype=torch.float64)  # shares .533 .833 .967 1
    assert spectra.dims_at(spectra.cumulative(energy)).tolist() == [2, 3, 3, 4]
    share = np.array([0.4, 0.3, 0.2, 0.1])
    assert spectra.effective_rank(energy).item() == pytest.approx(np.exp(-(share * np.log(share)).sum()))


def test_an_image_without_energy_counts_as_one_dimension() -> None:
    energy = spectra.energies(torch.zeros(2, 4, 6))
    assert spectra.dims_at(spectra.cumulative(energy)).tolist() == [[1] * 4] * 2
    assert spectra.effective_rank(energy).tolist() == [1, 1]
    assert spectra.captured(torch.zeros(2, 4, 6), torch.eye(6)).tolist() == [[1] * 6] * 2


def test_an_image_whose_tokens_are_equal_but_for_rounding_has_no_spectrum_about_its_mean() -> None:
    x = tokens(3, 50, 6).float()
    x[1] = torch.where(torch.arange(50)[:, None] % 3 > 0, 1e3, 1e3 + 2**-14)
    found = spectra.views(x)
    assert torch.equal(found["uncentred"], x)
    centred = found["centred"]
    assert torch.equal(centred[::2], (x - x.mean(1, keepdim=True))[::2]) and not centred[1].any()
    energy = spectra.energies(centred)
    assert spectra.dims_at(spectra.cumulative(energy))[1].tolist() == [1] * 4
    assert spectra.effective_rank(energy)[1] == 1


def test_spectra_know_nothing_of_rotation_and_scale_and_centred_ones_of_the_mean() -> None:
    x = tokens(3, 12, 20)
    same = 7.0 * rotation(12) @ x @ rotation(20, seed=2)
    shifted = x + 10 * torch.randn(3, 1, 20, generator=generator(), dtype=torch.float64)
    uncentred, centred = spectra.energies(x), spectra.energies(spectra.views(x)["centred"])
    torch.testing.assert_close(spectra.energies(same), 49 * uncentred)
    torch.testing.assert_close(spectra.energies(spectra.views(shifted)["centred"]), centred, atol=1e-9, rtol=1e-7)
    assert not torch.allclose(spectra.energies(shifted), uncentred, rtol=0.1)
    # About the mean token a rotation of tokens is not allowed, a permutation is.
    permuted = spectra.views(x[:, torch.randperm(12, generator=generator())])["centred"]
    torch.testing.assert_close(spectra.energies(permuted), centred)


# --- subspaces ---


@pytest.mark.parametrize("shape", SHAPES)
def test_top_basis_spans_what_the_svd_says(shape: tuple[int, int]) -> None:
    x = tokens(3, *shape)
    basis = spectra.top_basis(x, 4)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(4, dtype=torch.float64).expand(3, 4, 4))
    v = torch.linalg.svd(x).Vh[:, :4].mT
    torch.testing.assert_close(basis @ basis.mT, v @ v.mT, atol=1e-9, rtol=0)


def test_a_subspace_turned_by_30_degrees() -> None:
    axes = rotation(10)
    turned = axes.clone()
    angle = torch.tensor(torch.pi / 6, dtype=torch.float64)
    turned[:, 0] = angle.cos() * axes[:, 0] + angle.sin() * axes[:, 5]
    weights = torch.tensor([3.0, 2.0, 1.5], dtype=torch.float64)
    images = torch.stack([rotation(7)[:, :3] * weights @ basis[:, :3].T for basis in (axes, turned)])
    first, second = spectra.top_basis(images, 3)
    angles = spectra.principal_angles(first, second)
    torch.testing.assert_close(angles, torch.tensor([0.0, 0.0, 30.0], dtype=torch.float64), atol=3e-6, rtol=0)
    assert spectra.overlap(angles).item() == pytest.approx((1 + 1 + 0.75) / 3)


def test_principal_angles_are_scipys_and_rotate_along() -> None:
    a, b = (spectra.top_basis(tokens(30, 12, seed=seed), 4) for seed in (0, 1))
    found = spectra.principal_angles(a, b)
    np.testing.assert_allclose(found, np.rad2deg(scipy.linalg.subspace_angles(a, b))[::-1], atol=1e-6)
    q = rotation(12)
    torch.testing.assert_close(spectra.principal_angles(q @ a, q @ b), found)
    assert not torch.allclose(spectra.principal_angles(q @ a, b), found, atol=1)


def test_random_subspaces_overlap_by_k_over_d() -> None:
    noise = torch.randn(400, 40, 64, generator=generator())
    bases = spectra.top_basis(noise, 8)
    angles = spectra.principal_angles(bases[0::2], bases[1::2])
    assert spectra.overlap(angles).mean().item() == pytest.approx(8 / 64, rel=0.05)


def test_captured_energy_by_its_definition() -> None:
    x, v = tokens(3, 12, 20), rotation(20)
    found = spectra.captured(x, v)
    for d in (1, 7, 20):
        expected = (
            np.linalg.norm((x @ v[:, :d]).numpy(), axis=(1, 2)) ** 2 / np.linalg.norm(x.numpy(), axis=(1, 2)) ** 2
        )
        np.testing.assert_allclose(found[:, d - 1], expected)
    own = spectra.captured(x[:1], torch.linalg.svd(x[0]).Vh.mT)[0, :12]
    torch.testing.assert_close(own, spectra.cumulative(spectra.energies(x[:1]))[0])


# --- spectral energy pattern ---


def sep_curve(x: Tensor) -> Tensor:
    total, count = sep.power(x)
    return sep.curve(total / count, x.shape[-1])


@pytest.mark.parametrize("width", [16, 15, 2, 1])
def test_sep_is_the_mean_cumulated_full_fft(width: int) -> None:
    x = tokens(2, 9, width)
    power = np.abs(np.fft.fft(x.numpy(), axis=-1)) ** 2
    curve = (np.cumsum(power, -1) / power.sum(-1, keepdims=True)).mean((0, 1))
    np.testing.assert_allclose(sep_curve(x), curve, atol=1e-12)
    d = [int(np.argmax(curve >= level - 1e-9)) + 1 for level in sep.LEVELS]
    assert sep.fractions(sep_curve(x)).tolist() == [i / width for i in d]


def test_pure_tones_and_a_constant() -> None:
    width = 32
    channels = torch.arange(width, dtype=torch.float64)
    tone = torch.cos(2 * torch.pi * 3 * channels / width)[None]  # bins 3 and 29, half the energy each
    assert (sep.fractions(sep_curve(tone)) * width).tolist() == [4, 30, 30, 30, 30]
    assert (sep.fractions(sep_curve(torch.ones(1, width))) * width).tolist() == [1] * 5
    pulse = torch.zeros(1, width)
    pulse[0, 5] = 2.0  # flat: exactly the diagonal
    torch.testing.assert_close(sep_curve(pulse), (channels + 1) / width)


def test_white_noise_is_the_diagonal_and_half_the_energy_lies_below_half_the_bins_of_any_token() -> None:
    np.testing.assert_allclose(sep.null(384), sep.LEVELS, atol=1.5 / 384 + 1e-3)
    for x in (tokens(4, 10, 128), tokens(4, 10, 128) - 0.5, torch.randn(1, 1, 128, generator=generator())):
        x = x - x.mean(-1, keepdim=True)  # without the first bin, which has no partner
        assert sep.fractions(sep_curve(x))[0].item() == pytest.approx(0.5, abs=0.06)
    smooth = torch.randn(6, 128, generator=generator()).cumsum(-1)
    assert sep.fractions(sep_curve(smooth))[4].item() > 0.9  # low bins, and their mirror at the end
    assert sep_curve(smooth)[20].item() > 0.4


def test_sep_knows_nothing_of_scale_and_order_of_tokens_but_something_of_the_order_of_channels() -> None:
    smooth = torch.randn(6, 64, generator=generator()).cumsum(-1)
    curve = sep_curve(smooth)
    torch.testing.assert_close(sep_curve(3 * smooth.flip(0).roll(5, -1)), curve)
    permuted = sep_curve(smooth[:, sep.permutations(64, 1)[0]])
    assert (permuted - curve).abs().max() > 0.1
    # Permuted, only the mean over channels still differs from noise.
    noise = torch.arange(1, 65) / 64
    without_mean = smooth - smooth.mean(-1, keepdim=True)
    assert (sep_curve(without_mean[:, sep.permutations(64, 1)[0]]) - noise).abs().max() < 0.1


def test_tokens_of_zeros_have_no_pattern() -> None:
    x = tokens(4, 16)
    padded = torch.cat([x, torch.zeros(3, 16, dtype=torch.float64)])
    torch.testing.assert_close(sep_curve(padded), sep_curve(x))
    assert sorted(sep.permutations(10, 3)[2].tolist()) == list(range(10))


# --- moments and CKA ---


def test_moments_of_uneven_batches_with_a_large_mean() -> None:
    x = 300 + torch.randn(1000, 8, generator=generator())
    y = -50 + x[:, :5] * 0.2 + torch.randn(1000, 5, generator=generator(1))
    moments = CrossMoments(8, 5, CPU)
    for part_x, part_y in zip(x.split([1, 499, 400, 100]), y.split([1, 499, 400, 100]), strict=True):
        moments.update(part_x, part_y)
    a, b = x.double().numpy(), y.double().numpy()
    np.testing.assert_allclose(moments.mean_x, a.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.scatter, (b - b.mean(0)).T @ (a - a.mean(0)), atol=1e-2, rtol=1e-5)
    np.testing.assert_allclose(moments.uncentred(), b.T @ a, rtol=1e-7)
    assert moments.n.item() == 1000


def test_rows_that_are_equal_but_for_rounding_have_no_spread() -> None:
    row = torch.linspace(-700, 900, 8)
    rows = torch.where(torch.arange(1000)[:, None] % 3 > 0, row, row.nextafter(torch.tensor(1e9)))
    rows[:, 3] = 0.1  # not a sum of powers of two: its mean is rounded
    moments = CrossMoments(8, 8, CPU)
    for part in rows.split([1, 499, 400, 100]):
        moments.update(part, part)
    assert moments.scatter.any() and not moments.spread().any()
    rows[7, 3] += 0.1  # one number of one channel
    moments.update(rows, rows)
    assert torch.equal(moments.spread(), moments.scatter)


def test_principal_axes_diagonalise_strongest_first() -> None:
    x = tokens(200, 6)
    values, vectors = principal_axes(x.T @ x)
    torch.testing.assert_close(vectors * values @ vectors.T, x.T @ x)
    assert (values.diff() <= 0).all()


def test_cka_of_every_pair_of_layers_and_its_invariances() -> None:
    base = tokens(400, 6).float()
    students = [base, base[:, :3] + 4, torch.randn(400, 5, generator=generator())]
    q = rotation(6).float()
    last_bit = torch.where(torch.arange(400)[:, None] % 3 > 0, 1e3, 1e3 + 2**-14).expand(400, 2)
    teachers = [5 * base @ q - 2, base * torch.linspace(1, 5, 6), torch.full((400, 2), 0.1), last_bit]
    cka = LayerCka([6, 3, 5], [6, 6, 2, 2], CPU)
    for rows in torch.arange(400).split(90):
        cka.update([s[rows] for s in students], [t[rows] for t in teachers])
    matrix = cka.matrix()
    expected = torch.stack([torch.stack([linear_cka_of_features(s, t) for t in teachers]) for s in students])
    torch.testing.assert_close(matrix, expected, atol=1e-6, rtol=1e-6)
    assert matrix[0, 0].item() == pytest.approx(1, abs=1e-6)  # rotation, scale, shift: no difference
    assert matrix[0, 1].item() < 0.999  # another map: one
    assert matrix[:, 2:].tolist() == [[0, 0]] * 3
    assert matrix[2, 0].item() < 6 / 400 * 3  # independent: the bias of few rows


def test_summary_is_the_mean_of_the_spectra_of_a_batch() -> None:
    x = tokens(4, 12, 20).float()
    centred = (x - x.mean(1, keepdim=True)).double().numpy()
    found = token_summary(x.requires_grad_())
    assert all(value.ndim == 0 for value in found.values())
    dims = np.array([numpy_dims(image, (0.8, 0.9, 0.95, 0.99)) for image in centred])
    assert [found[f"dims_{level}"].item() for level in (80, 90, 95, 99)] == dims.mean(0).tolist()
    sigma = np.linalg.svd(centred, compute_uv=False)
    share = sigma / sigma.sum(-1, keepdims=True) + 1e-30
    assert found["effective_rank"].item() == pytest.approx(np.exp(-(share * np.log(share)).sum(-1)).mean(), rel=1e-5)
    half, *_, most = sep.fractions(sep_curve(x))
    assert (found["sep_50"], found["sep_90"]) == (half, most)
