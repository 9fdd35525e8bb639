"""Linear CKA from merged moments, against its definition in float64 and LEAP's measured values."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor

from leap_dist.matching.cka import linear_cka, linear_cka_of_features, mean_cosine, merge, merge_over_ranks
from leap_kernels import Moments, feature_match


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


@pytest.mark.parametrize(("pair", "cka", "cosine"), PUBLISHED)
def test_values_of_the_published_implementation(pair: tuple[Tensor, Tensor], cka: float, cosine: float | None) -> None:
    x, y = pair
    assert linear_cka_of_features(x, y).item() == pytest.approx(cka, abs=1e-9)
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


def over_ranks(parts: list[Moments]) -> list[Moments]:
    """`merge_over_ranks` on one thread per rank, with an all-reduce that waits for every rank."""
    slots, barrier = [torch.empty(0)] * len(parts), Barrier(len(parts), timeout=30)

    def rank(index: int) -> Moments:
        def all_reduce_sum(x: Tensor) -> Tensor:
            slots[index] = x
            barrier.wait()
            total = torch.stack(slots).sum(0)
            barrier.wait()
            return total

        return merge_over_ranks(parts[index], all_reduce_sum)

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(rank, range(len(parts))))


@pytest.mark.parametrize("split", SPLITS)
def test_score_over_ranks_is_that_of_the_concatenated_batch(split: list[int]) -> None:
    x, y, w = drifting_pair()
    whole = moments_of(x, y, w)
    ranks = over_ranks([moments_of(a, b, w) for a, b in zip(x.split(split), y.split(split), strict=True)])
    for merged in ranks:
        close(merged, whole)
        assert torch.equal(merged.ctt, ranks[0].ctt)
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
