"""`evaluation.every_epochs`: accuracy while the student trains, in TensorBoard and the run folder's `evaluation.jsonl`.

Judged is the student as it would be exported, in a model of its own: that is the same at every ZeRO stage, and leaves
mode and random numbers of the one that trains alone. Keys of a line: epoch and step (that are done), cls_knn, patch_knn
and cls_patch_knn (accuracies, 0 to 1, of the kinds of features judged), teacher_flops, flops (of all parts) and seconds
(of the run so far, without what evaluating took), evaluation_seconds (that this one took).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from leap_dist.config import Config
from leap_dist.evaluation.held_out import HeldOut
from leap_dist.evaluation.knn import knn_accuracy
from leap_dist.evaluation.protocol import protocol_of
from leap_dist.evaluation.tokens import Pooling
from leap_dist.models import export_student, load_student
from leap_dist.runtime.distributed import World, gather_objects, on_main
from leap_dist.runtime.files import write_text
from leap_dist.runtime.progress import Progress

VALIDATION = "evaluation.jsonl"


class Validation:
    """The evaluations of one run between its epochs; every method is called by all ranks.

    config: with data.train and data.val resolved to paths.
    """

    def __init__(self, config: Config, world: World) -> None:
        self._config = config
        self._world = world
        self._held_out: Optional[HeldOut] = None

    def is_due(self, progress: Progress) -> bool:
        """Whether a run is to be evaluated where it stands: between two epochs, and not done yet."""
        every, epochs = self._config.evaluation.every_epochs, progress.epoch
        between = progress.step_in_epoch == 0 < epochs
        return (
            between and every > 0 and epochs % every == 0 and epochs not in {x["epoch"] for x in progress.validations}
        )

    def knn(self, engine: Any) -> dict[str, float]:
        """kNN accuracy, 0 to 1, of the student as it stands, by the keys of a line; on every rank. Collective."""
        options, device = self._config.evaluation, self._world.device
        protocol = protocol_of(options)
        if self._held_out is None:
            few = options.quick_images
            self._held_out = HeldOut(self._config, self._world, few, few, bicubic=protocol.bicubic)
        exported = export_student(engine, self._config, self._world)
        pooling = Pooling(load_student(exported, device, self._config.student.model))
        found = self._held_out.features(pooling)
        accuracies = {}
        for kind in pooling.chosen(protocol.features, "student") if found else ():
            train, val = (pooling.of(kind, each) for each in found)
            accuracies[f"{kind}_knn"] = knn_accuracy(train, val, protocol.knn_k, device)[0]
        return gather_objects(accuracies, self._world)[0]

    def note(
        self, progress: Progress, knn: Mapping[str, float], flops: Mapping[str, float], *, seconds: float, spent: float
    ) -> None:
        """Take note of accuracies, as `knn` gives them, where the run stands.

        flops: so far, by part; seconds: trained; spent: on this.
        """
        progress.validations.append(
            {
                "epoch": progress.epoch,
                "step": progress.step,
                **knn,
                "teacher_flops": flops["teacher"],
                "flops": sum(flops.values()),
                "seconds": seconds,
                "evaluation_seconds": spent,
            }
        )
        self.write(progress.validations)

    def write(self, lines: list[dict[str, float]]) -> None:
        """Write, on rank 0, all of the run's evaluations so far: those of a checkpoint, and those since. Collective.

        Raises:
            UserError: on every rank, the disk refuses.
        """
        if not lines:
            return
        text = "".join(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n" for line in lines)
        on_main(lambda: write_text(Path(self._config.output) / VALIDATION, text), self._world)
