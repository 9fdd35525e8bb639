"""Students of the teacher's width, against timm's own modules and counts from widths alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leap_dist.config import OptimConfig, StudentConfig
from leap_dist.errors import UserError
from leap_dist.models.student import Student, build_student
from leap_dist.runtime.optim import build_optimizer

SMALL = {"patch_size": 4, "embed_dim": 12, "depth": 3, "num_heads": 2}
WIDTH, CLASSES = 30, 5
IMAGES = torch.randn(2, 3, 16, 16)


def student(remedy: str, model: str = "vit_tiny_patch16_224", num_classes: int = 0, **kwargs: object) -> Student:
    torch.manual_seed(0)
    config = StudentConfig(model=model, kwargs={**SMALL, **kwargs}, remedy=remedy, num_classes=num_classes)
    built = build_student(config, 16, WIDTH)
    for parameter in built.parameters():  # norms and biases too: nothing may be left out by being 1 or 0
        nn.init.normal_(parameter, std=0.3)
    return built.eval()


def trunk(model: nn.Module, blocks: int) -> Tensor:
    """Tokens that leave the first `blocks` blocks."""
    tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(IMAGES))))
    for block in model.blocks[:blocks]:
        tokens = block(tokens)
    return tokens


@pytest.mark.parametrize("remedy", ["none", "lift", "wide_last"])
@pytest.mark.parametrize(
    ("model", "kwargs"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"reg_tokens": 2, "no_embed_class": True, "init_values": 0.1}),
        ("deit_tiny_patch16_224", {}),
        ("deit3_small_patch16_224", {}),
        ("vit_small_patch14_reg4_dinov2", {}),
        ("vit_base_patch16_siglip_224", {}),  # no class token
    ],
)
def test_tokens_have_the_width_and_timms_forward_classifies_them(remedy: str, model: str, kwargs: dict) -> None:
    if model.endswith("siglip_224") and remedy != "lift":
        kwargs = {"global_pool": "avg", "fc_norm": False}  # as it is, it pools by attention
    built = student(remedy, model, CLASSES, **kwargs)
    features, width = built(IMAGES), 12 if remedy == "none" else WIDTH
    assert built.width == width and features.patch.shape == (2, 16, width)
    assert built.has_cls == ("siglip" not in model) and (not built.has_cls or features.cls.shape == (2, width))
    assert built.classify(features).shape == (2, CLASSES)
    assert torch.equal(built.classify(features), built.backbone(IMAGES))
    layers = built.every_layer(IMAGES)
    assert [layer.patch.shape[-1] for layer in layers] == ([12, 12, WIDTH] if remedy == "wide_last" else [width] * 3)
    if remedy == "lift":  # its product is of the patch tokens alone here, and there of the prefix tokens too
        torch.testing.assert_close(layers[-1].patch, features.patch)
    else:  # a norm takes each token by itself
        assert torch.equal(layers[-1].patch, features.patch)


def test_lift_projects_the_last_blocks_tokens_and_classifies_their_mean() -> None:
    built = student("lift", num_classes=CLASSES)
    linear, norm = built.backbone.norm
    assert linear.bias is None
    lifted = F.layer_norm(trunk(built.backbone, 3) @ linear.weight.T, (WIDTH,), norm.weight, norm.bias)
    features = built(IMAGES)
    torch.testing.assert_close(features.patch, lifted[:, 1:])
    torch.testing.assert_close(features.cls, lifted[:, 0])
    head = built.backbone.head
    torch.testing.assert_close(built.classify(features), lifted[:, 1:].mean(1) @ head.weight.T + head.bias)


def test_wide_last_enters_a_wide_block_of_timms_with_heads_of_the_same_width() -> None:
    built = student("wide_last", num_classes=CLASSES, drop_path_rate=0.3)
    linear, norm, block = built.backbone.blocks[-1]
    assert linear.bias is None and len(built.backbone.blocks) == 3
    wide = timm.create_model(
        "vit_tiny_patch16_224", **{**SMALL, "embed_dim": WIDTH, "num_heads": 5}, num_classes=CLASSES
    )
    block_alone, final = wide.blocks[-1].eval(), wide.norm
    assert (block.attn.num_heads, block.attn.head_dim) == (5, 6)
    block_alone.load_state_dict(block.state_dict())
    final.load_state_dict(built.backbone.norm.state_dict())
    entered = F.layer_norm(trunk(built.backbone, 2) @ linear.weight.T, (WIDTH,), norm.weight, norm.bias)
    tokens, features = final(block_alone(entered)), built(IMAGES)
    torch.testing.assert_close(features.patch, tokens[:, 1:])
    wide.head.load_state_dict(built.backbone.head.state_dict())
    torch.testing.assert_close(built.classify(features), wide.head(tokens[:, 0]))


def test_the_wide_last_block_keeps_the_last_drop_path_rate() -> None:
    def rates(built: Student) -> list[float]:
        return [m.drop_prob for m in built.modules() if type(m).__name__ == "DropPath"]

    assert rates(student("wide_last", drop_path_rate=0.3)) == pytest.approx(rates(student("none", drop_path_rate=0.3)))


def test_attention_pooling_is_widened_with_the_last_block() -> None:
    """What SigLIP's own forward gives is of the new width, though its features are matched before that pooling."""
    built = student("wide_last", "vit_base_patch16_siglip_224")
    assert built.backbone(IMAGES).shape == (2, WIDTH) and built(IMAGES).patch.shape == (2, 16, WIDTH)


