"""The exported student: what the documentation says is all it takes to load it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import leap_dist
from leap_dist.config import ObjectiveConfig, StudentConfig, load
from leap_dist.matching.objective import Objective
from leap_dist.models.export import export_student, load_student
from leap_dist.models.student import Student, build_student
from leap_dist.runtime.distributed import World
from leap_dist.runtime.integrity import sealed

ONE = World(0, 1, 0, 1, torch.device("cpu"))
ROOT = Path(__file__).resolve().parents[3]
DOCUMENTED = ROOT / "docs" / "students.md"
IMAGES = torch.randn(2, 3, 16, 16)
REMEDIES = ["none", "lift", "wide_last"]


def exported(folder: Path, *overrides: str) -> tuple[Student, Path]:
    """A student with no parameter at 0 or 1, and the file that a run would leave of it."""
    shape = ["patch_size=4", "embed_dim=12", "depth=3", "num_heads=2"]
    config = load(
        None,
        ["teacher.model=t", "student.model=vit_tiny_patch16_224", "data.train=digits", "data.image_size=16",
         "data.crop_pct=0.9", f"output={folder}", *(f"student.kwargs.{item}" for item in shape), *overrides],
    )  # fmt: skip
    student = build_student(config.student, 16, 18).eval()
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.3)
    engine = type("Engine", (), {"module": Objective(student, 18, (4, 4), ObjectiveConfig())})()
    return student, export_student(engine, config, ONE)


def documented(remedy: str) -> str:
    """The Python of the section on using a student."""
    opening, lift, wide_last, use, _ = re.findall(r"```python\n(.*?)```", DOCUMENTED.read_text(), re.S)[1:]
    return "\n".join([opening, {"none": "", "lift": lift, "wide_last": wide_last}[remedy], use])


def test_the_lines_of_the_readme_give_the_mean_patch_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They name the folder that the demo leaves; the feature is the one that a run's accuracies are about."""
    student, _ = exported(tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    names: dict[str, Any] = {"images": IMAGES}
    exec(lines, names)
    assert torch.equal(names["features"], student(IMAGES).patch.mean(1))
    assert torch.equal(names["model"](IMAGES), student(IMAGES).cls)


@pytest.mark.parametrize("classes", [0, 5])
@pytest.mark.parametrize("remedy", REMEDIES)
def test_the_documented_lines_load_an_export_bitwise(
    remedy: str, classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain timm and torch; also defect B4 of the published code, which could not export its tiny student."""
    student, path = exported(tmp_path, f"student.remedy={remedy}", f"student.num_classes={classes}")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"images": IMAGES}
    exec(documented(remedy), names)
    features = student(IMAGES)
    assert torch.equal(names["tokens"][:, 1:], features.patch) and torch.equal(names["tokens"][:, 0], features.cls)
    assert torch.equal(names["logits"], student.classify(features))
    assert names["logits"].shape[-1] == (classes or student.width)
    about = json.loads(path.with_suffix(".json").read_text())
    assert about["width"] == student.width == (12 if remedy == "none" else 18)
    assert about["crop_pct"] == 0.9


@pytest.mark.parametrize("remedy", REMEDIES)
def test_load_student_gives_the_student_back(remedy: str, tmp_path: Path) -> None:
    student, path = exported(tmp_path, f"student.remedy={remedy}", "student.num_classes=5")
    loaded = load_student(path, torch.device("cpu"))
    assert (loaded.recipe.remedy, loaded.width, loaded.training) == (remedy, student.width, False)
    for mine, theirs in zip(student.every_layer(IMAGES), loaded.every_layer(IMAGES), strict=True):
        assert torch.equal(mine.patch, theirs.patch) and torch.equal(mine.cls, theirs.cls)
    assert torch.equal(loaded.classify(loaded(IMAGES)), student.classify(student(IMAGES)))


def test_the_record_says_what_an_export_needs(tmp_path: Path) -> None:
    """Images as the run's evaluation took them, where the tokens are, and what made it."""
    _, path = exported(tmp_path / "swept")
    about = json.loads(path.with_suffix(".json").read_text())
    assert (about["interpolation"], about["colour_order"], about["crop_pct"]) == ("bilinear", "RGB", 0.9)
    told = {"order": "NLC", "prefix": 1, "stage": None, "reduction": None, "cls": "token", "source": "features"}
    assert {key: about[key] for key in told} == told
    assert about["versions"]["torch"] == torch.__version__ and about["versions"].keys() == {
        "leap_dist",
        "torch",
        "timm",
    }
    assert about["git"] is None or re.fullmatch("[0-9a-f]{40}", about["git"]["commit"])
    _, path = exported(tmp_path / "leap", "evaluation.protocol=leap")
    assert json.loads(path.with_suffix(".json").read_text())["interpolation"] == "bicubic"


FIRST = {"model", "kwargs", "image_size", "mean", "std"}
REMEDIED = FIRST | {"remedy", "width", "wide"}
MAPPED = REMEDIED | {"crop_pct", "reduction", "resized_to", "map_at", "mean_head", "cls", "grid"}
OLDER = {"first": FIRST, "remedied": REMEDIED, "cropped": REMEDIED | {"crop_pct"}, "mapped": MAPPED}


@pytest.mark.parametrize("keys", [*OLDER.values(), MAPPED | {"file", "seal"}], ids=[*OLDER, "sealed"])
def test_a_record_of_any_earlier_version_loads(keys: set[str], tmp_path: Path) -> None:
    student, path = exported(tmp_path)
    record = path.with_suffix(".json")
    about = json.loads(record.read_text())
    older = {key: about[key] for key in keys - {"seal"}}
    record.write_text(json.dumps(sealed(older) if "seal" in keys else older))
    assert torch.equal(load_student(path)(IMAGES).patch, student(IMAGES).patch)
    model = leap_dist.load(path)
    assert torch.equal(model(IMAGES).tokens, student(IMAGES).patch)
    assert (model.spec.crop_pct, model.spec.interpolation) == (0.9 if "crop_pct" in keys else 0.875, "bilinear")


@pytest.mark.seconds
def test_the_documented_control_has_the_papers_width(capsys: pytest.CaptureFixture[str]) -> None:
    text = DOCUMENTED.read_text()
    exec(re.findall(r"```python\n(.*?)```", text, re.S)[0], names := {})
    assert capsys.readouterr().out == "{'embed_dim': 219}\n"
    lifted = StudentConfig(model="deit_tiny_patch16_224", remedy="lift", num_classes=1000)
    assert names["uniform_control"](lifted, 224, 384).kwargs == {"embed_dim": 198}
    # By the closed form of a DeiT of 12 blocks with 197 tokens and 1000 classes, not by building it.
    counts = {w: 12 * (12 * w**2 + 13 * w) + 769 * w + 198 * w + 2 * w + 1000 * (w + 1) for w in range(192, 240, 3)}
    for wanted, width in ((7_313_896, 219), (5_983_528, 198)):
        assert min(counts, key=lambda w: abs(counts[w] - wanted)) == width
        assert re.search(rf"\| {width}\b[^|]*\| {counts[width]:,} \|", text)
    assert f"{counts[204]:,}" in text


def test_an_export_loads_from_its_run_folder_by_text_or_path(tmp_path: Path) -> None:
    student, path = exported(tmp_path)
    expected = student(IMAGES).patch
    for where in (str(tmp_path), tmp_path, str(path), path):
        assert torch.equal(load_student(where)(IMAGES).patch, expected)
    (tmp_path / "empty").mkdir()
    for nowhere in (tmp_path / "empty", tmp_path / "lfit"):
        with pytest.raises(FileNotFoundError, match=f"{nowhere.name}.*: no such file"):
            load_student(nowhere)


SWIN = {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}


@pytest.mark.parametrize(
    ("model", "size", "options"),
    [
        ("test_convnext", 64, {}),
        ("test_convnext", 64, {"reduction": 8, "num_classes": 5}),
        ("test_resnet", 64, {"remedy": "lift", "num_classes": 5}),
        ("swin_tiny_patch4_window7_224", 64, {"kwargs": SWIN}),
        ("test_vit_relpos", 32, {"remedy": "lift"}),
        pytest.param("pit_ti_224", 48, {}, marks=pytest.mark.seconds),
    ],
)
def test_the_documented_lines_load_every_other_student_bitwise(
    model: str, size: int, options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(None, ["teacher.model=t", f"student.model={model}", "data.train=digits", f"output={tmp_path}"])
    student = build_student(StudentConfig(model=model, **options), size, 18).eval()
    export_student(type("Engine", (), {"module": Objective(student, 18, (4, 4), ObjectiveConfig())})(), config, ONE)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"images": (images := torch.randn(2, 3, size, size))}
    opening, *_, every_other = re.findall(r"```python\n(.*?)```", DOCUMENTED.read_text(), re.S)[1:]
    exec(opening + every_other, names)
    assert torch.equal(names["tokens"], student(images).patch)
