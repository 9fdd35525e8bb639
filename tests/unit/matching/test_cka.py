"""Linear CKA from merged moments, against its definition in float64 and LEAP's measured values."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce

import numpy as np
import pytest
import torch
from torch import Tensor

from leap_dist.matching.cka import (
    constant,
    linear_cka,
    linear_cka_of_features,
    mean_cosine,
    merge,
    merged_shares,
    share_of,
)
from leap_kernels import Moments, alignment_moments, feature_match


def score(x: Tensor, y: Tensor, weight: Tensor | None = None) -> float:
    """CKA by the training path: moments of the loss op, float32, then `linear_cka`."""
    weight = torch.eye(y.shape[1], x.shape[1]) if weight is None else weight
    moments = moments_of(x.float(), y.float(), weight)
    return linear_cka(moments, weight).item()


def moments_of(x: Tensor, y: Tensor, weight: Tensor) -> Moments:
    return feature_match(x, weight.to(x.dtype), None, y, moments=True)[1]


def randn_pair(n: int, d: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(n + d)
    y = torch.randn(n, d, generator=g)
    return 0.7 * y + 0.5 * torch.randn(n, d, generator=g) + 3, y


def sine(n: int, d: int, a: float, b: float, c: float, bias: float) -> Tensor:
    i, j = torch.arange(n).double()[:, None], torch.arange(d).double()[None]
    return torch.sin(a * i + b * j + c * i * j / (n + d)) + bias * (j + 1) / d


PUBLISHED = [  # inputs, CKA in float64, mean cosine; measured on the published implementation
    (randn_pair(8, 4), 0.552731869527, -0.2710437775),
    (randn_pair(256, 32), 0.696250247468, 0.2284602970),
    (randn_pair(2048, 384), 0.716204407543, 0.2238256931),
    ((sine(20, 64, 0.11, 0.5, 2, 0), sine(20, 64, 0.13, 0.45, 2.2, 1)), 0.972494424088, None),
]


def by_definition(x: Tensor, y: Tensor) -> float:
    """CKA from the Gram matrices of the rows (Kornblith et al. 2019, equations 3 and 4), in numpy's float64."""
    k, l = ((a - a.mean(0)) @ (a - a.mean(0)).T for a in (x.double().numpy(), y.double().numpy()))  # noqa: E741
    return float((k * l).sum() / np.linalg.norm(k) / np.linalg.norm(l))


@pytest.mark.parametrize(("pair", "cka", "cosine"), PUBLISHED)
def test_values_of_the_published_implementation(pair: tuple[Tensor, Tensor], cka: float, cosine: float | None) -> None:
    x, y = pair
    # Another CPU's logarithms and cosines round `randn`'s float32 numbers differently, by a few units in the last
    # place, and so the score of these inputs; 16 units are 1e-6. The sines are float64.
    assert linear_cka_of_features(x, y).item() == pytest.approx(cka, abs=1e-6 if x.dtype == torch.float32 else 1e-9)
    assert linear_cka_of_features(x, y).item() == pytest.approx(by_definition(x, y), abs=1e-9)
    assert score(x, y) == pytest.approx(cka, abs=1e-6)
    if cosine is not None:
        assert mean_cosine(x, y).item() == pytest.approx(cosine, abs=1e-6)


def test_features_of_different_widths() -> None:
    x, y = sine(96, 24, 0.37, 1.3, 0.9, 2), sine(96, 40, 0.41, 0.77, 1.7, 0)
    assert linear_cka_of_features(x, y).item() == pytest.approx(0.516312527212, abs=1e-9)


@pytest.mark.parametrize(("ds", "dt"), [(12, 40), (40, 12)])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_projected_features_wide_and_narrow_and_far_from_zero(ds: int, dt: int, offset: float) -> None:
    g = torch.Generator().manual_seed(0)
    s, w = torch.randn(2000, ds, generator=g) + offset, torch.randn(dt, ds, generator=g)
    t = torch.randn(2000, dt, generator=g) + s @ torch.randn(ds, dt, generator=g) / ds**0.5 + offset
    truth = linear_cka_of_features(s.double() @ w.double().T, t).item()
    assert score(s, t, w) == pytest.approx(truth, abs=1e-5)


