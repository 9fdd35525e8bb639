"""Disks that are full, read-only or gone: one line with the folder and what is free, and nothing whole is lost.

A limit on the size of files stands for a full disk where no disk can be mounted; whole runs on real small disks are
slow tests.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.figure
import pytest
import torch

from leap_dist.config import DataConfig
from leap_dist.curriculum.ledger import Ledger
from leap_dist.data import BadSamples
from leap_dist.data.faults import BadSample
from leap_dist.data.sharding import Place, _publish_quarantine, publish_index
from leap_dist.data.shards import complete_or_absent, write_shards
from leap_dist.data.sources.spool import Listing
from leap_dist.data.store import ShardStore, prepare
from leap_dist.errors import UserError
from leap_dist.evaluation.periodic import Validation
from leap_dist.models.export import export_student
from leap_dist.monitoring.board import Board
from leap_dist.runtime.files import REFUSALS, refusal, write_json, write_whole, writing
from leap_dist.runtime.run_lock import Claim
from runs import command, environment, launch, run_ok, write_config
from stubs import ONE, stub_config, stub_trainer
from trials import LIMIT_S, Tally, complaints, files_of_at_most, results, small_disk

FREE = r"\d+\.\d MiB"
IMAGE = bytes(3000)


def ledger(folder: Path) -> None:
    book = Ledger(folder)
    book.write(text="x" * 3000)
    book.flush()


def evaluation(folder: Path) -> None:
    Validation(stub_config(folder), ONE).write([{"knn": 0.5}] * 300)


def bad_samples(folder: Path) -> None:
    bad = BadSamples(folder / "bad_samples.jsonl", 9, ONE)
    bad.note([BadSample(1, "shard", "x" * 3000)])
    bad.share()


def export(folder: Path) -> None:
    config = stub_config(folder, "student.kwargs.embed_dim=48")
    export_student(stub_trainer(config).learner.engine, config, ONE)


def claim(folder: Path) -> None:
    Claim(folder, ONE).mark("config.yaml", "x" * 3000)


def checkpoint(folder: Path) -> None:
    stub_trainer(stub_config(folder, "student.kwargs.embed_dim=48"))._save()


def shards(folder: Path) -> None:
    write_shards([(IMAGE, 0)], folder / "set")


def report(folder: Path) -> None:
    with complete_or_absent(folder / "analysis") as part:
        (part / "blocks.csv").write_bytes(IMAGE)


def quarantine(folder: Path) -> None:
    (folder / ".sharding").mkdir()
    with writing(folder):
        _publish_quarantine(Place(folder), [["image", "x" * 3000]])


def merged(folder: Path) -> None:
    (folder / ".sharding").mkdir()
    with writing(folder):
        publish_index(Place(folder), folder / "index.json", [{"basename": "x" * 3000}])


def listing(folder: Path) -> None:
    names = Listing(folder)
    names.add(["x" * 3000], [1], 0)
    names.columns()


def picture(folder: Path) -> None:
    kind = matplotlib.figure.Figure()
    write_whole(folder / "runs.png", lambda partial: kind.savefig(partial, format="png"))


def summary(folder: Path) -> None:
    write_json(folder / "summary.json", {"text": "x" * 3000})


def weights(folder: Path) -> None:
    write_whole(folder / "checkpoint.pt", lambda partial: torch.save(torch.zeros(9000), partial))


PLACES = (
    ledger, evaluation, bad_samples, export, claim, checkpoint, shards, report, quarantine, merged, listing, picture,
    summary, weights,
)  # fmt: skip


def test_wherever_a_file_is_written_a_full_disk_is_one_line(tmp_path: Path) -> None:
    tally = Tally("places on a full disk")
    for place in PLACES:
        folder = tmp_path / place.__name__
        folder.mkdir()
        said = ""
        try:
            with files_of_at_most(2000):
                place(folder)
        except UserError as error:
            said = str(error)
        told = re.search(rf"{re.escape(str(folder))}.*ulimit -f\); {FREE} are free", said) and "\n" not in said
        tally.note(bool(told) and not list(folder.rglob("*.partial")), f"{place.__name__}: {said}")
    tally.close()


@pytest.mark.parametrize("code", REFUSALS)
def test_every_answer_of_a_disk_names_folder_and_what_is_free(code: int, tmp_path: Path) -> None:
    error = OSError(code, "as the system words it")
    assert re.search(rf"{re.escape(str(tmp_path))}.*{FREE}", refusal(error, tmp_path))
    wrapped = RuntimeError("a library's own words")
    wrapped.__cause__ = OSError(code, "words", str(tmp_path / "else" / "file"))
    assert str(tmp_path / "else") in refusal(wrapped, tmp_path)
    assert refusal(ValueError("no fault of the disk"), tmp_path) == refusal(OSError(errno.ENOENT, "x"), tmp_path) == ""


def test_a_line_that_the_ledger_cannot_write_is_kept_until_it_can(tmp_path: Path) -> None:
    book = Ledger(tmp_path)
    book.write(step=0)
    with files_of_at_most(4):
        book.write(step=1)
        for _ in range(2):
            with pytest.raises(UserError, match="ulimit -f"):
                book.flush()
    book.write(step=2)
    book.close()
    lines = (tmp_path / "curriculum.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2] and book.lines == 3


def test_a_full_cache_is_told_at_once_and_not_blamed_on_the_shard(tmp_path: Path) -> None:
    write_shards([(IMAGE, label) for label in range(4)], tmp_path / "set")
    (tmp_path / "cache").mkdir()
    config = DataConfig(train=str(tmp_path / "set"), cache=str(tmp_path / "cache"))
    prepare(config.train, config)
    store = ShardStore(config.train, config)
    with files_of_at_most(2000), pytest.raises(UserError, match=rf"^data.cache: .*cache.*{FREE} are free"):
        store.read(0)
    assert store.read(0)["label"] == 0  # nothing was noted against it


@pytest.mark.parametrize("how", ["full", "deleted", "a file"])
def test_charts_that_cannot_be_written_are_one_warning_and_no_end(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tensorboard"
    if how == "a file":
        folder.touch()
    board = Board(folder, purge_step=0)
    if how == "deleted":
        board.write(lambda writer: writer.flush())
        shutil.rmtree(folder)
    with files_of_at_most(2000 if how == "full" else 10**9):
        for step in range(3):
            board.write(lambda writer, step=step: (writer.add_text("t", "x" * 3000, step), writer.flush()))
        board.close()
    (record,) = caplog.records
    assert "TensorBoard cannot be written" in record.message and "goes on without charts" in record.message
    assert "Traceback" not in capfd.readouterr().err


# -- whole runs on small disks ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with room for everything, by one rank."""
    folder = tmp_path_factory.mktemp("whole")
    run_ok(write_config(folder, checkpoint={"every_steps": 5}), processes=1)
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("options", ["size=8k", "ro"])
def test_a_run_whose_charts_have_no_room_has_the_same_results(options: str, whole: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "run/tensorboard", options):
        said = run_ok(write_config(tmp_path, checkpoint={"every_steps": 5}), processes=1, timeout=LIMIT_S)
    assert said.count("the run goes on without charts") == 1 and "Traceback" not in said
    assert results(tmp_path / "run") == results(whole)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_a_save_without_room_ends_all_ranks_in_the_same_line_and_status(stage: int, tmp_path: Path) -> None:
    config = write_config(tmp_path, checkpoint={"every_steps": 2, "keep": 50}, engine={"zero_stage": stage})
    with small_disk(tmp_path / "run", "size=3m"):
        done = launch(config, timeout=LIMIT_S)
        lines = complaints(done.stdout)
        assert done.returncode == 2 and lines and "Traceback" not in done.stdout, done.stdout[-3000:]
        assert all(re.search(rf"checkpoint .*No space left.*{FREE} are free.*intact", line) for line in lines), lines
        latest = (tmp_path / "run/checkpoints/latest").read_text()
        for path in (tmp_path / "run/checkpoints").glob("step*"):
            if path.name != latest:
                shutil.rmtree(path)
        said = run_ok(config, "resume=auto", "checkpoint.every_steps=0", "checkpoint.keep=1", timeout=LIMIT_S)
    assert f"continues at step {int(latest.removeprefix('step'))} " in said


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_cache_without_room_is_told_within_seconds(processes: int, tmp_path: Path) -> None:
    write_shards([(bytes(20_000), label % 10) for label in range(400)], tmp_path / "set")
    with small_disk(tmp_path / "cache", "size=250k"):
        config = write_config(
            tmp_path, data={"train": str(tmp_path / "set"), "cache": str(tmp_path / "cache"), "workers": 1}
        )
        done = launch(config, processes=processes, timeout=LIMIT_S)
    assert done.returncode == 2 and "Traceback" not in done.stdout, done.stdout[-3000:]
    assert re.search(
        rf"No space left: the disk of {tmp_path}/cache.*{FREE} are free", "\n".join(complaints(done.stdout))
    )


@pytest.mark.slow
def test_shared_memory_without_room_is_told_at_once(tmp_path: Path) -> None:
    """In a container with little of it; a mount of its own stands for that."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("a mount that others do not see is not allowed here")
    config = write_config(tmp_path, data={"workers": 1, "global_batch": 512, "image_size": 64})
    run = ["sh", "-c", 'mount -t tmpfs -o size=100k tmpfs /dev/shm && exec "$@"', "sh"]
    line = command(config, "student.kwargs.patch_size=32", processes=1, launcher="python")
    done = subprocess.run(
        ["unshare", "-m", *run, *line], capture_output=True, text=True, timeout=LIMIT_S, env=environment()
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert re.search(rf"shared memory. No space left: the disk of /dev/shm is full, {FREE}", done.stderr)
