"""Which run a folder belongs to, and that a checkpoint is whole or not there."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from leap_dist.config import Config, load
from leap_dist.errors import UserError
from leap_dist.runtime.checkpoint import Checkpoints, find_resume, newest
from leap_dist.runtime.distributed import World
from leap_dist.runtime.run_lock import Claim

ONE = World(0, 1, 0, 1, torch.device("cpu"))


def config(folder: Path, *overrides: str) -> Config:
    return load(None, ["teacher.model=t", "student.model=s", "data.train=digits", f"output={folder}", *overrides])


class PlainEngine:
    """Saves a number the way DeepSpeed saves a model; may be told to fail."""

    def __init__(self, fails: Exception | None = None) -> None:
        self.fails = fails
        self.optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])

    def save_checkpoint(self, folder: str, tag: str, client_state: dict[str, Any], save_latest: bool) -> None:
        assert save_latest is False
        path = Path(folder) / tag
        path.mkdir(parents=True)
        if self.fails:
            raise self.fails
        (path / "model.json").write_text(json.dumps(client_state))

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str, dict[str, Any]]:
        path = Path(folder) / tag / "model.json"
        return str(path), json.loads(path.read_text())


def claimed(tmp_path: Path, *overrides: str, steps: tuple[int, ...] = ()) -> Checkpoints:
    checkpoints = Checkpoints(config(tmp_path, *overrides), ONE, layout="12", teacher="t")
    checkpoints.claim_output()
    for step in steps:
        checkpoints.save(PlainEngine(), step, {"step": step})
        checkpoints.confirm()
    return checkpoints


def test_save_then_load_gives_the_state_back(tmp_path: Path) -> None:
    checkpoints = claimed(tmp_path, steps=(5, 10))
    path = find_resume(config(tmp_path, "resume=auto"), ONE)
    assert path == tmp_path / "checkpoints" / "step00000010"
    assert checkpoints.load(PlainEngine(), path) == {"step": 10}
    assert load(path / "config.yaml", []) == checkpoints.config


def test_one_run_at_a_time_works_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leap_dist.runtime.run_lock.LOCK_SECONDS", 0.2)
    first = claimed(tmp_path)
    with pytest.raises(UserError, match=r"output=.*: another run is at it"):
        claimed(tmp_path)
    first.release()
    second = claimed(tmp_path)
    assert load(tmp_path / "config.yaml", []) == second.config


def test_a_start_that_had_to_wait_goes_on_where_the_other_left(tmp_path: Path) -> None:
    first = claimed(tmp_path, steps=(5,))

    def leave() -> None:
        first.save(PlainEngine(), 9, {})
        first.confirm()
        first.release()

    timer = threading.Timer(0.5, leave)
    timer.start()
    second = Claim(tmp_path, ONE)
    second.hold()
    assert find_resume(config(tmp_path, "resume=auto"), ONE) == tmp_path / "checkpoints" / "step00000009"
    second.mark("config.yaml", "mine")  # held already: waits for nobody, itself least
    second.release()


def test_a_claim_on_nothing_leaves_nothing(tmp_path: Path) -> None:
    Claim(tmp_path / "new", ONE).hold()
    assert not (tmp_path / "new").exists()


def test_a_rank_that_does_not_see_the_run_folder_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on nodes each with a disk of its own, at the start and not at the first resume."""
    monkeypatch.setattr(
        "leap_dist.runtime.run_lock.gather_objects", lambda item, _: [item, False if item is True else item]
    )
    with pytest.raises(UserError, match=r"rank 1 does not see .*config.yaml; all ranks must share the folder"):
        claimed(tmp_path)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    claimed(tmp_path, "checkpoint.keep=2", steps=(1, 2, 3, 4))
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step*"))
    assert kept == ["step00000003", "step00000004"]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("PytorchStreamWriter: No space left")])
def test_a_failed_save_leaves_the_previous_one_the_latest(error: Exception, tmp_path: Path) -> None:
    checkpoints = claimed(tmp_path, steps=(5,))
    with pytest.raises(UserError, match=r"step00000006: cannot be written .*No space left.*previous one is intact"):
        checkpoints.save(PlainEngine(fails=error), 6, {})
    assert newest(tmp_path / "checkpoints").name == "step00000005"
    checkpoints.save(PlainEngine(), 6, {"step": 6})  # what the failed one left does not stand in the way
    assert newest(tmp_path / "checkpoints").name == "step00000005", "not confirmed yet"
    checkpoints.confirm()
    assert checkpoints.load(PlainEngine(), newest(tmp_path / "checkpoints")) == {"step": 6}


