"""Mixup, CutMix and soft labels: against timm's, by enumeration, and whoever shares the batch."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import timm.data
import torch
from timm.data.mixup import mixup_target

from leap_dist.config import DataConfig
from leap_dist.data import Mix, check_groups, draw_mix, soft_labels
from leap_dist.data.chance import seeded
from leap_dist.data.mixup import partners
from leap_dist.data.order import Share
from leap_dist.errors import UserError
from leap_dist.runtime.distributed import World

CPU = torch.device("cpu")
DEIT = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}


def config(global_batch: int, group: int, **options: object) -> DataConfig:
    return DataConfig(**{"train": "unused", "global_batch": global_batch, "mixup_group": group, **options})


def drawn(options: DataConfig, seed: int) -> Mix:
    """The mix of a whole global batch."""
    return draw_mix(options, torch.arange(options.global_batch), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("alphas", [{}, DEIT])
@pytest.mark.parametrize(("ranks", "accumulation", "nodes"), [(1, 1, 1), (1, 4, 1), (2, 2, 2), (4, 1, 2), (4, 2, 1)])
def test_a_mix_does_not_depend_on_who_shares_the_batch(
    ranks: int, accumulation: int, nodes: int, alphas: dict[str, float]
) -> None:
    options = config(64, 8, image_size=4, **alphas)
    images, labels = torch.rand(64, 3, 4, 4, dtype=torch.float64), torch.rand(64, 5)
    kinds = set()
    for seed in range(4 if alphas else 1):
        whole = drawn(options, seed)
        kinds.add(whole.box is None)
        seen = []
        for rank, part in itertools.product(range(ranks), range(accumulation)):
            place = World(rank, ranks, rank % (ranks // nodes), ranks // nodes, CPU)
            positions = torch.from_numpy(Share(64 // ranks // accumulation, accumulation, place).positions(part))
            mix = draw_mix(options, positions, torch.Generator().manual_seed(seed))
            assert torch.equal(mix.images(images[positions]), whole.images(images)[positions])
            assert torch.equal(mix.labels(labels[positions]), whole.labels(labels)[positions])
            seen += positions.tolist()
        assert sorted(seen) == list(range(64))
    assert kinds == ({True, False} if alphas else {True})


def test_at_alpha_one_the_draws_are_leaps() -> None:
    """One uniform number, then the pairs: what earlier runs were trained on, to the bit."""
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        lam = torch.rand((), generator=generator).item()
        mix = drawn(config(16, 4), seed)
        assert mix.lam == lam and mix.box is None
        assert torch.equal(mix.rows, torch.from_numpy(partners(4, 4, generator)))


def test_mixup_blends_pairs_with_one_uniform_lambda() -> None:
    lams = []
    for seed in range(400):
        mixed = drawn(config(16, 4), seed).images(torch.eye(16, dtype=torch.float64))
        lam = mixed.diagonal()
        assert torch.equal(lam, lam[:1].expand(16))
        torch.testing.assert_close(mixed.sum(1), torch.ones(16, dtype=torch.float64), rtol=0, atol=1e-12)
        assert ((mixed > 0).sum(1) == 2).all()  # itself and one other, never itself twice
        lams.append(lam[0].item())
    assert abs(np.mean(lams) - 1 / 2) < 0.05 and abs(np.var(lams) - 1 / 12) < 0.012


def test_lambda_has_the_variance_of_its_beta_distribution() -> None:
    for alpha in (0.2, 0.8, 4.0):
        lams = [drawn(config(2, 2, mixup_alpha=alpha), seed).lam for seed in range(1000)]
        assert abs(np.mean(lams) - 1 / 2) < 0.05
        assert np.var(lams) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.12)


def test_every_other_member_of_a_group_is_an_equally_likely_partner() -> None:
    counts = torch.zeros(12, 12)
    draws = 3000
    for seed in range(draws):
        counts[torch.arange(12), partners(3, 4, torch.Generator().manual_seed(seed))] += 1
    same_group = torch.arange(12)[:, None] % 3 == torch.arange(12) % 3
    expected = (same_group & ~torch.eye(12, dtype=torch.bool)) / 3
    assert ((counts / draws - expected).abs() < 0.05).all() and (counts[expected == 0] == 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_images_and_labels_are_mixed_as_timm_mixes_a_pair(smoothing: float) -> None:
    """Of two samples each is the other's partner, which is timm's flipped batch."""
    options, labels = config(2, 2, image_size=12, **DEIT), torch.tensor([1, 3])
    images = torch.rand(2, 3, 12, 12)
    boxes = 0
    for seed in range(30):
        mix = drawn(options, seed)
        expected = images * mix.lam + images.flip(0) * (1 - mix.lam)
        if mix.box is not None:
            boxes += 1
            top, bottom, left, right = mix.box
            assert mix.lam == 1 - (bottom - top) * (right - left) / 144
            expected = images.clone()
            expected[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
        torch.testing.assert_close(mix.images(images), expected)
        target = mixup_target(labels, 5, mix.lam, smoothing)
        torch.testing.assert_close(mix.labels(soft_labels(labels, 5, smoothing, CPU)), target)
    assert 5 < boxes < 25


def test_cuts_are_as_frequent_and_as_large_as_timms() -> None:
    timms = timm.data.Mixup(num_classes=2, mode="batch", **DEIT)
    ours, theirs = [], []
    for seed in range(800):
        mix = drawn(config(2, 2, image_size=32, **DEIT), seed)
        ours.append((mix.box is not None, mix.lam))
        with seeded(seed):
            images, target = timms(torch.arange(2.0)[:, None, None, None].expand(2, 1, 32, 32).clone(), torch.arange(2))
        theirs.append((bool(((images == 0) | (images == 1)).all()), (target[0, 0].item() - 0.05) / 0.9))
    cut, lam = np.array(ours).T
    their_cut, their_lam = np.array(theirs).T
    assert abs(cut.mean() - their_cut.mean()) < 0.06
    for of_ours, of_theirs in ((lam[cut == 1], their_lam[their_cut == 1]), (lam[cut == 0], their_lam[their_cut == 0])):
        assert abs(of_ours.mean() - of_theirs.mean()) < 0.06 and abs(of_ours.std() - of_theirs.std()) < 0.04


def test_drawing_leaves_the_global_generators_alone() -> None:
    def draw_all() -> tuple[float, float, float]:
        return random.random(), np.random.random(), torch.rand(()).item()

    with seeded(5):
        expected = draw_all()
    with seeded(5):
        for seed in range(4):
            drawn(config(8, 8, image_size=8, **DEIT), seed)
        assert draw_all() == expected


def test_a_label_that_is_no_class_is_refused() -> None:
    assert soft_labels(torch.tensor([0, 2]), 3, 0.3, CPU)[1].tolist() == pytest.approx([0.1, 0.1, 0.8])
    for labels, said in (([0, -1], "label -1"), ([3, 0], "label 3")):
        with pytest.raises(UserError, match=rf"student.num_classes=3: data.train has a sample of {said}.*from 0 to 2"):
            soft_labels(torch.tensor(labels), 3, 0.1, CPU)


def test_a_group_that_does_not_fit_a_micro_batch_is_refused() -> None:
    check_groups(8, 32)
    with pytest.raises(
        UserError, match=r"data.mixup_group=8: must divide the micro-batch of 12 .*valid: 2, 3, 4, 6, 12"
    ):
        check_groups(8, 12)
