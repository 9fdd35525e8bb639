"""Hostile weights, checkpoints, exported students, configs and sweeps."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors.torch import save_file

from hostile import CASES, Case, Evil, Work, case
from leap_dist.config import Config, load
from leap_dist.errors import UserError
from leap_dist.models import load_student
from leap_dist.models.weight_files import read_weights
from leap_dist.runtime.plain_checkpoint import require_plain
from leap_dist.sweeps.plan import read_plan


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
        save_file({"a": torch.zeros(2)}, folder / "student.safetensors")
        (folder / "secret.bin").write_bytes(pickle.dumps(Evil(folder)))
        record = {**STUDENT, "kwargs": {**STUDENT["kwargs"], **(kwargs or {})}, **changes}
        text = json.dumps(record).replace("FOLDER", str(folder))
        (folder / "student.json").write_text(text)
        return lambda: load_student(folder)

    CASES.append(Case(f"student_{name}", make, refused, quick))


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
