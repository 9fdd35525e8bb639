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
from leap_dist.evaluation import Pooling, evaluate, protocol_of
from leap_dist.evaluation.features import FeatureSet, check_finite, extract, in_step, merge
from leap_dist.evaluation.held_out import HeldOut
from leap_dist.evaluation.knn import knn_accuracy, knn_ranking
from leap_dist.evaluation.probe import Probes, Recipe, judge, probe_accuracy, train_probes
from leap_dist.models import Features
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
    predicted = knn_ranking(train, val.features, k, CPU)[:, 0].numpy()
    assert (predicted == expected.predict(val.features.double().numpy())).mean() > 0.999
    assert 0.5 < knn_accuracy(train, val, k, CPU)[0] < 0.99


def test_knn_votes_are_weighted_by_similarity() -> None:
    # One neighbour of class 1 at cosine 1 against two of class 0 at 0.9: e^(1/0.07) > 2 e^(0.9/0.07).
    near = [[0.9, 0.19**0.5], [0.9, -(0.19**0.5)]]
    train = FeatureSet(torch.tensor([*near, [1.0, 0.0]]), torch.tensor([0, 0, 1]), torch.arange(3))
    assert knn_ranking(train, torch.tensor([[5.0, 0.0]]), 3, CPU)[0, 0] == 1


def test_knn_takes_fewer_samples_than_neighbours() -> None:
    train = blobs(6, spread=0.01, seed=0)
    assert knn_accuracy(train, train, 1, CPU) == (1.0, 1.0)
    assert 0 < knn_accuracy(train, train, 20, CPU)[0] <= 1.0


ONE_RATE = Recipe(10, (0.1,))


def test_probe_separates_separable_blobs_and_finds_no_signal_in_noise() -> None:
    train, val = blobs(1000, spread=0.3, seed=0), blobs(500, spread=0.3, seed=1)
    found = probe_accuracy(train, val, ONE_RATE, seed=0, device=CPU)
    assert found == (1.0, 1.0, 0.1, None)
    shuffled = val._replace(labels=val.labels[torch.randperm(500, generator=torch.Generator().manual_seed(0))])
    assert probe_accuracy(train, shuffled, ONE_RATE, seed=0, device=CPU).top1 < 0.3


def test_probe_comes_close_to_logistic_regression() -> None:
    train, val = blobs(1000, spread=2.0, seed=0), blobs(2000, spread=2.0, seed=1)
    best = LogisticRegression(C=1e4, max_iter=500).fit(train.features.numpy(), train.labels.numpy())
    expected = best.score(val.features.numpy(), val.labels.numpy())
    found = probe_accuracy(train, val, Recipe(50, (0.01, 0.1, 1.0)), seed=0, device=CPU)
    assert found.top1 == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("cosine", ["step", "epoch"])
