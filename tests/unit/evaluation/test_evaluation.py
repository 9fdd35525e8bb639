"""Evaluation of frozen features, against scikit-learn, numpy and separable data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from leap_dist.config import EvaluationConfig, load
from leap_dist.data import build_eval_loader
from leap_dist.errors import UserError
from leap_dist.evaluation import evaluate
from leap_dist.evaluation.features import FeatureSet, check_finite, extract, in_step, merge
from leap_dist.evaluation.held_out import HeldOut
from leap_dist.evaluation.knn import knn_accuracy, knn_predict
from leap_dist.evaluation.probe import probe_accuracy, train_probe
from small_sets import ALONE, SIZE, write
from small_sets import config as data_config

CPU = torch.device("cpu")


def blobs(count: int, *, spread: float, seed: int, classes: int = 5, width: int = 16) -> FeatureSet:
    """Gaussian blobs around fixed random centres; the same centres whatever the seed."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    features = centres[labels] + spread * torch.randn(count, width, generator=generator)
    return FeatureSet(features, labels, torch.arange(count))


@pytest.mark.parametrize("k", [1, 7, 20])
def test_knn_equals_sklearn_with_the_same_weights(k: int) -> None:
    train, val = blobs(300, spread=1.5, seed=0), blobs(1500, spread=1.5, seed=1)  # more rows than one chunk
    expected = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    expected.fit(train.features.double().numpy(), train.labels.numpy())
    predicted = knn_predict(train, val.features, k, CPU).numpy()
    assert (predicted == expected.predict(val.features.double().numpy())).mean() > 0.999
    assert 0.5 < knn_accuracy(train, val, k, CPU) < 0.99


def test_knn_votes_are_weighted_by_similarity() -> None:
    # One neighbour of class 1 at cosine 1 against two of class 0 at 0.9: e^(1/0.07) > 2 e^(0.9/0.07).
    near = [[0.9, 0.19**0.5], [0.9, -(0.19**0.5)]]
    train = FeatureSet(torch.tensor([*near, [1.0, 0.0]]), torch.tensor([0, 0, 1]), torch.arange(3))
    assert knn_predict(train, torch.tensor([[5.0, 0.0]]), 3, CPU).item() == 1


def test_knn_takes_fewer_samples_than_neighbours() -> None:
    train = blobs(6, spread=0.01, seed=0)
    assert knn_accuracy(train, train, 1, CPU) == 1.0
    assert 0 < knn_accuracy(train, train, 20, CPU) <= 1.0


def test_probe_separates_separable_blobs_and_finds_no_signal_in_noise() -> None:
    train, val = blobs(1000, spread=0.3, seed=0), blobs(500, spread=0.3, seed=1)
    options = {"epochs": 10, "lr": 0.1, "seed": 0, "device": CPU}
    assert probe_accuracy(train, val, **options) == 1.0
    shuffled = val._replace(labels=val.labels[torch.randperm(500, generator=torch.Generator().manual_seed(0))])
    assert probe_accuracy(train, shuffled, **options) < 0.3


def test_probe_comes_close_to_logistic_regression() -> None:
    train, val = blobs(1000, spread=2.0, seed=0), blobs(2000, spread=2.0, seed=1)
    best = LogisticRegression(C=1e4, max_iter=500).fit(train.features.numpy(), train.labels.numpy())
    expected = best.score(val.features.numpy(), val.labels.numpy())
    assert probe_accuracy(train, val, epochs=50, lr=0.1, seed=0, device=CPU) == pytest.approx(expected, abs=0.02)


def test_probe_depends_on_its_seed_alone() -> None:
    train = blobs(500, spread=2.0, seed=0)

    def weight(seed: int) -> Tensor:
        return train_probe(train, epochs=2, lr=0.1, seed=seed, device=CPU, classes=5).weight

    first = weight(3)
    torch.manual_seed(123)
    assert torch.equal(first, weight(3))
    assert not torch.equal(first, weight(4))


def test_probe_reports_the_last_epoch() -> None:
    # Training labels are noise, so that accuracy over epochs wanders: the best of them would be higher than the last.
    train, val = blobs(400, spread=3.0, seed=0), blobs(100, spread=3.0, seed=1)
    options = {"epochs": 20, "lr": 5.0, "seed": 0, "device": CPU}
    probe = train_probe(train, classes=5, **options)
    last = (probe(val.features).argmax(dim=1) == val.labels).double().mean().item()
    assert probe_accuracy(train, val, **options) == last