def test_constant_features_and_tiny_scale_score_zero_as_published() -> None:
    y = sine(20, 64, 0.13, 0.45, 2.2, 1)
    assert score(torch.ones(20, 64), y) == 0.0
    assert linear_cka_of_features(torch.ones(20, 64), y) == 0.0
    assert score(1e-9 * y, y) == 0.0  # the guard: the product of norms is below 1e-12
    assert score(1e-4 * y, y) == pytest.approx(1.0, abs=1e-6)


def even_rows(n: int, d: int, level: float, dtype: torch.dtype) -> Tensor:
    """Rows that are equal but for the last bit: every third is the next number. On any CPU they are not constant."""
    row = (level * torch.linspace(0.7, -1.3, d, dtype=torch.float64)).to(dtype)
    return torch.where(torch.arange(n)[:, None] % 3 > 0, row, row.nextafter(torch.full_like(row, math.inf)))


def by(impl: str, x: Tensor, y: Tensor) -> Moments:
    return feature_match(x, x.new_ones(y.shape[1], x.shape[1]), None, y, impl=impl, moments=True)[1]


def parts(x: Tensor, y: Tensor, rows: int) -> list[Moments]:
    return [alignment_moments(a, b) for a, b in zip(x.split(rows), y.split(rows), strict=True)]