def vit_count(width: int, depth: int, tokens: int, classes: int) -> int:
    """Parameters of a DeiT: weights and biases of every matrix, two numbers per channel of every norm."""
    block = 12 * width**2 + 13 * width  # qkv, projection and two MLP matrices, their biases, two norms
    embed = (16 * 16 * 3 + 1) * width + tokens * width + width  # patches, positions, class token
    return depth * block + embed + 2 * width + (width + 1) * classes


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_deit_tiny_has_the_parameters_its_widths_say() -> None:
    """CaiT-S24 -> DeiT-Tiny, 1000 classes, derived from the widths alone and stated in docs/students.md."""
    documented = (Path(__file__).resolve().parents[3] / "docs" / "students.md").read_text()

    def built(remedy: str) -> int:
        config = StudentConfig(model="deit_tiny_patch16_224", remedy=remedy, num_classes=1000)
        found = count(build_student(config, 224, 384, torch.device("meta")))
        assert f"{found:,}" in documented
        return found

    plain = vit_count(192, 12, 197, 1000)
    entry = 192 * 384 + 2 * 384
    assert built("none") == plain == 5_717_416
    # The lift takes the final norm's place, and the classifier is wide.
    assert built("lift") == plain - 2 * 192 - 193 * 1000 + entry + 385 * 1000 == 5_983_528
    narrow_block, wide_block = (12 * width**2 + 13 * width for width in (192, 384))
    widened = wide_block - narrow_block + entry + 2 * (384 - 192) + (384 - 192) * 1000
    assert built("wide_last") == plain + widened == 7_313_896


def test_new_parts_start_as_timms_do_and_norms_do_not_decay() -> None:
    config = StudentConfig(model="vit_tiny_patch16_224", kwargs={"depth": 2}, remedy="lift", num_classes=100)
    built = build_student(config, 32, 768)
    linear, norm = built.backbone.norm
    for module in (linear, built.backbone.head):
        assert module.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert not built.backbone.head.bias.any() and not norm.bias.any() and (norm.weight == 1).all()
    decayed, undecayed = build_optimizer(OptimConfig(), built).param_groups
    assert any(p is linear.weight for p in decayed["params"])
    assert all(any(p is q for q in undecayed["params"]) for p in norm.parameters())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "cait_xxs24_224", "remedy": "wide_last"}, "cait_xxs24_224 has no width of its own to set"),
        ({"model": "deit_tiny_distilled_patch16_224", "remedy": "wide_last"}, "has no width of its own to set"),
        ({"remedy": "wide_last", "width": 31}, "31 channels are no multiple of 6"),
        ({"model": "vit_small_patch16_18x2_224", "remedy": "wide_last"}, "a ParallelThingsBlock has no one attention"),
        ({"remedy": "lift", "global_pool": "token"}, "must not set ['global_pool']"),
    ],
)
def test_what_cannot_be_widened_or_classified_is_one_line(settings: dict, words: str) -> None:
    settings = {"model": "vit_tiny_patch16_224", "remedy": "none", "num_classes": 0, "width": WIDTH, **settings}
    model, remedy, classes, width = (settings.pop(key) for key in ("model", "remedy", "num_classes", "width"))
    config = StudentConfig(model=model, remedy=remedy, num_classes=classes, kwargs={**SMALL, **settings})
    with pytest.raises(UserError) as caught:
        build_student(config, 16, width)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "cait_xxs24_224", "vit_base_patch16_siglip_224"])
def test_what_pools_in_a_way_of_its_own_is_classified_as_timm_does(name: str) -> None:
    """The mean of two heads, blocks for the class token alone, attention."""
    built = build_student(StudentConfig(model=name, kwargs=SMALL, num_classes=CLASSES), 16).eval()
    assert torch.equal(built.classify(built(IMAGES)), built.backbone(IMAGES))


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_dinov3", "beit_base_patch16_224", "deit_tiny_distilled_patch16_224"]
)
def test_lift_takes_the_other_families_too(name: str) -> None:
    kwargs = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    built = build_student(
        StudentConfig(model=name, kwargs=kwargs, remedy="lift", num_classes=CLASSES), 32, WIDTH
    ).eval()
    found, tokens = built(images := torch.randn(2, 3, 32, 32)), built.backbone.forward_features(images)
    linear, norm = built.backbone.lift
    lifted = norm(F.linear(tokens, linear.weight))
    torch.testing.assert_close(found.patch, lifted[:, -4:])
    torch.testing.assert_close(found.cls, lifted[:, 0])
    torch.testing.assert_close(found.logits, built.backbone.mean_head(lifted[:, -4:].mean(1)))


@pytest.mark.parametrize("model", ["eva02_tiny_patch14_224", "beit_base_patch16_224", "vit_small_patch16_dinov3"])
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_other_families_are_classified_as_timm_does(model: str, pool: str) -> None:
    size = 28 if "14" in model else 32
    kwargs = {"embed_dim": 24, "depth": 2, "num_heads": 2, "global_pool": pool}
    built = build_student(StudentConfig(model=model, kwargs=kwargs, num_classes=CLASSES), size).eval()
    images = torch.randn(2, 3, size, size)
    assert torch.equal(built.classify(built(images)), built.backbone(images))