def test_evaluate_reads_its_config() -> None:
    train, val = blobs(300, spread=1.5, seed=0), blobs(300, spread=1.5, seed=1)
    config = EvaluationConfig(knn_k=7, probe_epochs=3, probe_lr=0.05)
    assert evaluate(train, val, config, device=CPU, seed=5) == {
        "knn": knn_accuracy(train, val, 7, CPU),
        "probe": probe_accuracy(train, val, epochs=3, lr=0.05, seed=5, device=CPU),
    }


def batches(count: int, size: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    images = torch.arange(count * 3.0).view(count, 3, 1, 1)
    return list(
        zip(*(column.split(size) for column in (images, torch.arange(count) % 4, torch.arange(count))), strict=True)
    )


def test_extract_gives_every_row_in_order_in_fp32_without_gradients() -> None:
    def model(images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return images.flatten(1).bfloat16()

    result = extract(model, batches(18, 4), CPU)
    assert result.features.dtype == torch.float32
    assert torch.equal(result.features, torch.arange(18 * 3.0).view(18, 3))
    assert torch.equal(result.labels, torch.arange(18) % 4)
    assert torch.equal(result.ids, torch.arange(18))


def test_merge_does_not_depend_on_how_ranks_shared_the_samples() -> None:
    whole = blobs(11, spread=1.0, seed=0)
    shares = [torch.tensor([8, 0, 3, 10, 5, 1]), torch.tensor([2, 9, 4, 7, 6, 0])]  # 0 fills up the second rank
    merged = merge([FeatureSet(*(column[rows] for column in whole)) for rows in shares])
    for ours, expected in zip(merged, whole, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("more", [0, 2])
def test_what_the_loader_has_to_say_at_its_end_is_heard_on_every_rank(
    more: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also on the one with the most batches; the model, which may be collective, is called as often on all."""
    data = data_config(write(tmp_path / "set", bad=37), max_bad_fraction=0.02)
    loader = build_eval_loader(str(tmp_path / "set"), data, batch=5, world=ALONE)
    calls = []

    def model(images: Tensor) -> Tensor:
        calls.append(len(images))
        return images.flatten(1)

    found = merge([extract(model, in_step(loader, 5, len(loader) + more), CPU)])
    assert calls == [5] * (13 + more)
    assert found.ids.tolist() == [i for i in range(SIZE) if i != 37]
    assert caplog.text.count("1 samples cannot be read and are left out: [37]") == 1


def test_held_out_images_that_cannot_be_read_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train, val = write(tmp_path / "train", bad=5), write(tmp_path / "val", bad=37)
    options = ("data.image_size=8", "data.workers=0", "data.max_bad_fraction=0.02")
    run = load(None, ["teacher.model=t", "student.model=s", f"data.train={train}", f"data.val={val}", *options])
    known, judged = HeldOut(run, ALONE, None, None).features(lambda images: images.flatten(1))
    assert len(known.ids) == len(judged.ids) == SIZE - 1
    assert f"{train}: 1 samples cannot be read and are left out: [5]" in caplog.text
    assert f"{val}: 1 samples cannot be read and are left out: [37]" in caplog.text


@pytest.mark.parametrize(("rows", "size", "count"), [(10, 4, 3), (10, 4, 5), (3, 8, 2), (8, 4, 2)])
def test_in_step_gives_full_batches_and_merge_forgets_the_filling(rows: int, size: int, count: int) -> None:
    images, ids = torch.randn(rows, 3, 2, 2), torch.arange(rows) + 5
    batches = list(zip(images.split(size), (ids * 2).split(size), ids.split(size), strict=True))
    filled = list(in_step(batches, size, count))
    assert [batch[0].shape for batch in filled] == [(size, 3, 2, 2)] * count
    found = merge([extract(lambda x: x.flatten(1), filled, CPU)])
    assert torch.equal(found.features, images.flatten(1))
    assert torch.equal(found.labels, ids * 2)
    assert torch.equal(found.ids, ids)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_features_that_are_not_finite_are_refused(value: float, side: int) -> None:
    """Every distance to them is no number, and the first class would win: chance, as if the student had learnt none."""
    sets = [FeatureSet(torch.randn(8, 4), torch.arange(8) % 2, torch.arange(8)) for _ in range(2)]
    sets[side].features[3, 1] = value
    with pytest.raises(UserError, match="features of 1 of 8 images are not finite"):
        evaluate(*sets, EvaluationConfig(), device=CPU)
    with pytest.raises(UserError, match="the weights of the teacher hold NaN"):
        check_finite(*sets, whose="the teacher")
