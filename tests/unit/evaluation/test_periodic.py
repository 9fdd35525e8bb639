"""Accuracy between epochs: of the student as it stands, when it is due, and at no cost to the run's own numbers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from leap_dist.data import build_eval_loader, resolve
from leap_dist.errors import UserError
from leap_dist.evaluation.periodic import VALIDATION, Validation
from leap_dist.runtime.checkpoint_folder import newest
from leap_dist.trainer import Trainer
from stubs import ONE, scalars, stub_config, stub_trainer

EVALUATION_S = 1e6


class Clock:
    """A second passes with every look at it."""

    now = 0.0

    def perf_counter(self) -> float:
        self.now += 1
        return self.now


def validated(output: Path, *overrides: str, clock: Clock | None = None, fails_at: int | None = None) -> Trainer:
    """A trainer of five epochs, evaluated every second; the accuracy is a function of the weights."""
    config = stub_config(output, "epochs=5", "evaluation.every_epochs=2", "data.val=digits", *overrides)
    trainer = stub_trainer(config)
    calls = []

    def knn(engine: Any) -> dict[str, float]:
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        calls.append(1)
        if clock is not None:
            clock.now += EVALUATION_S
        torch.rand(3)  # somebody else's draws
        return {"patch_knn": sum(p.double().sum().item() for p in engine.module.parameters())}

    trainer.learner.validation.knn = knn
    return trainer


def run(trainer: Trainer) -> Trainer:
    try:
        trainer.run()
    finally:
        trainer.close()
    return trainer


def lines(output: Path) -> list[dict[str, float]]:
    return [json.loads(text) for text in (output / VALIDATION).read_text().splitlines()]


def test_due_epochs_have_a_line_and_the_runs_clock_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("leap_dist.runtime.timing.time", clock)
    trainer = run(validated(tmp_path, clock=clock))
    found = lines(tmp_path)
    assert [(line["epoch"], line["step"]) for line in found] == [(2, 6), (4, 12)]
    assert scalars(tmp_path, "evaluation/patch_knn") == pytest.approx([line["patch_knn"] for line in found])
    assert [line["evaluation_seconds"] for line in found] == [EVALUATION_S + 1] * 2
    assert clock.now > 2 * EVALUATION_S and 15 < trainer.learner.costs.seconds < EVALUATION_S
    ledger = [json.loads(text) for text in (tmp_path / "curriculum.jsonl").read_text().splitlines()]
    spent = {line["step"]: line["teacher_flops"] for line in ledger}
    assert [line["teacher_flops"] for line in found] == [spent[5], spent[11]]
    assert all(line["flops"] > line["teacher_flops"] for line in found)


def test_it_changes_nothing_in_the_training(tmp_path: Path) -> None:
    run(validated(tmp_path / "with"))
    run(stub_trainer(stub_config(tmp_path / "without", "epochs=5")))
    assert scalars(tmp_path / "with", "loss/total") == scalars(tmp_path / "without", "loss/total")


@pytest.mark.seconds
@pytest.mark.parametrize("fails_at", [0, 1])
def test_a_run_killed_in_an_evaluation_makes_it_again_and_no_step(fails_at: int, tmp_path: Path) -> None:
    run(validated(tmp_path / "uncut"))
    with pytest.raises(KeyboardInterrupt):
        run(validated(tmp_path / "cut", fails_at=fails_at))
    resumed = validated(tmp_path / "cut", "resume=auto")
    saved = newest(tmp_path / "cut" / "checkpoints")
    assert saved.name == f"step{6 + 6 * fails_at:08d}", "the epoch before the evaluation is lost"
    resumed.restore(saved)
    run(resumed)
    assert [without_seconds(line) for line in lines(tmp_path / "cut")] == [
        without_seconds(line) for line in lines(tmp_path / "uncut")
    ]


def test_weights_spoilt_before_an_evaluation_are_not_gone_on_from(tmp_path: Path) -> None:
    trainer = validated(tmp_path, fails_at=0)
    update = trainer.learner.engine.step

    def spoil() -> None:
        update()
        if trainer.progress.step == 5:  # the epoch's last
            next(trainer.learner.engine.module.parameters()).data.fill_(math.nan)

    trainer.learner.engine.step = spoil
    with pytest.raises(KeyboardInterrupt):
        run(trainer)
    assert (tmp_path / "checkpoints" / "step00000006").is_dir()
    assert newest(tmp_path / "checkpoints").name == "step00000003"


def without_seconds(line: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in line.items() if "seconds" not in key}


def test_a_run_told_to_stop_at_an_epochs_end_is_evaluated_when_it_goes_on(tmp_path: Path) -> None:
    trainer = validated(tmp_path)
    decide = trainer.learner.coordinator.decide
    trainer.learner.coordinator.decide = lambda **now: decide(**now)._replace(stop=now["step"] == 5)
    assert not trainer.run()
    trainer.close()
    assert not (tmp_path / VALIDATION).exists()
    resumed = validated(tmp_path, "resume=auto")
    resumed.restore(tmp_path / "checkpoints" / "step00000006")
    run(resumed)
    assert [line["epoch"] for line in lines(tmp_path)] == [2, 4]


def test_the_accuracy_is_that_of_the_weights_in_training(tmp_path: Path) -> None:
    """Against scikit-learn on features of the module itself, 200 images of each set."""
    config = stub_config(tmp_path, "data.val=digits", "data.workers=0", "evaluation.quick_images=200")
    config = replace(config, data=resolve(config.data, tmp_path, ONE))
    trainer = stub_trainer(config)
    trainer.learner.engine.train()
    found = Validation(config, ONE).knn(trainer.learner.engine)
    student = trainer.learner.engine.module.student
    assert student.training
    with torch.no_grad():
        (x, y), (queries, truth) = (
            (student(batch.images).patch.mean(1).double(), batch.labels)
            for source in (config.data.train, config.data.val)
            for batch in build_eval_loader(source, config.data, batch=200, world=ONE, limit=200)
        )
    classifier = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp(-distance / 0.07))
    predicted = classifier.fit(x.numpy(), y.numpy()).predict(queries.numpy())
    assert found["patch_knn"] == pytest.approx((predicted == truth.numpy()).mean(), abs=0.006)
    assert found["patch_knn"] > 0.3  # an untrained student already tells digits apart better than chance
    trainer.close()


def test_it_needs_held_out_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation.every_epochs=2: needs data.val"):
        stub_config(tmp_path, "evaluation.every_epochs=2")
