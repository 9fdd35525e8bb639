"""Students that are no plain vision transformers, against timm's own outputs written out for each kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Optional

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from leap_dist.config import Config, DataConfig, ObjectiveConfig, OptimConfig, StudentConfig, TeacherConfig
from leap_dist.errors import UserError
from leap_dist.matching import Objective
from leap_dist.models import Features, build_student, export_average, export_student, load_student, warm_start
from leap_dist.models.flops import student_step_flops
from leap_dist.models.student import Student
from leap_dist.runtime.average import WeightAverage
from leap_dist.runtime.optim import build_optimizer
from stubs import ONE


def nchw(raw: Tensor) -> Tensor:
    return raw.flatten(2).mT


def nhwc(raw: Tensor) -> Tensor:
    return raw.flatten(1, 2)


def after(prefix: int) -> Callable[[Tensor], Tensor]:
    return lambda raw: raw[:, prefix:]


SWIN = {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}
# Of every way to end: what makes cells of timm's forward_features, and whether there is a class token of its own.
KINDS: dict[str, tuple[int, dict, Callable[[Tensor], Tensor], bool]] = {
    "test_convnext": (64, {}, nchw, False),
    "test_resnet": (64, {}, nchw, False),
    "test_efficientnet": (64, {}, nchw, False),
    "mobilenetv4_conv_small_035": (64, {}, nchw, False),
    "test_nfnet": (64, {}, nchw, False),
    "test_byobnet": (64, {}, nchw, False),
    "test_mambaout": (64, {}, nhwc, False),
    "swin_tiny_patch4_window7_224": (64, SWIN, nhwc, False),
    "levit_128s": (96, {"depth": [1, 1, 1]}, after(0), False),
    "xcit_nano_12_p8_224": (32, {"depth": 2}, after(1), True),
    "convit_tiny": (32, {"depth": 2, "local_up_to_layer": 1}, after(1), True),
    "test_vit_relpos": (32, {}, after(0), False),
}


def built(name: str, size: int, **options: object) -> Student:
    torch.manual_seed(0)
    return build_student(StudentConfig(model=name, **options), size, 30).eval()


@pytest.mark.parametrize("name", KINDS)
def test_cells_and_class_token_are_timms(name: str) -> None:
    size, kwargs, cells, has_token = KINDS[name]
    student, images = built(name, size, num_classes=5, kwargs=kwargs), torch.randn(2, 3, size, size)
    with torch.no_grad():
        found, raw = student(images), student.backbone.forward_features(images)
        cls = raw[:, 0] if has_token else student.backbone.forward_head(raw, pre_logits=True)
        assert torch.equal(found.patch, cells(raw)) and torch.equal(found.cls, cls)
        assert torch.equal(student.classify(found), student.backbone(images))
    rows, columns = student.grid
    assert found.patch.shape == (2, rows * columns, student.width) and found.cls.shape == (2, student.cls_width)


@pytest.mark.parametrize(("name", "reduction", "stage"), [("test_convnext", 16, 2), ("test_resnet", 8, 2)])
def test_reduction_picks_the_stage_and_the_rest_is_not_there(name: str, reduction: int, stage: int) -> None:
    student, whole = built(name, 64, reduction=reduction), built(name, 64)
    images = torch.randn(2, 3, 64, 64)
    kept = {key: whole.backbone.state_dict()[key] for key in student.backbone.state_dict()}
    student.backbone.load_state_dict(kept)
    with torch.no_grad():
        maps = whole.backbone.forward_intermediates(images, output_fmt="NCHW", intermediates_only=True)
        found = student(images)
    truth = next(m for m in reversed(maps) if m.shape[-1] == 64 // reduction)
    assert torch.equal(found.patch, nchw(truth)) and torch.equal(found.cls, nchw(truth).mean(1))
    assert student.about()["stage"] == next(i for i, m in enumerate(maps) if m is truth)
    assert len(kept) < len(whole.backbone.state_dict())


def test_a_reduction_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(UserError, match="has maps at 4, 8, 16, 32 pixels"):
        built("test_convnext", 64, reduction=7)
    with pytest.raises(UserError, match="has one map, at 16"):
        build_student(StudentConfig(model="vit_tiny_patch16_224", reduction=8), 32)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_convnext", {}),
        ("test_resnet", {"num_classes": 5}),
        ("test_convnext", {"remedy": "lift", "num_classes": 5}),
        ("test_convnext", {"remedy": "wide_last"}),
        ("test_resnet", {"reduction": 16, "num_classes": 5}),
        ("vit_small_patch16_dinov3", {"remedy": "lift", "kwargs": {"embed_dim": 24, "depth": 1, "num_heads": 2}}),
        ("test_resnet", {"image_size": 96}),
    ],
)
def test_an_export_gives_the_tokens_to_the_bit(name: str, options: dict, tmp_path: Path) -> None:
    student, images = built(name, 64, **options), torch.randn(2, 3, 64, 64)
    path = exported(student, name, tmp_path)
    loaded = load_student(path)
    mine, theirs = student(images), loaded(images)
    assert torch.equal(mine.patch, theirs.patch) and torch.equal(mine.cls, theirs.cls)
    assert mine.logits is None or torch.equal(mine.logits, theirs.logits)
    assert student.width == (30 if "remedy" in options else student.layout.width)


def exported(student: Student, name: str, folder: Path) -> Path:
    config = Config(
        output=str(folder), teacher=TeacherConfig(model="t"), student=StudentConfig(model=name),
        data=DataConfig(train="d", image_size=64),
    )  # fmt: skip
    return export_student(engine_of(student), config, ONE)


def engine_of(student: Student, average: Optional[WeightAverage] = None) -> SimpleNamespace:
    return SimpleNamespace(module=SimpleNamespace(student=student, average=average))


def test_it_resizes_images_to_its_own_size() -> None:
    student, images = built("test_resnet", 64, image_size=96), torch.randn(2, 3, 64, 64)
    larger = F.interpolate(images, (96, 96), mode="bicubic", antialias=True)
    with torch.no_grad():
        assert torch.equal(student(images).patch, nchw(student.backbone.forward_features(larger)))
    vit = build_student(StudentConfig(model="vit_tiny_patch16_224", image_size=48, kwargs={"depth": 1}), 32).eval()
    with torch.no_grad():
        small = torch.randn(2, 3, 32, 32)
        larger = F.interpolate(small, (48, 48), mode="bicubic", antialias=True)
        assert torch.equal(vit(small).patch, vit.backbone.forward_features(larger)[:, 1:])


@pytest.mark.parametrize("cls_weight", [0.0, 0.5])
def test_what_no_loss_reaches_is_not_trained(cls_weight: float) -> None:
    """MobileNetV4's last convolution follows the pooling: it is in the class token alone."""
    student = built("mobilenetv4_conv_small_035", 64)
    before = {key: value.clone() for key, value in student.backbone.state_dict().items()}
    objective = Objective(student, 30, (4, 4), ObjectiveConfig(cls_weight=cls_weight)).train()
    optimizer = build_optimizer(OptimConfig(lr=1e-2, weight_decay=0.5), objective)
    objective(torch.randn(4, 3, 64, 64), [Features(torch.randn(4, 16, 30), torch.randn(4, 30))]).loss.backward()
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)
    optimizer.step()
    moved = {key for key, value in student.backbone.state_dict().items() if not torch.equal(value, before[key])}
    assert ("conv_head.weight" in moved) == (cls_weight > 0) and "conv_stem.weight" in moved
    assert (objective.cls_head is not None) == (cls_weight > 0)  # 1280 channels pooled, another width on the map


