"""Features of a folder of images: every image once, in order, whatever stops the run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import leap_dist
from exports import exported
from killed import killed_everywhere
from leap_dist.deployment import embedding
from leap_dist.deployment.embedding import embed
from leap_dist.errors import UserError
from small_sets import ALONE

pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Seven images in two folders, and one that is none."""
    draw = np.random.default_rng(0)
    for name in ("b/1.png", "a/0.jpg", "a/1.jpg", "b/0.png", "c.png", "d.png", "e.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    (tmp_path / "images/b/bad.png").write_bytes(b"no image")
    return tmp_path / "images"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_every_image_has_the_students_features(images: Path, tmp_path: Path) -> None:
    model, out = leap_dist.load(exported(tmp_path / "run")), tmp_path / "out.parquet"
    assert embed(model, images, out, ALONE, batch=3) == (7, 1)

    table = pq.read_table(out).to_pydict()
    assert sorted(table["path"]) == sorted(
        str(path.relative_to(images)) for path in images.rglob("*.*") if path.name != "bad.png"
    )
    for name, found in zip(table["path"], table["features"], strict=True):
        with torch.no_grad():
            wanted = model(model.preprocess(Image.open(images / name))[None]).pooled[0]
        torch.testing.assert_close(torch.tensor(found), wanted, atol=1e-5, rtol=1e-5)
    (bad,) = map(json.loads, (tmp_path / "out.parquet.bad.jsonl").read_text().splitlines())
    assert bad["path"] == "b/bad.png" and "cannot identify image" in bad["reason"]
    assert not (tmp_path / "out.parquet.parts").exists()


def test_a_stopped_run_goes_on_and_takes_what_is_done(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "PIECE", 3)
    model, out = leap_dist.load(exported(tmp_path / "run")), tmp_path / "out.parquet"
    embed(model, images, out, ALONE)
    whole, passes = out.read_bytes(), []
    out.unlink()

    def stopped(images: torch.Tensor) -> None:
        passes.append(len(images))
        if len(passes) == 2:
            raise KeyboardInterrupt

    hook = model.register_forward_pre_hook(lambda _, given: stopped(*given))
    with pytest.raises(KeyboardInterrupt):
        embed(model, images, out, ALONE)
    hook.remove()
    assert not out.exists() and len(list((tmp_path / "out.parquet.parts").glob("*.parquet"))) == 1
    with pytest.raises(UserError, match="holds pieces of other images or another student"):
        embed(model, images, out, ALONE, tokens="cls")
    assert embed(model, images, out, ALONE) == (7, 1)
    assert out.read_bytes() == whole


def test_a_kill_at_any_moment_loses_nothing(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third one is gone on from; the others are left to the next kill. One that was joined may begin anew."""
    monkeypatch.setattr(embedding, "PIECE", 3)
    model, folder = leap_dist.load(exported(tmp_path / "run")), tmp_path / "out"
    embed(model, images, folder / "out.parquet", ALONE)
    whole = contents(folder)
    (folder / "out.parquet").unlink()
    kills = 0
    for number in killed_everywhere(lambda: embed(model, images, folder / "out.parquet", ALONE), folder):
        kills += 1
        assert whole["out.parquet"] == contents(folder).get("out.parquet", whole["out.parquet"])
        if number % 3 == 0:
            assert embed(model, images, folder / "out.parquet", ALONE) == (7, 1)
            assert contents(folder) == whole
            (folder / "out.parquet").unlink()
    assert kills > 10 and contents(folder) == whole


def test_pieces_of_another_student_are_never_joined(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where the kill came while they were taken away."""
    monkeypatch.setattr(embedding, "PIECE", 3)
    model, other = (leap_dist.load(exported(tmp_path / str(seen), classes=seen)) for seen in (0, 3))
    out = tmp_path / "out" / "out.parquet"
    embed(other, images, out, ALONE)
    wanted = out.read_bytes()
    for _ in killed_everywhere(lambda: embed(model, images, out, ALONE), out.parent):
        try:
            embed(other, images, out, ALONE)
        except UserError as error:
            assert "pieces of other images or another student" in str(error)
            continue
        assert out.read_bytes() == wanted


def test_a_pipe_is_not_replaced(images: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "out.parquet")
    with pytest.raises(UserError, match="there is no regular file"):
        embed(leap_dist.load(exported(tmp_path / "run")), images, tmp_path / "out.parquet", ALONE)
    assert not (tmp_path / "out.parquet.parts").exists()


def test_a_folder_of_something_else_is_left_alone(images: Path, tmp_path: Path) -> None:
    mine = tmp_path / "out.parquet.parts" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(UserError, match="holds no pieces"):
        embed(leap_dist.load(exported(tmp_path / "run")), images, tmp_path / "out.parquet", ALONE)
    assert mine.read_text() == "mine"


@pytest.mark.parametrize(
    ("folder", "tokens", "said"),
    [
        ("nowhere", "pooled", "no such folder"),
        ("run", "pooled", "no image in it"),
        ("images", "logits", "no classifier"),
    ],
)
def test_a_mistake_is_one_line(folder: str, tokens: str, said: str, images: Path, tmp_path: Path) -> None:
    model = leap_dist.load(exported(tmp_path / "run"))
    with pytest.raises(UserError, match=said):
        embed(model, tmp_path / folder, tmp_path / "out.parquet", ALONE, tokens=tokens)
