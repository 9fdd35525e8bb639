"""Which run a folder belongs to, and that a checkpoint is whole or not there."""

from __future__ import annotations

import errno
import json
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from leap_dist.config import Config, load
from leap_dist.errors import UserError
from leap_dist.runtime.checkpoint import Checkpoints, find_resume
from leap_dist.runtime.checkpoint_folder import newest
from leap_dist.runtime.distributed import World
from leap_dist.runtime.integrity import write_sealed
from leap_dist.runtime.marks import Marks
from leap_dist.runtime.run_lock import Claim

ONE = World(0, 1, 0, 1, torch.device("cpu"))


def config(folder: Path, *overrides: str) -> Config:
    return load(None, ["teacher.model=t", "student.model=s", "data.train=digits", f"output={folder}", *overrides])


class PlainEngine:
    """Saves a number the way DeepSpeed saves a model; may be told to fail."""

    def __init__(self, fails: Exception | None = None) -> None:
        self.fails, self.checkpoint_engine = fails, None
        self._config = SimpleNamespace()
        self.module = torch.nn.Identity()
        self.optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
        self.torch_autocast_z0_gradscaler = None

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
        checkpoints.save({"": PlainEngine()}, step, {"": {"step": step}})
        checkpoints.confirm()
    return checkpoints


def test_save_then_load_gives_the_state_back(tmp_path: Path) -> None:
    checkpoints = claimed(tmp_path, steps=(5, 10))
    path = find_resume(config(tmp_path, "resume=auto"), ONE)
    assert path == tmp_path / "checkpoints" / "step00000010"
    assert checkpoints.load({"": PlainEngine()}, path) == {"": {"step": 10}}
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
        first.save({"": PlainEngine()}, 9, {"": {}})
        first.confirm()
        first.release()

    timer = threading.Timer(0.5, leave)
    timer.start()
    second = Claim(tmp_path, ONE)
    second.hold()
    assert find_resume(config(tmp_path, "resume=auto"), ONE) == tmp_path / "checkpoints" / "step00000009"
    second.mark("config.yaml", "mine")  # held already: waits for nobody, itself least
    second.release()


def test_two_starts_into_a_new_folder_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before either has looked at what is in it: the second would begin at step 0 over the first's checkpoints."""
    monkeypatch.setattr("leap_dist.runtime.run_lock.LOCK_SECONDS", 0.2)
    output = tmp_path / "runs" / "new"
    with Claim(output, ONE), pytest.raises(UserError, match=r"output=.*: another run is at it"):
        Claim(output, ONE).hold()
    with Claim(output, ONE) as second:
        second.mark("config.yaml", "second")
    assert (output / "config.yaml").read_text() == "second"


def test_a_start_that_comes_to_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError), Claim(tmp_path / "runs" / "new", ONE):
        raise UserError("of the config")
    assert not (tmp_path / "runs").exists()
    (tmp_path / "old").mkdir()
    with Claim(tmp_path / "old", ONE):
        pass
    assert (tmp_path / "old").exists(), "it was there before"
    with Claim(tmp_path / "data", ONE):
        (tmp_path / "data" / "digits").mkdir()
    assert (tmp_path / "data" / "digits").exists()


def test_who_waits_for_a_folder_that_is_removed_makes_it_anew(tmp_path: Path) -> None:
    first, second, held = Claim(tmp_path / "new", ONE), Claim(tmp_path / "new", ONE), threading.Event()
    first.hold()
    waiting = threading.Thread(target=lambda: (second.hold(), held.set()))
    waiting.start()
    assert not held.wait(0.3)
    first.release()  # unused: the folder goes, under the eyes of the one that waits
    assert held.wait(5)
    assert (tmp_path / "new" / ".lock").samefile(f"/proc/self/fd/{second._held.fileno()}")
    second.release()


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
        checkpoints.save({"": PlainEngine(fails=error)}, 6, {"": {}})
    assert newest(tmp_path / "checkpoints").name == "step00000005"
    checkpoints.save({"": PlainEngine()}, 6, {"": {"step": 6}})  # what the failed one left does not stand in the way
    assert newest(tmp_path / "checkpoints").name == "step00000005", "not confirmed yet"
    checkpoints.confirm()
    assert checkpoints.load({"": PlainEngine()}, newest(tmp_path / "checkpoints")) == {"": {"step": 6}}


