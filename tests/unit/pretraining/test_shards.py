"""A teacher trained on labelled shards: it learns, survives, and is what its record says."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

import leap_dist
from leap_dist.config import TeacherConfig
from leap_dist.data import Batch, eval_transform, write_shards
from leap_dist.data.crops import decode
from leap_dist.data.digits import digit_samples
from leap_dist.deployment.images import shown_to
from leap_dist.errors import UserError
from leap_dist.pretraining.recipe import TeacherRecipe, load_recipe
from leap_dist.pretraining.session import Session, token_loss
from leap_dist.pretraining.training import build_model, train_on_shards
from leap_dist.teacher import build_teacher

pytestmark = pytest.mark.seconds

ROOT = Path(__file__).parents[3]
TINY = (
    "kwargs={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2, mlp_ratio: 2}", "data.image_size=32", "epochs=4",
    "data.global_batch=20", "data.augment=crop", "data.crop_scale=[0.65,1.0]", "data.workers=0", "optim.lr=2e-3",
    "data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]", "optim.batch_reference=null", "ema_decay=0.9",
    "evaluate_every=2", "data.mixup_group=4", "data.cutmix_alpha=1.0", "init_std=0.2",
)  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 digits to train on, 297 held out; and 100 without a sensible label."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(itertools.islice(digit_samples("train"), 600), folder / "train")
    write_shards(digit_samples("val"), folder / "val")
    write_shards(((data, -1) for data, _ in itertools.islice(digit_samples("val"), 100)), folder / "unlabelled")
    return folder


def recipe(shards: Path, output: Path, *overrides: str) -> TeacherRecipe:
    places = [f"data.train={shards / 'train'}", f"data.val={shards / 'val'}", f"output={output}"]
    return load_recipe(None, [*TINY, *places, *overrides])


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that nothing interrupted."""
    output = tmp_path_factory.mktemp("trained") / "teacher"
    accuracy = train_on_shards(recipe(shards, output))
    assert accuracy == json.loads((output / "teacher.json").read_text())["val_accuracy"]
    return output


def val_accuracy(model: Callable[[Tensor], Tensor], using: TeacherRecipe) -> float:
    images, labels = zip(*((decode(data), label) for data, label in digit_samples("val")), strict=True)
    with torch.no_grad():
        logits = model(eval_transform(using.data)(torch.stack(images)))
    return (logits.argmax(1) == torch.tensor(labels)).double().mean().item()


def test_it_learns(trained: Path) -> None:
    first, last = json.loads((trained / "teacher.json").read_text())["history"]
    assert (first["epoch"], first["step"], last["epoch"], last["step"]) == (2, 60, 4, 120)
    assert last["val_accuracy"] > 0.25  # chance is 0.1
    assert last["loss"] < first["loss"] < math.log(10) + 0.1
    assert last["images_per_s"] > 0


def test_record_rebuilds_what_it_measured(trained: Path, shards: Path) -> None:
    about, state = json.loads((trained / "teacher.json").read_text()), load_file(trained / "teacher.safetensors")
    assert about["finished"] and about["versions"]["timm"] == timm.__version__
    model = timm.create_model(about["model"], **about["kwargs"])
    model.load_state_dict(state)
    assert val_accuracy(model.eval(), recipe(shards, trained)) == about["val_accuracy"]


def test_it_is_loaded_and_shown_its_images_as_a_student_is(trained: Path, shards: Path) -> None:
    model, about = leap_dist.load(trained), json.loads((trained / "teacher.json").read_text())
    assert val_accuracy(lambda images: model(images).logits, recipe(shards, trained)) == about["val_accuracy"]
    shown = shown_to(model.spec, trained, None, None)
    assert (shown.data.train, shown.bicubic) == (recipe(shards, trained).data.train, False)


