"""What an analysis found, as plain arrays, and as files: rows for CSV, every curve for NPZ, a table for the eye.

Legend: R = min(N, D) of N tokens and D channels, L levels of energy, k dimensions of the compared subspaces.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from leap_dist.analysis import sep, spectra
from leap_dist.analysis.moments import principal_axes
from leap_dist.analysis.passes import BlockTotals, ImageTotals, SampleViews
from leap_dist.analysis.spectra import LEVELS

QUANTILES = (0.1, 0.5, 0.9)


class Spread(NamedTuple):
    """Mean, standard deviation and 99th percentile over images, each (L,); at most 1 % of the images lie above p99."""

    mean: np.ndarray
    std: np.ndarray
    p99: np.ndarray


class Band(NamedTuple):
    """Mean and 10, 50 and 90 % quantiles over images or pairs."""

    mean: np.ndarray
    p10: np.ndarray
    p50: np.ndarray
    p90: np.ndarray


@dataclass(frozen=True, kw_only=True)
class View:
    """One block of one model at one centring ("centred": every image's tokens about the image's mean token).

    Image by image: energy (R,), mean cumulated share of an image's own singular directions; dims, and effective_rank
    (mean, standard deviation). Whole set, the PCA of all images' tokens: dataset_energy (D,), dataset_dims (L,).
    Sample, in that shared basis: captured (D,) per image, captured_dims. Sample, rotation: angles (k,) in degrees and
    overlaps (mean squared cosine) of neighbouring images' top-k subspaces (pair) and of each with the shared top-k
    basis (shared). SEP: sep_curve (D,), sep as d/D at `sep.LEVELS`, the same of the sample under permutations of the
    channels (P, levels), and of white noise.
    """

    energy: np.ndarray
    dims: Spread
    effective_rank: tuple[float, float]
    dataset_energy: np.ndarray
    dataset_dims: np.ndarray
    captured: Band
    captured_dims: Spread
    pair_angles: Band
    shared_angles: Band
    pair_overlap: float
    shared_overlap: float
    sep_curve: np.ndarray
    sep: np.ndarray
    sep_permuted: np.ndarray
    sep_null: np.ndarray


@dataclass(frozen=True)
class Block:
    """One block: tokens N, width D, and its views by centring.

    covariance_dims (L,): of the PCA of all tokens about their common mean, which tells images apart as well.
    """

    tokens: int
    width: int
    covariance_dims: np.ndarray
    views: dict[str, View]


@dataclass(frozen=True)
class Model:
    """One model, its blocks from the shallowest on."""

    name: str
    blocks: list[Block]


@dataclass(frozen=True)
class Cka:
    """Linear CKA (student blocks, teacher blocks)."""

    student: str
    teacher: str
    matrix: np.ndarray


@dataclass(frozen=True)
class Analysis:
    """Everything that was found on `images` images; `sample` of them were looked at in pairs, in `k` dimensions."""

    images: int
    sample: int
    k: int
    models: list[Model]
    cka: list[Cka]


def build_block(totals: BlockTotals, axes: dict[str, tuple[torch.Tensor, torch.Tensor]], sample: list[dict]) -> Block:
    """One block's results from both passes; sample: every batch's `SampleViews` by centring."""
    null = sep.null(totals.width).numpy()
    views = {
        centring: _view(images, axes[centring][0], [batch[centring] for batch in sample], null)
        for centring, images in totals.images.items()
    }
    spectrum, _ = principal_axes(totals.moments["uncentred"].spread())
    covariance_dims = spectra.dims_at(spectra.cumulative(spectrum)).cpu().numpy()
    return Block(totals.tokens, totals.width, covariance_dims, views)


def _view(images: ImageTotals, spectrum: torch.Tensor, batches: list[SampleViews], null: np.ndarray) -> View:
    width = len(spectrum)
    captured, pairs, shared = (np.concatenate([batch[i] for batch in batches]) for i in range(3))
    power, tokens = (sum(batch[i] for batch in batches) for i in (3, 4))
    count = images.images.item()
    mean, square = (images.effective / count).tolist()
    dataset = spectra.cumulative(spectrum)
    pattern = sep.curve(images.power / images.sep_tokens, width)
    permuted = sep.curve(torch.from_numpy(power / tokens[:, None]), width)
    return View(
        energy=(images.energy / count).cpu().numpy(),
        dims=_spread_of_histogram(images.histogram.cpu().numpy()),
        effective_rank=(mean, max(0.0, square - mean**2) ** 0.5),
        dataset_energy=dataset.cpu().numpy(),
        dataset_dims=spectra.dims_at(dataset).cpu().numpy(),
        captured=_band(captured),
        captured_dims=_spread(spectra.dims_at(torch.from_numpy(captured)).numpy()),
        pair_angles=_band(pairs),
        shared_angles=_band(shared),
        pair_overlap=_overlap(pairs),
        shared_overlap=_overlap(shared),
        sep_curve=pattern.cpu().numpy(),
        sep=sep.fractions(pattern).cpu().numpy(),
        sep_permuted=sep.fractions(permuted).numpy(),
        sep_null=null,
    )


def _overlap(angles: np.ndarray) -> float:
    return spectra.overlap(torch.from_numpy(angles)).mean().item()


def _band(values: np.ndarray) -> Band:
    return Band(values.mean(0), *np.quantile(values, QUANTILES, axis=0))


def _spread(values: np.ndarray) -> Spread:
    return Spread(values.mean(0), values.std(0), np.percentile(values, 99, axis=0, method="inverted_cdf"))


def _spread_of_histogram(histogram: np.ndarray) -> Spread:
    """Of (L, R + 1) images by value."""
    values, count = np.arange(histogram.shape[1]), histogram.sum(1, keepdims=True)
    share = histogram / count
    mean = share @ values
    p99 = (histogram.cumsum(1) >= 0.99 * count - 1e-9).argmax(1)
    return Spread(mean, np.sqrt(np.maximum(share @ values**2 - mean**2, 0)), p99)


def rows(analysis: Analysis) -> Iterator[dict[str, Any]]:
    """One flat row per model, block and centring, for a table or a CSV file."""
    for model in analysis.models:
        for index, block in enumerate(model.blocks, 1):
            for centring, view in block.views.items():
                where = {"model": model.name, "block": index, "centring": centring}
                where |= {"tokens": block.tokens, "width": block.width}
                yield where | _numbers(view) | _levelled("covariance_dims", block.covariance_dims)


def _numbers(view: View) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    for i, level in enumerate(LEVELS):
        for name, spread in (("image", view.dims), ("image_shared", view.captured_dims)):
            numbers |= {f"{name}_dims_{level * 100:.0f}_{part}": value[i] for part, value in spread._asdict().items()}
    numbers |= _levelled("dataset_dims", view.dataset_dims)
    numbers |= {"effective_rank_mean": view.effective_rank[0], "effective_rank_std": view.effective_rank[1]}
    for name, angles in (("pair", view.pair_angles), ("shared", view.shared_angles)):
        numbers |= {f"{name}_angle_{part}": value.mean() for part, value in angles._asdict().items()}
        numbers[f"{name}_overlap"] = getattr(view, f"{name}_overlap")
    for i, level in enumerate(sep.LEVELS):
        permuted = view.sep_permuted[:, i]
        found = {"": view.sep[i], "_permuted_mean": permuted.mean(), "_permuted_std": permuted.std()}
        found |= {"_null": view.sep_null[i], "_minus_null": view.sep[i] - view.sep_null[i]}
        numbers |= {f"sep_{level * 100:.0f}{part}": value for part, value in found.items()}
    return numbers


def _levelled(name: str, values: np.ndarray) -> dict[str, Any]:
    return {f"{name}_{level * 100:.0f}": value for level, value in zip(LEVELS, values, strict=True)}


def arrays(analysis: Analysis) -> Iterator[tuple[str, np.ndarray]]:
    """Every curve and matrix under 'model/block/centring/name' and 'cka/student/teacher'."""
    for model in analysis.models:
        for index, block in enumerate(model.blocks, 1):
            for centring, view in block.views.items():
                for field in dataclasses.fields(view):
                    value = getattr(view, field.name)
                    parts = value._asdict().items() if isinstance(value, (Spread, Band)) else [("", value)]
                    for part, item in parts:
                        name = f"{model.name}/{index}/{centring}/{field.name}"
                        yield (f"{name}/{part}" if part else name), np.asarray(item)
    for found in analysis.cka:
        yield f"cka/{found.student}/{found.teacher}", found.matrix


def write_tables(analysis: Analysis, folder: Path) -> None:
    """`blocks.csv`, `cka.csv` where there is a teacher, and `curves.npz`."""
    write_csv(folder / "blocks.csv", rows(analysis))
    if analysis.cka:
        cells = (
            {"student": c.student, "teacher": c.teacher, "student_block": i, "teacher_block": j, "cka": value}
            for c in analysis.cka
            for (i, j), value in (((i + 1, j + 1), value) for (i, j), value in np.ndenumerate(c.matrix))
        )
        write_csv(folder / "cka.csv", cells)
    # Not a mapping of keywords: model names may hold anything but a slash.
    np.savez_compressed(folder / "curves.npz", **dict(arrays(analysis)))


def write_csv(path: Path, items: Iterable[dict[str, Any]]) -> None:
    """Write rows of the same keys, at least one; floats with six digits."""
    items = [{key: _short(value) for key, value in item.items()} for item in items]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(items[0]))
        writer.writeheader()
        writer.writerows(items)


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, (float, np.floating)) else value


def last_block_table(analysis: Analysis) -> str:
    """The last block of every model side by side, as text."""
    lasts = [model.blocks[-1] for model in analysis.models]
    names = [
        f"{model.name} ({block.tokens} x {block.width})" for model, block in zip(analysis.models, lasts, strict=True)
    ]
    texts = []
    for centring in spectra.CENTRINGS:
        columns = [_lines(block, centring) for block in lasts]
        body = [(name, *(column[name] for column in columns)) for name in columns[0]]
        texts.append(_align([(f"last block, {centring}", *names), *body]))
    for found in analysis.cka:
        best = found.matrix[-1].argmax()
        texts.append(
            f"CKA of the last blocks, {found.student} with {found.teacher}: {found.matrix[-1, -1]:.3f}; "
            f"highest with block {best + 1}: {found.matrix[-1, best]:.3f}"
        )
    return "\n\n".join(texts)


def _lines(block: Block, centring: str) -> dict[str, str]:
    """Name and value of what is worth a line."""
    view = block.views[centring]
    levels, k = "/".join(f"{level * 100:.0f}" for level in LEVELS), len(view.pair_angles.mean)

    def joined(values: Iterable[float], form: str = ".0f") -> str:
        return "/".join(format(value, form) for value in values)

    ends = [0, -1]  # 50 and 90 %
    lines = {
        f"dimensions of an image, {levels} %, mean": joined(view.dims.mean),
        "  99th percentile": joined(view.dims.p99),
        "  in the shared basis, mean": joined(view.captured_dims.mean),
        "  effective rank, mean": f"{view.effective_rank[0]:.1f}",
        "dimensions of the whole set": joined(view.dataset_dims),
        f"angles of two images' top-{k}, mean": f"{view.pair_angles.mean.mean():.1f} deg",
        "  overlap": f"{view.pair_overlap:.3f}",
        f"angles of an image's and the shared top-{k}": f"{view.shared_angles.mean.mean():.1f} deg",
        "  overlap ": f"{view.shared_overlap:.3f}",
        "SEP, d/D at 50/90 %": joined(view.sep[ends], ".3f"),
        "  channels permuted": joined(view.sep_permuted.mean(0)[ends], ".3f"),
        "  minus white noise": joined((view.sep - view.sep_null)[ends], "+.3f"),
    }
    if centring == "centred":
        lines["dimensions of the whole set about its mean token"] = joined(block.covariance_dims)
    return lines


def _align(lines: list[tuple[str, ...]]) -> str:
    """Left-aligned columns under a rule."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])
