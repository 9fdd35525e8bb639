"""What the blocks of one model can do by themselves, and how alike they are: whether a curriculum has steps to climb.

Features of a block are its patch tokens through the final norm, as LEAP matches them; probe and kNN see their mean, as
in the evaluation at the end of a run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from torch import Tensor

from leap_dist.analysis.moments import LayerCka
from leap_dist.analysis.results import write_csv
from leap_dist.analysis.subjects import Subject
from leap_dist.analysis.survey import progress
from leap_dist.config import EvaluationConfig
from leap_dist.data import EvalLoader
from leap_dist.errors import UserError
from leap_dist.evaluation import FeatureSet, evaluate
from leap_dist.evaluation.features import extract, labelled, merge
from leap_dist.runtime.distributed import World, collect_objects, gather_objects

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockReport:
    """Of L blocks, shallowest first: probe (L,) and knn (L,), accuracies from 0 to 1; cka (L, L), linear, exact over
    all patch tokens of the held-out images. train, held_out: numbers of images.
    """

    name: str
    train: int
    held_out: int
    probe: np.ndarray
    knn: np.ndarray
    cka: np.ndarray


def report_blocks(
    subject: Subject, train: EvalLoader, held_out: EvalLoader, config: EvaluationConfig, world: World
) -> Optional[BlockReport]:
    """Train a probe per block on `train`, judge it and kNN on `held_out`, and compare the blocks there. Collective.

    Returns the report on rank 0, None elsewhere. Memory on the host: 4 x images x (sum of widths) bytes, and
    8 (sum of widths)^2 for the CKA.
    """
    blank = torch.zeros(1, 3, subject.image_size, subject.image_size, device=world.device)
    widths = [tokens.shape[-1] for tokens in subject.layers(blank)]
    cka = LayerCka(widths, widths, world.device)

    def compared(images: Tensor) -> Tensor:
        layers = subject.layers(images)
        rows = [tokens.flatten(0, 1) for tokens in layers]
        cka.update(rows, rows)
        return _pooled(layers)

    shares = [
        _gathered(lambda images: _pooled(subject.layers(images)), train, f"{subject.name}: to train on", world),
        _gathered(compared, held_out, f"{subject.name}: held out", world),
    ]
    cka.merge_over_ranks()
    if not world.is_main:
        return None
    known, asked = (labelled(merge(share)) for share in shares)
    blocks = progress(range(len(widths)), f"{subject.name}: probes", world)
    found = [evaluate(_of_block(known, i), _of_block(asked, i), config, device=world.device) for i in blocks]
    probe, knn = (np.array([scores[kind] for scores in found]) for kind in ("probe", "knn"))
    return BlockReport(subject.name, len(known.labels), len(asked.labels), probe, knn, cka.matrix().cpu().numpy())


def _pooled(layers: list[Tensor]) -> Tensor:
    """Tokens of L blocks (B, N, D) -> their means over an image, (B, L, D)."""
    return torch.stack([tokens.mean(1) for tokens in layers], 1)


def _of_block(features: FeatureSet, index: int) -> FeatureSet:
    return features._replace(features=features.features[:, index])


def _gathered(model: Callable[[Tensor], Tensor], loader: EvalLoader, what: str, world: World) -> list[FeatureSet]:
    """Every rank's features (N, L, D), on rank 0. Collective. UserError, on every rank, if no image has a label."""
    batches = ((batch.images, batch.labels, batch.ids) for batch in progress(loader, what, world))
    found = extract(model, batches, world.device)
    counts = gather_objects((int((found.labels < 0).sum()), len(found.labels)), world)
    missing, images = (sum(column) for column in zip(*counts, strict=True))
    if missing == images:
        raise UserError(f"{what}: the shards have no labels, which probe and kNN need")
    if missing and world.is_main:
        log.warning("%s: %d images have no label of a class and are left out", what, missing)
    return collect_objects(found, world)


def write_report(report: BlockReport, folder: Path) -> None:
    """`blocks.csv` and `cka.csv`, in a folder that exists."""
    scores = zip(report.probe.tolist(), report.knn.tolist(), strict=True)
    write_csv(folder / "blocks.csv", ({"block": i, "probe": p, "knn": k} for i, (p, k) in enumerate(scores, 1)))
    cells = ({"block": i + 1, "other": j + 1, "cka": value} for (i, j), value in np.ndenumerate(report.cka))
    write_csv(folder / "cka.csv", cells)


def report_table(report: BlockReport) -> str:
    """A line per block, as text."""
    lines = [
        f"{report.name}: {report.train} images to train on, {report.held_out} held out",
        "",
        "block  probe    kNN  CKA with the next, with the last",
    ]
    for i, (probe, knn) in enumerate(zip(report.probe, report.knn, strict=True)):
        following = f"{report.cka[i, i + 1]:.3f}" if i + 1 < len(report.cka) else "     "
        lines.append(f"{i + 1:5}  {probe:5.1%}  {knn:5.1%}  {following:>17}  {report.cka[i, -1]:13.3f}")
    return "\n".join(lines)
