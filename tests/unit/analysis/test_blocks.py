"""The report on a model's blocks against scikit-learn's numbers and a CKA written down a second time."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from leap_dist.analysis import BlockReport, Subject, report_blocks, report_table, write_report
from leap_dist.analysis.plots import block_figure
from leap_dist.config import EvaluationConfig
from leap_dist.data import Batch
from leap_dist.errors import UserError
from leap_dist.models import Features
from leap_dist.runtime.distributed import World

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
CLASSES, GRID = 4, (2, 3)
KINDS, NAMES = ("patch", "cls"), ("probe", "knn")
LABELS = ["patches, linear probe", "patches, kNN", "class token, linear probe", "class token, kNN"]


def layers(images: Tensor) -> list[Tensor]:
    """Three blocks of 6 tokens: noise, the class in one half of the channels, the same more clearly and turned."""
    tokens = images.flatten(1)[:, : 6 * 16].unflatten(1, (6, 16))
    signal = tokens * torch.cat([torch.zeros(8), torch.ones(8)])
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(5)))[0]
    return [tokens * torch.cat([torch.ones(8), torch.zeros(8)]), tokens, (tokens + 2 * signal) @ turn]


def class_tokens(blocks: list[Tensor]) -> list[Tensor]:
    """The first of the tokens: it says less of the class than the mean of six."""
    return [tokens[:, 0] for tokens in blocks]


def every_layer(images: Tensor) -> list[Features]:
    blocks = layers(images)
    return [Features(*tokens) for tokens in zip(blocks, class_tokens(blocks), strict=True)]


SUBJECT = Subject("made up", 6, ((0.5,) * 3, (0.5,) * 3), GRID, every_layer, lambda images: every_layer(images)[-1], "")


def images(count: int, seed: int, labelled: bool = True) -> list[Batch]:
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=random)
    pixels = torch.randn(count, 3, 6, 6, generator=random)
    tokens = pixels.flatten(1)[:, : 6 * 16].view(count, 6, 16)  # a view: what is added here is added to the pixels
    tokens[:, :, 8 : 8 + CLASSES] += 0.8 * torch.nn.functional.one_hot(labels, CLASSES)[:, None]
    labels = labels if labelled else -torch.ones_like(labels)
    ids = torch.arange(count)
    return [Batch(*part) for part in zip(*(c.split(25) for c in (pixels, labels, ids, ids)), strict=True)]


def whole(batches: list[Batch]) -> tuple[list[np.ndarray], np.ndarray]:
    """Tokens (N, 6, 16) float64 of every block, and labels."""
    found = layers(torch.cat([batch.images for batch in batches]))
    return [tokens.double().numpy() for tokens in found], torch.cat([batch.labels for batch in batches]).numpy()


def centred_gram_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Kornblith et al. (2019), equation 1, by its n x n kernels."""
    n = len(x)
    centre = np.eye(n) - 1 / n
    k, m = (centre @ (z @ z.T) @ centre for z in (x, y))
    return (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())


@pytest.fixture(scope="module")
def report() -> BlockReport:
    return report_blocks(SUBJECT, images(300, 0), images(100, 1), EvaluationConfig(), ALONE)


def test_cka_is_that_of_all_tokens_of_the_held_out_images(report: BlockReport) -> None:
    tokens, _ = whole(images(100, 1))
    rows = [t.reshape(-1, 16) for t in tokens]
    expected = [[centred_gram_cka(x, y) for y in rows] for x in rows]
    np.testing.assert_allclose(report.cka, expected, atol=1e-5)
    assert expected[0][2] < 0.5 < expected[1][2]  # they do differ


