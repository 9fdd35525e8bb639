"""Hostile weights, checkpoints, exported students, configs and sweeps."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import embed
import evaluate
import export
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import leap_dist
from hostile import CASES, Case, Evil, Work, case
from leap_dist.config import Config, StudentConfig, TeacherConfig, load
from leap_dist.errors import UserError
from leap_dist.models import build_model, build_student, load_student, warm_start
from leap_dist.models.weight_files import read_weights
from leap_dist.runtime.plain_checkpoint import require_plain
from leap_dist.sweeps.plan import read_plan
from leap_dist.teacher.weights import build_skeleton, open_weights


@case("which no checkpoint needs", quick=True)
def checkpoint_that_runs_a_program(folder: Path) -> Work:
    (folder / "step00000001").mkdir()
    torch.save({"module": {}, "x": Evil(folder)}, folder / "step00000001/mp_rank_00_model_states.pt")
    return lambda: require_plain(folder / "step00000001")


@case("which no checkpoint needs")
def optimizer_that_runs_a_program(folder: Path) -> Work:
    (folder / "step00000001").mkdir()
    torch.save({}, folder / "step00000001/mp_rank_00_model_states.pt")
    torch.save([Evil(folder)], folder / "step00000001/zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return lambda: require_plain(folder / "step00000001")


@case("cannot be read")
def checkpoint_of_the_old_format(folder: Path) -> Work:
    (folder / "step00000001").mkdir()
    path = folder / "step00000001/mp_rank_00_model_states.pt"
    torch.save([Evil(folder)], path, _use_new_zipfile_serialization=False)
    return lambda: require_plain(folder / "step00000001")


@case("load it where you trust it")
def teacher_that_runs_a_program(folder: Path) -> Work:
    torch.save({"model": Evil(folder)}, folder / "teacher.pth")
    return lambda: read_weights(folder / "teacher.pth")


@case("teacher.weights=")
def teacher_that_is_a_bare_pickle(folder: Path) -> Work:
    (folder / "teacher.safetensors").write_bytes(pickle.dumps(Evil(folder)))
    return lambda: read_weights(folder / "teacher.safetensors")


@case("teacher.weights=")
def safetensors_of_8_exabytes(folder: Path) -> Work:
    (folder / "t.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")
    return lambda: read_weights(folder / "t.safetensors")


@case("teacher.weights=")
def safetensors_whose_tensor_is_not_there(folder: Path) -> Work:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (folder / "t.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return lambda: read_weights(folder / "t.safetensors")


@case("teacher.weights=")
def safetensors_nested_deep(folder: Path) -> Work:
    header = b'{"a":' + b"[" * 10**6
    (folder / "t.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return lambda: read_weights(folder / "t.safetensors")


STUDENT = {
    "model": "vit_tiny_patch16_224", "image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3,
    "kwargs": {"img_size": 32, "num_classes": 0, "embed_dim": 24, "depth": 2, "num_heads": 3},
}  # fmt: skip


def _student(name: str, refused: str, *, quick: bool = False, kwargs: Optional[dict] = None, **changes: Any) -> None:
    def make(folder: Path) -> Work:
        _write_student(folder, {"kwargs": kwargs or {}, **changes})
        return lambda: load_student(folder)

    CASES.append(Case(f"student_{name}", make, refused, quick))


def _write_student(folder: Path, changes: dict[str, Any]) -> None:
    """A run's folder whose student.json says `changes`; of the same model, its kwargs beside those of a sound one."""
    save_file({"a": torch.zeros(2)}, folder / "student.safetensors")
    (folder / "secret.bin").write_bytes(pickle.dumps(Evil(folder)))
    sound = {} if "model" in changes else STUDENT["kwargs"]
    record = {**STUDENT, **changes, "kwargs": sound | changes.get("kwargs", {})}
    (folder / "student.json").write_text(json.dumps(record).replace("FOLDER", str(folder)))


def _through(name: str, door: Callable[[Path], Any], *, quick: bool = False) -> None:
    """A record that leads to the hub, and one to a file, through each door that a user has."""
    led = {"hub": {"model": "hf-hub:somebody/model"}, "file": {"kwargs": {"checkpoint_path": "FOLDER/secret.bin"}}}
    for kind, changes in led.items():

        def make(folder: Path, changes: dict[str, Any] = changes) -> Work:
            _write_student(folder, changes)
            return lambda: door(folder)

        # A warm start compares names and takes tensors, and builds nothing of the record.
        said = {"hub": "none of timm|lacks", "file": "checkpoint_path|lacks"}[kind]
        CASES.append(Case(f"{name}_of_a_{kind}", make, said, quick and kind == "hub"))