def test_flops_are_twice_the_products() -> None:
    """A closed form: lift adds a product of width x 30 for every cell, once forward, twice backward."""
    plain = StudentConfig(model="test_convnext")
    lifted = StudentConfig(model="test_convnext", remedy="lift")
    ours, theirs = student_step_flops(plain, 64, 30), student_step_flops(lifted, 64, 30)
    assert theirs.forward - ours.forward == 2 * 4 * 64 * 30
    assert theirs.backward - ours.backward == 2 * (2 * 4 * 64 * 30)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "test_resnet", "remedy": "wide_last"}, "no width of its own to set; use student.remedy=lift"),
        ({"model": "crossvit_tiny_240"}, "at 64 pixels cannot be used"),
        ({"model": "test_resnet", "kwargs": {"no_such": 1}}, "no_such"),
        ({"model": "test_resnett"}, "did you mean test_resnet"),
    ],
)
def test_what_cannot_be_is_one_line(options: dict, words: str) -> None:
    with pytest.raises(UserError) as caught:
        build_student(StudentConfig(**options), 64, 30)
    assert words in str(caught.value) and "\n" not in str(caught.value)


# -- a module of one's own --------------------------------------------------------------------------------------------


class Own(nn.Module):
    """One convolution; `gives` says what of it."""

    def __init__(self, gives: str) -> None:
        super().__init__()
        self.conv, self.gives = nn.Conv2d(3, 6, 16, 16), gives

    def forward(self, images: Tensor) -> object:
        found = self.conv(images)
        tokens = found.flatten(2).mT
        return {
            "map": found,
            "tokens": tokens,
            "pair": (tokens, found.amax((2, 3))),
            "odd": tokens[:, 1:],
            "dict": {"x": found},
            "vector": found.mean((2, 3)),
            "sequence first": tokens.transpose(0, 1),
            "class token of all": (tokens, found.amax((0, 2, 3))[None].expand(3, -1)),
            "fewer in training": tokens[:, :9] if self.training else tokens,
            "two in training": (found, found, found) if self.training else found,
            "detached": found.detach(),
            "numbers": found * (1 + float(found.detach().amax() > 1e9)),
        }[self.gives]