WAYS: dict[str, Callable[[Tensor, Tensor], Moments]] = {
    "gram": lambda x, y: by("gram", x, y),
    "reference": lambda x, y: by("reference", x, y),
    "alone": alignment_moments,
    "micro-batches": lambda x, y: reduce(merge, parts(x, y, len(x) // 3)),
    "ranks": lambda x, y: over_ranks(parts(x, y, len(x) // 2)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [0.0, 1e-3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("n", [20, 1000])
def test_features_that_are_constant_but_for_rounding_score_zero(n: int, level: float, dtype: torch.dtype) -> None:
    """By every way to the score, and with each other, where what rounding left would agree."""
    x, y = even_rows(n, 12, level, dtype), sine(n, 9, 0.13, 0.45, 2.2, 1).to(dtype)
    weight = torch.randn(9, 12, generator=torch.Generator().manual_seed(0), dtype=dtype)
    for a, b in ((x, y), (y, x), (x, x)):
        assert linear_cka_of_features(a, b) == 0.0
        for way, moments in WAYS.items():
            assert linear_cka(moments(a, b), weight if b is y else None) == 0.0, way
    x[0, 0], y[0, 0] = 0.0, float("nan")
    assert math.isnan(linear_cka_of_features(y, torch.ones_like(x)))
    assert math.isnan(linear_cka(alignment_moments(torch.ones_like(x), y), None))


@pytest.mark.parametrize("n", [3, 49, 777, 1000, 1024])
def test_rows_summed_one_after_another_are_still_seen_to_be_constant(n: int) -> None:
    """The order that rounds most, that of a plain loop; and spread of four times what rounding may leave is spread."""
    value = np.random.default_rng(0).uniform(1, 10, 500).astype(np.float32)
    mean = np.add.accumulate(np.tile(value * np.float32(1 / n), (n, 1)), dtype=np.float32)[-1]
    left = torch.from_numpy(value.astype(np.float64) - mean)
    assert left.abs().max() > 0
    rows, mean = torch.tensor(n, dtype=torch.float32), torch.from_numpy(mean)
    assert constant(rows, mean, n * left.square(), torch.float32)
    squares = n * left.square()
    squares[7] = n * (4 * (n + 2) * 2**-24 * mean[7].double()) ** 2
    assert not constant(rows, mean, squares, torch.float32)


def test_constant_channels_among_others_leave_the_score_as_it_is() -> None:
    x, y = randn_pair(256, 32)
    x[:, 5] = 1e3
    assert score(x, y) == pytest.approx(by_definition(x, y), abs=1e-6)
    assert score(y, x) == pytest.approx(by_definition(x, y), abs=1e-6)
    x[:, 1:] = 3.0  # one channel is left
    assert score(x, y) == pytest.approx(by_definition(x, y), abs=1e-6)
    assert linear_cka_of_features(x, y).item() == pytest.approx(by_definition(x, y), abs=1e-9)


def test_a_spread_that_is_small_against_the_mean_is_scored() -> None:
    x, y = sine(200, 24, 0.37, 1.3, 0.9, 2).float() + 1e3, sine(200, 24, 0.41, 0.77, 1.7, 0).float()
    # The mean is off by up to 202 u 1000 = 0.012, to the square against a variance of 0.5.
    assert score(x, y) == pytest.approx(by_definition(x, y), abs=3e-4)
    assert linear_cka_of_features(x, y).item() == pytest.approx(by_definition(x, y), abs=1e-9)


@pytest.mark.parametrize("scale", [1e4, 1e8])
def test_no_float32_overflow(scale: float) -> None:
    """The published product of squared norms overflows here and reads 0."""
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(1)) * scale
    assert score(x, x) == pytest.approx(1.0, abs=1e-6)
    assert linear_cka_of_features(x, x).item() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    x, y = randn_pair(256, 32)
    plain = score(x, y), linear_cka_of_features(x, y).item()
    with torch.autocast("cpu", dtype):
        assert (score(x, y), linear_cka_of_features(x, y).item()) == plain


def test_nan_is_reported() -> None:
    x, y = randn_pair(256, 32)
    x[3, 3] = float("nan")
    assert math.isnan(score(x, y))


SPLITS = [[256, 256], [1, 511], [100, 300, 112], [512], [1, 1, 510]]


def close(a: Moments, b: Moments) -> None:
    for name, x, y in zip(Moments._fields, a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5 * y.abs().max().item(), msg=name)


def drifting_pair() -> tuple[Tensor, Tensor, Tensor]:
    """Parts of these rows differ in mean, as batches of different images do."""
    x, y = randn_pair(512, 24)
    drift = torch.linspace(0, 5, 512)[:, None]
    return x + drift, y - 2 * drift, torch.randn(24, 24, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("split", SPLITS)
def test_merged_micro_batches_are_the_whole_batch(split: list[int]) -> None:
    x, y, w = drifting_pair()
    parts = [moments_of(a, b, w) for a, b in zip(x.split(split), y.split(split), strict=True)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merge(merged, part)
    close(merged, moments_of(x, y, w))


def over_ranks(parts: list[Moments]) -> Moments:
    """As each of so many ranks gets them from the sum of all shares."""
    shares = [share_of(part, rank, len(parts)) for rank, part in enumerate(parts)]
    return merged_shares(torch.stack(shares).sum(0), parts[0], len(parts))


@pytest.mark.parametrize("split", SPLITS)
def test_score_over_ranks_is_that_of_the_concatenated_batch(split: list[int]) -> None:
    x, y, w = drifting_pair()
    parts = [moments_of(a, b, w) for a, b in zip(x.split(split), y.split(split), strict=True)]
    merged = over_ranks(parts)
    close(merged, moments_of(x, y, w))
    truth = linear_cka_of_features(x.double() @ w.double().T, y)
    assert abs(linear_cka(merged, w) - truth) < 1e-6


@pytest.mark.parametrize(("n", "d"), [(512, 384), (2048, 384), (2048, 96)])
def test_independent_features_read_d_over_n_plus_d(n: int, d: int) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, d, generator=g), torch.randn(n, d, generator=g)
    assert score(x, y) == pytest.approx(d / (n + d), rel=0.03)


def test_mean_of_per_rank_scores_is_biased_upward() -> None:
    """8 ranks of 64 rows against one batch of 512: D / (N + D) at N = 64, not at N = 512."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(512, 64, generator=g), torch.randn(512, 64, generator=g)
    per_rank = sum(score(a, b) for a, b in zip(x.split(64), y.split(64), strict=True)) / 8
    assert score(x, y) == pytest.approx(64 / (512 + 64), rel=0.1)
    assert per_rank == pytest.approx(0.5, rel=0.05)


def test_mean_cosine() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    y = torch.tensor([[3.0, 0.0], [0.0, -1.0], [1.0, 0.0]])
    assert mean_cosine(x, y).item() == pytest.approx((1 - 1 + 0.5**0.5) / 3)
    assert mean_cosine(x.half()[None], y[None]).dtype == torch.float32
    assert mean_cosine(torch.zeros(3, 2), y) == mean_cosine(y, torch.zeros(3, 2)) == 0
