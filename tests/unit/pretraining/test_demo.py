"""Training and caching of the demo teacher, on a tiny recipe."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from leap_dist.models.export import load_student
from leap_dist.pretraining import demo
from leap_dist.pretraining.demo import TeacherTraining, demo_cache, ensure_demo_teacher, train_teacher

pytestmark = pytest.mark.seconds

TINY = TeacherTraining(
    kwargs={"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "mlp_ratio": 2}, epochs=6, batch=25, lr=3e-3
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    out = tmp_path_factory.mktemp("teacher") / "new" / "tiny.safetensors"
    return out, train_teacher(TINY, out)


def test_it_learns_the_digits(trained: tuple[Path, float]) -> None:
    assert trained[1] > 0.5  # chance is 0.1


def test_file_is_a_timm_model(trained: tuple[Path, float]) -> None:
    model = timm.create_model(TINY.model, img_size=32, num_classes=10, **TINY.kwargs)
    model.load_state_dict(load_file(trained[0]))
    assert [path.name for path in sorted(trained[0].parent.iterdir())] == ["tiny.json", "tiny.safetensors"]


def test_record_names_the_recipe_and_the_accuracy(trained: tuple[Path, float]) -> None:
    record = json.loads(trained[0].with_suffix(".json").read_text())
    assert record["val_accuracy"] == trained[1]
    assert record["recipe"]["model"] == TINY.model
    assert record["recipe"]["kwargs"] == TINY.kwargs


def test_a_demo_teacher_loads_as_an_exported_student_does(trained: tuple[Path, float]) -> None:
    images = torch.randn(2, 3, 32, 32)
    model = timm.create_model(TINY.model, img_size=32, num_classes=10, **TINY.kwargs)
    model.load_state_dict(load_file(trained[0]))
    loaded = load_student(trained[0])
    assert torch.equal(loaded(images).patch, model.eval().forward_features(images)[:, 1:])


def test_a_sweep_takes_the_demos_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("runs/sweeps/first/runs/a-s0")
    assert demo_cache(run) == Path("runs/sweeps/first/runs/demo-teacher")
    (tmp_path / "runs/demo-teacher").mkdir(parents=True)
    (tmp_path / "runs/demo-teacher/teacher.safetensors").touch()
    assert demo_cache(run) == demo_cache(Path("runs/demo")) == Path("runs/demo-teacher")
    assert demo_cache(tmp_path / run) == tmp_path / "runs/demo-teacher"
    monkeypatch.chdir(tmp_path / "runs/demo-teacher")
    assert demo_cache(tmp_path / run) == tmp_path / run.parent / "demo-teacher", "not outside the working directory"


def test_training_depends_on_its_seed_alone_and_keeps_the_callers_random_state(tmp_path: Path) -> None:
    short = dataclasses.replace(TINY, epochs=1)

    def weights(seed: int) -> torch.Tensor:
        out = tmp_path / f"{seed}.safetensors"
        train_teacher(dataclasses.replace(short, seed=seed), out)
        return load_file(out)["blocks.1.mlp.fc2.weight"]

    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = weights(0)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(weights(0), first)
    assert not torch.equal(weights(1), first)


def test_every_block_writes_more_than_the_one_before() -> None:
    model = demo._initial_model(TeacherTraining())
    spreads = [(b.attn.proj.weight.std().item(), b.mlp.fc2.weight.std().item()) for b in model.blocks]
    for depth, (attention, mlp) in enumerate(spreads):
        assert attention == pytest.approx(0.1 * 0.14 * 1.44**depth, rel=0.05)
        assert mlp == pytest.approx(0.1 * 0.7 * 1.25**depth, rel=0.05)


def test_cache_is_reused_until_the_recipe_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainings: list[int] = []

    def train(config: TeacherTraining, out: Path) -> float:
        trainings.append(config.seed)
        return train_teacher(dataclasses.replace(TINY, epochs=1, seed=config.seed), out)

    monkeypatch.setattr(demo, "train_teacher", train)
    monkeypatch.setattr(demo, "TeacherTraining", lambda seed: dataclasses.replace(TINY, epochs=1, seed=seed))
    path = ensure_demo_teacher(tmp_path)
    assert ensure_demo_teacher(tmp_path) == path
    assert trainings == [0]
    ensure_demo_teacher(tmp_path, seed=1)
    assert trainings == [0, 1]
    path.with_suffix(".json").write_text("{")  # as a full disk may leave it
    ensure_demo_teacher(tmp_path, seed=1)
    path.unlink()
    ensure_demo_teacher(tmp_path, seed=1)
    assert trainings == [0, 1, 1, 1]


def test_an_interrupted_training_leaves_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_accuracy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_teacher(dataclasses.replace(TINY, epochs=1), tmp_path / "teacher.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("rank", "shown"), [("0", True), ("1", False)])
def test_only_the_main_process_shows_progress(
    rank: str, shown: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    train_teacher(dataclasses.replace(TINY, epochs=1), tmp_path / "teacher.safetensors")
    assert ("training the demo teacher" in capsys.readouterr().err) == shown