def _embedded(folder: Path) -> None:
    (folder / "images").mkdir()
    Image.new("RGB", (32, 32)).save(folder / "images" / "a.png")
    embed.run(embed.parse([str(folder), str(folder / "images"), "--out", str(folder / "out.parquet"), "--workers=0"]))


def _warmed(folder: Path) -> None:
    config = StudentConfig(model=STUDENT["model"], kwargs={"embed_dim": 24, "depth": 2, "num_heads": 3})
    warm_start(build_student(config, 32), str(folder))


def _judged(folder: Path) -> None:
    data = ["--train", "digits", "--test", "digits", "--out", str(folder / "out")]
    evaluate.evaluate(evaluate.parse([str(folder), "knn", *data]))


_through("loaded", leap_dist.load, quick=True)
_through("exported", lambda folder: export.run(export.parse([str(folder), "--to", "hub"])))
_through("embedded", _embedded)
_through("judged", _judged)
_through("warm_start", _warmed)

_student("of_the_hub", "none of timm", model="hf-hub:somebody/model", quick=True)
_student("of_the_old_hub", "none of timm", model="hf_hub:somebody/model")
_student("of_a_folder", "none of timm", model="local-dir:FOLDER")
_student("of_a_path", "none of timm", model="../../x")
_student("of_a_list", "none of timm", model=["vit_tiny_patch16_224"])
_student("with_a_file", "kwargs.checkpoint_path", kwargs={"checkpoint_path": "FOLDER/secret.bin"})
_student("pretrained", "kwargs.pretrained", kwargs={"pretrained": True})
_student("with_a_config", "kwargs.pretrained_cfg", kwargs={"pretrained_cfg": {"file": "FOLDER/secret.bin"}})
_student("with_an_overlay", "kwargs.pretrained_cfg_overlay", kwargs={"pretrained_cfg_overlay": {"url": "http://x"}})
_student("with_a_cache", "kwargs.cache_dir", kwargs={"cache_dir": "FOLDER"})
_student("with_a_nested_path", "no plain argument", kwargs={"a": [{"b": "/etc/passwd"}]})
_student("of_a_billion_blocks", "no plain argument", kwargs={"depth": 10**9})
_student("of_a_million_channels", "not the weights of its record", kwargs={"embed_dim": 3 * 10**5, "depth": 1})
_student("of_a_thousand_blocks", "not the weights of its record", kwargs={"depth": 300})
_student("of_texts", "cannot be loaded", kwargs={"depth": "2"})
_student("of_a_billion_pixels", "image_size", image_size=10**9)
_student("of_negative_pixels", "image_size", image_size=-1)
_student("of_tiny_crops", "crop_pct", crop_pct=1e-9)
_student("of_two_colours", "mean", mean=[0.5, 0.5])
_student("of_another_model", "not the weights of its record")
_student("of_a_url", "none of timm", model="https://example.com/model.safetensors")
_student("of_an_own_module", "if you trust it", model="os:system")
_student("of_an_own_module_of_a_path", "none of timm", model="../evil:main")
_student("of_a_file_of_features", "kwargs.features_only", kwargs={"features_only": True})
_student("of_a_plain_file", "cannot be loaded", kwargs={"file": "secret.bin"})
_student("of_a_word_for_a_norm", "cannot be loaded", kwargs={"norm_layer": "nothing"})
_student("of_nested_files", "no plain argument", kwargs={"a": {"b": [{"checkpoint_path": "x"}]}})
_student("of_deep_kwargs", "no plain argument", kwargs={"a": [[[[[[1]]]]]]})
_student("of_a_billion_channels", "no plain argument", kwargs={"embed_dim": 10**9})
_student("of_nan", "no plain argument", kwargs={"mlp_ratio": float("nan")})
_student("of_ten_million_classes", "not the weights of its record", kwargs={"num_classes": 10**7})
_student("of_a_million_layers", "a model of more than", model="resnet18", map_at=32, kwargs={"layers": [10**6] * 4})
_student("of_a_huge_map", "not the weights of its record", model="coat_tiny", map_at=8192, kwargs={"img_size": 8192})
_student(
    "of_a_wide_block",
    "not the weights of its record",
    remedy="wide_last",
    width=48,
    wide={"embed_dim": 10**6, "num_heads": 10},
)
_student("of_a_list_of_remedies", "does not say what it should", remedy=["lift"])
_student("of_another_resampling", "interpolation", interpolation="/etc/passwd")
_student("of_other_colours", "colour_order", colour_order="BGR")
_student("of_no_deviation", "std", std=[0, 0, 0])


@case("does not say what images")
def student_that_says_nothing_of_images(folder: Path) -> Work:
    model = timm.create_model(STUDENT["model"], **STUDENT["kwargs"])
    save_file(model.state_dict(), folder / "student.safetensors")
    (folder / "student.json").write_text(json.dumps({key: STUDENT[key] for key in ("model", "kwargs")}))
    return lambda: leap_dist.load(folder)


