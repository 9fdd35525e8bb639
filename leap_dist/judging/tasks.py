"""The tasks of tools/evaluate.py: rows of numbers for one model at a time. Every function is collective."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch

from leap_dist.analysis import Subject
from leap_dist.config import EvaluationConfig
from leap_dist.data.classes import translation
from leap_dist.errors import UserError
from leap_dist.evaluation import FeatureSet, Pooling, protocol_of
from leap_dist.evaluation.features import labelled
from leap_dist.evaluation.knn import knn_accuracy
from leap_dist.evaluation.probe import Probes, fit_probe, judge, probe_accuracy
from leap_dist.evaluation.retrieval import rankings, retrieval_scores, summed
from leap_dist.evaluation.robustness import ALEXNET, SEVERITIES, class_table, corruption_errors
from leap_dist.judging.features import View, features_of
from leap_dist.judging.pictures import Shelf, draw_neighbours, draw_retrieved, file_name
from leap_dist.judging.segmentation import HeadOptions, MaskedSet, judge_segmentation
from leap_dist.judging.sets import LabelledSet, RetrievalSet, open_labelled
from leap_dist.runtime.distributed import World

Rows = list[dict[str, Any]]  # model, task, features, and a number for every measure


@dataclass(frozen=True)
class Bench:
    """What all tasks of one model share."""

    subject: Subject
    pooling: Pooling
    view: View
    options: EvaluationConfig
    world: World
    pictures: Optional[Path] = None  # folder for pictures, if they are wanted

    def features(self, store: Any, table: Optional[dict[int, int]] = None) -> Optional[FeatureSet]:
        """See `features_of`."""
        return features_of(self.subject, self.pooling, store, self.view, self.world, table)

    def kinds(self, *sets: FeatureSet) -> Iterator[tuple[str, list[FeatureSet]]]:
        """Each kind of features that is wanted and there, and the sets as it sees them."""
        for kind in self.pooling.chosen(protocol_of(self.options).features, self.subject.name):
            yield kind, [self.pooling.of(kind, one) for one in sets]

    def picture(self, *words: str) -> Optional[Path]:
        """Where a picture goes, if they are wanted."""
        return self.pictures and self.pictures / file_name(*words)

    def row(self, task: str, kind: str, **measures: Any) -> dict[str, Any]:
        """One row of the results."""
        return {"model": self.subject.name, "task": task, "features": kind, **measures}


def judge_labelled(bench: Bench, train: LabelledSet, test: LabelledSet, tasks: list[str]) -> Rows:
    """kNN and probe, as far as among `tasks`: they know `train` and are judged on `test`. Rows on rank 0."""
    table = translation(train.classes, test.classes, (train.store.source, test.store.source))
    known, asked = bench.features(train.store), bench.features(test.store, table)
    if known is None or asked is None:
        return []
    known, asked = _with_labels(known, train), _with_labels(asked, test)
    protocol, device, rows = protocol_of(bench.options), bench.world.device, []
    for kind, (seen, held_out) in bench.kinds(known, asked):
        if "knn" in tasks:
            top1, top5 = knn_accuracy(seen, held_out, protocol.knn_k, device)
            rows.append(bench.row("knn", kind, top1=top1, top5=top5))
            if path := bench.picture("knn", bench.subject.name, kind):
                names = {label: name for name, label in (train.classes or {}).items()}
                draw_neighbours(path, Shelf(test.store, held_out), Shelf(train.store, seen), names, device)
        if "probe" in tasks:
            found = probe_accuracy(seen, held_out, protocol.probe, seed=0, device=device, watch=protocol.best_epoch)
            best = {} if found.best_epoch is None else {"top1_best_epoch": found.best_epoch}
            rows.append(bench.row("probe", kind, top1=found.top1, top5=found.top5, lr=found.rate, **best))
    return rows


def _with_labels(found: FeatureSet, of: LabelledSet) -> FeatureSet:
    known = labelled(found)
    if not len(known.ids):
        raise UserError(f"{of.store.source}: no image has a label, which kNN and probe need")
    return known


def judge_retrieval(benches: Iterable[Bench], sets: Sequence[RetrievalSet]) -> Rows:
    """mAP and mP@k of each set, Easy, Medium and Hard. Rows on rank 0.

    benches: of one model at each of its scales, made as they are asked for: giants need not fit side by side. Features
    are L2-normalised at every scale, and their sum again.

    Raises:
        UserError: an image cannot be read: a ranking needs them all.
    """
    scales = []
    for bench in benches:
        scales.append([(bench.features(of.queries), bench.features(of.database)) for of in sets])
    rows: Rows = []
    for of, found in zip(sets, zip(*scales, strict=True), strict=True) if bench.world.is_main else ():
        rows += _ranked(bench, of, found)
    return rows


def _ranked(bench: Bench, of: RetrievalSet, scales: Sequence[tuple[FeatureSet, FeatureSet]]) -> Rows:
    """A row for each kind of features. scales: features of queries and of the database at each scale."""
    pairs = [pair for both in scales for pair in zip(both, (of.queries, of.database), strict=True)]
    for found, store in pairs:
        missing = sorted(set(range(store.size)) - set(found.ids.tolist()))
        if missing:
            raise UserError(f"{store.source}: {store.shard_name(missing[0])} cannot be read, and a ranking needs it")
    rows, several = [], f", {len(scales)} scales" if len(scales) > 1 else ""
    for kind, found in bench.kinds(*(one for both in scales for one in both)):
        queries, database = (summed([one.features for one in found[side::2]]) for side in (0, 1))
        ranked = rankings(queries, database, bench.world.device)
        rows.append(bench.row(f"retrieval {of.name}", kind + several, **retrieval_scores(ranked, of.truths)))
        if path := bench.picture("retrieval", of.name, bench.subject.name, kind):
            draw_retrieved(path, of.queries, of.database, ranked, of.truths)
    return rows


def judge_masks(bench: Bench, of: MaskedSet, blocks: int, steps: int, workers: int) -> Rows:
    """mIoU and pixel accuracy of a linear head on the patch tokens of the last `blocks` blocks. A row on rank 0."""
    options = HeadOptions(blocks, steps, workers, bench.view.cache)
    picture = bench.picture("segmentation", of.name, bench.subject.name)
    found = judge_segmentation(bench.subject, of, options, bench.world, picture)
    kind = "patch" if blocks == 1 else f"patch, last {blocks} blocks"
    return [] if found is None else [bench.row(f"segmentation {of.name}", kind, **found)]


def judge_robustness(bench: Bench, train: LabelledSet, folders: list[Path]) -> Rows:
    """Top-1 and top-5 on each robustness set, and the corruption errors, by probes trained on `train`. Rank 0's."""
    if train.classes is None:
        raise UserError(f"{train.store.source}: names no classes, which the robustness sets are told by")
    known = bench.features(train.store)
    probes = {} if known is None else _probes(bench, _with_labels(known, train), max(train.classes.values()) + 1)
    rows: Rows = []
    for folder in folders:
        corruptions = _corruptions(folder)
        if not corruptions:
            rows += [row for row, _ in _on_one(bench, train, folder, folder.name, probes)]
            continue
        accuracies: dict[str, dict[str, list[float]]] = {}
        for name, parts in corruptions.items():
            for part in parts:
                for row, top1 in _on_one(bench, train, part, f"{folder.name} {name} {part.name}", probes):
                    rows.append(row)
                    accuracies.setdefault(row["features"], {}).setdefault(name, []).append(top1)
        for kind, found in accuracies.items():
            mean, own = corruption_errors(found)
            whole = {} if mean is None else {"mce": mean}
            rows.append(bench.row(f"robustness {folder.name}", kind, **whole, **{f"ce_{n}": e for n, e in own.items()}))
    return rows


