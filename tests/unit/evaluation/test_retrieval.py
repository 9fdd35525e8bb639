"""The revisited protocol, against a plain transcription of its definition and against values worked out by hand."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from leap_dist.errors import UserError
from leap_dist.evaluation.retrieval import KAPPAS, Truth, query_scores, rankings, retrieval_scores, summed
from leap_dist.evaluation.robustness import ALEXNET, class_table, corruption_errors

CPU = torch.device("cpu")
NONE = np.empty(0, np.int64)


def by_definition(ranking: list[int], positives: set[int], junk: set[int]) -> tuple[Fraction, list[Fraction]]:
    """Image after image, with exact fractions."""
    hits = seen = 0
    area, right_at, last = Fraction(0), [], 0
    precision = Fraction(1)  # before the first image
    for image in ranking:
        if image in junk:
            continue
        seen += 1
        if image in positives:
            before = precision if seen > 1 else Fraction(1)
            hits += 1
            area += (before + Fraction(hits, seen)) / 2 / len(positives)
            last = seen
        precision = Fraction(hits, seen)
        right_at.append(hits)
    depths = [min(last, kappa) for kappa in KAPPAS]
    return area, [Fraction(right_at[depth - 1], depth) for depth in depths]


def test_by_hand() -> None:
    """Ranked: positive, junk, negative, positive. Without the junk precision is 1, 1/2, 2/3.

    The first positive adds (1 + 1) / 2 and the second (1/2 + 2/3) / 2, each over two positives: 1/2 + 7/24.
    """
    average, precisions = query_scores(np.array([7, 1, 3, 5]), np.array([7, 5]), np.array([1]))
    assert average == pytest.approx(1 / 2 + 7 / 24, abs=1e-12)
    assert precisions == pytest.approx([1, 2 / 3, 2 / 3], abs=1e-12)  # down to the last positive, not to ten


@pytest.mark.parametrize("seed", range(8))
def test_scores_are_those_of_the_definition(seed: int) -> None:
    """Random sets, with empty lists, all-positive and junk-only queries among them."""
    random = np.random.default_rng(seed)
    ranked, truths = [], []
    for _ in range(12):
        parts = np.split(random.permutation(20), np.sort(random.integers(0, 21, 3)))
        truths.append(Truth(*parts[:3]))
        ranked.append(random.permutation(20))
    found = retrieval_scores(np.array(ranked), truths)
    for name in ("easy", "medium", "hard"):
        expected = []
        for ranking, truth in zip(ranked, truths, strict=True):
            easy, hard, junk = ({int(i) for i in part} for part in truth)
            positives = {"easy": easy, "medium": easy | hard, "hard": hard}[name]
            removed = {"easy": junk | hard, "medium": junk, "hard": junk | easy}[name]
            if positives:
                expected.append(by_definition(ranking.tolist(), positives, removed))
        assert found[f"{name}_queries"] == len(expected) > 0
        assert found[f"{name}_map"] == pytest.approx(float(sum(a for a, _ in expected) / len(expected)), abs=1e-6)
        for i, kappa in enumerate(KAPPAS):
            mean = float(sum(p[i] for _, p in expected) / len(expected))
            assert found[f"{name}_mp{kappa}"] == pytest.approx(mean, abs=1e-6)


def test_a_setting_without_a_query_is_absent() -> None:
    found = retrieval_scores(np.array([[0, 1]]), [Truth(np.array([1]), NONE, NONE)])
    assert "hard_map" not in found and found["easy_map"] == found["medium_map"] == pytest.approx(1 / 4)


def test_rankings_are_by_cosine_and_of_equals_the_first_comes_first() -> None:
    database = torch.tensor([[0.0, 2.0], [3.0, 0.0], [1.0, 1.0], [5.0, 5.0], [9.0, 0.0]])
    assert rankings(torch.tensor([[0.1, 0.0], [0.0, 7.0]]), database, CPU).tolist() == [
        [1, 4, 2, 3, 0],
        [0, 2, 3, 1, 4],
    ]


def test_corruption_errors_are_over_alexnets() -> None:
    """As bad as AlexNet is 1; twice as good on one of 15 takes 1/30 away."""
    as_alexnet = {name: [1 - error] * 5 for name, error in ALEXNET.items()}
    assert corruption_errors(as_alexnet)[0] == pytest.approx(1)
    better = as_alexnet | {"fog": [1 - ALEXNET["fog"] / 2] * 5}
    mean, own = corruption_errors(better)
    assert mean == pytest.approx(1 - 1 / 30) and own["fog"] == pytest.approx(0.5)
    mean, own = corruption_errors({"fog": [0.5], "speckle_noise": [0.1]})
    assert mean is None and own == {"fog": pytest.approx(0.5 / ALEXNET["fog"])}


def test_classes_of_the_robustness_sets_are_found_by_name_or_by_number() -> None:
    train = {"n01440764": 2, "n01443537": 0, "n01484850": 1}
    assert class_table(train, {"n01484850": 0}, "a") == {0: 1}
    assert class_table(train, {"0": 0, "2": 1}, "v2") == {0: 2, 1: 1}
    with pytest.raises(UserError, match="class 7 is beyond the 3"):
        class_table(train, {"7": 0}, "v2")
    with pytest.raises(UserError, match="n99999999 is none of the training set's 3"):
        class_table(train, {"n99999999": 0}, "a")
    with pytest.raises(UserError, match="not named by WordNet ids"):
        class_table({"cat": 0}, {"n01484850": 0}, "a")


def test_scales_add_up_as_in_the_published_code() -> None:
    """`extract_ms` of cnnimageretrieval-pytorch, whose networks normalise: v += net(scaled); v /= len; v /= |v|."""
    random = np.random.default_rng(3)
    scales = [random.normal(size=(5, 4)) * factor for factor in (1, 30, 0.1)]
    expected = np.zeros((5, 4))
    for features in scales:
        for row in range(5):
            expected[row] += features[row] / np.sqrt((features[row] ** 2).sum())
    expected /= np.sqrt((expected**2).sum(1, keepdims=True))
    found = summed([torch.from_numpy(features) for features in scales])
    assert torch.nn.functional.normalize(found).numpy() == pytest.approx(expected)
    assert summed([torch.from_numpy(scales[0])]).numpy() == pytest.approx(scales[0])