def test_a_save_that_fails_leaves_an_earlier_one_of_the_same_step(tmp_path: Path) -> None:
    checkpoints = claimed(tmp_path, steps=(5,))
    with pytest.raises(UserError, match="previous one is intact"):
        checkpoints.save({"": PlainEngine(fails=OSError(28, "No space left"))}, 5, {"": {}})
    assert checkpoints.load({"": PlainEngine()}, newest(tmp_path / "checkpoints")) == {"": {"step": 5}}
    checkpoints.save({"": PlainEngine()}, 5, {"": {"step": 55}})
    checkpoints.confirm()
    assert checkpoints.load({"": PlainEngine()}, newest(tmp_path / "checkpoints")) == {"": {"step": 55}}
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"latest", "step00000005"}


def test_a_fresh_run_does_not_pick_up_what_lies_in_the_folder(tmp_path: Path) -> None:
    """Defect B1 of the published code: a new student started at an old run's block."""
    claimed(tmp_path, steps=(5,))
    with pytest.raises(UserError, match="holds a run; continue it with resume=auto, or choose another output"):
        find_resume(config(tmp_path), ONE)


@pytest.mark.parametrize("resume", ["none", "auto"])
def test_a_folder_of_another_config_is_refused(resume: str, tmp_path: Path) -> None:
    claimed(tmp_path, steps=(5,))
    with pytest.raises(UserError, match=r"holds a run of another config \(optim.lr: 0.001 -> 0.5\)") as told:
        find_resume(config(tmp_path, "optim.lr=0.5", f"resume={resume}"), ONE)
    assert f"output=NEW resume={tmp_path}" in str(told.value)
    continued = config(tmp_path / "new", "optim.lr=0.5", f"resume={tmp_path}")
    assert find_resume(continued, ONE) == newest(tmp_path / "checkpoints"), "what the message says works"
    with pytest.raises(UserError, match=r"student.kwargs: .*; choose another output$"):  # nothing can go on from there
        find_resume(config(tmp_path, "student.kwargs.depth=6", f"resume={resume}"), ONE)


def test_auto_starts_fresh_where_nothing_was_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert find_resume(config(tmp_path, "resume=auto"), ONE) is None
    assert not caplog.messages
    claimed(tmp_path)
    assert find_resume(config(tmp_path, "resume=auto"), ONE) is None
    assert caplog.messages == [f"output={tmp_path}: holds a run without a checkpoint; begins at step 0"]


def renamed(folder: Path) -> None:
    (folder / "step00000005").rename(folder / "backup-step00000005")
    (folder / "latest").unlink()


def unmounted(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("nowhere"))


