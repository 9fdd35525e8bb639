"""What the early exits saved, from passes whose times are known."""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from leap_dist import wrapup
from leap_dist.data import build_eval_loader, resolve
from leap_dist.matching import Calibration
from leap_dist.models.export import export_student, load_student
from leap_dist.runtime.distributed import device_name
from stubs import DEPTH, ONE, StubTeacher, stub_config, stub_trainer


@pytest.mark.parametrize(
    ("start", "calibration", "waited"), [("1", 0, 1.0), ("null", 1, 1.0), ("1", 0, 40.0), ("null", 1, 40.0)]
)
def test_time_and_efficiency_follow_the_steps_spent_on_each_block(
    start: str, calibration: int, waited: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass costs 1 s and 2 s a block; its FLOPs are 10 a block: time saves less than FLOPs do."""
    config = stub_config(tmp_path, f"curriculum.start={start}", "curriculum.threshold=-1")
    trainer = stub_trainer(config, StubTeacher())
    trainer.learner.coordinator.start_at(1)
    monkeypatch.setattr(Calibration, "best", lambda calibration: 1)
    assert trainer.run()
    trainer.close()
    assert [block for _, block in trainer.progress.trajectory] == [1, 2, 3, 4]  # 1, 1, 1 and 3 steps
    trainer.learner.costs.seconds = 100.0
    trainer.learner.costs.phases = {"calibration": 3.0 * calibration, "data": waited, "optimizer": 50.0}
    seconds = {block: 1.0 + 2.0 * block for block in range(1, DEPTH + 1)}
    monkeypatch.setattr(wrapup, "_seconds_by_depth", lambda teacher, images, blocks: {b: seconds[b] for b in blocks})
    summary = wrapup._time_saved(config, ONE, trainer)
    saved = (6 + 4 + 2) - 3 * calibration
    assert summary["time_saved_seconds"] == pytest.approx(saved)
    assert summary["time_saved"] == pytest.approx(saved / (saved + 100))
    least = max(0, 12 - waited) - 3 * calibration  # a calibration cannot hide
    assert summary["time_saved_at_least"] == pytest.approx(least / (least + 100))
    spared = 40 * (3 + 2 + 1) - 160 * calibration
    assert summary["skip_efficiency"] == pytest.approx(summary["time_saved"] / trainer.learner.costs.flops_saved)
    assert trainer.learner.costs.teacher_saved == pytest.approx(spared / (6 * 160))
    assert summary["teacher_skip_efficiency"] == pytest.approx((saved / (6 * 9)) / (spared / (6 * 160)))


def test_a_run_that_is_judged_anew_keeps_the_times_it_was_made_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stub_config(tmp_path, "curriculum.threshold=-1")
    trainer = stub_trainer(config)
    assert trainer.run()
    first = wrapup.wrap_up(config, ONE, trainer)[""]
    assert all(isinstance(first[key], float) for key in wrapup.TIMES)
    trainer.close()
    trainer.first_step = trainer.progress.step  # as when it is resumed
    written = []
    monkeypatch.setattr(wrapup, "_write_all", lambda summaries, *_: written.append(dict(summaries[""])))
    again = wrapup.wrap_up(config, ONE, trainer)[""]
    assert {key: again[key] for key in wrapup.TIMES} == {key: first[key] for key in wrapup.TIMES}
    assert written == [again], "a kill would leave half a summary in the place of a whole one"


def test_steps_of_two_settings_are_not_timed_in_one(tmp_path: Path) -> None:
    config = stub_config(tmp_path, "curriculum.threshold=-1")
    trainer = stub_trainer(config)
    assert trainer.run()
    trainer.close()
    (setting,) = trainer.learner.costs.settings
    assert setting.startswith(f"1 x {device_name(ONE.device)}, ") and "teacher.compile=False" in setting
    trainer.learner.costs.settings.append("8 x NVIDIA H200")
    mixed = wrapup.wrap_up(config, ONE, trainer)[""]
    assert mixed["time_saved"] is None and "skip_efficiency" not in mixed
    assert "not measured" in wrapup._final_table(mixed, config)


def test_the_final_block_is_the_last_one_trained_on(tmp_path: Path) -> None:
    """The end of the last epoch moves the curriculum on once more, where a longer run would go on."""
    config = stub_config(tmp_path, "curriculum.threshold=2", "curriculum.max_epochs_per_block=1", "epochs=2")
    trainer = stub_trainer(config)
    assert trainer.run()
    trainer.close()
    assert trainer.learner.curriculum.block == 3
    assert wrapup._progress_summary(trainer, trainer.learner)["final_block"] == 2


@pytest.mark.parametrize("judged", [("student", "teacher"), ("student",)])
def test_cka_is_of_the_features_of_the_last_block_on_held_out_images(tmp_path: Path, judged: tuple[str, ...]) -> None:
    """Against the form by Gram matrices over images, in numpy; whether or not the teacher's accuracies are wanted."""
    overrides = ("data.val=digits", "data.workers=0", "evaluation.probe_epochs=1", "evaluation.max_train_images=99")
    overrides += (f"evaluation.teacher={'teacher' in judged}",)
    config = stub_config(tmp_path, *overrides)
    config = replace(config, data=resolve(config.data, tmp_path, ONE))
    trainer = stub_trainer(config)
    judge = wrapup.Judge(config, ONE)
    found = judge.student(load_student(export_student(trainer.learner.engine, config, ONE), ONE.device), config)
    found |= judge.teacher(trainer.teacher)[""]
    trainer.close()
    measures = ("knn", "knn_top5", "probe", "probe_top5", "probe_lr")
    kinds = ("cls", "patch", "cls_patch")
    accuracies = {f"{who}_{kind}_{measure}" for who in judged for kind in kinds for measure in measures}
    assert set(found) == accuracies | {"student_teacher_cka", "known_images", "judged_images", "judged_classes"}
    assert (found["known_images"], found["judged_images"]) == (99, 297)
    (batch,) = build_eval_loader(config.data.val, config.data, batch=999, world=ONE)
    with torch.no_grad():
        maps = trainer.learner.engine.module.student(batch.images).patch, StubTeacher().at(DEPTH, batch.images).patch
    grams = []
    for tokens in maps:
        features = tokens.mean(1).double().numpy()
        features -= features.mean(0)
        grams.append(features @ features.T)
    x, y = grams
    expected = (x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())
    assert found["student_teacher_cka"] == pytest.approx(expected, rel=1e-4)
    assert 0.01 < expected < 0.99


class Unaffordable(StubTeacher):
    """Its last block does not fit."""

    def retarget(self, block: int) -> None:
        if block == DEPTH:
            raise torch.OutOfMemoryError
        super().retarget(block)


def test_a_teacher_that_does_not_fit_whole_costs_no_student(tmp_path: Path) -> None:
    overrides = ("data.val=digits", "data.workers=0", "evaluation.probe_epochs=1", "evaluation.max_train_images=99")
    config = stub_config(tmp_path, *overrides, "curriculum.threshold=9")  # it never leaves block 1
    config = replace(config, data=resolve(config.data, tmp_path, ONE))
    trainer = stub_trainer(config, Unaffordable())
    assert trainer.run()
    with pytest.raises(torch.OutOfMemoryError):
        wrapup.wrap_up(config, ONE, trainer)
    trainer.close()
    assert (tmp_path / "student.safetensors").is_file()
    assert 0 < json.loads((tmp_path / "summary.json").read_text())["student_patch_knn"] <= 1


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_the_umask_decides_who_reads_a_run(umask: int, file: int, folder: int, tmp_path: Path) -> None:
    few = ["evaluation.quick_images=20", "evaluation.max_train_images=20", "evaluation.probe_epochs=1"]
    watched = ["evaluation.every_epochs=1", "data.val=digits", "data.workers=0", "epochs=1"]
    config = stub_config(tmp_path / "run", *watched, *few)
    before = os.umask(umask)
    try:
        config = replace(config, data=resolve(config.data, tmp_path / "run", ONE))
        trainer = stub_trainer(config)
        assert trainer.run()
        wrapup.wrap_up(config, ONE, trainer)
        trainer.close()
    finally:
        os.umask(before)
    modes = {path.relative_to(tmp_path): stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert {"student.safetensors", "checkpoints", "curriculum.jsonl"} <= {path.name for path in modes}
    odd = {path: oct(mode) for path, mode in modes.items() if mode != (folder if (tmp_path / path).is_dir() else file)}
    assert not odd


def finished(**changes: Any) -> dict[str, Any]:
    """The summary of a run that climbed to the last of four blocks and saved."""
    summary = {
        "final_block": 4, "teacher_depth": 4, "trajectory": [(0, 1), (3, 4)], "steps": 6, "train_seconds": 1.0,
        "images_per_s": 24.0, "teacher_flops_saved": 0.4, "flops_saved": 0.3, "time_saved": 0.2,
        "time_saved_seconds": 0.25, "time_saved_at_least": -0.1, "skip_efficiency": 0.66,
    }  # fmt: skip
    return summary | changes


def test_savings_say_against_what_and_never_fall_below_nothing(tmp_path: Path) -> None:
    config = stub_config(tmp_path)
    table = wrapup._final_table(finished(), config)
    assert "teacher FLOPs saved      40.0% of a run with the whole teacher at every step" in table
    assert "20.0% (0.2 s), at least 0.0%" in table and "skip efficiency          0.66" in table
    nothing = finished(teacher_flops_saved=-0.04, flops_saved=-0.02, time_saved=-0.298, skip_efficiency=-2.08)
    table = wrapup._final_table(nothing, config)
    assert table.count("saved  ") == table.count("  nothing") == 3
    assert "skip efficiency" not in table and "29.8" not in table


def test_each_kind_of_features_has_a_row_and_the_best_epoch_is_called_optimistic(tmp_path: Path) -> None:
    judged = {"student_cls_knn": 0.5, "student_cls_probe": 0.6, "teacher_patch_knn": 0.7, "teacher_patch_probe": 0.8}
    lines = wrapup._final_table(finished(**judged, student_cls_probe_best_epoch=0.65), stub_config(tmp_path))
    words = "kNN 50.0%, linear probe 60.0% (best epoch 65.0%, chosen on the same images: optimistic)"
    assert re.search(rf"student, class token +{re.escape(words)}\n", lines)
    assert re.search(r"teacher, patches +kNN 70.0%, linear probe 80.0%\n", lines)
    assert "student, patches" not in lines


@pytest.mark.parametrize(
    ("overrides", "changes", "words"),
    [
        ([], {}, []),
        ([], {"final_block": 2, "trajectory": [(0, 1), (3, 2)]},
         ["mid-climb, at block 2 of 4", "epochs=2", "curriculum.last_block_after"]),
        (["curriculum.block=2"], {"final_block": 2, "trajectory": [(0, 1), (3, 2)]}, []),
        (["curriculum.start=null"], {"trajectory": [(0, 4)]}, ["started at block 4 of 4"]),
        (["curriculum.mode=fixed", "curriculum.start=null"], {"trajectory": [(0, 4)]}, []),
        ([], {"judged_classes": 1}, ["data.val are of one class"]),
        ([], {"judged_classes": 2}, []),
    ],
)  # fmt: skip
def test_what_the_table_does_not_say_has_a_line(
    tmp_path: Path, overrides: list[str], changes: dict[str, Any], words: list[str]
) -> None:
    remarks = wrapup._remarks(finished(**changes), stub_config(tmp_path, *overrides))
    assert len(remarks) == bool(words)
    assert all(word in remarks[0] for word in words)
