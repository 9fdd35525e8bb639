"""tools/evaluate.py on a dozen images in the layouts as downloaded: every task, two ranks, a kill, and mistakes."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from leap_dist.analysis.sheets import NEITHER, RIGHT, WRONG
from leap_dist.config import StudentConfig
from leap_dist.evaluation.robustness import ALEXNET
from leap_dist.judging import features, segmentation
from leap_dist.models.student import build_student
from runs import finish, fork

TOOL = Path(evaluate.__file__)
COLOURS = {"n00000001": (250, 20, 20), "n00000002": (20, 250, 20), "n00000003": (20, 20, 250)}
SMALL = ["--workers", "0", "--batch", "4", "--probe-epochs", "20", "--knn-k", "3"]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a student of two blocks at 32 pixels, and a config that names its teacher."""
    folder = tmp_path_factory.mktemp("my-run")
    torch.manual_seed(0)
    kwargs = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    built = build_student(StudentConfig(model="vit_tiny_patch16_224", kwargs=kwargs), 32, width=36)
    save_file(built.backbone.state_dict(), folder / "student.safetensors")
    about = asdict(built.recipe) | {"image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9}
    (folder / "student.json").write_text(json.dumps(about))
    (folder / "config.yaml").write_text(
        "teacher: {model: vit_tiny_patch16_224, weights: random, kwargs: {depth: 2, embed_dim: 24, num_heads: 2}}\n"
        "student: {model: vit_tiny_patch16_224}\ndata: {train: digits, image_size: 32}\n"
    )
    return folder


def picture(path: Path, colour: tuple[int, int, int], seed: int) -> None:
    """A noisy field of one colour, 40 by 36 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-15, 16, (36, 40, 3))
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype("uint8")).save(path)


def classes(folder: Path, per_class: int, seed: int, names: Mapping[str, str] | None = None) -> Path:
    """Class folders; names: what to call which class, all by default."""
    for index, (wnid, called) in enumerate((names or {name: name for name in COLOURS}).items()):
        for i in range(per_class):
            picture(folder / called / f"{i}.png", COLOURS[wnid], seed + 100 * index + i)
    return folder


def revisited(folder: Path, **changes: Any) -> Path:
    """Two queries and five images in the published layout. The second half of query a is another picture's colour."""
    red, green, blue = COLOURS.values()
    for i, colour in enumerate((red, red, green, green, blue)):
        picture(folder / "jpg" / f"db_{i}.jpg", colour, i)
    for name, left, right in (("a", red, green), ("b", green, blue)):
        pixels = np.zeros((40, 80, 3), "uint8")
        pixels[:, :40], pixels[:, 40:] = left, right
        Image.fromarray(pixels).save(folder / "jpg" / f"{name}.jpg")
    gnd = [
        {"bbx": [0.2, 0.0, 39.7, 40.0], "easy": [0], "hard": [1], "junk": [4]},  # its red half
        {"bbx": [0.0, 0.0, 40.0, 40.0], "easy": np.array([2, 3]), "hard": [], "junk": []},
    ]
    told = {"imlist": [f"db_{i}" for i in range(5)], "qimlist": ["a", "b"], "gnd": gnd} | changes
    (folder / "gnd_rmade.pkl").write_bytes(pickle.dumps(told))
    return folder


def results(out: Path) -> dict[tuple[str, str, str], dict[str, float]]:
    rows = json.loads((out / "results.json").read_text())["rows"]
    return {(row["model"], row["task"], row["features"]): row for row in rows}


@pytest.mark.seconds
def test_transfer_to_class_folders_beside_the_teacher(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three colours: every probe and kNN is right, and has its line, student and teacher in one table."""
    data = ["--train", str(classes(tmp_path / "train", 4, 0)), "--test", str(classes(tmp_path / "test", 2, 50))]
    arguments = [str(student), "knn", "probe", "compare", *data, *SMALL, "--out", str(tmp_path / "out")]
    assert evaluate.main(arguments) == 0
    found = results(tmp_path / "out")
    names = {student.name, "vit_tiny_patch16_224"}
    kinds = ("cls", "patch", "cls_patch")
    assert found.keys() == {(name, task, kind) for name in names for task in ("knn", "probe") for kind in kinds}
    assert {row["top1"] for key, row in found.items() if key[0] == student.name} == {1.0}
    printed = capsys.readouterr().out
    assert printed.startswith("task   features   measure") and (tmp_path / "out" / "table.txt").read_text() in printed
    assert f"measure  {student.name}" in printed.splitlines()[0]


@pytest.mark.seconds
def test_retrieval_by_hand_on_one_rank_and_two(student: Path, tmp_path: Path) -> None:
    """Colours rank: each query's own colour first, once its box is cut out. So every positive comes first."""
    data = revisited(tmp_path / "rmade")
    arguments = [str(student), "retrieval", "--retrieval", str(data), *SMALL]
    assert evaluate.main([*arguments, "--out", str(tmp_path / "one")]) == 0
    row = results(tmp_path / "one")[student.name, "retrieval rmade", "patch"]
    assert (row["easy_queries"], row["medium_queries"], row["hard_queries"]) == (2, 2, 1)
    assert row["medium_map"] == row["easy_map"] == row["hard_map"] == pytest.approx(1)
    assert row["medium_mp10"] == pytest.approx(1)
    done = finish(fork(TOOL, *arguments, "--out", str(tmp_path / "two"), processes=2))
    assert done.returncode == 0, done.stdout[-3000:]
    assert results(tmp_path / "two").keys() == results(tmp_path / "one").keys()
    other = results(tmp_path / "two")[student.name, "retrieval rmade", "patch"]
    assert other == pytest.approx(row)
    for i in range(3):  # nearer to the first query than its positives, which are noisy: these come fourth and fifth
        (tmp_path / "more").mkdir(exist_ok=True)
        Image.new("RGB", (40, 40), COLOURS["n00000001"]).save(tmp_path / "more" / f"{i}.png")
    further = [*arguments, "--distractors", str(tmp_path / "more"), "--out", str(tmp_path / "further")]
    assert evaluate.main(further) == 0
    harder = results(tmp_path / "further")[student.name, "retrieval rmade", "patch"]
    assert harder["easy_map"] == pytest.approx((1 / 8 + 1) / 2)
    assert harder["medium_map"] == pytest.approx((1 / 16 + 13 / 80 + 1) / 2)


@pytest.mark.seconds
def test_robustness_sets_as_downloaded(student: Path, tmp_path: Path) -> None:
    """Two of three classes by their ids, all by number, and a corruption whose fifth severity shows another class."""
    train = classes(tmp_path / "train", 4, 0)
    part = classes(tmp_path / "imagenet-a", 2, 60, {"n00000001": "n00000001", "n00000003": "n00000003"})
    by_number = classes(tmp_path / "imagenetv2", 2, 70, {w: str(i) for i, w in enumerate(COLOURS)})
    wrong = {"n00000001": "n00000002", "n00000002": "n00000003", "n00000003": "n00000001"}
    for severity in range(1, 6):
        classes(tmp_path / f"imagenet-c/weather/fog/{severity}", 1, 80, wrong if severity == 5 else None)
    sets = ["--robustness", str(part), str(by_number), str(tmp_path / "imagenet-c")]
    arguments = [str(student), "robustness", "--train", str(train), *sets, *SMALL, "--features", "patch"]
    assert evaluate.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    found = {task: row for (_, task, _), row in results(tmp_path / "out").items()}
    assert found["robustness imagenet-a"]["top1"] == 1 and found["robustness imagenet-a"]["classes"] == 2
    assert found["robustness imagenetv2"]["top1"] == 1 and found["robustness imagenetv2"]["classes"] == 3
    assert found["robustness imagenet-c fog 5"]["top1"] == 0 and found["robustness imagenet-c fog 4"]["top1"] == 1
    total = found["robustness imagenet-c"]
    assert total["ce_fog"] == pytest.approx(1 / 5 / ALEXNET["fog"]) and "mce" not in total


def test_a_killed_evaluation_goes_on_and_a_damaged_part_is_made_again(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(features, "PART", 1)
    data = ["--train", str(classes(tmp_path / "train", 4, 0)), "--test", str(classes(tmp_path / "test", 2, 50))]
    arguments = [str(student), "knn", *data, *SMALL, "--out"]
    assert evaluate.main([*arguments, str(tmp_path / "uncut")]) == 0
    seen: list[int] = []
    write = features._write

    def killed_at_the_third(part: Any, folder: Path) -> None:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(part.ids))
        write(part, folder)

    monkeypatch.setattr(features, "_write", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main([*arguments, str(tmp_path / "cut")])
    parts = sorted((tmp_path / "cut" / "features").rglob("*.safetensors"))
    assert len(parts) == 2
    whole = parts[0].read_bytes()
    parts[0].write_bytes(whole[:-4] + b"\xff\xff\xff\x00")  # as long as it was
    again: list[int] = []
    monkeypatch.setattr(features, "_write", lambda part, folder: (again.extend(part.ids.tolist()), write(part, folder)))
    assert evaluate.main([*arguments, str(tmp_path / "cut")]) == 0
    assert len(again) == 12 + 6 - 4 and "is damaged and computed again" in caplog.text
    assert results(tmp_path / "cut") == results(tmp_path / "uncut")
    again.clear()
    assert evaluate.main([*arguments, str(tmp_path / "cut")]) == 0
    assert again == []
    picture(tmp_path / "test" / "n00000001" / "0.png", (1, 2, 3), 5)  # another image: another fingerprint
    assert evaluate.main([*arguments, str(tmp_path / "cut")]) == 0
    assert len(again) == 6


class Hostile:
    """Runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_hostile_ground_truth_runs_nothing(student: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = revisited(tmp_path / "rmade", extra=Hostile(tmp_path / "touched"))
    arguments = [str(student), "retrieval", "--retrieval", str(data), *SMALL, "--out", str(tmp_path / "out")]
    assert evaluate.main(arguments) == 2
    assert not (tmp_path / "touched").exists()
    assert "gnd_rmade.pkl: the ground truth of a revisited set is expected" in capfd.readouterr().err


BAD_TRUTH = {
    "beyond": ({"gnd": [{"bbx": [0, 0, 9, 9], "easy": [5], "hard": [], "junk": []}] * 2}, "beyond the 5 of imlist"),
    "a list missing": ({"gnd": [{"bbx": [0, 0, 9, 9], "easy": [0]}] * 2}, "KeyError: 'hard'"),
    "no box": ({"gnd": [{"bbx": [9, 0, 9, 9], "easy": [0], "hard": [], "junk": []}] * 2}, "left, top, right, lower"),
    "too few": ({"gnd": []}, "2 queries, 0 truths, 5 images"),
    "an image missing": ({"imlist": ["db_0", "db_9"] + ["db_1"] * 3}, "db_9.jpg is missing"),
    "out of the folder": ({"imlist": ["../x"] * 5}, "no name of an image"),
}


@pytest.mark.parametrize("case", BAD_TRUTH)
def test_a_truth_that_is_not_as_published_is_one_line(
    case: str, student: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changes, words = BAD_TRUTH[case]
    data = revisited(tmp_path / "rmade", **changes)
    arguments = [str(student), "retrieval", "--retrieval", str(data), *SMALL, "--out", str(tmp_path / "out")]
    assert evaluate.main(arguments) == 2
    complaints = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert len(complaints) == 1 and words in complaints[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["knn"], "knn: needs --train"),
        (["retrieval"], "retrieval: needs --retrieval"),
        (["compare"], "goes beside other tasks"),
        (["retrieval", "--retrieval", "{}", "--scales", "0"], "--scales 0: from 0.1 to 4"),
        (["knn", "--train", "{}", "--test", "{}", "--scales", "2"], "--scales: only used by retrieval"),
        (["probe", "--train", "{}", "--test", "{}", "--pictures"], "only used by knn and retrieval and segmentation"),
        (["knn", "--train", "{}", "--test", "{}", "--knn-k", "0"], "--knn-k 0: at least 1"),
        (["knn", "--train", "{}/nowhere", "--test", "{}"], "nowhere is not a folder"),
        (["knn", "--train", "{}", "--test", "{}"], "holds neither images nor class folders"),
        (["retrieval", "--retrieval", "{}"], "one gnd_NAME.pkl is expected beside jpg/"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], words: str, student: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    asked = [text.replace("{}", str(tmp_path / "empty")) for text in arguments]
    assert evaluate.main([str(student), *asked, "--workers", "0", "--out", str(tmp_path / "out")]) == 2
    complaints = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert len(complaints) == 1 and words in complaints[0]


def test_sets_that_do_not_go_together_are_one_line(
    student: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train, test = classes(tmp_path / "train", 2, 0), classes(tmp_path / "test", 2, 0)
    shutil.move(test / "n00000001", test / "n00000009")
    command = [str(student), "--train", str(train), "--out", str(tmp_path / "out"), *SMALL]
    assert evaluate.main([command[0], "knn", *command[1:], "--test", str(test)]) == 2
    assert "has classes that" in capfd.readouterr().err
    assert evaluate.main([command[0], "robustness", *command[1:], "--robustness", str(test)]) == 2
    assert "class n00000009 is none of the training set's 3" in capfd.readouterr().err


def masked(folder: Path, layout: str) -> Path:
    """Two images to train on and two to be judged on, 48 by 64 pixels: one half of each of two colours."""
    red, green, _ = COLOURS.values()
    for index, split in enumerate(("train", "train", "val", "val")):
        left, right = ((red, green), (green, red))[index % 2]
        pixels, mask = np.zeros((48, 64, 3), "uint8"), np.zeros((48, 64), "uint8")
        pixels[:, :32], pixels[:, 32:] = left, right
        mask[:, :32], mask[:, 32:] = (1, 2) if left == red else (2, 1)
        mask[:4] = {"ade": 0, "voc": 255}[layout]  # does not count
        if layout == "ade":
            part = {"train": "training", "val": "validation"}[split]
            places = folder / "images" / part / f"{index}.jpg", folder / "annotations" / part / f"{index}.png"
        else:
            places = folder / "JPEGImages" / f"{index}.jpg", folder / "SegmentationClass" / f"{index}.png"
            listed = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
            listed.parent.mkdir(parents=True, exist_ok=True)
            listed.write_text((listed.read_text() if listed.exists() else "") + f"{index}\n")
        for place, content in zip(places, (pixels, mask), strict=True):
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(content).save(place, quality=95)
    return folder


@pytest.mark.seconds
@pytest.mark.parametrize(("layout", "blocks"), [("ade", 1), ("voc", 4)])
def test_segmentation_of_two_halves(layout: str, blocks: int, student: Path, tmp_path: Path) -> None:
    """Cells of 8 of 32 pixels, masks of 48: the border is found within a cell, so most pixels are right.

    A class that is nowhere may still win on the border, where it takes a share of the mean: mIoU is low.
    """
    data = ["--segmentation", str(masked(tmp_path / "set", layout)), "--segmentation-blocks", str(blocks)]
    arguments = [str(student), "segmentation", *data, "--segmentation-steps", "50", "--workers", "0"]
    assert evaluate.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    (row,) = results(tmp_path / "out").values()
    assert row["pixels"] > 0.85 and 0.1 < row["miou"] < row["pixels"]


def test_masks_that_are_not_as_published_are_one_line(
    student: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = masked(tmp_path / "set", "voc")
    arguments = [str(student), "segmentation", "--segmentation", str(folder), "--segmentation-steps", "1"]
    arguments += ["--workers", "0", "--out", str(tmp_path / "out")]
    Image.fromarray(np.full((48, 64), 21, "uint8")).save(folder / "SegmentationClass" / "3.png")
    assert evaluate.main(arguments) == 2
    assert "3.png: label 21 is out of range; voc2012 has 21 classes" in capfd.readouterr().err
    (folder / "SegmentationClass" / "3.png").unlink()
    assert evaluate.main(arguments) == 2
    assert "3.png is missing" in capfd.readouterr().err
    shutil.rmtree(folder / "ImageSets")
    assert evaluate.main(arguments) == 2
    assert "neither ADE20K (images/, annotations/) nor VOC 2012" in capfd.readouterr().err


def sheet(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def has(pixels: np.ndarray, colour: tuple[int, int, int]) -> bool:
    """Whether a frame of that colour is there: as many pixels as one of its sides has."""
    return int((pixels == colour).all(-1).sum()) > 5 * 100


@pytest.mark.seconds
def test_tokens_of_models_side_by_side(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row an image, a column a model; of a teacher that is the student itself both columns are the same."""
    classes(tmp_path / "images", 1, 0)
    arguments = [str(student), "pictures", "--beside", str(student / "student.safetensors"), "--images"]
    arguments += [str(tmp_path / "images"), str(tmp_path / "images" / "n00000002" / "0.png"), "--out"]
    for name, options in (("plain", []), ("foreground", ["--foreground", "0.5"])):
        out = tmp_path / name
        assert evaluate.main([*arguments, str(out), *options]) == 0
        pixels = sheet(out / "pictures" / "tokens.png")
        assert pixels.shape == (28 + 4 * 272, 6 + 3 * 272, 3)
        first, second = (pixels[28:, 6 + column * 272 :][:, :272] for column in (1, 2))
        assert (first == second).all() and first.std() > 20
        assert bool((first[8:250, 8:250] == 0).all(-1).any()) == (name == "foreground")
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "foreground")


@pytest.mark.seconds
def test_the_teacher_is_the_reference_of_the_colours(student: Path, tmp_path: Path) -> None:
    """Its column is the same whoever stands beside it."""
    picture(tmp_path / "one.png", (200, 30, 90), 1)
    seen = []
    for model in (student, tmp_path / "twin"):
        if model != student:
            shutil.copytree(student, model)
        command = [str(model), "pictures", "compare", "--images", str(tmp_path / "one.png")]
        if model != student:
            command += ["--beside", "vit_tiny_patch16_224=random", "--image-size", "32"]
        assert evaluate.main([*command, "--out", str(model / "out")]) == 0
        seen.append(sheet(model / "out" / "pictures" / "tokens.png")[28:, -272:])
    assert (seen[0] == seen[1]).all()


@pytest.mark.seconds
def test_neighbours_are_framed_by_their_class(student: Path, tmp_path: Path) -> None:
    """Four images a class, eight neighbours: some are right, some wrong. With one class all are right."""
    for name, part in (("three", None), ("one", {"n00000001": "n00000001"})):
        train = classes(tmp_path / name / "train", 8, 0, part)
        test = classes(tmp_path / name / "test", 2, 50, part)
        data = ["--train", str(train), "--test", str(test), "--features", "patch", "--pictures", *SMALL]
        out = tmp_path / name / "out"
        assert evaluate.main([str(student), "knn", *data, "--out", str(out)]) == 0
        pixels = sheet(out / "pictures" / f"knn_{student.name}_patch.png")
        assert has(pixels, RIGHT) and not has(pixels, WRONG) and not has(pixels, NEITHER)
    few = classes(tmp_path / "few", 3, 0)
    data = ["--train", str(few), "--test", str(few), "--features", "patch", "--pictures", *SMALL]
    assert evaluate.main([str(student), "knn", *data, "--out", str(tmp_path / "out")]) == 0
    pixels = sheet(tmp_path / "out" / "pictures" / f"knn_{student.name}_patch.png")
    assert has(pixels, RIGHT) and has(pixels, WRONG)


@pytest.mark.seconds
def test_retrieval_at_several_scales_and_what_it_finds(student: Path, tmp_path: Path) -> None:
    """Every scale ranks colours alike, so the scores are those of one scale; frames: positives, junk and others."""
    data = ["--retrieval", str(revisited(tmp_path / "rmade")), "--features", "patch", *SMALL]
    arguments = [str(student), "retrieval", *data, "--pictures", "--out", str(tmp_path / "out")]
    assert evaluate.main([*arguments, "--scales", "1", "0.7071", "0.5"]) == 0
    row = results(tmp_path / "out")[student.name, "retrieval rmade", "patch, 3 scales"]
    assert row["medium_map"] == row["hard_map"] == pytest.approx(1)
    pixels = sheet(tmp_path / "out" / "pictures" / f"retrieval_rmade_{student.name}_patch.png")
    assert has(pixels, RIGHT) and has(pixels, WRONG) and has(pixels, NEITHER)


@pytest.mark.seconds
def test_a_killed_segmentation_goes_on_to_the_bit(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(segmentation, "KEPT_EVERY", 4)
    data = ["--segmentation", str(masked(tmp_path / "set", "voc")), "--segmentation-steps", "10", "--workers", "0"]
    arguments = [str(student), "segmentation", *data, "--pictures", "--out"]
    assert evaluate.main([*arguments, str(tmp_path / "uncut")]) == 0
    crops = segmentation._Crops.__getitem__
    seen: list[int] = []

    def killed_in_the_sixth(self: Any, index: int) -> Any:
        seen.append(self._numbers[index])
        if self._numbers[index] == 16 * 6 - 1 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        return crops(self, index)

    monkeypatch.setattr(segmentation._Crops, "__getitem__", killed_in_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main([*arguments, str(tmp_path / "cut")])
    (tmp_path / "again").touch()
    seen.clear()
    assert evaluate.main([*arguments, str(tmp_path / "cut")]) == 0
    assert seen == list(range(16 * 4, 16 * 10))
    (whole,), (cut,) = (list((tmp_path / name / "features").glob("head-*.pt")) for name in ("uncut", "cut"))
    ours, theirs = (torch.load(path, weights_only=True)["parts"][0] for path in (whole, cut))
    assert all(ours[key].equal(theirs[key]) for key in ours)
    assert results(tmp_path / "uncut") == results(tmp_path / "cut")
    seen.clear()
    assert evaluate.main([*arguments, str(tmp_path / "cut")]) == 0 and seen == []  # done is done
    cut.write_bytes(whole.read_bytes()[:-100])
    assert evaluate.main([*arguments, str(tmp_path / "cut")]) == 0
    assert len(seen) == 160 and "is damaged and trained again" in caplog.text
    pixels = sheet(tmp_path / "cut" / "pictures" / f"segmentation_voc2012_{student.name}.png")
    assert pixels.shape == (28 + 2 * 272, 6 + 3 * 272, 3)


@pytest.mark.slow
def test_a_head_that_two_ranks_have_trained_is_there_for_both(student: Path, tmp_path: Path) -> None:
    """Each with its own running statistics: the same command gives the same figures. One rank trains anew."""
    data = ["--segmentation", str(masked(tmp_path / "set", "ade")), "--segmentation-steps", "20", "--workers", "0"]
    arguments = [str(student), "segmentation", *data, "--pictures", "--out", str(tmp_path / "out")]
    found = []
    for processes in (2, 2, 1):
        done = finish(fork(TOOL, *arguments, processes=processes))
        assert done.returncode == 0, done.stdout[-3000:]
        heads = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "features").glob("head-*.pt")}
        found.append((results(tmp_path / "out"), heads))
    assert found[0] == found[1] and len(found[2][1]) == 2


def test_pictures_that_cannot_be_are_one_line(student: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    cases = {
        (): "pictures: needs --images",
        ("--images", "nowhere"): "--images nowhere: no such file or folder",
        ("--images", str(tmp_path / "empty")): "holds no images",
        ("--images", str(tmp_path / "text.png")): "no readable image",
        ("--images", str(tmp_path / "text.png"), "--foreground", "1"): "--foreground 1: above 0 and below 1",
    }
    for options, words in cases.items():
        assert evaluate.main([str(student), "pictures", *options, "--out", str(tmp_path / "out")]) == 2
        complaints = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
        assert len(complaints) == 1 and words in complaints[0]