def own(gives: str = "map") -> nn.Module:
    return Own(gives)


def not_a_module() -> int:
    return 3


OWN = f"{__name__}:own"


@pytest.mark.parametrize("gives", ["map", "tokens", "pair"])
def test_a_module_of_ones_own(gives: str, tmp_path: Path) -> None:
    student, images = built(OWN, 64, kwargs={"gives": gives}, num_classes=3), torch.randn(2, 3, 64, 64)
    found, truth = student(images), student.backbone.conv(images)
    assert torch.equal(found.patch, nchw(truth)) and student.grid == (4, 4)
    assert torch.equal(found.cls, truth.amax((2, 3)) if gives == "pair" else nchw(truth).mean(1))
    assert torch.equal(student.classify(found), student.backbone.mean_head(nchw(truth).mean(1)))
    path = exported(student, OWN, tmp_path)
    assert torch.equal(load_student(path, own=OWN)(images).patch, found.patch)
    with pytest.raises(UserError, match="if you trust it"):  # a file does not say which code is run
        load_student(path)


@pytest.mark.parametrize(
    ("model", "kwargs", "words"),
    [
        (OWN, {"gives": "odd"}, r"made a tensor \(1, 15, 6\) of torch.float32 of an image; expected a map \(B,C,h,w\)"),
        (OWN, {"gives": "dict"}, "made a dict of an image"),
        (OWN, {"gives": "vector"}, r"made a tensor \(1, 6\)"),
        (OWN, {"gives": "sequence first"}, r"made a tensor \(16, 1, 6\)"),
        (OWN, {"gives": "class token of all"}, r"made a tuple of 2 \(a tensor \(1, 16, 6\) .*, a tensor \(3, 6\)"),
        (OWN, {"gives": "nothing"}, "cannot run on an image of 64 pixels"),
        (OWN, {"no": 1}, "failed with TypeError"),
        (f"{__name__}:not_a_module", {}, "returned a int, expected an nn.Module"),
        (f"{__name__}:absent", {}, "has no function absent"),
        ("no_such_package.here:f", {}, "PYTHONPATH"),
    ],
)
def test_a_module_that_gives_something_else_is_one_line(model: str, kwargs: dict, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        build_student(StudentConfig(model=model, kwargs=kwargs), 64)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "kwargs", "size", "images", "words"),
    [
        (OWN, {"gives": "fewer in training"}, 64, 2, "gives 9 patch tokens of 6 channels in training, 16 of 6 else"),
        (OWN, {"gives": "two in training"}, 64, 2, "made a tuple of 3 .* of 2 images; expected a map"),
        ("test_resnet", {}, 32, 1, "cannot train on an image of 32 pixels .*more than 1 value per channel"),
        ("vit_tiny_patch16_224", {"patch_drop_rate": 0.5}, 64, 2, "gives 8 patch tokens .* in training, 16 of .* else"),
    ],
)
def test_what_only_training_shows_is_one_line_before_it(
    model: str, kwargs: dict, size: int, images: int, words: str
) -> None:
    student = build_student(StudentConfig(model=model, kwargs=kwargs), size)
    with pytest.raises(UserError, match=words) as caught:
        student.check_trains(images)
    assert "\n" not in str(caught.value)
    assert student.training and all(buffer.eq(0).all() for name, buffer in student.named_buffers() if "mean" in name)


def test_two_images_are_enough_for_batch_norms_on_a_map_of_one_cell() -> None:
    student = build_student(StudentConfig(model="test_resnet"), 32)
    assert student.grid == (1, 1)
    student.check_trains(2)


def test_a_module_that_nothing_trains_is_one_line_and_one_that_needs_numbers_trains() -> None:
    def objective(gives: str) -> Objective:
        student = build_student(StudentConfig(model=OWN, kwargs={"gives": gives}), 64)
        return Objective(student, 30, (4, 4), ObjectiveConfig())

    with pytest.raises(UserError, match=r"cannot be trained .*does not require grad"):
        objective("detached")
    assert all(parameter.requires_grad for parameter in objective("numbers").student.parameters())