def test_a_save_that_fails_leaves_an_earlier_one_of_the_same_step(tmp_path: Path) -> None:
    checkpoints = claimed(tmp_path, steps=(5,))
    with pytest.raises(UserError, match="previous one is intact"):
        checkpoints.save(PlainEngine(fails=OSError(28, "No space left")), 5, {})
    assert checkpoints.load(PlainEngine(), newest(tmp_path / "checkpoints")) == {"step": 5}
    checkpoints.save(PlainEngine(), 5, {"step": 55})
    checkpoints.confirm()
    assert checkpoints.load(PlainEngine(), newest(tmp_path / "checkpoints")) == {"step": 55}
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"latest", "step00000005"}


def test_a_fresh_run_does_not_pick_up_what_lies_in_the_folder(tmp_path: Path) -> None:
    """Defect B1 of the published code: a new student started at an old run's block."""
    claimed(tmp_path, steps=(5,))
    with pytest.raises(UserError, match="holds a run; continue it with resume=auto, or choose another output"):
        find_resume(config(tmp_path), ONE)


@pytest.mark.parametrize("resume", ["none", "auto"])
def test_a_folder_of_another_config_is_refused(resume: str, tmp_path: Path) -> None:
    claimed(tmp_path, steps=(5,))
    with pytest.raises(UserError, match=r"holds a run of another config \(optim.lr: 0.001 -> 0.5\)"):
        find_resume(config(tmp_path, "optim.lr=0.5", f"resume={resume}"), ONE)


def test_auto_starts_fresh_where_nothing_was_saved(tmp_path: Path) -> None:
    assert find_resume(config(tmp_path, "resume=auto"), ONE) is None
    claimed(tmp_path)
    assert find_resume(config(tmp_path, "resume=auto"), ONE) is None


