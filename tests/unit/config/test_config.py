"""Every mistake in a config is one line that names the key, the value and what would be valid."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from streaming.base.util import bytes_to_int

from leap_dist.config import Config, describe, differences, flat, load, load_demo, option_fields, to_yaml
from leap_dist.config.ranges import RANGES, RECIPE_RANGES, Range, complaint
from leap_dist.errors import UserError
from leap_dist.pretraining.recipe import TeacherRecipe

ROOT = Path(__file__).resolve().parents[3]
LAUNCHED = sorted(
    path
    for path in (ROOT / "launch_configs").rglob("*.yaml")
    if path.parent.name != "sweeps" and not path.name.startswith("teacher_")
)
NEEDED = ["teacher.model=t", "student.model=s", "data.train=digits"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.trian=x", ["data.trian", "unknown key", "data.train"]),
        ("treshold=0.5", ["treshold", "unknown key", "curriculum.threshold"]),
        ("data.workers=many", ["data.workers='many'", "a whole number"]),
        ("curriculum.mode=lep", ["curriculum.mode='lep'", "leap", "fixed", "all_layers"]),
        ("curriculum.start=soon", ["curriculum.start='soon'", "a whole number or null"]),
        ("data=5", ["data", "is a section"]),
        ("epochs", ["'epochs'", "section.key=value"]),
        ("epochs=0", ["epochs=0.0", "above 0"]),
        ("data.global_batch=-8", ["data.global_batch=-8", "at least 1"]),
        ("optim.lr=0", ["optim.lr=0", "above 0"]),
        ("optim.betas=[0.9,1.5]", ["optim.betas=[0.9, 1.5]", "at least 0, below 1"]),
        ("seed=5000000000", ["seed=5000000000", "at most 4,294,967,295"]),
        ("optim.lr=.nan", ["optim.lr=nan", "above 0"]),
        ("objective.cls_weight=-1", ["objective.cls_weight=-1", "at least 0"]),
        ("curriculum.ema_alpha=0", ["curriculum.ema_alpha=0", "above 0, at most 1"]),
        ("curriculum.threshold=.inf", ["curriculum.threshold=inf", "finite"]),
        ("curriculum.replay=/no/such/curriculum.jsonl", ["curriculum.replay=/no/such", "no such file"]),
        ("telemetry.profile_steps=[30,20]", ["telemetry.profile_steps=[30, 20]", "first <= last"]),
        ("telemetry.profile_steps=[-1,20]", ["telemetry.profile_steps=[-1, 20]", "at least 0"]),
        ("telemetry.profile_steps=[20]", ["telemetry.profile_steps=[20]", "two whole numbers or null"]),
        ("telemetry.pictures_foreground=0.5", ["telemetry.pictures_foreground=0.5", "telemetry.pictures_every"]),
        ("telemetry.pictures_foreground=1", ["telemetry.pictures_foreground=1", "below 1"]),
        ("telemetry.profile_steps=20", ["telemetry.profile_steps=20", "two whole numbers or null"]),
        ("telemetry.peak_tflops=0", ["telemetry.peak_tflops=0", "above 0"]),
        ("data.crop_pct=1.2", ["data.crop_pct=1.2", "at least 0.01, at most 1"]),
        ("data.crop_scale=[0.9,0.1]", ["data.crop_scale=[0.9, 0.1]", "low <= high"]),
        ("data.mean=[0.5,.nan,0.5]", ["data.mean=[0.5, nan, 0.5]", "finite"]),
        ("data.mean=[123.7,116.3,103.5]", ["data.mean=[123.7, 116.3, 103.5]", "pixels from 0 to 1"]),
        ("data.std=[58.4,57.1,57.4]", ["data.std=[58.4, 57.1, 57.4]", "pixels from 0 to 1"]),
        ("data.mixup_group=1", ["data.mixup_group=1", "at least 2", "data.mixup=false"]),
        ("data.cache_limit=200gb", ["data.cache_limit=200gb", "only used with data.cache"]),
        ("output=runs/${x}", ["Interpolation key 'x' not found"]),
        ("data.train=/no/such/folder", ["data.train=/no/such/folder", "no such folder"]),
        ("data.train=s3://bucket/set", ["data.train=s3://bucket/set", "data.cache"]),
        ("teacher.weights=/no/such/file.pth", ["teacher.weights=/no/such/file.pth", "no such file", "random"]),
        ("teacher.placement=split", ["teacher.placement='split'", "replicated", "sharded", "pipelined", "auto"]),
        ("teacher.placement=auto", ["teacher.memory_budget=None", "auto needs it"]),
        ("teacher.memory_budget=4", ["teacher.memory_budget=4.0", "teacher.placement=replicated", "do not use it"]),
        ("teacher.stages=0", ["teacher.stages=0", "at least 1"]),
        ("teacher.microbatches=0", ["teacher.microbatches=0", "at least 1"]),
        ("resume=/no/such/checkpoint", ["resume=/no/such/checkpoint", "auto or none"]),
        ("curriculum.last_block_after=0", ["curriculum.last_block_after=0", "at least 1"]),
        ("output=~/runs/x", ["output=~/runs/x", "home folder"]),
        ("data.cache=~/imagenet", ["data.cache=~/imagenet", "home folder"]),
        ("student.kwargs=[1]", ["student.kwargs=[1]", "command line", "expected"]),
        ("optim.trust_coefficient=0", ["optim.trust_coefficient=0.0", "above 0"]),
        ("student.num_classes=-1", ["student.num_classes=-1", "at least 0"]),
        ("student.remedy=lifted", ["student.remedy='lifted'", "none", "lift", "wide_last"]),
        ("objective.head=pool", ["objective.head='pool'", "linear", "none", "pooled", "or null"]),
        ("engine.deepspeed.optimizer.type=Adam", ["engine.deepspeed.optimizer", "optim.name"]),
        ("engine.deepspeed.zero_optimization.stage=2", ["engine.deepspeed.zero_optimization.stage", "zero_stage"]),
    ],
)
def test_one_mistake_one_line(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load(None, [*NEEDED, override])
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def outside(wanted: Range) -> list[float]:
    """Numbers just outside a range, and none at all."""
    near = [wanted.low if wanted.low_open else wanted.low - 1, wanted.high if wanted.high_open else wanted.high + 1]
    return [*near, math.nan, math.inf, -math.inf]


@pytest.mark.parametrize(("schema", "ranges"), [(Config, RANGES), (TeacherRecipe, RANGES | RECIPE_RANGES)])
def test_every_number_has_a_range_of_its_own(schema: type, ranges: dict[str, Range]) -> None:
    """An option that is added without one is found here; so is a default outside its range."""
    numbers = {
        key: field
        for key, field in option_fields(schema).items()
        if re.search(r"\b(int|float)\b", str(field.type)) and not str(field.type).startswith("dict")
    }
    assert len(numbers) > 30
    assert not numbers.keys() - ranges.keys()
    assert schema is not Config or numbers.keys() == ranges.keys()
    for key, field in numbers.items():
        assert complaint(key, field.default, ranges) is None
        for value in outside(ranges[key]):
            wrong = (*field.default[:-1], value) if isinstance(field.default, tuple) else value
            assert f"{key}=" in complaint(key, wrong, ranges) and ranges[key].words in complaint(key, wrong, ranges)


def test_numbers_out_of_range_end_in_a_line() -> None:
    """What would have harmed the machine, from the command line on."""
    for override in (
        "data.workers=99999999999999999999", "data.global_batch=1000000000000000000000000000000000000000",
        "epochs=1e308", "student.num_classes=100000000000", "data.crop_pct=1e-9", "data.image_size=1000000000",
        "data.image_size=-1", "engine.clip=.inf", "curriculum.start=100000000", "evaluation.probe_epochs=9999999999",
    ):  # fmt: skip
        key = override.partition("=")[0]
        with pytest.raises(UserError, match=rf"^{re.escape(key)}=.*: must be .*at (least|most) "):
            load(None, [*NEEDED, override])


@pytest.mark.parametrize("option", ["output", "data.cache", "teacher.weights", "curriculum.replay", "resume"])
@pytest.mark.parametrize("path", ["", "a\0b", "a\nb", "n" * 300, "p/" * 3000, "{pipe}", "{file}/below", "{empty}"])
def test_a_path_that_cannot_be_is_told_before_anything_starts(option: str, path: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    text = path.format(**{name: tmp_path / name for name in ("file", "empty", "pipe")})
    with pytest.raises(UserError, match=rf"^{re.escape(option)}=") as caught:
        load(None, [*NEEDED, f"{option}={text}"])
    message = str(caught.value)
    assert message.isprintable() and len(message) < 500


@pytest.mark.parametrize("size", ["200000", "200000b", "1.5TB", " 64 kb"])
def test_sizes_of_a_cache(size: str) -> None:
    assert load(None, [*NEEDED, "data.cache=/c", f"data.cache_limit={size}"]).data.cache_limit == size
    assert bytes_to_int(size) >= 64 * 1024
    with pytest.raises(UserError, match="expected a size in bytes"):
        load(None, [*NEEDED, "data.cache=/c", f"data.cache_limit={size}igs"])


def test_texts_are_what_was_typed(tmp_path: Path) -> None:
    """YAML would make 20260701 of the first, 10 of the second and True of the last."""
    for text in ("2026_07_01", "0012", "1e3", "12:30", "yes"):
        assert load(None, [*NEEDED, f"output={text}"]).output == text
        (tmp_path / "run.yaml").write_text(f"output: {text}\n")
        with pytest.raises(UserError, match=r"output=.* \(.*run.yaml\): expected text; put it in quotes"):
            load(tmp_path / "run.yaml", NEEDED)
        (tmp_path / "run.yaml").write_text(f"output: '{text}'\n")
        assert load(tmp_path / "run.yaml", NEEDED).output == text
    assert load(None, [*NEEDED, "data.val=digits", "data.val=null"]).data.val is None


def test_combinations_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"engine\.precision=fp16 with engine\.zero_stage=2"):
        load(None, [*NEEDED, "engine.precision=fp16", "engine.zero_stage=2"])
    with pytest.raises(
        UserError, match=r"placement=pipelined with curriculum.mode=all_layers: .*=sharded or replicated"
    ):
        load(None, [*NEEDED, "teacher.placement=pipelined", "curriculum.mode=all_layers"])
    with pytest.raises(UserError, match=r"curriculum.block=3: only used with curriculum.mode=leap or fixed"):
        load(None, [*NEEDED, "curriculum.block=3", "curriculum.mode=all_layers"])
    with pytest.raises(UserError, match=r"curriculum.last_block_after=3: the run ends after epochs=3"):
        load(None, [*NEEDED, "curriculum.last_block_after=3", "epochs=3"])
    with pytest.raises(UserError, match=r"curriculum.last_block_after=3: only used with curriculum.mode=leap"):
        load(None, [*NEEDED, "curriculum.last_block_after=3", "curriculum.mode=fixed"])
    with pytest.raises(UserError, match=r"objective.head=pooled with student.remedy=lift: the widths are equal"):
        load(None, [*NEEDED, "objective.head=pooled", "student.remedy=lift"])
    with pytest.raises(UserError, match=r"reset_head=true with objective.head=none: there is no head to reset"):
        load(None, [*NEEDED, "curriculum.reset_head=true", "student.remedy=lift"])
    with pytest.raises(UserError, match=r"remedy=wide_last with curriculum.mode=all_layers: the blocks before"):
        load(None, [*NEEDED, "curriculum.mode=all_layers", "student.remedy=wide_last"])
    with pytest.raises(UserError, match=r"teacher.memory_budget=-1.0: must be above 0"):
        load(None, [*NEEDED, "teacher.placement=auto", "teacher.memory_budget=-1"])
    with pytest.raises(UserError, match=r"rebalance=false with teacher.placement=auto: its budget counts on balanced"):
        load(None, [*NEEDED, "teacher.placement=auto", "teacher.memory_budget=1", "teacher.rebalance=false"])
    for stage in (1, 2, 3):
        with pytest.raises(UserError, match=rf"optim\.name=lars with engine\.zero_stage={stage}"):
            load(None, [*NEEDED, "optim.name=lars", f"engine.zero_stage={stage}"])
    with pytest.raises(UserError, match=r"student\.compile=true with engine\.zero_stage=3: .*use engine.zero_stage=2"):
        load(None, [*NEEDED, "student.compile=true", "engine.zero_stage=3"])
    with pytest.raises(UserError, match=r"student\.compile=true with student\.sync_batchnorm=true"):
        load(None, [*NEEDED, "student.compile=true", "student.sync_batchnorm=true"])
    with pytest.raises(UserError, match=r"data.global_batch=255: must be a multiple of engine.accumulation=2"):
        load(None, [*NEEDED, "data.global_batch=255", "engine.accumulation=2"])


def test_a_missing_required_key_is_named() -> None:
    with pytest.raises(UserError, match=r"data\.train is required"):
        load(None, ["teacher.model=t", "student.model=s"])


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: [1", "not readable as YAML"), ("- 1\n- 2\n", "mapping"), ("base: self.yaml", "its own base")],
)
def test_a_broken_yaml_is_one_line(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "self.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        load(path, [])
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_later_layers_win_and_base_comes_first(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("epochs: 3\noptim: {lr: 0.5, momentum: 0.1}\n")
    (tmp_path / "run.yaml").write_text("base: base.yaml\noptim: {lr: 0.25}\n")
    config = load(tmp_path / "run.yaml", [*NEEDED, "optim.betas=[0.8,0.9]"])
    assert (config.epochs, config.optim.lr, config.optim.momentum, config.optim.betas) == (3, 0.25, 0.1, (0.8, 0.9))


def test_the_resolved_config_loads_back_equal(tmp_path: Path) -> None:
    config = load(None, [*NEEDED, "student.kwargs.depth=3", "engine.deepspeed.zero_optimization.overlap_comm=true"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load(path, []) == config


def test_differences_name_what_makes_it_another_run() -> None:
    old = load(None, NEEDED)
    assert differences(old, load(None, [*NEEDED, "output=elsewhere", "telemetry.every=3", "data.workers=1"])) == []
    assert differences(old, load(None, [*NEEDED, "optim.lr=0.5"])) == ["optim.lr: 0.001 -> 0.5"]
    checked = load(None, [*NEEDED, "data.validate_hash=xxh64"])
    assert differences(old, checked, also=("data.val:",)) == []
    assert differences(old, checked, also=("data.val",)) == ["data.validate_hash: None -> xxh64"]


@pytest.mark.parametrize("path", LAUNCHED, ids=lambda path: path.stem)
def test_every_launch_config_loads(path: Path) -> None:
    config = load(path, ["data.train=digits", "teacher.weights=random"])  # what is made first need not be there
    assert "base" not in flat(config)
    only_deltas = yaml.safe_load(path.read_text())
    assert only_deltas.keys() <= {key.split(".")[0] for key in option_fields()} | {"base"}


def test_the_published_settings_are_the_launched_ones() -> None:
    """papers.md, section A: threshold 0.8 / 0.85, LARS 6.0 at sqrt(batch/1536), 100 epochs, clip 1.0, CLS 0.05."""
    names = {path.stem for path in LAUNCHED}
    for student in ("vits14", "vitt14"):
        for data, threshold in (("imagenet1k", 0.8), ("imagenet100", 0.85)):
            assert {f"leap_vitg14_{student}_{data}", f"baseline_vitg14_{student}_{data}", "demo"} <= names
            leap, base = (
                load(ROOT / f"launch_configs/vitg14/{kind}_vitg14_{student}_{data}.yaml", ["data.train=digits"])
                for kind in ("leap", "baseline")
            )
            assert (leap.curriculum.threshold, leap.epochs, leap.engine.clip) == (threshold, 100, 1.0)
            assert (leap.optim.name, leap.optim.lr, leap.optim.batch_reference) == ("lars", 6.0, 1536)
            assert differences(leap, base) == ["curriculum.mode: leap -> fixed"]


def test_the_published_supervised_pair_is_the_launched_one() -> None:
    """Alpha 0.9, w 0.2, last block to last block, 300 epochs, DeiT's recipe; three students."""
    names = ("baseline", "lift", "wide_last", "leap", "leap_lift", "leap_wide_last")
    baseline, lift, wide, leap, leap_lift, leap_wide = (
        load(ROOT / f"launch_configs/cait/{name}_caits24_deittiny_imagenet1k.yaml", ["data.train=digits"])
        for name in names
    )
    objective, optim = baseline.objective, baseline.optim
    assert (objective.kd_alpha, objective.feature_weight, objective.label_smoothing) == (0.9, 0.2, 0.1)
    assert (baseline.epochs, baseline.data.global_batch, optim.warmup_epochs) == (300, 2048, 5)
    assert optim.lr == 5e-4 * 2048 / 512 and optim.lr * optim.final_lr_fraction == pytest.approx(1e-5)
    assert (baseline.teacher_classes, baseline.curriculum.mode, baseline.curriculum.block) == (1000, "fixed", None)
    for plain, remedied in (
        (baseline, {"lift": lift, "wide_last": wide}),
        (leap, {"lift": leap_lift, "wide_last": leap_wide}),
    ):
        for remedy, config in remedied.items():
            head = f"objective.head: {plain.objective.head} -> none"
            assert differences(plain, config) == [f"student.remedy: none -> {remedy}", head]


