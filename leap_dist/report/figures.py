"""Which charts a page has, and what each shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import numpy as np

from leap_dist.monitoring.comparison import KINDS, Series, column
from leap_dist.report.charts import Axes, Chart, Curve, chart, corners, thinned
from leap_dist.report.facts import Facts

NOTHING = Series(np.array([]), np.array([]))
LOSSES = {
    "total": "total", "patch": "patch tokens", "cls": "class token", "ce": "cross-entropy", "kd": "soft distillation",
}  # fmt: skip
SAVINGS = {
    "flops/teacher_saved_fraction": "teacher's FLOPs",
    "savings/flops": "all FLOPs",
    "savings/time_estimate": "time, estimated",
}


def charts_of_run(facts: Facts) -> dict[str, Optional[Chart]]:
    """By name; None where the run has nothing to draw."""
    speed = "Over all ranks: a deeper target block costs speed."
    norm = "Their norm before clipping: a peak is an odd batch, or too high a learning rate."
    rate = "As it was scheduled; with optim.on_advance it may rise anew at an advance."
    return {
        "blocks": _blocks(facts),
        "score": _score(facts),
        "savings": _savings(facts),
        "evaluation": _evaluation(facts),
        "loss": _loss(facts),
        "rate": _of_tag(facts, "lr", "Learning rate", rate, "learning rate"),
        "speed": _of_tag(facts, "images_per_s", "Speed", speed, "images per second"),
        "norm": _of_tag(facts, "update/grad_norm", "Gradients", norm, "norm of the gradients"),
    }


def _marks(facts: Facts) -> list[int]:
    return facts.climb.advances if facts.climb else []


def _blocks(facts: Facts) -> Optional[Chart]:
    if facts.climb is None:
        return None
    climb = facts.climb
    stairs = corners(climb.blocks)
    curve = Curve(
        label="target block", x=np.append(stairs.steps, climb.end), y=np.append(stairs.values, stairs.values[-1]),
        steps=True,
    )  # fmt: skip
    axes = Axes(
        y="teacher block", whole=True, limit=(0, climb.depth * 1.04), above=("blocks not run", float(climb.depth))
    )
    caption = "The student imitates one block of the teacher at a time; blocks above it are not run, which saves them."
    return chart("Target block", caption, [curve], axes)


def _score(facts: Facts) -> Optional[Chart]:
    if facts.climb is None:
        return None
    climb = facts.climb
    arrived = climb.blocks.values[-1] == climb.depth  # where the threshold decides nothing any more
    until = max(climb.advances, default=0) if arrived else climb.end
    levels = [(climb.threshold, until, "threshold")] if until and climb.threshold is not None else []
    scores = thinned(climb.scores)
    curves = [Curve(label="score", x=scores.steps, y=scores.values, color=1)]
    metric = str(facts.config.get("curriculum.metric", "cka"))
    name = {"cka": "CKA", "cosine": "cosine"}.get(metric, "score")
    caption = (
        "How alike student and target are, 1 being equal. The block moves on at the threshold; thin lines are advances."
    )
    return chart("Score", caption, curves, Axes(y=f"score, {name}", marks=_marks(facts), levels=levels))


def _savings(facts: Facts) -> Optional[Chart]:
    curves = [
        Curve(label=label, x=found.steps, y=found.values, color=color)
        for color, (tag, label) in zip((2, 0, 4), SAVINGS.items(), strict=True)
        for found in [thinned(facts.points.get(tag, NOTHING))]
    ]
    low = min((curve.y.min() for curve in curves if len(curve.y)), default=0.0)
    limit = (max(-0.2, min(0.0, low)), 1.0)  # the first steps have yet to earn what the calibration has cost
    caption = "Against running the whole teacher at every step, calibration charged. It falls as the target deepens."
    return chart("Saved so far", caption, curves, Axes(y="share saved", percent=True, limit=limit, marks=_marks(facts)))


def _evaluation(facts: Facts) -> Optional[Chart]:
    curves, levels = [], []
    for color, (kind, words) in enumerate(KINDS.items()):
        found = column(facts.validations, f"{kind}_knn")
        curves.append(Curve(label=words, x=found.steps, y=found.values, color=color, marker=True))
    judged = {kind: facts.summary.get(f"teacher_{kind}_knn") for kind in KINDS}
    known = [value for value in judged.values() if value is not None]
    if known and facts.validations:
        levels = [(max(known), facts.steps, "teacher at the end, its best kind")]
    caption = "The student's accuracy by nearest neighbours between epochs, on images it was not trained on."
    return chart("Accuracy while it trains", caption, curves, Axes(y="kNN accuracy", percent=True, levels=levels))


def _loss(facts: Facts) -> Optional[Chart]:
    curves = []
    for color, (name, words) in enumerate(LOSSES.items()):
        found = facts.points.get(f"loss/{name}", NOTHING)
        positive = found.values > 0  # the scale is logarithmic
        found = thinned(Series(found.steps[positive], found.values[positive]))
        curves.append(Curve(label=words, x=found.steps, y=found.values, color=color))
    caption = "It jumps at every advance, where the target changes. Losses on different blocks cannot be compared."
    return chart("Loss and its terms", caption, curves, Axes(y="loss, log scale", log=True, marks=_marks(facts)))


def _of_tag(facts: Facts, tag: str, title: str, caption: str, unit: str) -> Optional[Chart]:
    found = thinned(facts.points.get(tag, NOTHING))
    curve = Curve(label=unit, x=found.steps, y=found.values, color=0)
    return chart(title, caption, [curve], Axes(y=unit, zero=True, marks=_marks(facts)))


def charts_of_runs(runs: Sequence[Facts]) -> list[Chart]:
    """Curves of several runs in common charts, a colour for each run."""
    blocks, scores, losses, accuracies, spent = [], [], [], [], []
    for color, run in enumerate(runs):
        if run.climb is not None:
            blocks.append(_curve(run, color, corners(run.climb.blocks), steps=True))
            scores.append(_curve(run, color, thinned(run.climb.scores)))
        losses.append(_curve(run, color, thinned(run.points.get("loss/total", NOTHING))))
        knn = _best_kind(run)
        accuracies.append(_curve(run, color, knn, marker=True))
        flops = column(run.ledger, "teacher_flops")
        if len(flops.steps) and len(knn.steps):
            along = np.interp(knn.steps, flops.steps, flops.values)
            spent.append(Curve(label=run.name, x=along, y=knn.values, color=color, marker=True))
    over_flops = Axes(x="FLOPs of the teacher", y="kNN accuracy", percent=True)
    found = [
        chart("Accuracy while they train", "kNN between epochs, of each run's best kind of features.", accuracies,
              Axes(y="kNN accuracy", percent=True)),
        chart("Accuracy over the teacher's cost", "The same accuracies: further left is cheaper.", spent, over_flops),
        chart("Target block", "Which block of the teacher each student imitates.", blocks,
              Axes(y="teacher block", whole=True, zero=True)),
        chart("Score", "How alike student and target are; 1 is equal.", scores, Axes(y="score")),
        chart("Loss", "Compare it only where runs are on the same block.", losses, Axes(y="loss, log scale", log=True)),
    ]  # fmt: skip
    return [one for one in found if one is not None]


def _curve(run: Facts, color: int, series: Series, *, steps: bool = False, marker: bool = False) -> Curve:
    return Curve(label=run.name, x=series.steps, y=series.values, color=color, steps=steps, marker=marker)


def _best_kind(run: Facts) -> Series:
    """kNN between epochs of the kind of features that ends highest."""
    found = [series for kind in KINDS if len((series := column(run.validations, f"{kind}_knn")).steps)]
    return max(found, key=lambda series: series.values[-1], default=NOTHING)
