"""Other runtimes give what torch gives, and a folder loads where its layout says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import leap_dist
from exports import exported
from killed import killed_everywhere
from leap_dist.config import StudentConfig
from leap_dist.deployment import exporting, onnx_file
from leap_dist.deployment.comparing import differences, require_close
from leap_dist.deployment.exporting import Order, export
from leap_dist.deployment.images import shown_to
from leap_dist.deployment.loaded import weights_file
from leap_dist.deployment.onnx_file import onnx_runner
from leap_dist.errors import UserError
from leap_dist.models.export import describe_student
from leap_dist.models.student import build_student

VIT = {"patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 3}
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", VIT, 32),
    "dinov3": ("vit_small_patch16_dinov3", {"embed_dim": 24, "depth": 2, "num_heads": 3}, 32),
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}, 64),
    "mobilenet": ("mobilenetv4_conv_small", {}, 64),
    "swin": ("swin_tiny_patch4_window7_224", {"depths": [1, 1, 1, 1], "embed_dim": 12, "num_heads": [1, 1, 2, 2]}, 224),
    "cait": ("cait_xxs24_224", {"depth": 2, "embed_dim": 24, "num_heads": 2}, 32),
    "beit": ("beit_base_patch16_224", VIT, 32),
    "eva": ("eva02_tiny_patch14_224", {"embed_dim": 24, "depth": 2, "num_heads": 2}, 28),
}
QUICK = ("vit", "dinov3", "convnext")
WIDENED = ("vit", "convnext")  # the other families have no last stage with a width of its own
REMEDIES = [
    pytest.param(family, remedy, marks=[] if family in QUICK and remedy == "none" else pytest.mark.slow)
    for family in FAMILIES
    for remedy in ("none", "lift", *(["wide_last"] if family in WIDENED else []))
]


def student(family: str, remedy: str, folder: Path) -> Path:
    """A run's folder with an untrained student of a family."""
    model, kwargs, size = FAMILIES[family]
    torch.manual_seed(1)
    built = build_student(StudentConfig(model=model, kwargs=kwargs, remedy=remedy), size, width=48).eval()
    folder.mkdir(parents=True)
    save_file(built.backbone.state_dict(), folder / "student.safetensors")
    seen = {"image_size": size, "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0}
    (folder / "student.json").write_text(json.dumps(describe_student(built) | seen))
    return folder


def order(run: Path, **given: object) -> Order:
    standard = {"shown": None, "bound": None, "images": 8, "half": False, "int8": False}
    return Order(leap_dist.load(run), weights_file(run), run / "export", **standard | given)


@pytest.mark.seconds
@pytest.mark.parametrize(("family", "remedy"), REMEDIES)
def test_onnx_gives_torchs_outputs(family: str, remedy: str, tmp_path: Path) -> None:
    run = student(family, remedy, tmp_path / "run")
    runner = export(order(run), "onnx")["onnx"]

    model, images = leap_dist.load(run), torch.randn(3, 3, FAMILIES[family][2], FAMILIES[family][2])
    with torch.no_grad():
        wanted = model(images)
    found = runner(images)  # another number of images than it was made with
    assert found.keys() == {"tokens", "cls", "pooled"}
    for name, value in found.items():
        reference = getattr(wanted, name).numpy()
        np.testing.assert_allclose(value, reference, atol=1e-4 * np.abs(reference).max(), rtol=0, err_msg=name)


@pytest.mark.seconds
def test_a_program_gives_torchs_outputs_and_a_classifiers(tmp_path: Path) -> None:
    run = exported(tmp_path / "run", classes=5)
    export(order(run), "pt2")
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        found = torch.export.load(run / "export" / "student.pt2").module()(images)
        wanted = leap_dist.load(run)(images)
    assert len(found) == 4
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_hub_folder_is_loaded_by_timm_and_by_leap_dist(tmp_path: Path) -> None:
    run = exported(tmp_path / "run")
    (run / "summary.json").write_text(json.dumps({"student_knn": 0.871, "teacher_flops_saved": 0.25}))
    config = (
        "teacher: {model: vit_giant}\nstudent: {model: any}\ndata: {train: gone, augment: leap, global_batch: 384}\n"
    )
    (run / "config.yaml").write_text(config)
    export(order(run), "hub")
    folder, images = run / "export" / "hub", torch.randn(2, 3, 32, 32)
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    wanted = leap_dist.load(run)(images)
    assert torch.equal(plain.forward_features(images)[:, 1:], wanted.tokens)
    assert torch.equal(leap_dist.load(folder)(images).tokens, wanted.tokens)
    assert plain.pretrained_cfg["mean"] == [0.4, 0.5, 0.6] and plain.pretrained_cfg["crop_pct"] == 0.8
    card = (folder / "README.md").read_text()
    assert "| student knn | 87.1% |" in card and "| teacher FLOPs saved | 25.0% |" in card
    assert all(row in card for row in ("| teacher | vit_giant |", "| augmentation | leap |", "| images a step | 384 |"))
    assert "license" not in (folder / "config.json").read_text()  # of timm's own weights of that name


@pytest.mark.parametrize("classes", [0, 5])
def test_timms_training_script_can_fine_tune_a_hub_folder(classes: int, tmp_path: Path) -> None:
    """Its arguments of `create_model`, its look at the images, and a step."""
    run = exported(tmp_path / "run", classes=classes)
    export(order(run), "hub")
    model = timm.create_model(
        f"local-dir:{run / 'export' / 'hub'}", pretrained=True, in_chans=3, num_classes=37, drop_rate=0.0,
        drop_path_rate=None, drop_block_rate=None, global_pool=None, bn_momentum=None, bn_eps=None, scriptable=False,
        checkpoint_path="",
    )  # fmt: skip
    seen = timm.data.resolve_data_config({}, model=model)
    told = ("input_size", "interpolation", "mean", "std", "crop_pct")
    assert [seen[key] for key in told] == [(3, 32, 32), "bilinear", [0.4, 0.5, 0.6], [0.2, 0.3, 0.4], 0.8]
    mine, before = leap_dist.load(run).student.backbone, dict(model.named_parameters())
    for name, tensor in mine.named_parameters():
        assert name.startswith("head.") or torch.equal(before[name], tensor), name
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 37)
    logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_a_hub_folder_of_a_lifted_student_says_who_loads_it(tmp_path: Path) -> None:
    run = student("vit", "lift", tmp_path / "run")
    export(order(run), "hub")
    folder, images = run / "export" / "hub", torch.randn(2, 3, 32, 32)
    assert "parts that timm does not know" in (folder / "README.md").read_text()
    assert torch.equal(leap_dist.load(folder)(images).tokens, leap_dist.load(run)(images).tokens)


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("model", "kwargs"),
    [
        ("vit_tiny_patch16_224", VIT),
        ("vit_small_patch14_dinov2", {"patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 3}),
        (
            "vit_giant_patch14_reg4_dinov2",
            {"patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 4},
        ),
    ],
)
@torch.no_grad()
def test_transformers_loads_a_plain_student(model: str, kwargs: dict, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    FAMILIES["plain"] = (model, kwargs, 32)
    run = student("plain", "none", tmp_path / "run")
    export(order(run), "transformers")
    theirs = transformers.AutoModel.from_pretrained(run / "export" / "transformers").eval()
    images = torch.randn(2, 3, 32, 32)
    found, wanted = theirs(images).last_hidden_state, leap_dist.load(run)(images)
    skipped = found.shape[1] - wanted.tokens.shape[1]
    torch.testing.assert_close(found[:, skipped:], wanted.tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[:, 0], wanted.cls, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "remedy"), [("dinov3", "none"), ("convnext", "none"), ("vit", "lift")])
def test_what_the_dinov2_layout_cannot_say_is_refused(family: str, remedy: str, tmp_path: Path) -> None:
    run = student(family, remedy, tmp_path / "run")
    with pytest.raises(UserError, match="--to transformers: the student"):
        export(order(run), "transformers")
    assert not list((run / "export").iterdir())


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    run = exported(tmp_path / "run")
    mine = run / "export" / "hub"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is no earlier export"):
        export(order(run), "hub")
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]


def test_a_failed_export_leaves_the_earlier_one(tmp_path: Path) -> None:
    run = exported(tmp_path / "run")
    export(order(run), "hub")
    before = {path.name: path.read_bytes() for path in (run / "export" / "hub").iterdir()}
    with pytest.raises(AttributeError):
        export(replace(order(run), model=None), "hub")
    assert {path.name: path.read_bytes() for path in (run / "export" / "hub").iterdir()} == before
    assert [path.name for path in (run / "export").iterdir()] == ["hub"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_kill_at_any_moment_leaves_the_earlier_export_or_the_new_one(tmp_path: Path) -> None:
    """Before each operation on a file; and what killed exports leave is gone after the next one."""
    run = exported(tmp_path / "run")
    given = order(run)
    export(given, "hub")
    folder = run / "export" / "hub"
    earlier = contents(folder)
    newer = replace(given, weights=weights_file(exported(tmp_path / "newer")))  # the card has its name
    card = earlier["README.md"].replace(b"# run", b"# newer").replace(b"local-dir:run", b"local-dir:newer")
    found = []
    for number in killed_everywhere(lambda: export(newer, "hub"), run / "export"):
        found.append(contents(folder) == earlier)
        assert found[-1] or contents(folder) == earlier | {"README.md": card}, number
    assert len(found) > 10 and found == sorted(found, reverse=True), "the earlier one, then the new one"
    assert [path.name for path in (run / "export").iterdir()] == ["hub"]


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_the_earlier_file_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the exporter writes is copied here, as it takes seconds; the check and all else are what they are."""
    run = exported(tmp_path / "run")
    path, given, found = run / "export" / "student.onnx", order(run), []
    export(given, "onnx")
    ready = path.read_bytes()
    monkeypatch.setattr(exporting, "write_onnx", lambda model, path: path.write_bytes(ready))
    path.write_bytes(b"earlier")
    for _ in killed_everywhere(lambda: export(given, "onnx"), run / "export"):
        found.append(path.read_bytes() == b"earlier")
        assert found[-1] or onnx_runner(path)(torch.zeros(1, 3, 32, 32))
    assert len(found) > 5 and found == sorted(found, reverse=True)
    assert [path.name for path in (run / "export").iterdir()] == ["student.onnx"]


@torch.no_grad()
def test_outputs_that_are_off_are_told_and_refused(tmp_path: Path) -> None:
    model, images = leap_dist.load(exported(tmp_path / "run")), torch.randn(2, 3, 32, 32)
    wanted = {name: value.numpy() for name, value in model(images)._asdict().items() if value is not None}
    off = wanted | {"cls": wanted["cls"].copy()}
    off["cls"][0, 0] += 0.5
    found = differences(model, lambda _: off, [images])
    largest = np.abs(wanted["cls"]).max()
    assert found["cls"].largest == pytest.approx(0.5 / largest, rel=1e-5) and found["tokens"].largest == 0
    assert found["cls"].mean == pytest.approx(0.5 / largest / wanted["cls"].size, rel=1e-5)
    with pytest.raises(UserError, match=r"its cls are .* off torch's, at most 1e-04 may be; nothing was written"):
        require_close(found, 1e-4, "x.onnx")
    off["cls"][0, 0] = np.nan
    with pytest.raises(UserError, match="its cls are inf off"):
        require_close(differences(model, lambda _: off, [images]), 1e9, "x.onnx")


def test_weights_that_one_onnx_file_cannot_hold_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "LARGEST", 1000)
    run = exported(tmp_path / "run")
    with pytest.raises(UserError, match=r"--to onnx: .* GiB of weights.*--to pt2 takes any"):
        export(order(run), "onnx")
    assert not list((run / "export").iterdir())


@pytest.mark.seconds
def test_an_export_that_is_too_far_off_is_not_kept(tmp_path: Path) -> None:
    run = exported(tmp_path / "run")
    with pytest.raises(UserError, match=r"student\.onnx: its .* off torch's"):
        export(order(run, bound=1e-12), "onnx")
    assert not list((run / "export").iterdir())


@pytest.mark.parametrize("folder", ["run", "run/tiny"])
def test_a_run_or_a_student_of_a_cohort_is_shown_the_runs_images(folder: str, tmp_path: Path) -> None:
    """Through its own eyes: the record's pixels, not the config's."""
    run = exported(tmp_path / folder, interpolation="bicubic")
    config = "teacher: {model: any}\nstudent: {model: any}\ndata: {train: digits, val: digits, image_size: 64}\n"
    (tmp_path / "run" / "config.yaml").write_text(config)
    model = leap_dist.load(run)
    shown = shown_to(model.spec, run, None, None)
    assert shown.bicubic and shown.data.image_size == 32 and shown.data.mean == (0.4, 0.5, 0.6)
    assert Path(shown.data.train).is_relative_to(tmp_path / "run")
    assert shown_to(model.spec, tmp_path, None, None) is None


@pytest.mark.slow
def test_half_and_8_bit_files_are_near(tmp_path: Path) -> None:
    from leap_dist.config import DataConfig
    from leap_dist.data import resolve
    from leap_dist.deployment.images import ALONE, Shown

    run = exported(tmp_path / "run", mean=[0.5] * 3, std=[0.5] * 3)
    data = resolve(DataConfig(train="digits", val="digits", image_size=32, workers=0), tmp_path, ALONE)
    runners = export(order(run, shown=Shown(data, False), images=32, half=True, int8=True), "onnx")
    assert runners.keys() == {"onnx", "fp16", "int8"}
    sizes = {name: (run / "export" / f"student{end}").stat().st_size for name, end in
             {"onnx": ".onnx", "fp16": ".fp16.onnx", "int8": ".int8.onnx"}.items()}  # fmt: skip
    assert sizes["int8"] < sizes["fp16"] < sizes["onnx"]
    images = torch.randn(2, 3, 32, 32)
    exact = onnx_runner(run / "export" / "student.onnx")(images)["pooled"]
    for name, near in {"fp16": 2e-2, "int8": 0.3}.items():
        assert np.abs(runners[name](images)["pooled"] - exact).max() < near * np.abs(exact).max()