# -- warm start -------------------------------------------------------------------------------------------------------


def test_it_starts_from_a_timm_checkpoint_and_from_an_export(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = timm.create_model("test_convnext", num_classes=7)
    torch.save(model.state_dict(), file := tmp_path / "timm.pth")
    student = built("test_convnext", 64, remedy="lift")
    warm_start(student, str(file))
    stem = model.state_dict()["stem.0.weight"]
    assert torch.equal(student.backbone.state_dict()["stem.0.weight"], stem)
    path, again = exported(student, "test_convnext", tmp_path), built("test_convnext", 64, remedy="lift")
    nn.init.zeros_(again.backbone.lift[0].weight)
    warm_start(again, str(path))
    assert torch.equal(again.backbone.lift[0].weight, student.backbone.lift[0].weight)


def test_a_widened_last_stage_starts_anew_and_the_rest_from_the_file(tmp_path: Path) -> None:
    state = timm.create_model("test_convnext").state_dict()
    torch.save(state, file := tmp_path / "timm.pth")
    student = built("test_convnext", 64, remedy="wide_last")
    untouched = built("test_convnext", 64, remedy="wide_last").backbone.state_dict()
    warm_start(student, str(file))
    for name, tensor in student.backbone.state_dict().items():
        source = state if tensor.shape == state[name].shape else untouched
        assert torch.equal(tensor, source[name]), name
        assert source is state or name.startswith(("stages.3.", "norm_pre.", "head.norm.")), name
    torch.save({key: value for key, value in state.items() if "stages.2" not in key}, file)
    with pytest.raises(UserError, match=r"lacks stages\.2"):
        warm_start(student, str(file))


def test_a_second_stage_at_a_higher_resolution_resamples_as_timm_does(tmp_path: Path) -> None:
    small = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    first = build_student(StudentConfig(model="vit_tiny_patch16_224", kwargs=small), 64)
    path = exported(first, "vit_tiny_patch16_224", tmp_path)
    second = build_student(StudentConfig(model="vit_tiny_patch16_224", kwargs=small), 96)
    warm_start(second, str(path))
    truth = timm.layers.resample_abs_pos_embed(first.backbone.pos_embed.detach(), [12, 12], [8, 8], 1)
    assert torch.equal(second.backbone.pos_embed.detach(), truth)


def test_half_fitting_and_foreign_weights_are_one_line(tmp_path: Path) -> None:
    state = timm.create_model("test_convnext").state_dict()
    torch.save({key: value for key, value in state.items() if "stages.2" not in key}, file := tmp_path / "half.pth")
    student = built("test_convnext", 64)
    lost = sum("stages.2" in key for key in student.backbone.state_dict())
    total = len(student.backbone.state_dict())
    with pytest.raises(UserError, match=f"has {total - lost} of the {total} tensors of student.model=test_convnext"):
        warm_start(student, str(file))
    path = exported(student, "test_convnext", tmp_path)
    with pytest.raises(UserError, match=r"is an export of student\.model=test_convnext"):
        warm_start(built("test_resnet", 64), str(path))
    with pytest.raises(UserError, match=r"student\.weights=.*truncated, damaged or no file of weights"):
        (tmp_path / "x").write_bytes(b"nothing")
        warm_start(student, str(tmp_path / "x"))


# -- the average of the weights ---------------------------------------------------------------------------------------


def test_the_average_is_timms(tmp_path: Path) -> None:
    student = built("test_resnet", 64)
    average = WeightAverage(student.backbone, 0.9)
    theirs = timm.utils.ModelEmaV3(student.backbone, decay=0.9, use_warmup=False, foreach=False)
    for _ in range(3):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update()
        theirs.update(student.backbone)
    config = Config(output=str(tmp_path), teacher=TeacherConfig(model="t"), student=StudentConfig(model="test_resnet"),
                    data=DataConfig(train="d", image_size=64))  # fmt: skip
    path = export_average(engine_of(student, average), config, ONE)
    state = load_file(path)
    for name, parameter in theirs.module.named_parameters():
        torch.testing.assert_close(state[name], parameter, rtol=1e-5, atol=1e-6)
    average.save(tmp_path, ONE)
    other = WeightAverage(student.backbone, 0.9)
    other.load(tmp_path, ONE)
    mine, loaded = average.whole(ONE), other.whole(ONE)
    assert all(torch.equal(mine[name], loaded[name]) for name in mine)