def test_weights_are_the_average_and_a_teachers(trained: Path, shards: Path) -> None:
    state = load_file(trained / "teacher.safetensors")
    saved = torch.load(trained / "checkpoint.pt", weights_only=True)
    assert all(torch.equal(tensor, saved["average"][name]) for name, tensor in state.items())
    assert not torch.equal(state["blocks.1.mlp.fc2.weight"], saved["model"]["blocks.1.mlp.fc2.weight"])
    about = json.loads((trained / "teacher.json").read_text())
    kwargs = {key: value for key, value in about["kwargs"].items() if key not in ("num_classes", "img_size")}
    config = TeacherConfig(model=about["model"], kwargs=kwargs, weights=str(trained / "teacher.safetensors"))
    teacher = build_teacher(config, about["image_size"], torch.device("cpu"))
    teacher.retarget(2)

    def classify(images: Tensor) -> Tensor:
        return teacher.features(images).cls @ state["head.weight"].T + state["head.bias"]

    assert val_accuracy(classify, recipe(shards, trained)) == about["val_accuracy"]


@pytest.mark.parametrize("how", ["SIGTERM", "killed", "SIGTERM at the end"])
def test_an_interrupted_training_goes_on_as_if_nothing_had_been(
    how: str, trained: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    advance, at = Session.advance, 120 if how == "SIGTERM at the end" else 17

    def advance_until(self: Session, images: Tensor, batch: Batch) -> None:
        advance(self, images, batch)
        if self.step == at:
            if how == "killed":
                raise Killed  # before this step is saved
            os.kill(os.getpid(), signal.SIGTERM)

    asked = recipe(shards, tmp_path / "out", *(["save_minutes=1e-9"] if how == "killed" else []))
    with monkeypatch.context() as patch:
        patch.setattr(Session, "advance", advance_until)
        if how == "killed":
            with pytest.raises(Killed):
                train_on_shards(asked)
        else:
            assert train_on_shards(asked) is None
    saved = torch.load(tmp_path / "out/checkpoint.pt", weights_only=True)
    assert saved["step"] == at - (how == "killed")
    assert train_on_shards(recipe(shards, tmp_path / "out")) is not None
    ours, theirs = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (tmp_path / "out", trained))
    for part in ("model", "average"):
        assert all(torch.equal(tensor, theirs[part][name]) for name, tensor in ours[part].items())
    for ours_row, row in zip(ours["history"], theirs["history"], strict=True):
        assert [ours_row[key] for key in ("step", "val_accuracy")] == [row[key] for key in ("step", "val_accuracy")]


def test_a_finished_training_is_left_alone(trained: Path, shards: Path) -> None:
    before = (trained / "teacher.safetensors").stat().st_mtime_ns
    accuracy = train_on_shards(recipe(shards, trained))
    assert accuracy == json.loads((trained / "teacher.json").read_text())["val_accuracy"]
    assert (trained / "teacher.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["classes=9"], "classes=9: data.train has a sample of label 9"),
        (["data.train={shards}/unlabelled"], "classes=10: data.train has a sample of label -1"),
        (["optim.lr=1e10", "clip=1e9"], "the loss is not finite by step 30"),
        (
            ["model=vit_base_patch16_siglip_224"],
            "siglip_224: not a VisionTransformer with one classifier, on its class",
        ),
        (["model=deit_tiny_distilled_patch16_224"], "not a VisionTransformer with one classifier"),
        (["kwargs.global_pool=avg"], "model=vit_tiny_patch16_224: not a VisionTransformer with one classifier"),
        (["model=beit_base_patch16_224"], "model=beit_base_patch16_224: not a VisionTransformer"),
        (["model=vit_tinny"], "vit_tinny: unknown to timm"),
        (["data.mixup_group=8"], "data.mixup_group=8: must divide the micro-batch of 20"),
    ],
)
def test_what_does_not_fit_ends_in_one_line_without_a_teacher(
    overrides: list[str], message: str, shards: Path, tmp_path: Path
) -> None:
    overrides = [text.replace("{shards}", str(shards)) for text in overrides]
    with pytest.raises(UserError) as error:
        train_on_shards(recipe(shards, tmp_path / "out", "epochs=1", *overrides))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out/teacher.safetensors").exists() and not (tmp_path / "out/checkpoint.pt").exists()


