"""The whole survey, against NumPy on a dump of every token; and what it refuses."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from leap_dist.analysis import Analysis, Subject, SurveyOptions, sep, survey, write_tables
from leap_dist.analysis.passes import FirstPass
from leap_dist.analysis.plots import figures, write_figures
from leap_dist.analysis.results import View, last_block_table
from leap_dist.analysis.spectra import LEVELS
from leap_dist.data import Batch
from leap_dist.errors import UserError
from leap_dist.models import Features
from stubs import ONE

IMAGES, PAIRS, K, SIDE = 22, 4, 3, 8
OPTIONS = SurveyOptions(pairs=PAIRS, k=K, batch=5, shuffles=2)


class Loader:
    """Random images in batches of 5, the last one short."""

    num_samples = IMAGES

    def __iter__(self) -> Iterator[Batch]:
        for ids in torch.arange(IMAGES).split(5):
            yield Batch(images()[ids], torch.zeros_like(ids), ids, ids)

    def __len__(self) -> int:
        return -(-IMAGES // 5)


def images() -> Tensor:
    return torch.randn(IMAGES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def subject(name: str, widths: list[int], cells: int) -> Subject:
    """One block for each width: cells x cells tokens, random features of the image's cells."""

    def every_layer(batch: Tensor) -> list[Features]:
        cut = batch.unfold(2, SIDE // cells, SIDE // cells).unfold(3, SIDE // cells, SIDE // cells)
        flat = cut.movedim(1, 3).flatten(3).flatten(1, 2)
        generator = torch.Generator().manual_seed(len(name))
        maps = [torch.randn(flat.shape[-1], width, generator=generator) for width in widths]
        return [Features(torch.tanh(flat @ m) + 0.3, None) for m in maps]

    return Subject(
        name, SIDE, ((0.5,) * 3, (0.5,) * 3), (cells, cells), every_layer, lambda batch: every_layer(batch)[-1], ""
    )


STUDENT, TEACHER = subject("s", [6, 10], 4), subject("teacher", [12, 9, 7], 4)


@pytest.fixture(scope="module")
def found() -> Analysis:
    return survey([STUDENT], TEACHER, Loader(), ONE, OPTIONS)


def dims(share: np.ndarray) -> np.ndarray:
    return np.stack([(share >= level - 1e-9).argmax(-1) + 1 for level in LEVELS], -1)


def cumulated(squares: np.ndarray) -> np.ndarray:
    return squares.cumsum(-1) / squares.sum(-1, keepdims=True)


@pytest.mark.parametrize("model", [0, 1])
@pytest.mark.parametrize("centring", ["uncentred", "centred"])
def test_every_number_is_numpys(found: Analysis, model: int, centring: str) -> None:
    dump = (STUDENT, TEACHER)[model].layers(images())
    assert [block.width for block in found.models[model].blocks] == [x.shape[-1] for x in dump]
    for block, layer in zip(found.models[model].blocks, dump, strict=True):
        x = layer.double().numpy()
        own = x - x.mean(1, keepdims=True) if centring == "centred" else x
        view = block.views[centring]
        check_spectra(view, own)
        axes = check_data_set(view, own)
        rows = (x - x.mean((0, 1))).reshape(-1, block.width)
        assert block.covariance_dims.tolist() == dims(cumulated(np.linalg.svd(rows, compute_uv=False) ** 2)).tolist()
        check_pairs(view, own, axes)
        check_sep(view, own)


def check_spectra(view: View, own: np.ndarray) -> None:
    share = cumulated(np.linalg.svd(own, compute_uv=False) ** 2)
    needed = dims(share)
    np.testing.assert_allclose(view.energy, share.mean(0), atol=1e-6)
    np.testing.assert_allclose(view.dims.mean, needed.mean(0))
    np.testing.assert_allclose(view.dims.std, needed.std(0), atol=1e-9)
    np.testing.assert_array_equal(view.dims.p99, np.percentile(needed, 99, axis=0, method="inverted_cdf"))
    sigma = np.linalg.svd(own, compute_uv=False)
    sigma = sigma / sigma.sum(-1, keepdims=True)
    ranks = np.exp(-(sigma * np.log(sigma + 1e-300)).sum(-1))
    np.testing.assert_allclose(view.effective_rank, (ranks.mean(), ranks.std()), rtol=1e-4)


def check_data_set(view: View, own: np.ndarray) -> np.ndarray:
    rows = own.reshape(-1, own.shape[-1])
    _, sigma, axes = np.linalg.svd(rows, full_matrices=False)
    share = cumulated(sigma**2)
    np.testing.assert_allclose(view.dataset_energy, share, atol=1e-6)
    np.testing.assert_array_equal(view.dataset_dims, dims(share))
    sample = own[np.arange(2 * PAIRS) * IMAGES // (2 * PAIRS)]
    captured = cumulated(((sample @ axes.T) ** 2).sum(1))
    np.testing.assert_allclose(view.captured.mean, captured.mean(0), atol=1e-5)
    np.testing.assert_allclose(view.captured.p90, np.quantile(captured, 0.9, axis=0), atol=1e-5)
    np.testing.assert_allclose(view.captured_dims.mean, dims(captured).mean(0))
    return axes


def check_pairs(view: View, own: np.ndarray, axes: np.ndarray) -> None:
    sample = own[np.arange(2 * PAIRS) * IMAGES // (2 * PAIRS)]
    bases = [np.linalg.svd(x)[2][:K].T for x in sample]
    pairs = [scipy.linalg.subspace_angles(a, b)[::-1] for a, b in zip(bases[0::2], bases[1::2], strict=True)]
    shared = [scipy.linalg.subspace_angles(a, axes[:K].T)[::-1] for a in bases]
    for band, overlap, angles in (
        (view.pair_angles, view.pair_overlap, pairs), (view.shared_angles, view.shared_overlap, shared)
    ):  # fmt: skip
        np.testing.assert_allclose(band.mean, np.rad2deg(angles).mean(0), atol=0.01)
        np.testing.assert_allclose(band.p10, np.quantile(np.rad2deg(angles), 0.1, axis=0), atol=0.01)
        assert overlap == pytest.approx((np.cos(angles) ** 2).mean(), abs=1e-4)


def check_sep(view: View, own: np.ndarray) -> None:
    def curve(x: np.ndarray) -> np.ndarray:
        power = np.abs(np.fft.fft(x, axis=-1)) ** 2
        return (power.cumsum(-1) / power.sum(-1, keepdims=True)).mean((0, 1))

    width = own.shape[-1]
    np.testing.assert_allclose(view.sep_curve, curve(own), atol=1e-6)
    sample = own[np.arange(2 * PAIRS) * IMAGES // (2 * PAIRS)]
    for order, fractions in zip(sep.permutations(width, 2), view.sep_permuted, strict=True):
        expected = [((curve(sample[..., order]) >= level - 1e-6).argmax() + 1) / width for level in sep.LEVELS]
        np.testing.assert_allclose(fractions, expected)


def test_cka_of_all_pairs_of_blocks_also_across_grids(found: Analysis) -> None:
    coarse = subject("coarse", [5, 8], 2)
    across = survey([STUDENT, coarse], TEACHER, Loader(), ONE, OPTIONS)
    assert [(c.student, c.teacher) for c in across.cka] == [("s", "teacher"), ("coarse", "teacher")]
    np.testing.assert_allclose(across.cka[0].matrix, found.cka[0].matrix)
    for cka, model in zip(across.cka, (STUDENT, coarse), strict=True):
        for (i, j), value in np.ndenumerate(cka.matrix):
            x = model.layers(images())[i]
            if model is coarse:
                picture = x.unflatten(1, (2, 2)).movedim(-1, 1)
                x = torch.nn.functional.interpolate(picture, (4, 4), mode="bilinear").movedim(1, -1)
            x, y = (z.double().reshape(IMAGES * 16, -1).numpy() for z in (x, TEACHER.layers(images())[j]))
            x, y = x - x.mean(0), y - y.mean(0)
            norms = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
            assert value == pytest.approx(np.linalg.norm(y.T @ x) ** 2 / norms, rel=1e-4)


def test_what_is_kept_does_not_grow_with_the_images() -> None:
    def kept(repeats: int) -> int:
        first = FirstPass([STUDENT, TEACHER], [(0, 1)], repeats * IMAGES, 4, ONE)
        for repeat in range(repeats):
            for batch in Loader():
                first.update(batch._replace(positions=batch.positions + repeat * IMAGES))
        sums = [t for blocks in first.blocks for b in blocks for v in b.images.values() for t in vars(v).values()]
        moments = [m for blocks in first.blocks for b in blocks for c in b.moments.values() for m in vars(c).values()]
        assert len(first.finish()) == 4
        return sum(t.numel() for t in sums + moments)

    assert kept(1) == kept(5)


@pytest.mark.seconds
def test_tables_and_figures_hold_what_was_found(found: Analysis, tmp_path: Path) -> None:
    write_tables(found, tmp_path)
    with (tmp_path / "blocks.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (2 + 3)
    last = next(r for r in rows if (r["model"], r["block"], r["centring"]) == ("teacher", "3", "centred"))
    view = found.models[1].blocks[2].views["centred"]
    assert float(last["image_dims_90_mean"]) == pytest.approx(view.dims.mean[1], rel=1e-5)
    assert float(last["sep_90_minus_null"]) == pytest.approx(view.sep[4] - view.sep_null[4], abs=1e-5)
    curves = np.load(tmp_path / "curves.npz")
    np.testing.assert_array_equal(curves["teacher/3/centred/pair_angles/mean"], view.pair_angles.mean)
    np.testing.assert_array_equal(curves["cka/s/teacher"], found.cka[0].matrix)
    assert f"{found.cka[0].matrix[-1, -1]:.3f}" in last_block_table(found)
    names = [name for name, _ in figures(found)]
    assert names[0] == "overview" and "cka" in names
    write_figures(found, tmp_path)
    for name in names:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert list((tmp_path / "tensorboard").iterdir())


def broken(batch: Tensor) -> list[Features]:
    layers = STUDENT.every_layer(batch)
    layers[1].patch[:, 0, 0] = torch.nan
    return layers


@pytest.mark.parametrize(
    ("students", "options", "message"),
    [
        ([STUDENT, replace(STUDENT, image_size=16)], OPTIONS, "different sizes (s 8, s 16"),
        ([STUDENT], replace(OPTIONS, k=7), "subspaces of 7 dimensions: s has room for 1 to 6; set --subspace"),
        ([replace(STUDENT, every_layer=broken)], OPTIONS, "s: tokens of block 2 are not finite"),
    ],
)
def test_what_cannot_be_analysed_is_said_in_one_line(
    students: list[Subject], options: SurveyOptions, message: str
) -> None:
    with pytest.raises(UserError) as error:
        survey(students, None, Loader(), ONE, options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_images_that_cannot_be_read_leave_whole_pairs_of_the_rest() -> None:
    readable = torch.arange(IMAGES) % 4 != 3

    class Holed(Loader):
        def __iter__(self) -> Iterator[Batch]:
            for batch in super().__iter__():
                good = readable[batch.ids]
                yield Batch(*(column[good] for column in batch[:4]))

    left = survey([STUDENT], None, Holed(), ONE, replace(OPTIONS, pairs=IMAGES // 2))
    assert (left.images, left.sample) == (17, 16)
    check_spectra(left.models[0].blocks[0].views["uncentred"], STUDENT.layers(images())[0][readable].double().numpy())


def test_one_image_is_not_enough() -> None:
    loader = Loader()
    loader.num_samples = 1
    with pytest.raises(UserError, match="1 images: at least 2"):
        survey([STUDENT], None, loader, ONE, OPTIONS)
