"""Every mistake ends the run on every rank: one clear line, a non-zero status, promptly, nothing half-written."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import timm
from safetensors.torch import save_file

from forked import Forked
from leap_dist.data import write_shards
from leap_dist.data.digits import digit_samples
from runs import ENTRY, TINY, environment, finish, free_port, launch, run_ok, scalars, write_config
from small_sets import write

PROMPTLY_S = 60


def refused(config: Path, *overrides: str, processes: int = 2, launcher: str = "forked") -> list[str]:
    """The error lines of a run that must fail, one per rank that spoke, without a traceback."""
    began = time.monotonic()
    done = launch(config, *overrides, processes=processes, launcher=launcher)
    assert done.returncode != 0, done.stdout[-2000:]
    assert time.monotonic() - began < PROMPTLY_S
    assert "Traceback" not in done.stdout, done.stdout[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("leap_dist [rank ")]
    assert lines, done.stdout[-2000:]
    assert len({line.split("]", 1)[1] for line in lines}) == 1, lines
    assert not (config.parent / "run" / "config.yaml").exists(), "the output folder was claimed"
    assert not (config.parent / "run" / "checkpoints").exists()
    return lines


def test_a_mistyped_key_is_said_by_rank_0_alone(tmp_path: Path) -> None:
    assert refused(write_config(tmp_path), "data.trian=x", launcher="deepspeed") == [
        "leap_dist [rank 0]: error: data.trian (command line): unknown key; did you mean data.train?"
    ]


def test_teacher_weights_of_another_shape(tmp_path: Path) -> None:
    wider = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=16, **TINY["teacher"]["kwargs"] | {"embed_dim": 60}
    )
    path = tmp_path / "teacher.safetensors"
    save_file(wider.state_dict(), path)
    line = refused(write_config(tmp_path), f"teacher.weights={path}")[0]
    assert str(path) in line and "60" in line and "48" in line


@pytest.mark.slow  # the rule itself is a unit test
def test_a_batch_larger_than_the_set(tmp_path: Path) -> None:
    line = refused(write_config(tmp_path), "data.global_batch=4000")[0]
    assert "data.global_batch" in line and "4000" in line and "1500" in line


@pytest.mark.slow  # the rule itself is a unit test
def test_a_batch_the_ranks_cannot_share(tmp_path: Path) -> None:
    assert "data.global_batch=63: must be a multiple of 2" in refused(write_config(tmp_path), "data.global_batch=63")[0]


@pytest.mark.slow  # the rule itself is a unit test
def test_an_image_size_the_patches_do_not_divide(tmp_path: Path) -> None:
    assert "data.image_size=20" in refused(write_config(tmp_path), "data.image_size=20")[0]


def test_an_option_that_deepspeed_does_not_have(tmp_path: Path) -> None:
    line = refused(write_config(tmp_path), "engine.deepspeed.wall_clock_breakdwn=true", processes=1)[0]
    assert "engine.deepspeed.wall_clock_breakdwn: DeepSpeed has no such option; wall_clock_breakdown?" in line


@pytest.mark.slow  # the rule itself is a unit test
def test_layers_that_cannot_be_paired(tmp_path: Path) -> None:
    line = refused(write_config(tmp_path), "curriculum.mode=all_layers", "curriculum.start=null")[0]
    assert "has 2 blocks" in line and "6" in line


def damaged_missing(folder: Path) -> None:
    next(folder.glob("*.mds")).unlink()


def damaged_truncated(folder: Path) -> None:
    shard = next(folder.glob("*.mds"))
    shard.write_bytes(shard.read_bytes()[:-100])


def damaged_empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    "damage",
    [damaged_missing, *(pytest.param(damage, marks=pytest.mark.slow) for damage in (damaged_truncated, damaged_empty))],
)
def test_shards_that_cannot_be_read(damage: Any, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_shards(digit_samples("train"), folder)
    damage(folder)
    assert str(folder) in refused(write_config(tmp_path), f"data.train={folder}")[0]


def test_held_out_shards_are_checked_before_training(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    sets = f"data.train={write(tmp_path / 'train')}", f"data.val={tmp_path / 'empty'}"
    assert "empty/index.json does not exist" in refused(write_config(tmp_path), *sets)[0]


def test_ranks_that_were_started_differently(tmp_path: Path) -> None:
    """One rank would continue a run where the other starts one, and wait for it for ever."""
    line = refused(write_config(tmp_path), f"output={tmp_path}/${{oc.env:RANK}}/run")[0]
    assert "output: rank 1 was started with" in line and "rank 0 with" in line


def start_by_hand(config: Path, *nodes: int, port: str) -> list[Forked]:
    """A rank per process of each of `nodes`, all on this machine, as launchers start them on machines of their own."""
    places = [(local_rank, local_size) for local_size in nodes for local_rank in range(local_size)]
    common = {"WORLD_SIZE": str(len(places)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    # Two of the nodes would claim the same GPU.
    shared = environment() | common | {"CUDA_VISIBLE_DEVICES": ""}
    return [
        Forked(
            ENTRY, ["--config", str(config)],
            [{"RANK": str(rank), "LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(local_size)}], shared,
        )
        for rank, (local_rank, local_size) in enumerate(places)
    ]  # fmt: skip


def test_a_taken_port_is_one_line_that_says_how_to_choose_another(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = finish(*start_by_hand(write_config(tmp_path), 1, port=port), timeout=PROMPTLY_S)
    assert done.returncode == 2 and "Traceback" not in done.stdout, done.stdout
    (line,) = [line for line in done.stdout.splitlines() if "error:" in line]
    assert f"port {port} is in use" in line and "--master_port (deepspeed)" in line
    assert not (tmp_path / "run").exists()


def test_nodes_of_different_sizes(tmp_path: Path) -> None:
    """Each rank would lay out the batch for nodes like its own: images twice, others never, and a run that succeeds."""
    ranks = start_by_hand(write_config(tmp_path, data={"global_batch": 48}), 1, 2, port=free_port())
    try:
        said = [rank.communicate(timeout=PROMPTLY_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [2] * 3, said
    for index, text in enumerate(said):
        lines = [line for line in text.splitlines() if line.startswith("leap_dist [rank ")]
        assert len(lines) == 1 and "Traceback" not in text, text
        assert lines[0].startswith(f"leap_dist [rank {index}]: error: nodes have 1 and 2 processes: every node needs")
    assert not (tmp_path / "run").exists()


def test_bad_images_are_stood_in_for_until_there_are_too_many(tmp_path: Path) -> None:
    """Counted and listed on the way; then every rank stops in the same words, and a resume knows the old ones."""
    folder = tmp_path / "set"
    bad = {5, 600, 1300}
    samples = [(b"no image" if i in bad else image, label) for i, (image, label) in enumerate(digit_samples("train"))]
    write_shards(samples, folder)
    config = write_config(tmp_path, data={"train": str(folder), "max_bad_fraction": 0.0022, "workers": 1})
    run_ok(config)
    counts = scalars(tmp_path / "run", "data/bad_samples")
    listed = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    found = {entry["id"] for entry in listed}
    assert found <= bad and len(found) >= 2  # the epoch drops its last 28 samples
    assert [counts[0], counts[22]] == [0.0, len(found)] and sorted(counts.values()) == list(counts.values())
    assert all(entry["shard"].startswith("shard.") and "does not decode" in entry["reason"] for entry in listed)
    done = launch(
        write_config(tmp_path, data={"train": str(folder), "max_bad_fraction": 0.0007}, output=str(tmp_path / "b"))
    )
    lines = {line.split("]", 1)[1] for line in done.stdout.splitlines() if line.startswith("leap_dist [rank ")}
    assert done.returncode != 0 and len(lines) == 1 and "Traceback" not in done.stdout
    assert f"2 training samples cannot be read, at most 1 may be; they are listed in {tmp_path / 'b'}" in lines.pop()


def test_a_loss_that_is_not_finite_names_rank_and_step_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    config = write_config(tmp_path, checkpoint={"every_steps": 1})
    done = launch(config, "optim.lr=1e10", "optim.warmup_epochs=0", "engine.clip=0")
    assert done.returncode != 0
    lines = {line.split("]", 1)[1] for line in done.stdout.splitlines() if line.startswith("leap_dist [rank ")}
    assert len(lines) == 1 and "non-finite loss on rank 0 at step" in lines.pop()
    assert "Traceback" not in done.stdout
    assert not (tmp_path / "run" / "checkpoints" / "latest").exists(), "spoilt weights must not be the latest"


def test_the_last_good_checkpoint_is_kept_and_continues(tmp_path: Path) -> None:
    """A good run, continued with a rate that destroys it, leaves the good checkpoint as the one to continue from."""
    config = write_config(tmp_path, checkpoint={"every_steps": 10})
    run_ok(config, processes=1)
    good, spoilt = tmp_path / "run" / "checkpoints" / "step00000020", tmp_path / "spoilt"
    done = launch(
        config, f"output={spoilt}", f"resume={good}", "optim.lr=1e10", "checkpoint.every_steps=1", processes=1
    )
    assert done.returncode != 0 and "non-finite loss on rank 0 at step 21" in done.stdout
    assert (spoilt / "checkpoints" / "latest").read_text() == "step00000020"
    run_ok(config, f"output={tmp_path / 'third'}", f"resume={spoilt}", processes=1)
    assert scalars(tmp_path / "third", "loss/total")[22] == scalars(tmp_path / "run", "loss/total")[22]


@pytest.mark.slow  # the rule itself is a unit test
def test_a_folder_of_another_config(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    run_ok(config, processes=1)
    before = sorted(path for path in (tmp_path / "run").rglob("*"))
    for override, words in (("optim.lr=0.5", "another config (optim.lr: 0.002 -> 0.5)"), ("seed=0", "resume=auto")):
        done = launch(config, override)
        assert done.returncode != 0 and words in done.stdout
    assert sorted(path for path in (tmp_path / "run").rglob("*")) == before