def test_probes_side_by_side_are_torchs_own_sgd_one_by_one(cosine: str) -> None:
    """Zero weights, momentum, batches of 256 of which the last is short, cosine by step or epoch: by autograd."""
    train = blobs(600, spread=2.0, seed=0)
    double = train._replace(features=train.features.double())
    recipe = Recipe(4, (0.02, 0.5), cosine)
    probes = train_probes(train, recipe, seed=3, device=CPU, classes=5)
    for index, rate in enumerate(recipe.rates):
        generator = torch.Generator().manual_seed(3)
        linear = torch.nn.Linear(16, 5).double()
        for parameter in linear.parameters():
            torch.nn.init.zeros_(parameter)
        optimizer = torch.optim.SGD(linear.parameters(), lr=rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12 if cosine == "step" else 4)
        for _ in range(4):
            for rows in torch.randperm(600, generator=generator).split(256):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(linear(double.features[rows]), train.labels[rows]).backward()
                optimizer.step()
                if cosine == "step":
                    schedule.step()
            if cosine == "epoch":
                schedule.step()
        torch.testing.assert_close(probes.weight[:, index].double(), linear.weight.T.detach(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(probes.bias[index].double(), linear.bias.detach(), rtol=1e-3, atol=1e-4)


def test_probe_depends_on_its_seed_alone() -> None:
    train = blobs(500, spread=2.0, seed=0)

    def weight(seed: int) -> Tensor:
        return train_probes(train, Recipe(2, (0.1,)), seed=seed, device=CPU, classes=5).weight

    first = weight(3)
    torch.manual_seed(123)
    assert torch.equal(first, weight(3))
    assert not torch.equal(first, weight(4))


def test_a_rate_that_diverges_is_not_chosen_and_harms_no_other() -> None:
    train, val = blobs(1000, spread=0.5, seed=0), blobs(500, spread=0.5, seed=1)
    probes = train_probes(train, Recipe(3, (1e38, 0.1)), seed=0, device=CPU, classes=5)
    alone = train_probes(train, Recipe(3, (0.1,)), seed=0, device=CPU, classes=5)
    assert not probes.weight[:, 0].isfinite().all()
    torch.testing.assert_close(probes.weight[:, 1], alone.weight[:, 0])
    assert judge(probes, val, CPU)[0] == [0.0, 1.0]
    assert probe_accuracy(train, val, Recipe(3, (1e38, 0.1)), seed=0, device=CPU).rate == 0.1


def test_the_rate_is_chosen_on_training_images_alone() -> None:
    """Judged on other labels, the choice stays; and it is the best on what is held back, computed apart."""
    train, val = blobs(400, spread=3.0, seed=0), blobs(100, spread=3.0, seed=1)
    recipe = Recipe(5, (0.003, 0.1, 3.0))
    wrong = val._replace(labels=(val.labels + 1) % 5)
    first, second = (probe_accuracy(train, asked, recipe, seed=2, device=CPU) for asked in (val, wrong))
    assert first.rate == second.rate
    order = torch.randperm(400, generator=torch.Generator().manual_seed(2))
    held, rest = (FeatureSet(*(column[rows] for column in train)) for rows in (order[:40], order[40:]))
    shares = [probe_accuracy(rest, held, Recipe(5, (rate,)), seed=2, device=CPU).top1 for rate in recipe.rates]
    assert first.rate == recipe.rates[shares.index(max(shares))]


def test_probe_reports_the_last_epoch_and_the_best_one_apart() -> None:
    # Training labels are noise, so that accuracy over epochs wanders: the best of them is higher than the last.
    train, val = blobs(400, spread=3.0, seed=0), blobs(100, spread=3.0, seed=1)
    recipe = Recipe(20, (5.0,), "epoch")
    seen = []
    options = {"seed": 0, "device": CPU, "classes": 5}
    probes = train_probes(train, recipe, after_epoch=lambda now: seen.append(judge(now, val, CPU)[0][0]), **options)
    found = probe_accuracy(train, val, recipe, seed=0, device=CPU, watch=True)
    assert found.top1 == (probes.logits(val.features)[:, 0].argmax(1) == val.labels).double().mean().item() == seen[-1]
    assert found.best_epoch == max(seen) > found.top1 and len(seen) == 20


def test_top5_counts_a_class_among_the_first_five() -> None:
    """Seven classes in a row; for features of class c, a class is the likelier the nearer it is to c."""
    weight = torch.stack([-(torch.arange(7) - c).abs().float() for c in range(7)])[:, None]
    probes = Probes(weight, torch.zeros(1, 7), (0.1,))
    labels = torch.tensor([0, 4, 5, 3, 6])  # for features of class 0: first, fifth, sixth; of class 6: fourth, first
    asked = FeatureSet(torch.eye(7)[[0, 0, 0, 6, 6]], labels, torch.arange(5))
    assert judge(probes, asked, CPU) == ([2 / 5], [4 / 5])


def test_knn_top5_never_counts_a_class_that_nobody_voted_for() -> None:
    train = FeatureSet(torch.eye(8), torch.arange(8), torch.arange(8))
    asked = FeatureSet(torch.eye(8)[:4], torch.tensor([0, 1, 7, 7]), torch.arange(4))
    assert knn_accuracy(train, asked, 1, CPU) == (0.5, 0.5)
    likely = knn_ranking(train, torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]]), 8, CPU)
    assert likely.tolist() == [[0, 1, 2, 3, 4]]