@case("does not say what images")
def hub_folder_that_says_nothing_of_images(folder: Path) -> Work:
    model = timm.create_model(STUDENT["model"], **STUDENT["kwargs"])
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "student.json").write_text(json.dumps({key: STUDENT[key] for key in ("model", "kwargs")}))
    return lambda: leap_dist.load(folder)


@case("lacks")
def warm_start_whose_record_is_a_pipe(folder: Path) -> Work:
    save_file({"a": torch.zeros(2)}, folder / "student.safetensors")
    os.mkfifo(folder / "student.json")
    return lambda: _warmed(folder)


def _teacher(name: str, record: dict[str, Any]) -> None:
    """The record beside a teacher's weights, which only tells whether they are of another model."""

    def make(folder: Path) -> Work:
        kwargs = {"embed_dim": 24, "depth": 2, "num_heads": 3}
        model = build_model(STUDENT["model"], kwargs, 32)
        save_file(model.state_dict(), folder / "teacher.safetensors")
        (folder / "teacher.json").write_text(json.dumps(record))
        config = TeacherConfig(model=STUDENT["model"], kwargs=kwargs, weights=str(folder / "teacher.safetensors"))
        return lambda: open_weights(config, build_skeleton(config, 32))

    CASES.append(Case(f"teacher_{name}", make, None, False))


_teacher("of_the_hub", {"model": "hf-hub:somebody/model", "kwargs": {}})
_teacher("of_a_file", {"model": STUDENT["model"], "kwargs": {"checkpoint_path": "/etc/passwd"}})
_teacher("of_a_million_layers", {"model": "resnet18", "kwargs": {"layers": [10**6] * 4}})
_teacher("of_a_million_blocks", {"model": STUDENT["model"], "kwargs": {"depth": 10**6}})


@case("no readable record")
def student_nested_deep(folder: Path) -> Work:
    save_file({"a": torch.zeros(2)}, folder / "student.safetensors")
    (folder / "student.json").write_text("[" * 10**6)
    return lambda: load_student(folder)


@case("no readable record")
def student_record_is_a_pipe(folder: Path) -> Work:
    save_file({"a": torch.zeros(2)}, folder / "student.safetensors")
    os.mkfifo(folder / "student.json")
    return lambda: load_student(folder)


def _config(name: str, text: str, refused: str, *, quick: bool = False) -> None:
    def make(folder: Path) -> Work:
        (folder / "run.yaml").write_text(text.replace("FOLDER", str(folder)))
        (folder / "secret.txt").write_text("password: hunter2\nother: [hunter2\n")
        (folder / "secret.yaml").write_text("hunter2: 1\n")

        def read() -> Config:
            try:
                return load(folder / "run.yaml", [])
            except UserError as error:
                assert "hunter2" not in str(error) and "root:" not in str(error), error
                raise

        return read

    CASES.append(Case(f"config_{name}", make, refused, quick))


_LAUGHS = "l0: &l0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
_config("of_a_billion_laughs", _LAUGHS, "anchors stand for more than", quick=True)
_config("that_is_its_own_part", "student: &a {kwargs: *a}\n", "nested deeper")
_config("nested_deep", "a: " + "[" * 5000 + "]" * 5000, "nested deeper|not readable as YAML")
_config("that_runs_python", "a: !!python/object/apply:os.mkdir [FOLDER/../canary]\n", "not readable as YAML")
_config("that_reads_the_environment", "output: x-${oc.env:HOME}\n", "not taken from a file", quick=True)
_config("of_doubling_texts", "student: {kwargs: {a: '${b}${b}'}}\n", "not taken from a file")
_config("on_a_text", "base: secret.txt\n", "the name of a .yaml file", quick=True)
_config("on_passwd", "base: /etc/passwd\n", "the name of a .yaml file")
_config("on_another_yaml", "base: secret.yaml\n", "has a key that is no option")
_config("broken", "password: [hunter2\n", "not readable as YAML .line")


@case("a device or a pipe")
def config_is_a_pipe(folder: Path) -> Work:
    os.mkfifo(folder / "run.yaml")
    return lambda: load(folder / "run.yaml", [])


@case("a device or a pipe")
def config_on_dev_zero(folder: Path) -> Work:
    (folder / "run.yaml").symlink_to("/dev/zero")
    return lambda: load(folder / "run.yaml", [])


@case("not taken from a file")
def sweep_that_reads_the_environment(folder: Path) -> Work:
    (folder / "sweep.yaml").write_text("base: b.yaml\nrows: {a: ['output=${oc.env:HOME}']}\n")
    return lambda: read_plan(folder / "sweep.yaml", None, ())
