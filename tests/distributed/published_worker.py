"""Run by test_published.py on every rank: one scenario of published/leap_trajectory.json, by leap_dist's own trainer.

Rank 0 writes `trained.json` into the run folder: the calibration's scores, and what is left of student and head.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from leap_dist import assembly
from leap_dist.config import Config, load
from leap_dist.data import Batch
from leap_dist.matching import Calibration
from leap_dist.runtime.distributed import World, initialise, shutdown
from leap_dist.runtime.run_lock import Claim
from leap_dist.trainer import Trainer
from published import inputs

STEPS_PER_EPOCH = 10


class Finished:
    """A loader of images that are augmented and normalised already: this rank's share of each batch."""

    num_samples, layout, contents, order = inputs.BATCH * STEPS_PER_EPOCH, "published", "published", 0

    def __init__(self, world: World) -> None:
        share = inputs.BATCH // world.size
        self.positions = torch.arange(world.rank * share, (world.rank + 1) * share)
        self.images = torch.from_numpy(inputs.images())[:, self.positions]

    def __len__(self) -> int:
        return STEPS_PER_EPOCH

    def epoch(self, epoch: int, start: int) -> Iterator[Batch]:
        none = torch.full_like(self.positions, -1)
        for images in self.images[epoch * STEPS_PER_EPOCH + start : (epoch + 1) * STEPS_PER_EPOCH]:
            yield Batch(images, none, none, self.positions)

    def close(self) -> None:
        """There are no workers."""


def given_weights(trainer: Trainer) -> list[float]:
    """Load student and head. Returns every block's score on the first batch."""
    objective = trainer.learner.engine.module
    objective.student.backbone.load_state_dict({k: torch.from_numpy(v) for k, v in inputs.student().items()})
    objective.heads[0].load_state_dict({k: torch.from_numpy(v) for k, v in inputs.head().items()})
    first = trainer.loader.images[0]
    calibration = Calibration(trainer.learner.engine, trainer.learner._over_ranks)
    calibration.show(first, list(trainer.teacher.sweep(first, trainer.teacher.spec.depth)))
    return calibration.scores()


def main(config: Config) -> None:
    world = initialise()
    assembly.build_train_loader = lambda *_, world, **__: Finished(world)
    with Claim(Path(config.output), world) as claim:
        config, trainer = assembly.build_trainer(config, world, claim)
        scores = given_weights(trainer)
        assert trainer.run()
        trainer.close()
    objective = trainer.learner.engine.module
    left = {name: tensor.tolist() for name, tensor in objective.student.backbone.state_dict().items()}
    left |= {f"head.{name}": tensor.tolist() for name, tensor in objective.heads[0].state_dict().items()}
    if world.is_main:
        (Path(config.output) / "trained.json").write_text(json.dumps({"scores": scores, "left": left}))
    shutdown()


if __name__ == "__main__":
    main(load(None, sys.argv[1:]))