def a_file(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.write_text("")


@pytest.mark.parametrize("config_kept", [True, False])
@pytest.mark.parametrize(
    ("damage", "said"),
    [(renamed, "under other names .backup-step00000005"), (unmounted, "cannot be read as"), (a_file, "cannot be read")],
)
def test_nothing_begins_anew_over_checkpoints_that_cannot_be_seen(damage, said, config_kept, tmp_path) -> None:
    claimed(tmp_path, steps=(5,))
    damage(tmp_path / "checkpoints")
    if not config_kept:
        (tmp_path / "config.yaml").unlink()
    for resume in ("auto", *(["none"] if not config_kept else [])):
        with pytest.raises(UserError, match=said):
            find_resume(config(tmp_path, f"resume={resume}"), ONE)


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
        (("student.kwargs.depth=6",), "12", "student.kwargs={.*}, this run has student.kwargs={.*'depth': 6"),
        (("student.remedy=lift",), "12", "student.remedy=none, this run has student.remedy=lift"),
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


@pytest.mark.parametrize("says", [True, False])
def test_a_position_in_another_order_of_the_samples_is_refused(says: bool, tmp_path: Path) -> None:
    """The first order did not say that it was one."""
    saved = claimed(tmp_path, steps=(7,)) and newest(tmp_path / "checkpoints")
    if not says:
        record = json.loads((saved / "run.json").read_text())
        write_sealed(saved / "run.json", {key: value for key, value in record.items() if key != "order"})
    with pytest.raises(UserError, match=r"another order \(1, here 2\); go on with that version") as caught:
        Checkpoints(config(tmp_path), ONE, "12", "t", order=2).needs_conversion(saved)
    assert "\n" not in str(caught.value)


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
    checkpoints.load({"": new}, checkpoints.save({"": old}, 1, {"": {}}))
    assert [group["weight_decay"] for group in new.optimizer.param_groups] == [0.3, 0.0]
    for mine, theirs in zip(new.optimizer.state.values(), old.optimizer.state.values(), strict=True):
        assert mine["step"] == 1 and torch.equal(mine["exp_avg"], theirs["exp_avg"])


@pytest.mark.seconds
def test_a_failed_conversion_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    stage = "engine.zero_stage=2"
    claimed(tmp_path, stage, steps=(7,))
    folder = tmp_path / "checkpoints"
    path = newest(folder)
    torch.save({}, path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")  # half a checkpoint
    saved = json.loads((path / "run.json").read_text())
    (folder / ".universal-0").mkdir()  # of a conversion that was killed
    # One process cannot be two ranks: the checkpoint says that it was two that saved it.
    write_sealed(path / "run.json", saved | {"world_size": 2})
    checkpoints = Checkpoints(config(tmp_path, stage), ONE, "12", "t")
    with pytest.raises(
        UserError, match=r"step00000007: cannot be converted for 1 ranks in .*1 of 2 ranks' parts"
    ) as caught:
        checkpoints.load({"": PlainEngine()}, path)
    assert "\n" not in str(caught.value)
    assert not list(folder.glob(".universal-*"))


def test_a_damaged_checkpoint_is_one_line(tmp_path: Path) -> None:
    checkpoints = claimed(tmp_path, steps=(5,))
    path = newest(tmp_path / "checkpoints")
    (path / "model.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read") as caught:
        checkpoints.load({"": PlainEngine()}, path)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_version_of_the_package_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies beside it is as old: nobody is sent there."""
    checkpoints = claimed(tmp_path, steps=(3, 5))
    engine = PlainEngine()

    def load_checkpoint(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'leap_dist.gone'")

    monkeypatch.setattr(engine, "load_checkpoint", load_checkpoint)
    with pytest.raises(UserError, match="saved by another version of leap_dist") as caught:
        checkpoints.load({"": engine}, newest(tmp_path / "checkpoints"))
    assert "beside" not in str(caught.value)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "left", "said"),
    [
        (lambda folder: (folder / "latest").unlink(), 9, "latest is missing"),
        (lambda folder: (folder / "latest").write_text("step00000777"), 9, "step00000777 is not there"),
        (lambda folder: (folder / "latest").write_bytes(b"\xff\xfe\x00"), 9, "latest is garbled"),
        (lambda folder: (folder / "latest").write_text("step00000005\nstep00000009\n"), 9, "latest is garbled"),
        (lambda folder: (folder / "latest").write_text("x" * 5000), 9, "latest is garbled"),
        (lambda folder: (folder / "latest").write_text("\ufeffstep00000009\r\n"), 9, None),
        (lambda folder: emptied(folder / "latest"), 9, "latest is garbled"),
        (lambda folder: emptied(folder / "step00000009" / "run.json"), 5, "step00000009 has a run.json that is empty"),
        (lambda folder: (folder / "step00000009" / "run.json").write_text("{"), 5, "run.json that is garbled"),
        (lambda folder: (folder / "step00000009" / "run.json").write_text("[1]"), 5, "run.json that is garbled"),
        (lambda folder: (folder / "step00000009" / "run.json").write_text("[" * 10**5), 5, "run.json that is garbled"),
        (lambda folder: (folder / "step00000009" / "run.json").unlink(), 5, "has no run.json"),
        (lambda folder: (folder / "step00000009" / "model.json").unlink(), 5, "has no model states"),
        (lambda folder: emptied(folder / "step00000009" / "model.json"), 5, "has an empty model.json"),
        (lambda folder: (folder / "step00000009" / "mp_rank_00_model_states.pt").write_text("PK"), 5, "cut off"),
        (lambda folder: torch.save(1, folder / "step00000009" / "zero_pp_rank_3_optim_states.pt"), 9, None),
        (lambda folder: [torch.save(1, folder / "step00000009" / f"{i}_optim_states.pt") for i in "01"], 5, "2 ranks"),
    ],
)  # fmt: skip
def test_a_damaged_folder_goes_on_from_its_newest_whole_checkpoint_and_says_so(damage, left, said, tmp_path, caplog):
    """Never from the start: the first save would drop what is left."""
    claimed(tmp_path, "checkpoint.keep=3", steps=(7, 5, 9))  # went back to 5
    damage(tmp_path / "checkpoints")
    found = find_resume(config(tmp_path, "checkpoint.keep=3", "resume=auto"), ONE)
    assert found == tmp_path / "checkpoints" / f"step{left:08d}"
    if said is None:
        assert not caplog.messages
    else:
        (line,) = caplog.messages
        assert re.search(said, line) and f"goes on from {found.name}" in line and "\n" not in line


def flipped(path: Path) -> None:
    """One bit of it, which neither names nor sizes show."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_a_bit_that_has_flipped_is_found_before_anything_is_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    claimed(tmp_path, "checkpoint.keep=3", steps=(5, 7, 9))
    folder = tmp_path / "checkpoints"
    for step in (7, 9):
        flipped(folder / f"step0000000{step}" / "model.json")
    assert find_resume(config(tmp_path, "checkpoint.keep=3", "resume=auto"), ONE) == folder / "step00000005"
    (line,) = caplog.messages
    assert "goes on from step00000005 (step00000009 has a model.json that is damaged" in line and "step00000007" in line
    wanted = folder / "step00000009"
    with pytest.raises(UserError, match=r"resume=.*step00000009: has a model.json that is damaged"):
        find_resume(config(tmp_path / "new", f"resume={wanted}"), ONE)
    flipped(folder / "step00000005" / "model.json")
    with pytest.raises(UserError, match="holds no whole checkpoint") as caught:
        find_resume(config(tmp_path, "checkpoint.keep=3", "resume=auto"), ONE)
    assert "\n" not in str(caught.value)


def test_a_bit_that_has_flipped_in_one_students_part_damages_the_checkpoint(tmp_path: Path) -> None:
    options = "students={small: {}, tiny: {seed: 1}}", "checkpoint.keep=2"
    checkpoints = Checkpoints(config(tmp_path, *options), ONE, layout="12", teacher="t")
    checkpoints.claim_output()
    for step in (5, 7):
        checkpoints.save({name: PlainEngine() for name in ("small", "tiny")}, step, {"small": {}, "tiny": {}})
        checkpoints.confirm()
    resumed, folder = config(tmp_path, *options, "resume=auto"), tmp_path / "checkpoints"
    assert find_resume(resumed, ONE) == folder / "step00000007"
    flipped(folder / "step00000007" / "tiny" / "model.json")
    assert find_resume(resumed, ONE) == folder / "step00000005"
    (folder / "step00000005" / "small" / "model.json").unlink()
    with pytest.raises(UserError, match="holds no whole checkpoint") as caught:
        find_resume(resumed, ONE)
    assert "tiny/model.json" in str(caught.value) and "for student small" in str(caught.value)


def test_a_checkpoint_without_hashes_is_taken_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    claimed(tmp_path, steps=(5,))
    path = newest(tmp_path / "checkpoints")
    saved = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(
        json.dumps({key: value for key, value in saved.items() if key not in ("files", "seal")})
    )
    assert find_resume(config(tmp_path, "resume=auto"), ONE) == path
    (line,) = caplog.messages
    assert "has no hashes: it is taken unchecked" in line


def test_latest_that_names_an_older_one_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By hand, or by a bit that has flipped."""
    claimed(tmp_path, "checkpoint.keep=3", steps=(5, 7))
    (tmp_path / "checkpoints" / "latest").write_text("step00000005")
    found = find_resume(config(tmp_path, "checkpoint.keep=3", "resume=auto"), ONE)
    assert found.name == "step00000005" and "though step00000007 is newer" in caplog.text


def test_an_output_folder_that_is_removed_ends_the_run_at_its_next_save(tmp_path: Path) -> None:
    output = tmp_path / "run"
    checkpoints = claimed(output, steps=(5,))
    shutil.rmtree(output)
    with pytest.raises(UserError, match=r"output=.*/run: was removed or replaced while this run was at it"):
        checkpoints.save({"": PlainEngine()}, 6, {"": {}})
    assert not output.exists()
    checkpoints.release()


def test_a_loader_worker_that_is_killed_in_a_save_is_not_the_saves_fault(tmp_path: Path) -> None:
    checkpoints = claimed(tmp_path, steps=(5,))
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    with pytest.raises(RuntimeError, match=r"^DataLoader worker"):
        checkpoints.save({"": PlainEngine(fails=killed)}, 6, {"": {}})


def test_an_older_one_goes_before_a_newer_one_that_no_loss_has_confirmed(tmp_path: Path) -> None:
    checkpoints = claimed(tmp_path, "checkpoint.keep=3", steps=(5, 9))
    checkpoints.save({"": PlainEngine()}, 11, {"": {}})
    emptied(tmp_path / "checkpoints" / "step00000009" / "run.json")
    assert newest(tmp_path / "checkpoints").name == "step00000005"
    emptied(tmp_path / "checkpoints" / "step00000005" / "run.json")
    assert newest(tmp_path / "checkpoints").name == "step00000011"


def test_a_folder_without_a_whole_checkpoint_is_one_line(tmp_path: Path) -> None:
    claimed(tmp_path, "checkpoint.keep=3", steps=(5, 9))
    for step in (5, 9):
        emptied(tmp_path / "checkpoints" / f"step{step:08d}" / "model.json")
    with pytest.raises(
        UserError, match=r"holds no whole checkpoint \(step00000009 has an empty model.json; step0"
    ) as caught:
        find_resume(config(tmp_path, "checkpoint.keep=3", "resume=auto"), ONE)
    assert "\n" not in str(caught.value)


def test_a_lost_config_does_not_make_a_used_folder_new(tmp_path: Path) -> None:
    claimed(tmp_path, steps=(5,))
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(UserError, match="holds a run; continue it with resume=auto"):
        find_resume(config(tmp_path), ONE)
    with pytest.raises(UserError, match=r"holds a run of another config \(optim.lr"):
        find_resume(config(tmp_path, "optim.lr=0.5", "resume=auto"), ONE)
    assert find_resume(config(tmp_path, "resume=auto"), ONE).name == "step00000005"
    (tmp_path / "checkpoints" / "step00000005" / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"holds a run whose config.yaml is missing or empty"):
        find_resume(config(tmp_path, "resume=auto"), ONE)


def test_a_damaged_checkpoint_that_is_asked_for_names_the_whole_ones_beside_it(tmp_path: Path) -> None:
    claimed(tmp_path / "old", "checkpoint.keep=3", steps=(5, 7, 9))
    wanted = tmp_path / "old" / "checkpoints" / "step00000009"
    emptied(wanted / "run.json")
    with pytest.raises(UserError, match=r"has a run.json that is empty; whole beside it: step00000007, step00000005"):
        find_resume(config(tmp_path / "new", f"resume={wanted}"), ONE)


def test_another_block_of_the_teacher_is_refused_when_it_is_known(tmp_path: Path) -> None:
    marks = Marks("teacher.weights=a.pth")
    marks.note("sample of block 3", "s3")
    marks.note("block 1", "b1")
    first = Checkpoints(config(tmp_path), ONE, "12", "t", marks=marks)
    first.claim_output()
    first.save({"": PlainEngine()}, 7, {"": {}})
    first.confirm()
    path = newest(tmp_path / "checkpoints")

    def resumed(**parts: str) -> Marks:
        marks = Marks("teacher.weights=b.pth")
        for part, mark in parts.items():
            marks.note(part.replace("_", " "), mark)
        Checkpoints(config(tmp_path), ONE, "12", "t", marks=marks).needs_conversion(path)
        return marks

    for other, part in (({"block_1": "x"}, "block 1"), ({"sample_of_block_3": "x"}, "sample of block 3")):
        with pytest.raises(UserError, match=rf"step00000007: saved with teacher=.* \({part}\), this run has teacher=x"):
            resumed(**other)
    marks = resumed(sample_of_block_3="s3", block_2="new")  # not read by then
    with pytest.raises(UserError, match=r"\(block 1\), this run has teacher=x; teacher.weights=b.pth holds other"):
        marks.note("block 1", "x")
    before = json.loads((path / "run.json").read_text())
    del before["teacher_marks"]  # a checkpoint of before there were any
    write_sealed(path / "run.json", before)
    resumed(block_1="x")


def test_a_full_disk_is_called_so_whatever_the_writer_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = claimed(tmp_path, steps=(5,))
    spoken = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
    with pytest.raises(UserError, match="unexpected pos"):  # there is room: something else is wrong
        checkpoints.save({"": PlainEngine(fails=spoken)}, 6, {"": {}})
    monkeypatch.setattr("leap_dist.runtime.files._answer", lambda _: errno.ENOSPC)
    with pytest.raises(
        UserError, match=r"No space left: the disk of .*/checkpoints is full, .* MiB are free"
    ) as caught:
        checkpoints.save({"": PlainEngine(fails=spoken)}, 6, {"": {}})
    assert "unexpected pos" not in str(caught.value)


def test_the_loss_scaler_is_saved_where_there_is_one(tmp_path: Path) -> None:
    """DeepSpeed leaves the scaler of autocast at stage 0 out of its checkpoints."""
    checkpoints = claimed(tmp_path)
    engine = PlainEngine()
    engine.torch_autocast_z0_gradscaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    path = checkpoints.save({"": engine}, 1, {"": {}})
    other = PlainEngine()
    other.torch_autocast_z0_gradscaler = torch.amp.GradScaler("cpu")
    checkpoints.load({"": other}, path)
    assert other.torch_autocast_z0_gradscaler.state_dict() == engine.torch_autocast_z0_gradscaler.state_dict()
    assert other.torch_autocast_z0_gradscaler.get_scale() == 8.0
