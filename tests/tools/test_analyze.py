"""tools/analyze.py: an exported student and a timm teacher on the digits, on one and on two ranks, and its mistakes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import analyze
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from leap_dist.config import StudentConfig
from leap_dist.models.student import build_student
from leap_dist.runtime.distributed import World
from runs import finish, fork

TOOL = Path(analyze.__file__)
TEACHER = "vit_tiny_patch16_224=random"
SMALL = ["--data", "digits", "--images", "21", "--pairs", "3", "--subspace", "2", "--batch", "8", "--workers", "0"]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of two blocks, 16 tokens of 24 channels at 32 pixels."""
    return exported("vit_tiny_patch16_224", tmp_path_factory.mktemp("my-run"))


def exported(model: str, folder: Path, remedy: str = "none") -> Path:
    """What `export_student` leaves."""
    path = folder / "student.safetensors"
    kwargs = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    torch.manual_seed(0)
    built = build_student(StudentConfig(model=model, kwargs=kwargs, remedy=remedy), 32, width=36)
    save_file(built.backbone.state_dict(), path)
    about = asdict(built.recipe) | {"image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9}
    path.with_suffix(".json").write_text(json.dumps(about))
    return path


def on_two_ranks(*arguments: str) -> str:
    """What it printed."""
    done = finish(fork(TOOL, *arguments, processes=2))
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(student: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one").mkdir()  # empty: as good as none
    command = ["compare", str(student), str(student), "--teacher", TEACHER, *SMALL, "--out"]
    assert analyze.main([*command, str(tmp_path / "one")]) == 0
    printed, log = capfd.readouterr()
    assert "21 images, 3 pairs of them\n\nlast block, uncentred" in printed
    assert "expects another normalisation or crop than" in log  # this teacher's colours, but not its crop
    assert on_two_ranks(*command, str(tmp_path / "two")).count("21 images, 3 pairs of them") == 1
    one, two = (np.load(tmp_path / name / "curves.npz") for name in ("one", "two"))
    assert set(one) == set(two)
    names = [path.parent.name for path in (student, student)]
    assert {key.split("/")[0] for key in one} == {f"{names[0]} #1", f"{names[1]} #2", "vit_tiny_patch16_224", "cka"}
    for key in one:
        np.testing.assert_allclose(two[key], one[key], rtol=1e-4, atol=2e-3 if "angles" in key else 1e-5, err_msg=key)
    assert one["vit_tiny_patch16_224/12/centred/dims/mean"].tolist()[3] > 1
    files = {path.name for path in (tmp_path / "two").iterdir()}
    assert files >= {
        "blocks.csv",
        "cka.csv",
        "curves.npz",
        "analysis.json",
        "overview.png",
        "overview.pdf",
        "cka_2.png",
    }


@pytest.mark.seconds
def test_students_with_and_without_a_remedy_are_compared_block_by_block(tmp_path: Path) -> None:
    """Blocks of other widths stand beside each other; with lift every block is seen through the lift."""
    widths = {"none": (24, 24), "lift": (36, 36), "wide_last": (24, 36)}
    paths = {}
    for remedy in widths:
        (tmp_path / remedy).mkdir()
        paths[remedy] = str(exported("vit_tiny_patch16_224", tmp_path / remedy, remedy))
    command = ["compare", paths["lift"], paths["wide_last"], "--teacher", paths["none"], *SMALL]
    assert analyze.main([*command, "--out", str(tmp_path / "out")]) == 0
    curves = np.load(tmp_path / "out" / "curves.npz")
    for name, expected in widths.items():
        found = [curves[f"{name}/{block}/uncentred/dataset_energy"].shape[-1] for block in (1, 2)]
        assert tuple(found) == expected
    heat_maps = [curves[key] for key in curves if key.startswith("cka/")]
    assert len(heat_maps) == 2 and all(np.isfinite(found).all() for found in heat_maps)


@pytest.mark.slow
def test_two_ranks_report_the_blocks_as_one_does(student: Path, tmp_path: Path) -> None:
    command = ["blocks", str(student), "--train", "digits", "--data", "digits", "--images", "21", "--workers", "0"]
    command += ["--train-images", "101", "--batch", "8", "--out"]
    assert analyze.main([*command, str(tmp_path / "one")]) == 0
    assert on_two_ranks(*command, str(tmp_path / "two")).count("101 images to train on, 21 held out") == 1
    for name, columns in (("blocks.csv", 5), ("cka.csv", 3)):
        one, two = (np.loadtxt(tmp_path / ranks / name, delimiter=",", skiprows=1) for ranks in ("one", "two"))
        assert one.shape[1] == columns
        np.testing.assert_allclose(two, one, atol=1e-4)


def test_a_run_folder_stands_for_its_student(student: Path) -> None:
    assert analyze.request(str(student.parent)) == analyze.request(str(student))
    assert analyze.request("vit_tiny_patch16_224").student is None


def test_a_teacher_of_a_students_name_is_told_apart() -> None:
    requests = [analyze.request(TEACHER)] * 2
    plain = requests[0].name
    assert [r.name for r in analyze.named_apart(requests, teacher=True)] == [plain, f"{plain} (teacher)"]
    assert [r.name for r in analyze.named_apart(requests, teacher=False)] == [f"{plain} #1", f"{plain} #2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere/student.safetensors"], "nowhere/student.safetensors: no such file"),
        (["run", "nowhere/config.yaml"], "nowhere/config.yaml: no such file"),
        (["run", TEACHER, "--pairs", "0"], "--pairs 0: at least 1"),
        (["run", TEACHER, "--crop-pct", "0"], "--crop-pct 0.0: at least 0.01, at most 1"),
        (["run", TEACHER, "--data", "s3://bucket/val"], "--data s3://bucket/val: a URI needs --cache"),
        (["run", TEACHER, "--out", "{used}"], "exists and is not empty"),
        (["run", TEACHER, "--out", "{link}"], "a link or mount point; name a new folder"),
        (["run", "vit_tinny_patch16_224=random"], "error: vit_tinny_patch16_224: unknown to timm"),
        (["run", "vit_tiny_patch16_224=nowhere.pth"], "vit_tiny_patch16_224=nowhere.pth: no such file"),
        (["run", "{student}", "--image-size", "64"], "takes images of 32 pixels, not 64"),
        (["run", "{empty}"], "empty/student.safetensors: no such file"),
        (["run", "{plain}"], "no readable record of an export"),
        (["run", "{cait}"], "cait_xxs24_224 cannot give the tokens of every block"),
        (["run", "{student}", "--subspace", "16"], "has room for 1 to 15; set --subspace"),
        (["run", TEACHER, "--data", "nowhere"], "nowhere/index.json does not exist"),
    ],
)
def test_mistakes_end_in_one_line_and_leave_nothing(
    student: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used/mine.txt").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    plain = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(1)}, plain)
    places = {
        "student": student,
        "plain": plain,
        "used": tmp_path / "used",
        "empty": tmp_path / "empty",
        "link": tmp_path / "link",
    }
    if "{cait}" in arguments:
        places["cait"] = exported("cait_xxs24_224", tmp_path)
    arguments = [text.format(**places) for text in arguments]
    defaults = {"--data": "digits", "--out": str(tmp_path / "out"), "--subspace": "2", "--workers": "0"}
    for option, value in defaults.items():
        arguments += [] if option in arguments else [option, value]
    assert analyze.main(arguments) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("analyze")]
    assert len(lines) == 1 and message in lines[0] and lines[0].startswith("analyze [rank 0]: error: ")
    assert not (tmp_path / "out").exists()


def test_what_the_launchers_add_and_names() -> None:
    args = analyze.parse(["--local_rank=1", "run", "m", "--data", "digits", "--out", "o"])
    assert args.models == ["m"]
    assert analyze.request("vit_x").teacher.weights == "hub"
    assert analyze.request("vit_x=/w/file.safetensors").teacher.weights == "/w/file.safetensors"


@pytest.mark.parametrize(("asked", "crop_pct"), [([], 0.9), (["--crop-pct", "1"], 1.0)])
def test_images_are_cropped_as_the_student_was_evaluated(
    asked: list[str], crop_pct: float, student: Path, tmp_path: Path
) -> None:
    args = analyze.parse(["run", str(student), "--data", "digits", "--out", str(tmp_path / "out"), *asked])
    world = World(0, 1, 0, 1, torch.device("cpu"))
    [subject] = analyze.open_subjects(analyze.check(args), None, world)
    assert analyze.open_data(args, subject, world).crop_pct == crop_pct


@pytest.mark.parametrize("command", ["run", "compare", "blocks"])
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        analyze.parse([command, "--help"])
    assert "MODEL" in capsys.readouterr().out
