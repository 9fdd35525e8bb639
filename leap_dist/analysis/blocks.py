"""What the blocks of one model can do by themselves, and how alike they are: whether a curriculum has steps to climb.

Features of a block are its tokens through the final norm, as LEAP matches them; probe and kNN see the mean patch and,
where every block has one, the class token, as in the evaluation at the end of a run.
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
from leap_dist.evaluation.tokens import CLS, KINDS, PATCH
from leap_dist.models import Features
from leap_dist.runtime.distributed import World, collect_objects, gather_objects

JUDGES = {"probe": "probe", "knn": "kNN"}  # of the report, in the words of a table
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockReport:
    """Of L blocks, shallowest first. probe, knn: (L,) accuracies from 0 to 1 of each kind of features, "patch" (the
    mean) and, where every block has a class token, "cls"; cka: (L, L), linear, exact over all patch tokens of the
    held-out images. train, held_out: numbers of images.
    """

    name: str
    train: int
    held_out: int
    probe: dict[str, np.ndarray]
    knn: dict[str, np.ndarray]
    cka: np.ndarray


def report_blocks(
    subject: Subject, train: EvalLoader, held_out: EvalLoader, config: EvaluationConfig, world: World
) -> Optional[BlockReport]:
    """Train a probe per block on `train`, judge it and kNN on `held_out`, and compare the blocks there. Collective.

    Returns the report on rank 0, None elsewhere. Memory on the host: 4 x images x (sum of widths) bytes, twice that
    where there are class tokens, and 8 (sum of widths)^2 for the CKA.
    """
    blank = torch.zeros(1, 3, subject.image_size, subject.image_size, device=world.device)
    tried = subject.every_layer(blank)
    widths = [layer.patch.shape[-1] for layer in tried]
    kinds = (PATCH, CLS) if all(layer.cls is not None for layer in tried) else (PATCH,)
    cka = LayerCka(widths, widths, world.device)

    def pooled(layers: list[Features]) -> Tensor:
        return torch.stack([_pooled(layers, kind) for kind in kinds], 1)

    def compared(images: Tensor) -> Tensor:
        layers = subject.every_layer(images)
        rows = [layer.patch.float().flatten(0, 1) for layer in layers]
        cka.update(rows, rows)
        return pooled(layers)

    shares = [
        _gathered(lambda images: pooled(subject.every_layer(images)), train, f"{subject.name}: to train on", world),
        _gathered(compared, held_out, f"{subject.name}: held out", world),
    ]
    cka.merge_over_ranks()
    if not world.is_main:
        return None
    known, asked = (labelled(merge(share)) for share in shares)
    probe, knn = ({kind: np.zeros(len(widths)) for kind in kinds} for _ in range(2))
    columns = [slice(end - width, end) for width, end in zip(widths, np.cumsum(widths), strict=True)]
    for i in progress(range(len(widths)), f"{subject.name}: probes", world):
        for k, kind in enumerate(kinds):
            sets = (found._replace(features=found.features[:, k, columns[i]]) for found in (known, asked))
            scores = evaluate(*sets, config, device=world.device)
            probe[kind][i], knn[kind][i] = scores["probe"], scores["knn"]
    return BlockReport(subject.name, len(known.labels), len(asked.labels), probe, knn, cka.matrix().cpu().numpy())


def _pooled(layers: list[Features], kind: str) -> Tensor:
    """Tokens of L blocks -> one vector of each for an image, side by side: (B, sum of widths) float32."""
    return torch.cat([layer.patch.float().mean(1) if kind == PATCH else layer.cls.float() for layer in layers], 1)


def _gathered(model: Callable[[Tensor], Tensor], loader: EvalLoader, what: str, world: World) -> list[FeatureSet]:
    """Every rank's features (N, kinds, sum of widths), on rank 0. Collective.

    UserError, on every rank, if no image has a label.
    """
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
    write_csv(folder / "blocks.csv", ({"block": i + 1, **_scores(report, i)} for i in range(len(report.cka))))
    cells = ({"block": i + 1, "other": j + 1, "cka": value} for (i, j), value in np.ndenumerate(report.cka))
    write_csv(folder / "cka.csv", cells)


def _scores(report: BlockReport, index: int) -> dict[str, float]:
    """Accuracies of a block, from 0 to 1, in the order of the table."""
    return {f"{kind}_{name}": float(getattr(report, name)[kind][index]) for kind in report.probe for name in JUDGES}


def report_table(report: BlockReport) -> str:
    """A line per block, as text."""
    judged = [f"{KINDS[kind]}: {JUDGES[name]}" for kind in report.probe for name in JUDGES]
    lines = [
        f"{report.name}: {report.train} images to train on, {report.held_out} held out",
        "",
        "  ".join(["block", *judged, "CKA with the next, with the last"]),
    ]
    for i in range(len(report.cka)):
        following = f"{report.cka[i, i + 1]:.3f}" if i + 1 < len(report.cka) else ""
        scores = [f"{score:{len(head)}.1%}" for head, score in zip(judged, _scores(report, i).values(), strict=True)]
        lines.append("  ".join([f"{i + 1:5}", *scores, f"{following:>17}", f"{report.cka[i, -1]:13.3f}"]))
    return "\n".join(lines)