def test_a_folder_belongs_to_one_recipe(trained: Path, shards: Path) -> None:
    with pytest.raises(UserError, match=r"holds a teacher of another recipe \(mix_prob: 0.5 -> 0.25\)"):
        train_on_shards(recipe(shards, trained, "mix_prob=0.25"))
    assert train_on_shards(recipe(shards, trained, "save_minutes=3", "data.timeout_s=30")) is not None


def test_it_does_not_go_on_with_other_shards(trained: Path, shards: Path) -> None:
    with pytest.raises(UserError, match=r"data.train had 600 samples in 1 shards \(\w+\) and has 297 samples in 1"):
        train_on_shards(recipe(shards, trained, f"data.train={shards / 'val'}"))
    assert f"{shards / 'train'}\n" in (trained / "recipe.yaml").read_text()


def test_images_that_cannot_be_read_are_listed_and_end_it_when_they_are_many(shards: Path, tmp_path: Path) -> None:
    samples = itertools.islice(digit_samples("train"), 100)
    bad = {3, 50, 51}
    write_shards(((b"none" if i in bad else data, label) for i, (data, label) in enumerate(samples)), tmp_path / "bad")
    asked = [f"data.train={tmp_path / 'bad'}", "epochs=1", "evaluate_every=1"]
    assert train_on_shards(recipe(shards, tmp_path / "few", *asked, "data.max_bad_fraction=0.03")) is not None
    listed = [json.loads(line)["id"] for line in (tmp_path / "few/bad_samples.jsonl").read_text().splitlines()]
    assert set(listed) == bad
    with pytest.raises(UserError, match="3 training samples cannot be read, at most 2 may be"):
        train_on_shards(recipe(shards, tmp_path / "many", *asked, "data.max_bad_fraction=0.02"))
    assert not (tmp_path / "many/teacher.safetensors").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("classes=0", "classes=0: must be at least 1"),
        ("label_smoothing=1.0", "label_smoothing=1.0: must be at least 0, below 1"),
        ("ema_decay=1", "ema_decay=1.0: must be at least 0, below 1"),
        ("mix_prob=-0.1", "mix_prob=-0.1: must be at least 0, at most 1"),
        ("data.val=null", "data.val is required"),
        ("data.val=nowhere", "data.val=nowhere: no such folder"),
        ("epochs=0", "epochs=0: must be at least 1"),
        ("optim.name=sgd", "optim.name='sgd' (command line): expected one of"),
        ("ema=0.9", "ema (command line): unknown key; did you mean ema_decay?"),
    ],
)
def test_recipes_that_cannot_be(override: str, message: str, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        recipe(shards, tmp_path, override)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("path", sorted((ROOT / "launch_configs").rglob("teacher_*.yaml")), ids=lambda path: path.stem)
def test_recipes_that_are_shipped_can_be_built(path: Path) -> None:
    shipped = load_recipe(path, ["data.train=digits", "data.val=digits"])
    spread = [block.mlp.fc2.weight.std().item() for block in build_model(shipped).blocks]
    assert spread[-1] > 2 * spread[0]


def test_loss_is_half_the_class_tokens_and_half_the_mean_patchs() -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 9, 4, generator=random, dtype=torch.float64)
    targets = torch.randn(5, 4, generator=random, dtype=torch.float64).softmax(-1)
    expected = 0.0
    for image, target in zip(logits, targets, strict=True):
        for seen in (image[0], sum(image[2:]) / 7):  # two prefix tokens
            expected -= float((target * (seen - seen.exp().sum().log())).sum()) / 10
    assert token_loss(logits, targets, prefix=2).item() == pytest.approx(expected, rel=1e-12)


def test_bf16_takes_about_the_same_step(shards: Path, tmp_path: Path) -> None:
    images = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 10
    losses = {}
    for precision in ("fp32", "bf16"):
        asked = recipe(shards, tmp_path, f"precision={precision}")
        session = Session(asked, build_model(asked), 30, "any", tmp_path / "checkpoint.pt")
        for _ in range(5):
            session.advance(images, Batch(images, labels, torch.arange(20), torch.arange(20)))
        session.save()
        losses[precision] = session.loss
        assert next(session.model.parameters()).dtype == torch.float32
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"] != losses["fp32"]