def test_evaluate_reads_its_config() -> None:
    train, val = blobs(300, spread=1.5, seed=0), blobs(300, spread=1.5, seed=1)
    config = EvaluationConfig(knn_k=7, probe_epochs=3, probe_lrs=[0.05, 0.5])
    found = evaluate(train, val, config, device=CPU, seed=5)
    probe = probe_accuracy(train, val, Recipe(3, (0.05, 0.5)), seed=5, device=CPU)
    assert (found["knn"], found["knn_top5"]) == knn_accuracy(train, val, 7, CPU)
    assert (found["probe"], found["probe_top5"], found["probe_lr"]) == probe[:3]
    assert "probe_best_epoch" not in found


def test_the_published_protocol_and_what_may_be_set_in_it() -> None:
    """Class token, one rate of 0.1, a cosine by epochs, all images, bicubic; each option still counts."""
    published = protocol_of(EvaluationConfig(protocol="leap"))
    assert (published.features, published.train_images) == (("cls",), None)
    assert published.probe == Recipe(100, (0.1,), "epoch") and published.bicubic and published.best_epoch
    own = EvaluationConfig(protocol="leap", features=["patch"], probe_lrs=[1.0], max_train_images=7, probe_epochs=2)
    own = protocol_of(own)
    assert (own.features, own.train_images, own.probe) == (("patch",), 7, Recipe(2, (1.0,), "epoch"))
    swept = protocol_of(EvaluationConfig())
    assert (swept.features, swept.train_images, len(swept.probe.rates)) == (("cls", "patch", "cls_patch"), 50_000, 5)
    assert protocol_of(EvaluationConfig(max_train_images=0)).train_images is None
    train, val = blobs(300, spread=1.5, seed=0), blobs(300, spread=1.5, seed=1)
    found = evaluate(train, val, EvaluationConfig(protocol="leap", probe_epochs=2), device=CPU)
    assert found["probe_best_epoch"] >= found["probe"] and found["probe_lr"] == 0.1


@pytest.mark.parametrize("has_cls", [True, False])
def test_kinds_of_features_are_the_models_own_tokens(has_cls: bool, caplog: pytest.LogCaptureFixture) -> None:
    patch, cls = torch.randn(4, 3, 2), torch.randn(4, 2)
    pooling = Pooling(lambda images: Features(patch, cls if has_cls else None))
    whole = FeatureSet(pooling(torch.zeros(4, 3, 1, 1)), torch.zeros(4), torch.arange(4))
    assert torch.equal(pooling.of("patch", whole).features, patch.mean(1))
    assert pooling.chosen(("cls_patch", "patch"), "student") == (["patch", "cls_patch"] if has_cls else ["patch"])
    if has_cls:
        assert torch.equal(pooling.of("cls", whole).features, cls)
        assert torch.equal(pooling.of("cls_patch", whole).features, torch.cat([cls, patch.mean(1)], 1))
    else:
        assert pooling.chosen(["cls"], "teacher") == ["patch"]
        assert "teacher has no class token and is judged by its patches" in caplog.text


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("features=[cls,cls]", "each once"), ("features=[]", "at least one"), ("features=[tokens]", "a list of .cls"),
        ("probe_lrs=[0.1,-1]", "must be above 0"), ("probe_lrs=[.inf]", "must be finite"), ("probe_lrs=[]", "at least"),
        ("max_train_images=-1", "at least 0"), ("protocol=dino", "one of .swept., .leap"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_are_named(override: str, words: str) -> None:
    with pytest.raises(UserError, match=f"evaluation.{override.partition('=')[0]}.*{words}"):
        load(None, ["teacher.model=t", "student.model=s", "data.train=digits", f"evaluation.{override}"])


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
