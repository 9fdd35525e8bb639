"""What is shown is what happened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from leap_dist.config import Config, hyperparameters
from leap_dist.monitoring.dashboard import CARDS, layout
from leap_dist.monitoring.telemetry import Bar, Telemetry, memory_bytes, table
from stubs import let_a_second_begin, stub_config


def events(output: Path) -> EventAccumulator:
    found = EventAccumulator(str(output / "tensorboard"))
    found.Reload()
    return found


def test_points_are_written_at_their_step(tmp_path: Path) -> None:
    telemetry = Telemetry(stub_config(tmp_path, "telemetry.every=2"), first_step=0)
    for step in range(4):
        if telemetry.is_due(step):
            telemetry.points(step, {"loss/total": float(step)})
    telemetry.close()
    assert [(event.step, event.value) for event in events(tmp_path).Scalars("loss/total")] == [(0, 0.0), (2, 2.0)]


def test_the_bar_moves_by_images_and_says_what_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar(stub_config(tmp_path, "telemetry.progress=true"), total_steps=4, first_step=2)
    bar.step({"block": "1/4"})
    bar.say("a line")
    bar.end()
    shown = capsys.readouterr().err
    assert "12.0/16.0" in shown and "block=1/4" in shown and "a line\n" in shown


def charts(config: Config) -> dict[str, list[str]]:
    return {category: list(found) for category, found in layout(config).items()}


def test_charts_are_grouped_and_explained(tmp_path: Path) -> None:
    config = stub_config(tmp_path, "telemetry.spectra_every=5")
    Telemetry(config, first_step=0).close()
    found = events(tmp_path)
    written = Layout.FromString(found.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert {category.title: [chart.title for chart in category.chart] for category in written.category} == (
        charts(config)
    )
    assert list(charts(config)) == list(CARDS) == ["curriculum", "savings", "progress", "speed", "spectra"]
    for name, text in CARDS.items():
        (card,) = found.Tensors(f"what the charts mean/{name}/text_summary")
        assert card.tensor_proto.string_val[0].decode() == text.strip()


def test_what_is_switched_off_has_no_chart(tmp_path: Path) -> None:
    plain = stub_config(tmp_path, "engine.clip=0")
    full = stub_config(
        tmp_path, "evaluation.every_epochs=1", "data.val=digits", "telemetry.spectra_every=5",
        "telemetry.peak_tflops=1", "curriculum.metric=cosine",
    )  # fmt: skip
    lacking = {name for found in charts(full).values() for name in found}
    lacking -= {name for found in charts(plain).values() for name in found}
    assert {"accuracy of the student", "norm of the gradients", "effective rank of an image's tokens"} < lacking
    for config, metric in ((plain, "cka"), (full, "cosine")):
        tags = layout(config)["curriculum"]["score, its average and the threshold"][1]
        assert tags == [f"curriculum/{metric}$", "curriculum/ema", "curriculum/threshold"]


def test_a_resumed_run_hides_the_points_it_repeats(tmp_path: Path) -> None:
    config = stub_config(tmp_path)
    first = Telemetry(config, first_step=0)
    for step in range(4):
        first.points(step, {"loss/total": -1.0})
    first.close()
    let_a_second_begin(tmp_path / "tensorboard")
    second = Telemetry(config, first_step=2)
    for step in range(2, 4):
        second.points(step, {"loss/total": 1.0})
    second.close()
    assert [event.value for event in events(tmp_path).Scalars("loss/total")] == [-1, -1, 1, 1]


def test_the_end_of_a_run_leaves_results_hparams_and_figure(tmp_path: Path) -> None:
    ledger = [
        {"step": 0, "block": 1, "score": 0.5, "threshold": 0.6, "next_block": 1, "depth": 4},
        {"step": 2, "block": 1, "score": 0.7, "threshold": 0.6, "next_block": 2},
        {"step": 3, "block": 2, "score": 0.4, "threshold": 0.6, "next_block": 2},
    ]
    (tmp_path / "curriculum.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ledger))
    telemetry = Telemetry(stub_config(tmp_path), first_step=0)
    telemetry.finish({"steps": 4, "student_patch_knn": 0.5, "trajectory": [(0, 1)]}, "student kNN  50.0%")
    telemetry.close()
    found = events(tmp_path)
    assert {"config/text_summary"} <= set(found.Tags()["tensors"])
    (card,) = found.Tensors("result/text_summary")
    assert "student kNN  50.0%" in card.tensor_proto.string_val[0].decode()
    assert "curriculum/climb" in found.Tags()["images"]
    assert found.Scalars("result/student_patch_knn")[0].value == 0.5
    assert (tmp_path / "curriculum.png").read_bytes().startswith(b"\x89PNG")


def test_a_lost_ledger_costs_the_figure_alone(tmp_path: Path) -> None:
    telemetry = Telemetry(stub_config(tmp_path), first_step=0)
    missing = telemetry.finish({"steps": 4, "student_patch_knn": 0.5}, "student kNN  50.0%")
    telemetry.close()
    assert events(tmp_path).Scalars("result/student_patch_knn")[0].value == 0.5
    assert missing is not None and missing.startswith("no curriculum.png: ")


def test_hyperparameters_are_what_the_numbers_follow_from(tmp_path: Path) -> None:
    shown = hyperparameters(stub_config(tmp_path))
    assert {"optim.lr", "curriculum.threshold", "student.model", "epochs"} < shown.keys()
    assert not [key for key in shown if key.startswith(("checkpoint.", "telemetry.", "evaluation.", "output"))]


def test_the_table_aligns_and_leaves_out_what_is_unknown() -> None:
    assert table([("kNN", "50 %"), ("teacher", None), ("steps", "3")]).splitlines() == [
        "-----------", "kNN    50 %", "steps  3", "-----------",
    ]  # fmt: skip


def test_memory_counts_this_process() -> None:
    before = memory_bytes(torch.device("cpu"))
    block = torch.ones(64 << 18)
    assert memory_bytes(torch.device("cpu")) >= max(before, block.nbytes)
