"""Two sets that are joined number the same classes alike, are matched by name, or are refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from leap_dist.config import DataConfig, load
from leap_dist.data import build_eval_loader, check_sources, write_shards
from leap_dist.data.classes import class_number, explain, read_classes, translation
from leap_dist.errors import UserError
from leap_dist.evaluation.features import FeatureSet
from leap_dist.evaluation.held_out import HeldOut
from leap_dist.evaluation.knn import knn_accuracy
from leap_dist.evaluation.probe import Recipe, probe_accuracy
from leap_dist.pretraining.training import accuracy
from small_sets import ALONE, png

NAMES = ("data.train=t", "data.val=v")
ABCD = {"a": 0, "b": 1, "c": 2, "d": 3}


def make(folder: Path, labels: list[int], classes: dict[str, int] | None, above: bool = False) -> Path:
    write_shards(((png(20 * label % 256), label) for label in labels), folder)
    if classes is not None:
        (folder.parent if above else folder).joinpath("class_to_idx.json").write_text(json.dumps(classes))
    return folder


def config(train: Path, val: Path, **options: object) -> DataConfig:
    return DataConfig(train=str(train), val=str(val), workers=0, image_size=8, **options)


@pytest.mark.parametrize(
    ("other", "table", "line"),
    [
        (ABCD, {0: 0, 1: 1, 2: 2, 3: 3}, None),
        ({"b": 0, "c": 1, "d": 2}, {0: 1, 1: 2, 2: 3}, "has 3 of the 4 classes .* 3 have another label"),
        ({"a": 0, "b": 1}, {0: 0, 1: 1}, "has 2 of the 4 classes of data.train=t$"),
        ({"d": 7}, {7: 3}, "has 1 of the 4 classes"),
        (None, {0: 0, 1: 1, 2: 2, 3: 3}, "data.val=v: no class_to_idx.json"),
    ],
)
def test_a_part_of_the_classes_is_matched_by_name(
    other: dict[str, int] | None, table: dict[int, int] | None, line: str | None
) -> None:
    assert translation(ABCD, other, NAMES) == table
    told = explain(ABCD, other, NAMES)
    assert told is None if line is None else re.search(line, told)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": 1, "b": 0, "c": 2, "d": 3}, r"class 'a' has label 1, but 0 in data.train=t \(2 classes differ\)"),
        ({"b": 0, "c": 1, "d": 2, "e": 3}, r"has classes that data.train=t has not \(e\)"),
        ({**ABCD, "e": 4}, r"has not \(e\)"),
        ({"0": 0, "1": 1}, r"has not \(0, 1\)"),
    ],
)
def test_other_classes_and_other_numbers_are_refused(other: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        translation(ABCD, other, NAMES)


def test_names_are_found_beside_the_shards_or_above_but_not_those_of_another_set(tmp_path: Path) -> None:
    split = make(tmp_path / "out/train", [0], ABCD, above=True)
    assert read_classes(split) == ABCD
    (tmp_path / "out/index.json").write_text("{}")  # a set of its own, in which this one happens to lie
    assert read_classes(split) is None
    assert read_classes(make(tmp_path / "own", [0], {"x": 0})) == {"x": 0}


@pytest.mark.parametrize("text", ["[1]", '{"a": "0"}', '{"a": -1}', '{"a": 0, "b": 0}', "{", '{"a": true}'])
def test_a_class_list_that_is_none_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "class_to_idx.json").write_text(text)
    with pytest.raises(UserError, match=r"class_to_idx\.json"):
        read_classes(tmp_path)


def test_a_run_says_so_before_it_begins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = make(tmp_path / "train", [0, 1, 2, 3], ABCD)
    part = make(tmp_path / "part", [0, 1], {"c": 0, "d": 1})
    check_sources(config(train, part), ALONE)
    assert caplog.messages == [
        f"data.val={part}: has 2 of the 4 classes of data.train={train}; 2 have another label there and are matched "
        "by name"
    ]
    with pytest.raises(UserError, match=r"has classes that data\.train"):
        check_sources(config(part, train), ALONE)
    caplog.clear()
    check_sources(config(train, make(tmp_path / "nameless", [0], None)), ALONE)
    (line,) = caplog.messages
    assert "nobody can tell whether both sets number classes alike" in line


def test_evaluation_numbers_labels_as_the_training_set_does(tmp_path: Path) -> None:
    train = make(tmp_path / "train", [0, 1, 2, 3], ABCD)
    part = make(tmp_path / "part", [0, 1, 5], {"c": 0, "d": 1})
    data = config(train, part)
    (own,) = build_eval_loader(str(part), data, batch=9, world=ALONE)
    (joined,) = build_eval_loader(str(part), data, batch=9, world=ALONE, numbered_as=str(train))
    assert own.labels.tolist() == [0, 1, -1] and joined.labels.tolist() == [2, 3, -1]
    with pytest.raises(UserError, match="has classes that"):
        build_eval_loader(str(train), data, batch=9, world=ALONE, numbered_as=str(part))


@pytest.mark.parametrize("labels", [[4, 5, 5], [10, 11, 12, 13], [-1, 4]])
def test_nameless_sets_without_a_common_label_are_refused(labels: list[int], tmp_path: Path) -> None:
    train, val = make(tmp_path / "train", [0, 1, 2, 3], None), make(tmp_path / "val", labels, None)
    with pytest.raises(UserError, match=rf"no image of data\.train={train} has its labels? .*, nor any other"):
        check_sources(config(train, val), ALONE)


def test_labels_that_no_training_image_has_are_said_before_and_after(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train, val = make(tmp_path / "train", [0, 1, 2, 3], None), make(tmp_path / "val", [1, 2, 3, 4, 4], None)
    check_sources(config(train, val), ALONE)
    assert caplog.messages[1:] == [f"data.val={val}: no image of data.train={train} has its label 4; such images count "
                                   "as errors"]  # fmt: skip
    caplog.clear()
    sets = held_out(train, val)
    for _ in range(2):
        sets.features(lambda images: images.flatten(1))
    assert caplog.messages == [
        f"{val}: 2 of 5 images have labels that none of 4 images of {train} has, and count as errors"
    ]


@pytest.mark.parametrize("named", ["train", "val"])
def test_names_of_one_set_say_which_labels_there_are(named: str, tmp_path: Path) -> None:
    """255 stands for 'no label' in sets of 8 bits."""
    train = make(tmp_path / "train", [0, 1, 2, 3], ABCD if named == "train" else None)
    val = make(tmp_path / "val", [0, 255, 3], ABCD if named == "val" else None)
    assert held_out(train, val).validation(lambda images: images.flatten(1)).labels.tolist() == [0, 3]


def test_the_training_images_again_are_no_held_out_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = make(tmp_path / "train", [0, 1, 2, 3], ABCD)
    for val in (train, shutil.copytree(train, tmp_path / "copy")):
        caplog.clear()
        check_sources(config(train, val), ALONE)
        (line,) = caplog.messages
        assert f"data.val={val}: holds the images of data.train={train}" in line


def test_names_that_a_file_system_took_apart_are_the_same(tmp_path: Path) -> None:
    train = make(tmp_path / "train", [0, 1], {"caf\u00e9": 0, "b": 1})
    val = make(tmp_path / "val", [1, 0, 0], {"cafe\u0301": 0, "b": 1})
    check_sources(config(train, val), ALONE)
    (val / "class_to_idx.json").write_text(json.dumps({"cafe\u0301": 0, "caf\u00e9": 1}))
    with pytest.raises(UserError, match="two classes have one name"):
        check_sources(config(train, val), ALONE)


def held_out(train: Path, val: Path) -> HeldOut:
    options = ("data.image_size=8", "data.workers=0", "evaluation.probe_epochs=2")
    run = load(None, ["teacher.model=t", "student.model=s", f"data.train={train}", f"data.val={val}", *options])
    return HeldOut(run, ALONE, None, None)


@pytest.mark.parametrize("strange", [-1, -(2**40), 10**9, 2**40])
def test_images_without_a_usable_label_are_left_out_and_counted_once(
    strange: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = make(tmp_path / "train", [0, 1, 2, strange, 3], None)
    val = make(tmp_path / "val", [3, strange, strange, 1], None)
    sets = held_out(train, val)
    for _ in range(2):
        known, judged = sets.features(lambda images: images.flatten(1))
        assert known.labels.tolist() == [0, 1, 2, 3] and judged.labels.tolist() == [3, 1]
    assert knn_accuracy(known, judged, 1, torch.device("cpu")) == (1, 1)
    assert sum("left out" in line for line in caplog.messages) == 2
    assert f"{val}: 2 images have no label of a class and are left out" in caplog.messages


def test_a_teachers_accuracy_is_of_the_labelled_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = make(tmp_path / "train", [0, 1, 2, 3], ABCD)
    val = make(tmp_path / "val", [0, -1, 1, 10**9, 0], {"c": 0, "d": 1})
    data = config(train, val)
    loader = build_eval_loader(str(val), data, batch=2, world=ALONE, numbered_as=str(train))

    def always_c(images: torch.Tensor) -> torch.Tensor:
        return torch.eye(4)[2].expand(len(images), 4)

    assert accuracy(always_c, loader, torch.device("cpu"), tell=True) == pytest.approx(2 / 3)
    assert caplog.messages == [f"{val}: 2 images have no label of a class and are left out"]
    unlabelled = make(tmp_path / "none", [-1, -1], None)
    with pytest.raises(UserError, match="no image has a label, which an accuracy needs"):
        accuracy(always_c, build_eval_loader(str(unlabelled), data, batch=2, world=ALONE), torch.device("cpu"))


def test_a_set_without_any_label_is_refused_before_the_run_and_by_evaluation(tmp_path: Path) -> None:
    train, val = make(tmp_path / "train", [0, 1], None), make(tmp_path / "val", [-1, 10**9], None)
    with pytest.raises(UserError, match="none of 2 samples looked at has a label"):
        check_sources(config(train, val), ALONE)
    with pytest.raises(UserError, match="no image has a label"):
        held_out(train, val).features(lambda images: images.flatten(1))


@pytest.mark.parametrize("label", [-1, 4, 10**9])
def test_a_classifier_is_not_trained_on_what_is_no_class_of_its(label: int, tmp_path: Path) -> None:
    train = make(tmp_path / "train", [0, 1, 2, 3] * 20 + [label], None)
    data = DataConfig(train=str(train), workers=0, image_size=8)
    check_sources(data, ALONE)
    with pytest.raises(UserError, match=f"student.num_classes=4: data.train has a sample of label {label}"):
        check_sources(data, ALONE, 4)


def test_a_classifier_is_not_trained_on_a_class_that_the_list_lacks(tmp_path: Path) -> None:
    train = make(tmp_path / "train", [0, 1, 2], {"a": 0, "b": 1})
    with pytest.raises(UserError, match=r"a sample of label 2, which its class_to_idx\.json does not list"):
        check_sources(DataConfig(train=str(train)), ALONE, classes=4)


def test_a_classifier_with_too_few_outputs_is_refused_by_the_names(tmp_path: Path) -> None:
    train = make(tmp_path / "train", [0, 1], ABCD)
    with pytest.raises(UserError, match=r"classes=3: data\.train=.* has 4 classes"):
        check_sources(DataConfig(train=str(train)), ALONE, 3, option="classes")


@pytest.mark.parametrize("key", ["train", "val"])
def test_the_digits_are_not_joined_with_a_set_of_ones_own(key: str, tmp_path: Path) -> None:
    other = {"train": "val", "val": "train"}[key]
    sets = [f"data.{key}=digits", f"data.{other}={tmp_path}"]
    with pytest.raises(UserError, match=f"data.{key}=digits with data.{other}="):
        load(None, ["teacher.model=t", "student.model=s", *sets])


def test_labels_as_large_as_they_like_take_no_memory() -> None:
    generator = torch.Generator().manual_seed(0)
    centres, labels = torch.randn(3, 8, generator=generator), torch.arange(90) % 3
    features = centres[labels] + 0.01 * torch.randn(90, 8, generator=generator)
    small = FeatureSet(features, labels, torch.arange(90))
    large = small._replace(labels=labels * 400_000_000)
    cpu = torch.device("cpu")
    assert knn_accuracy(large, large, 5, cpu) == knn_accuracy(small, small, 5, cpu) == (1, 1)
    recipe, options = Recipe(3, (0.1,)), {"seed": 0, "device": cpu}
    found = [probe_accuracy(one, one, recipe, **options) for one in (large, small)]
    assert found[0] == found[1] and found[0].top1 == 1


def test_what_can_be_the_number_of_a_class() -> None:
    assert [class_number(label) for label in (0, 999_999, 1_000_000, -1, 2**70)] == [0, 999_999, -1, -1, -1]