def test_help_shows_every_option_with_its_default() -> None:
    text = describe()
    for key, option in option_fields().items():
        assert f"  {key}=" in text and option.metadata["doc"] in text
    assert isinstance(Config.__doc__, str)


def test_a_mistyped_key_costs_no_torch_import() -> None:
    """The entry point must refuse before seconds of imports."""
    code = (
        "import sys; from leap_dist.train import main; status = main(['data.trian=x']); "
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "leap_dist [rank 0]: error: data.trian (command line): unknown key; did you mean data.train?"
    )


def main_elsewhere(argv: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """`main` in a process of its own, in which no rank waits long for rank 0's word and nothing is trained."""
    code = (
        "import sys; from leap_dist import train; from leap_dist.runtime import reporting; "
        "reporting.WORD_OF_RANK_0_S = 0.01; train.train = lambda *_: None; "
        f"sys.exit(train.main({argv!r}))"
    )
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_a_rank_that_no_word_of_rank_0_ends_says_its_own_mistake() -> None:
    done = main_elsewhere(["data.trian=x"], RANK="1")
    assert done.returncode == 2
    assert done.stderr.startswith("leap_dist [rank 1]: error: data.trian (command line): unknown key")


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_without_a_yaml_it_says_that_the_settings_are_the_demos(rank: str, lines: int) -> None:
    done = main_elsewhere(["epochs=3", "curriculum.threshold=0.5", "output=x"], RANK=rank)
    assert done.returncode == 0
    assert done.stderr.count("\n") == lines == done.stderr.count("no --config, so the settings are the demo's")


@pytest.mark.parametrize("override", ["data.train={}", "data.val={}", "teacher.model=vit_small_patch14_dinov2"])
def test_another_set_or_teacher_without_a_yaml_is_refused_with_a_yaml_to_write(override: str, tmp_path: Path) -> None:
    asked = override.format(tmp_path)
    with pytest.raises(UserError) as told:
        load_demo(ROOT / "launch_configs/demo.yaml", [asked])
    message = str(told.value)
    assert message.startswith(f"{asked} without --config") and "32 pixels" in message
    (shown,) = re.findall(r"\{teacher.*\}\}", message)
    (tmp_path / "mine.yaml").write_text(shown.replace("NAME", "vit_tiny_patch16_224").replace("SHARDS", str(tmp_path)))
    assert load(tmp_path / "mine.yaml", []).data.train == str(tmp_path)


def test_overrides_that_leave_the_demo_the_demo_are_taken() -> None:
    same = [
        "data.train=digits",
        "data.val=null",
        "evaluation.every_epochs=0",
        "teacher.model=vit_tiny_patch16_224",
        "student.kwargs.depth=2",
    ]
    assert load_demo(ROOT / "launch_configs/demo.yaml", same).data.val is None


@pytest.mark.parametrize(
    ("path", "student", "size"),
    [
        ("vitg14/leap_vitg14_convnextt_imagenet1k.yaml", "convnext_tiny", 256),
        ("vitg14/leap_vitg14_mobilenetv4_imagenet1k.yaml", "mobilenetv4_conv_medium", 256),
        ("vit7b/leap_vit7b_convnexts_imagenet1k.yaml", "convnext_small", None),
    ],
)
def test_launch_configs_of_convolutional_students(path: str, student: str, size: int | None) -> None:
    config = load(ROOT / "launch_configs" / path, ["data.train=digits"])
    assert (config.student.model, config.student.image_size, config.student.kwargs) == (student, size, {})
    assert (config.optim.name, config.engine.precision) == ("adamw", "bf16")