def test_resume_from_a_path_takes_run_folder_or_checkpoint(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    claimed(old, steps=(7,))
    for path in (old, old / "checkpoints", old / "checkpoints" / "step00000007"):
        assert find_resume(config(new, f"resume={path}", "optim.lr=0.5"), ONE).name == "step00000007"
    new.mkdir()
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_resume(config(tmp_path / "third", f"resume={new}"), ONE)


def test_a_run_begun_at_anothers_checkpoint_continues_at_its_own(tmp_path: Path) -> None:
    """A queue starts the same command again; only a checkpoint of the run's own folder takes it back."""
    old, new = tmp_path / "old", tmp_path / "new"
    claimed(old, steps=(9,))
    claimed(new, steps=(10, 20))
    assert find_resume(config(new, f"resume={old}"), ONE) == new / "checkpoints" / "step00000020"
    back = new / "checkpoints" / "step00000010"
    assert find_resume(config(new, f"resume={back}"), ONE) == back


def test_a_run_that_went_back_keeps_what_it_has_made_since(tmp_path: Path) -> None:
    claimed(tmp_path, "checkpoint.keep=2", steps=(30, 10, 20))
    assert {path.name for path in (tmp_path / "checkpoints").glob("step*")} == {"step00000010", "step00000020"}


@pytest.mark.parametrize(
    ("overrides", "layout", "words"),
    [
        ((), "99", "data.train=12, this run has data.train=99"),
        (("optim.name=lars",), "12", "optim.name=adamw, this run has optim.name=lars"),
        (("curriculum.mode=fixed",), "12", "curriculum.mode=leap, this run has curriculum.mode=fixed"),
        (("engine.zero_stage=1",), "12", "zero_stage=0, this run has zero_stage=1"),
        (("engine.precision=bf16",), "12", "precision=fp32, this run has precision=bf16"),
        (("data.global_batch=8",), "12", "global_batch=256, this run has global_batch=8"),
        (("data.canonical_nodes=2",), "12", "canonical_nodes=8, this run has canonical_nodes=2"),
        (("data.image_size=32",), "12", "data.image_size=224, this run has data.image_size=32"),
        (("seed=3",), "12", "seed=0, this run has seed=3"),
    ],
)
@pytest.mark.parametrize("size", [1, 2])
def test_what_the_position_does_not_hold_for_is_refused(
    overrides: tuple[str, ...], layout: str, words: str, size: int, tmp_path: Path
) -> None:
    """At another number of ranks too, before anything is converted or written."""
    claimed(tmp_path / "old", steps=(7,))
    checkpoints = Checkpoints(config(tmp_path / "new", *overrides), replace(ONE, size=size), layout, "t")
    with pytest.raises(UserError, match=words):
        checkpoints.needs_conversion(tmp_path / "old" / "checkpoints" / "step00000007")
    assert not (tmp_path / "new").exists()


def test_another_teacher_is_refused(tmp_path: Path) -> None:
    """`teacher.weights` may name another place, but not another teacher."""
    claimed(tmp_path, steps=(7,))
    with pytest.raises(UserError, match="saved with teacher=t, this run has teacher=u"):
        Checkpoints(config(tmp_path), ONE, "12", "u").needs_conversion(newest(tmp_path / "checkpoints"))


@pytest.mark.parametrize(("stage", "size", "needed"), [(0, 2, False), (1, 1, False), (1, 2, True), (3, 2, True)])
def test_only_what_zero_has_cut_up_for_other_ranks_is_converted(
    stage: int, size: int, needed: bool, tmp_path: Path
) -> None:
    claimed(tmp_path, f"engine.zero_stage={stage}", steps=(7,))
    checkpoints = Checkpoints(config(tmp_path, f"engine.zero_stage={stage}"), replace(ONE, size=size), "12", "t")
    assert checkpoints.needs_conversion(newest(tmp_path / "checkpoints")) is needed


class AdamEngine(PlainEngine):
    """Saves and loads its optimizer's state, settings and all, as torch does."""

    def __init__(self, weight_decay: float) -> None:
        super().__init__()
        weight, bias = (torch.nn.Parameter(torch.zeros(size)) for size in (2, 1))
        groups = [{"params": [weight], "weight_decay": weight_decay}, {"params": [bias], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups)
        weight.grad, bias.grad = torch.ones(2), torch.ones(1)

    def save_checkpoint(self, folder: str, tag: str, client_state: dict[str, Any], save_latest: bool) -> None:
        path = Path(folder) / tag
        path.mkdir(parents=True)
        torch.save((self.optimizer.state_dict(), client_state), path / "state.pt")

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str, dict[str, Any]]:
        path = Path(folder) / tag / "state.pt"
        state, client = torch.load(path)
        self.optimizer.load_state_dict(state)
        return str(path), client


def test_settings_are_the_configs_and_momenta_the_checkpoints(tmp_path: Path) -> None:
    """A new run that starts from an old one's checkpoint decays as its own config says."""
    old, new = AdamEngine(weight_decay=0.1), AdamEngine(weight_decay=0.3)
    old.optimizer.step()
    checkpoints = claimed(tmp_path)
    checkpoints.load(new, checkpoints.save(old, 1, {}))
    assert [group["weight_decay"] for group in new.optimizer.param_groups] == [0.3, 0.0]
    for mine, theirs in zip(new.optimizer.state.values(), old.optimizer.state.values(), strict=True):
        assert mine["step"] == 1 and torch.equal(mine["exp_avg"], theirs["exp_avg"])


@pytest.mark.seconds
def test_a_failed_conversion_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    stage = "engine.zero_stage=2"
    claimed(tmp_path, stage, steps=(7,))
    folder = tmp_path / "checkpoints"
    path = newest(folder)
    (path / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_text("half a checkpoint")
    saved = json.loads((path / "run.json").read_text())
    (folder / ".universal-0").mkdir()  # of a conversion that was killed
    # One process cannot be two ranks: the checkpoint says that it was two that saved it.
    (path / "run.json").write_text(json.dumps(saved | {"world_size": 2}))
    checkpoints = Checkpoints(config(tmp_path, stage), ONE, "12", "t")
    with pytest.raises(
        UserError, match=r"step00000007: cannot be converted for 1 ranks in .*1 of 2 ranks' parts"
    ) as caught:
        checkpoints.load(PlainEngine(), path)
    assert "\n" not in str(caught.value)
    assert not list(folder.glob(".universal-*"))


def test_a_damaged_checkpoint_is_one_line(tmp_path: Path) -> None:
    checkpoints = claimed(tmp_path, steps=(5,))
    path = newest(tmp_path / "checkpoints")
    (path / "model.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read") as caught:
        checkpoints.load(PlainEngine(), path)
    assert "\n" not in str(caught.value)


def test_a_latest_that_names_nothing_is_one_line(tmp_path: Path) -> None:
    claimed(tmp_path, steps=(5,))
    (tmp_path / "checkpoints" / "latest").write_text("step00000009")
    with pytest.raises(UserError, match="latest names step00000009, which is not there"):
        find_resume(config(tmp_path, "resume=auto"), ONE)


def test_the_loss_scaler_is_saved_where_there_is_one(tmp_path: Path) -> None:
    """DeepSpeed leaves the scaler of autocast at stage 0 out of its checkpoints."""
    checkpoints = claimed(tmp_path)
    engine = PlainEngine()
    engine.torch_autocast_z0_gradscaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    path = checkpoints.save(engine, 1, {})
    other = PlainEngine()
    other.torch_autocast_z0_gradscaler = torch.amp.GradScaler("cpu")
    checkpoints.load(other, path)
    assert other.torch_autocast_z0_gradscaler.state_dict() == engine.torch_autocast_z0_gradscaler.state_dict()
    assert other.torch_autocast_z0_gradscaler.get_scale() == 8.0