@pytest.mark.parametrize("kind", ["patch", "cls"])
def test_probe_and_knn_are_those_of_the_mean_patch_and_the_class_token(report: BlockReport, kind: str) -> None:
    known, labels = whole(images(300, 0))
    asked, truth = whole(images(100, 1))
    assert (report.train, report.held_out) == (300, 100)
    for block in range(3):
        x, y = (t.mean(1) if kind == "patch" else t[:, 0] for t in (known[block], asked[block]))
        best = LogisticRegression(C=1e4, max_iter=2000).fit(x, labels).score(y, truth)
        assert report.probe[kind][block] == pytest.approx(best, abs=0.05)
        unit, asked_unit = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
        # exp(cosine / 0.07) votes of the 20 nearest on the sphere, where |a - b|^2 = 2 - 2 cosine
        judge = KNeighborsClassifier(20, weights=lambda distance: np.exp((1 - distance**2 / 2) / 0.07))
        assert report.knn[kind][block] == pytest.approx(judge.fit(unit, labels).score(asked_unit, truth), abs=0.011)
    assert report.probe[kind][0] < 0.45 < report.probe["patch"][2] - 0.2
    assert report.probe["cls"][2] < report.probe["patch"][2] - 0.2  # the two are not the same


def test_a_model_without_class_token_is_judged_by_its_patches_at_blocks_of_any_width() -> None:
    def of_unlike_width(images: Tensor) -> list[Features]:
        return [Features(tokens[..., 4 * i :], None) for i, tokens in enumerate(layers(images))]

    bare = replace(SUBJECT, every_layer=of_unlike_width)
    found = report_blocks(bare, images(100, 0), images(50, 1), EvaluationConfig(probe_epochs=2), ALONE)
    assert found.probe.keys() == found.knn.keys() == {"patch"} and found.cka.shape == (3, 3)
    known, asked = (whole(images(*which)) for which in ((100, 0), (50, 1)))
    means = (tokens[2][..., 8:].mean(1) for tokens, _ in (known, asked))
    unit, asked_unit = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in means)
    judge = KNeighborsClassifier(20, weights=lambda distance: np.exp((1 - distance**2 / 2) / 0.07))
    assert found.knn["patch"][2] == pytest.approx(judge.fit(unit, known[1]).score(asked_unit, asked[1]), abs=0.021)


def test_images_without_labels_are_refused() -> None:
    with pytest.raises(UserError, match="no labels"):
        report_blocks(SUBJECT, images(50, 0), images(50, 1, labelled=False), EvaluationConfig(), ALONE)


def test_images_without_a_label_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    options = EvaluationConfig(probe_epochs=2)
    partly = images(100, 1)
    partly[-1] = partly[-1]._replace(labels=torch.full((25,), -1))
    found, expected = (
        report_blocks(SUBJECT, images(100, 0), held_out, options, ALONE) for held_out in (partly, partly[:-1])
    )
    assert (found.train, found.held_out) == (100, 75)
    assert all((getattr(found, name)[kind] == getattr(expected, name)[kind]).all() for name in NAMES for kind in KINDS)
    assert caplog.messages == ["made up: held out: 25 images have no label of a class and are left out"]


def test_files_table_and_figure_say_the_same(report: BlockReport, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    with (tmp_path / "blocks.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["block"]) for row in rows] == [1, 2, 3]
    for kind in KINDS:
        for name in NAMES:
            assert [float(row[f"{kind}_{name}"]) for row in rows] == pytest.approx(getattr(report, name)[kind].tolist())
    with (tmp_path / "cka.csv").open() as file:
        cells = {(int(row["block"]), int(row["other"])): float(row["cka"]) for row in csv.DictReader(file)}
    assert cells[1, 3] == pytest.approx(report.cka[0, 2], rel=1e-5) and len(cells) == 9
    last_but_one = report_table(report).splitlines()[-2].split()
    accuracies = [f"{getattr(report, name)[kind][1]:.1%}" for kind in KINDS for name in NAMES]
    assert last_but_one == ["2", *accuracies, *2 * [f"{report.cka[1, 2]:.3f}"]]
    scores, cka = block_figure(report).axes[:2]
    assert [line.get_label() for line in scores.lines] == LABELS
    shown = [100 * getattr(report, name)[kind] for kind in KINDS for name in NAMES]
    assert np.array([line.get_ydata() for line in scores.lines]) == pytest.approx(np.array(shown))
    np.testing.assert_array_equal(cka.images[0].get_array(), report.cka)
