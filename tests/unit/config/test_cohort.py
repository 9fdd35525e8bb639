"""`students:`: each is the config of a run alone, and what cannot differ within a run is refused in a line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from leap_dist.config import Config, differences, load, members, to_yaml
from leap_dist.errors import UserError

BASE = ["teacher.model=t", "teacher.weights=random", "student.model=s", "data.train=digits", "output=runs/x"]


def written(folder: Path, students: object) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"students": students}))
    return path


def read(folder: Path, students: object, *overrides: str) -> Config:
    return load(written(folder, students), [*BASE, *overrides])


def test_without_students_the_run_is_its_only_one() -> None:
    config = load(None, BASE)
    assert members(config) == {"": config}


def test_each_is_what_a_run_alone_would_be(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        {"plain": None, "own": {"student": {"kwargs": {"depth": 3}}, "curriculum.threshold": 0.9, "seed": 7}},
        "student.kwargs.embed_dim=12",
        "students.own.optim.lr=0.5",
    )
    found = members(config)
    assert found["plain"] == load(None, [*BASE, "student.kwargs.embed_dim=12", "output=runs/x/plain"])
    own = ["student.kwargs={embed_dim: 12, depth: 3}", "curriculum.threshold=0.9", "student.seed=7", "optim.lr=0.5"]
    assert found["own"] == load(None, [*BASE, *own, "output=runs/x/own"])
    assert (found["own"].seed, found["own"].student_seed, found["plain"].student_seed) == (0, 7, 0)


def test_null_takes_an_argument_of_the_runs_model_away(tmp_path: Path) -> None:
    """timm means the same by it; a module of one's own need not know the name. Other options may be null."""
    own = {"student": {"model": "mine:net", "kwargs": {"depth": None, "width": 4}, "image_size": None}}
    config = read(tmp_path, {"vit": {}, "own": own}, "student.kwargs={depth: 2, embed_dim: 12}", "student.image_size=8")
    found = members(config)
    assert found["vit"].student.kwargs == {"depth": 2, "embed_dim": 12}
    assert found["own"].student.kwargs == {"embed_dim": 12, "width": 4} and found["own"].student.image_size is None
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert members(load(tmp_path / "again.yaml", [])) == found
    base = tmp_path / "again.yaml"
    (tmp_path / "over.yaml").write_text(f"base: {base.name}\nteacher: {{kwargs: {{a: null}}}}\n")
    assert load(tmp_path / "over.yaml", ["teacher.kwargs.b=1", "student.kwargs.depth=null"]).teacher.kwargs == {"b": 1}


def test_it_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    config = read(tmp_path, {"t0.85": {"curriculum": {"threshold": 0.8}}, "b": {}})
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "again.yaml", []) == config


def test_a_difference_names_student_and_option(tmp_path: Path) -> None:
    one = read(tmp_path, {"a": {"optim.lr": 0.1}, "b": {}})
    assert differences(one, read(tmp_path, {"b": {}, "a": {"optim.lr": 0.1}})) == []
    assert differences(one, read(tmp_path, {"a": {"optim.lr": 0.2}, "b": {}})) == ["students.a.optim.lr: 0.1 -> 0.2"]
    assert differences(one, read(tmp_path, {"a": {"optim.lr": 0.1}})) == ["students.b: there -> None"]


@pytest.mark.parametrize(
    ("students", "words"),
    [
        (3, "students=3 .*: expected a mapping"),
        ({"a": 3}, "students.a=3 .*: expected what differs"),
        ({1: {}}, "students.1 .*a number needs quotes"),
        ({"../a": {}}, r"students.\.\./a .*a folder bears this name"),
        ({"": {}}, "a folder bears this name"),
        ({".hidden": {}}, "begin with a letter"),
        ({"x" * 65: {}}, "at most 64"),
        ({"Checkpoints": {}}, "has checkpoints of its own"),
        ({"a": {}, "A": {}}, "students.a .*A would have the same folder"),
        ({"a": {"data.image_size": 8}}, "students.a.data.image_size .*the same for all students"),
        ({"a": {"teacher": {"dtype": "bf16"}}}, "students.a.teacher.dtype .*the same for all"),
        ({"a": {"epochs": 3}}, "students.a.epochs .*the same for all"),
        ({"a": {"seed": 1, "student.seed": 2}}, "means the same as student.seed"),
        ({"a": {"optim.lrr": 1}}, r"optim.lrr \(students.a\): unknown key; did you mean optim.lr"),
        ({"a": {"student": "vit"}}, r"student \(students.a\): is a section; set one of its keys, e.g. student.model"),
        ({"a": {"optim.lr": "fast"}}, r"optim.lr='fast' \(students.a\): expected a number"),
        ({"a": {"optim.lr": -1}, "b": {}}, "^students.a: optim.lr=-1.0: must be above 0"),
        ({"a": {"optim.lr": -1}}, "^students.a: optim.lr=-1.0: must be above 0"),
        (
            {
                "a": {"student.num_classes": 3, "objective.kd_alpha": 0.5},
                "b": {"student.num_classes": 4, "objective.kd_alpha": 0.5},
            },
            "one number of classes",
        ),
    ],
)
def test_a_mistake_is_told_in_a_line(students: object, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as caught:
        read(tmp_path, students)
    assert "\n" not in str(caught.value)


def test_names_that_meet_in_one_folder_are_seen_over_layers_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the same folder"):
        read(tmp_path, {"a": {}}, "students.A.seed=1")


def test_what_is_wrong_with_all_of_them_is_said_without_a_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data.global_batch=0: must be at least 1"):
        read(tmp_path, {"a": {}, "b": {}}, "data.global_batch=0")