def _probes(bench: Bench, known: FeatureSet, classes: int) -> dict[str, Probes]:
    """A probe with so many outputs on each kind of features."""
    recipe = protocol_of(bench.options).probe
    if int(known.labels.max()) >= classes:
        raise UserError(f"--train: label {int(known.labels.max())} is beyond its {classes} classes")
    options = {"seed": 0, "device": bench.world.device, "classes": classes}
    return {kind: fit_probe(seen, recipe, **options) for kind, (seen,) in bench.kinds(known)}


def _corruptions(folder: Path) -> dict[str, list[Path]]:
    """Corruption -> folders of its severities, also below noise/, blur/, weather/ and digital/; empty if it has none.

    UserError for a corruption that lacks a severity.
    """
    found = {}
    for path in sorted([*folder.iterdir(), *folder.glob("*/*")] if folder.is_dir() else []):
        if path.name in ALEXNET and path.is_dir():
            parts = [path / severity for severity in SEVERITIES]
            missing = [part for part in parts if not part.is_dir()]
            if missing:
                raise UserError(f"{missing[0]} is missing: a corruption has the severities 1 to 5")
            found[path.name] = parts
    return found


def _on_one(
    bench: Bench, train: LabelledSet, folder: Path, name: str, probes: dict[str, Probes]
) -> list[tuple[dict[str, Any], float]]:
    """A row for each kind of features of one folder of classes, and its top-1. Empty on all ranks but 0."""
    test = open_labelled(str(folder), ("val", "test"), bench.view.config, bench.world)
    table = class_table(train.classes, test.classes or {}, str(folder))
    found = bench.features(test.store, table)
    if found is None:
        return []
    columns = torch.tensor(sorted(set(table.values())))
    known = _with_labels(found, test)
    dense = known._replace(labels=torch.searchsorted(columns, known.labels))
    rows = []
    for kind, (asked,) in bench.kinds(dense):
        probe, outputs = probes[kind], columns.to(bench.world.device)
        among = probe._replace(weight=probe.weight[..., outputs], bias=probe.bias[..., outputs])
        (top1,), (top5,) = judge(among, asked, bench.world.device)
        rows.append((bench.row(f"robustness {name}", kind, top1=top1, top5=top5, classes=len(columns)), top1))
    return rows
