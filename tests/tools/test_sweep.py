"""A sweep makes every run once, survives what kills it, and its tables say what the runs said."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sweep
import yaml

from fake_run import summary
from leap_dist.config import members
from leap_dist.runtime.integrity import write_sealed
from leap_dist.sweeps import runner
from leap_dist.sweeps.passes import in_company, units
from leap_dist.sweeps.plan import read_plan
from runs import write_config

ROOT = Path(__file__).resolve().parents[2]
FAKE = Path(__file__).with_name("fake_run.py")
BASE = {
    "teacher": {"model": "vit_tiny_patch16_224", "weights": "random"},
    "student": {"model": "vit_tiny_patch16_224"},
    "data": {"train": "digits", "val": "digits"},
    "optim": {"lr": 0.1},
    "epochs": 10,
}


def write_sweep(folder: Path, rows: dict[str, Any], **spec: Any) -> Path:
    """A sweep of `fake_run.py` with two seeds."""
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    path = folder / "sweep.yaml"
    defaults = {"base": "base.yaml", "output": str(folder / "out"), "seeds": [0, 2], "launcher": f"python {FAKE}"}
    path.write_text(yaml.safe_dump({**defaults, "rows": rows, **spec}, sort_keys=False))
    return path


def started(folder: Path) -> list[str]:
    """Names of the runs, in the order in which they were started; a run has a line for every start."""
    return [line.split()[0] for line in (folder / "out" / "runs" / "started").read_text().splitlines()]


def table(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (folder / "out" / "results.csv").open() as file:
        return {(line["row"], line["seed"]): line for line in csv.DictReader(file)}


def cells(folder: Path, row: str) -> list[str]:
    """Of the main table."""
    lines = (folder / "out" / "results.md").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"| {row} |")).strip("| ").split(" | ")


@pytest.mark.seconds
def test_tables_say_what_the_runs_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_sweep(tmp_path, {"fixed": ["curriculum.mode=fixed"], "leap": {"overrides": [], "seeds": [0, 1, 4]}})
    assert sweep.main([str(path), "optim.lr=0.2"]) == 0
    assert started(tmp_path) == ["fixed-s0", "fixed-s2", "leap-s0", "leap-s1", "leap-s4"]
    for (row, seed), line in table(tmp_path).items():
        mode = {"fixed": "fixed", "leap": "leap"}[row]
        said = summary({"seed": int(seed), "optim": {"lr": 0.2}, "epochs": 10, "curriculum": {"mode": mode}})
        assert line["status"] == "done" and line["error"] == ""
        assert float(line["student_patch_knn"]) == said["student_patch_knn"]
        assert float(line["teacher_flops"]) == said["flops"]["teacher"]
        assert float(line["flops"]) == said["flops"]["teacher"] + 5
    knn = [70.0, 71.0, 86.0]  # 0.5 + 0.2 + 0.01 seed^2, in percent
    assert cells(tmp_path, "leap")[:4] == [
        "leap", "3", f"{sum(knn) / 3:.2f} ± {statistics.stdev(knn):.2f}", "63.33 ± 4.16",
    ]  # fmt: skip
    assert cells(tmp_path, "fixed")[4:7] == ["10.00", "9.000e+01 ± 4.243e+01", "9.500e+01 ± 4.243e+01"]
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "| leap | 4 | done |" in capsys.readouterr().out


@pytest.mark.seconds
def test_a_failed_run_is_told_in_its_own_line_and_tried_anew(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_sweep(tmp_path, {"bad": {"overrides": ["optim.lr=13"], "seeds": [0]}, "good": []})
    assert sweep.main([str(path)]) == 1
    line = table(tmp_path)["bad", "0"]
    assert (line["status"], line["student_patch_knn"]) == ("failed", "")
    assert line["error"] == "non-finite loss on rank 0 at step 3"
    assert cells(tmp_path, "good")[1] == "2"
    assert "bad-s0: non-finite loss on rank 0 at step 3" in capfd.readouterr().err
    assert sweep.main([str(path)]) == 1
    assert started(tmp_path) == ["bad-s0", "good-s0", "good-s2", "bad-s0"]


@pytest.mark.seconds
def test_epochs_can_be_those_that_cost_as_much(tmp_path: Path) -> None:
    """leap costs two per epoch and seed-dependent unit, fixed three: ten epochs of the one are 6.67 of the other."""
    rows = {
        "fixed": ["curriculum.mode=fixed"],
        "leap": [],
        "flops": {"like": "fixed", "epochs_as": {"of": "leap", "by": "teacher_flops"}},
        "time": {"like": "fixed", "epochs_as": {"of": "leap", "by": "seconds"}, "overrides": ["optim.lr=0.3"]},
    }
    assert sweep.main([str(write_sweep(tmp_path, rows, seeds=[1])), "--jobs=3"]) == 0
    results = table(tmp_path)
    assert (results["flops", "1"]["epochs"], results["time", "1"]["epochs"]) == ("6.667", "10.0")
    assert float(results["flops", "1"]["teacher_flops"]) == pytest.approx(
        float(results["leap", "1"]["teacher_flops"]), rel=1e-3
    )
    assert float(results["time", "1"]["student_patch_knn"]) == pytest.approx(0.5 + 0.01 + 0.3)
    assert sweep.main([str(tmp_path / "sweep.yaml")]) == 0
    assert len(started(tmp_path)) == 4


@pytest.mark.seconds
def test_a_row_whose_measure_failed_is_not_made(tmp_path: Path) -> None:
    rows = {
        "fixed": ["curriculum.mode=fixed"],
        "leap": ["optim.lr=13"],
        "equal": {"like": "fixed", "epochs_as": {"of": "leap", "by": "flops"}},
    }
    assert sweep.main([str(write_sweep(tmp_path, rows, seeds=[0]))]) == 1
    assert table(tmp_path)["equal", "0"]["error"] == "its epochs depend on leap-s0, which failed"
    assert started(tmp_path) == ["fixed-s0", "leap-s0"]


@pytest.mark.seconds
def test_a_run_of_another_config_is_neither_taken_nor_overwritten(tmp_path: Path) -> None:
    assert sweep.main([str(write_sweep(tmp_path, {"a": [], "b": ["epochs=3"]}, seeds=[0]))]) == 0
    path = write_sweep(tmp_path, {"a": ["optim.lr=0.4"], "b": ["epochs=3", "data.workers=1"]}, seeds=[0])
    assert sweep.main([str(path)]) == 1
    line = table(tmp_path)["a", "0"]
    assert "holds a run of another config (optim.lr: 0.1 -> 0.4)" in line["error"] and line["student_patch_knn"] == ""
    assert table(tmp_path)["b", "0"]["status"] == "done"  # how it was read does not matter
    path = write_sweep(tmp_path, {"b": ["epochs=3", "evaluation.knn_k=3"]}, seeds=[0])
    assert sweep.main([str(path)]) == 1  # what was measured does
    assert len(started(tmp_path)) == 2


@pytest.mark.seconds
def test_a_run_that_was_judged_again_by_hand_is_not_taken_for_the_sweeps(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, {"a": [], "b": ["teacher.weights=demo"]}, seeds=[0])
    assert sweep.main([str(path)]) == 0
    shutil.rmtree(tmp_path / "out/configs")  # what the run itself noted counts
    edit_config(tmp_path / "out/runs/b-s0", "teacher", weights=str(tmp_path / "out/runs/demo-teacher/teacher.pt"))
    assert sweep.main([str(path)]) == 0, "the demo's teacher is where the run puts it"
    edit_config(tmp_path / "out/runs/b-s0", "teacher", weights="/elsewhere/teacher.pt")
    assert sweep.main([str(path)]) == 1
    edit_config(tmp_path / "out/runs/b-s0", "teacher", weights="demo")
    edit_config(tmp_path / "out/runs/a-s0", "evaluation", max_train_images=5)
    assert sweep.main([str(path)]) == 1
    assert "evaluation.max_train_images: 5 -> " in table(tmp_path)["a", "0"]["error"]
    assert started(tmp_path) == ["a-s0", "b-s0"]


def edit_config(run: Path, section: str, **values: Any) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config[section] |= values
    (run / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.seconds
def test_a_run_that_died_while_it_was_evaluated_is_gone_on_with(tmp_path: Path) -> None:
    """The student's accuracies are on disk before the rest."""
    path = write_sweep(tmp_path, {"a": []}, seeds=[0])
    assert sweep.main([str(path)]) == 0
    left = tmp_path / "out/runs/a-s0/summary.json"
    whole = json.loads(left.read_text())
    write_sealed(left, {key: value for key, value in whole.items() if key != "time_saved"})
    assert sweep.main([str(path)]) == 0
    assert started(tmp_path) == ["a-s0", "a-s0"]
    assert json.loads(left.read_text()) == whole


@pytest.mark.seconds
def test_seeds_can_be_made_one_by_one_and_the_tables_are_of_all(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, {"a": [], "b": ["epochs=3"]})
    assert sweep.main([str(path), "--seeds", "2"]) == 0
    assert started(tmp_path) == ["a-s2", "b-s2"]
    assert {key: line["status"] for key, line in table(tmp_path).items()} == {
        ("a", "0"): "not made", ("a", "2"): "done", ("b", "0"): "not made", ("b", "2"): "done",
    }  # fmt: skip
    assert sweep.main([str(path), "--seeds", "7"]) == 2, "nothing to make is not a success"


def test_every_seed_of_initial_weights_meets_every_seed_of_the_data(tmp_path: Path) -> None:
    rows = {
        "a": ["curriculum.mode=fixed"],
        "b": {"seeds": [2], "student_seeds": [7]},
        "c": {"like": "a", "overrides": ["optim.lr=0.2"], "epochs_as": {"of": "a", "by": "flops"}},
    }
    plan = read_plan(write_sweep(tmp_path, rows, student_seeds=[0, 1]), None, [])
    assert list(plan.runs) == [
        "a-s0w0", "a-s0w1", "a-s2w0", "a-s2w1", "b-s2w7", "c-s0w0", "c-s0w1", "c-s2w0", "c-s2w1",
    ]  # fmt: skip
    drawn = {name: (run.config.seed, run.config.student.seed) for name, run in plan.runs.items()}
    assert drawn["a-s0w0"] == (0, 0) and drawn["a-s2w1"] == (2, 1) and drawn["b-s2w7"] == (2, 7)
    assert plan.runs["c-s2w1"].needs() == ("a-s2w1", "a-s2w1")


@pytest.mark.seconds
def test_seeds_of_initial_weights_share_a_pass_and_are_told_apart(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, {"a": [], "b": ["optim.lr=0.2"]}, seeds=[0, 2], student_seeds=[0, 1], together=True)
    assert sweep.main([str(path)]) == 0
    passes = sorted(path.name[:2] for path in (tmp_path / "out" / "passes").iterdir() if path.is_dir())
    assert passes == ["s0", "s2"]
    assert cells(tmp_path, "a")[1] == "4"
    with (tmp_path / "out" / "results.csv").open() as file:
        made = [(line["row"], line["seed"], line["student_seed"], line["status"]) for line in csv.DictReader(file)]
    assert made == [(row, seed, own, "done") for row in "ab" for seed in "02" for own in "01"]
    assert "| a | 2w1 | done |" in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.seconds
def test_seeds_of_initial_weights_can_be_made_one_by_one(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, {"a": [], "b": ["optim.lr=0.2"]}, seeds=[0], student_seeds=[0, 1], together=True)
    assert sweep.main([str(path), "--student-seeds", "1"]) == 0
    with (tmp_path / "out" / "results.csv").open() as file:
        made = [(line["row"], line["student_seed"], line["status"]) for line in csv.DictReader(file)]
    assert made == [(row, own, "done" if own == "1" else "not made") for row in "ab" for own in "01"]
    assert sweep.main([str(path)]) == 0
    passes = [path for path in (tmp_path / "out" / "passes").iterdir() if path.is_dir()]
    assert sorted(sorted(run.name for run in path.glob("?-*")) for path in passes) == [
        ["a-s0w0", "b-s0w0"], ["a-s0w1", "b-s0w1"],
    ]  # fmt: skip
    assert sweep.main([str(path), "--student-seeds", "7"]) == 2


@pytest.mark.seconds
def test_jobs_run_beside_each_other_with_slots_and_ports_of_their_own(tmp_path: Path) -> None:
    """Each of these runs waits until two have started."""
    launcher = f"env SLOT={{slot}}:{{port}} python {FAKE}"
    path = write_sweep(tmp_path, {"a": ["optim.lr=22"]}, launcher=launcher)
    begun = time.monotonic()
    assert sweep.main([str(path), "--jobs=2"]) == 0
    assert time.monotonic() - begun < 25, "one waited for the other in vain"
    places = [line.split()[1].split(":") for line in (tmp_path / "out/runs/started").read_text().splitlines()]
    assert sorted(slot for slot, _ in places) == ["0", "1"] and len({port for _, port in places}) == 2


def start(path: Path) -> subprocess.Popen[str]:
    """The sweep as a process, once its first run has begun."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "sweep.py"), str(path)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (path.parent / "out" / "runs" / "slow-s0" / "waiting").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.seconds
@pytest.mark.parametrize("between", ["", "bash -c '\"$@\" & wait' bash "], ids=["itself", "a launcher that ends first"])
def test_sigterm_lets_the_run_save_and_the_next_sweep_goes_on(between: str, tmp_path: Path) -> None:
    launcher = f"{between}{sys.executable} {FAKE}"
    path = write_sweep(tmp_path, {"slow": ["optim.lr=77"], "quick": []}, seeds=[0], launcher=launcher)
    process = start(path)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert (tmp_path / "out/runs/slow-s0/saved").exists(), "the sweep was gone before its run"
    assert process.returncode == 130 and "the same command goes on" in output
    assert sweep.main([str(path)]) == 0
    assert started(tmp_path) == ["slow-s0", "slow-s0", "quick-s0"]


@pytest.mark.seconds
def test_a_killed_sweep_leaves_no_run_to_be_made_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its run goes on by itself; the next sweep makes the others and waits for that one's end."""
    monkeypatch.setattr(runner, "PATIENCE_S", 0.1)
    path = write_sweep(tmp_path, {"slow": ["optim.lr=77"], "quick": []}, seeds=[0])
    process = start(path)
    process.kill()
    process.communicate()
    plan = read_plan(path, None, [])
    waiting_for = runner.Sweep(plan, jobs=1, wanted=plan.runs)
    end = runner.Sweep._end
    orphan = int(subprocess.run(["pgrep", "-f", f"{FAKE}.*{tmp_path}"], capture_output=True, text=True).stdout)

    def then_kill_the_orphan(self: Any, job: Any, bar: Any) -> None:
        end(self, job, bar)
        if job.unit.name == "quick-s0":
            assert "slow-s0" in self._waiting
            os.kill(orphan, signal.SIGKILL)

    monkeypatch.setattr(runner.Sweep, "_end", then_kill_the_orphan)
    waiting_for.make()
    assert not waiting_for.failures
    assert started(tmp_path) == ["slow-s0", "quick-s0", "slow-s0"]


MISTAKES = {
    "unknown key": ({"rows": {"a": []}, "sedes": [0]}, "unknown key sedes; it takes base, common"),
    "no rows": ({"rows": {}}, "rows: expected names with lists of overrides"),
    "a row's option": ({"rows": {"a": ["optim.rl=1"]}}, "row a: optim.rl"),
    "a row's text": ({"rows": {"a": "optim.lr=1"}}, "row a: expected a list of overrides"),
    "seeds": ({"rows": {"a": []}, "seeds": 3}, "seeds=3: expected a list of whole numbers"),
    "like": ({"rows": {"a": {"like": "b"}}}, "row a: like=b: no row above it"),
    "a cost": ({"rows": {"a": [], "b": {"like": "a", "epochs_as": {"of": "a", "by": "euro"}}}}, "one of teacher_flops"),
    "no like": ({"rows": {"a": [], "b": {"epochs_as": {"of": "a", "by": "flops"}}}}, "epochs_as needs `like`"),
    "a leap": ({"rows": {"a": [], "b": {"like": "a", "epochs_as": {"of": "a", "by": "flops"}}}}, "is not known before"),
    "another price": (
        {
            "rows": {
                "a": [],
                "b": {
                    "like": "a",
                    "overrides": ["curriculum.mode=fixed"],
                    "epochs_as": {"of": "a", "by": "flops"},
                },
            }
        },
        "row b: epochs_as: an epoch costs something else than in a (curriculum.mode: leap -> fixed)",
    ),
    "another price by labels": (
        {
            "rows": {
                "a": ["curriculum.mode=fixed", "student.num_classes=10"],
                "b": {
                    "like": "a",
                    "overrides": ["objective.kd_alpha=0.5"],
                    "epochs_as": {"of": "a", "by": "teacher_flops"},
                },
            }
        },
        "row b: epochs_as: an epoch costs something else than in a (objective.kd_alpha: 0.0 -> 0.5)",
    ),
    "a row's seed": ({"rows": {"a": ["seed=7"]}}, "row a: seed=7: the sweep itself sets seed, output, resume"),
    "everybody's seed": ({"rows": {"a": []}, "common": ["seed=7"]}, "common or command line: seed=7: the sweep itself"),
    "any seed": ({"rows": {"a": []}, "seeds": [0, -1]}, "row a: seed=-1: must be at least 0"),
    "weights' seeds": ({"rows": {"a": {"student_seeds": 3}}}, "row a: student_seeds=3: expected a list of whole"),
    "any seed of weights": ({"rows": {"a": []}, "student_seeds": [-1]}, "row a: student.seed=-1: must be at least 0"),
    "two seeds of weights": (
        {"rows": {"a": ["student.seed=1"]}, "student_seeds": [0, 1]},
        "row a: student.seed: student_seeds sets it; give one of them",
    ),
    "no base": ({"rows": {"a": []}, "base": None}, "base=None: expected a text"),
    "a launcher": ({"rows": {"a": []}, "launcher": ["python"]}, "launcher=['python']: expected a text"),
    "an output": ({"rows": {"a": []}, "output": 20260701}, "output=20260701: expected a text"),
    "a name": ({"rows": {"a/b": []}}, "row a/b: a name of letters, digits"),
    "a column": ({"rows": {"a": []}, "show": ["knn"]}, "show: knn is none of student_patch_knn"),
    "a program": ({"rows": {"a": []}, "launcher": "nosuch --n 2"}, "nosuch is not a program here"),
}


@pytest.mark.parametrize(("spec", "words"), [pytest.param(*case, id=name) for name, case in MISTAKES.items()])
def test_a_mistake_is_told_in_one_line_before_anything_starts(
    spec: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main([str(write_sweep(tmp_path, **spec))]) == 2
    told = capsys.readouterr().err
    assert told.startswith("sweep: error: ") and words in told and told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_parallel_launchers_need_ports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_sweep(tmp_path, {"a": []}, launcher="deepspeed --num_gpus 1")
    assert sweep.main([str(path), "--jobs", "2"]) == 2
    assert "--jobs=2 needs a port for each" in capsys.readouterr().err
    assert sweep.main([str(path), "--jobs", "0"]) == 2
    assert "--jobs=0: must be at least 1" in capsys.readouterr().err


DELIVERED = {
    "cifar10": 54,
    "cifar10_long": 10,
    "cifar10_remedies": 12,
    "cifar10_strong": 6,
    "cifar10_table": 54,
    "demo_remedies": 18,
}  # runs of each sweep


def test_every_sweep_that_is_delivered_is_counted() -> None:
    assert {path.stem for path in (ROOT / "launch_configs" / "sweeps").glob("*.yaml")} == DELIVERED.keys()


@pytest.mark.seconds
@pytest.mark.parametrize("name", DELIVERED)
def test_the_sweeps_that_are_delivered_hold_together(name: str) -> None:
    path = ROOT / "launch_configs" / "sweeps" / f"{name}.yaml"
    plan = read_plan(path, None, ["data.train=digits", "data.val=digits", "teacher.weights=random"])
    assert len(plan.runs) == DELIVERED[name]


@pytest.mark.slow
def test_real_runs_are_killed_continued_and_told_as_they_were(tmp_path: Path) -> None:
    """Two rows, two seeds on digits. Sweep and run are killed in the second run, after a checkpoint of its own."""
    out = tmp_path / "out"
    base = write_config(
        tmp_path, epochs=3, data={"val": "digits"}, evaluation={"every_epochs": 1, "probe_epochs": 2, "teacher": False}
    )
    rows = {"fixed": ["curriculum.mode=fixed", "curriculum.start=null"], "leap": []}
    path = write_sweep(tmp_path, rows, base=base.name, launcher="python", seeds=[0, 1])
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "sweep.py"), str(path)], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while not (out / "runs/fixed-s1/checkpoints/latest").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    os.killpg(
        int(subprocess.check_output(["pgrep", "-f", f"{out}/configs/fixed-s1"], text=True).split()[0]), signal.SIGKILL
    )
    process.wait()
    saved = (out / "runs/fixed-s1/checkpoints/latest").read_text()
    before = (out / "runs/fixed-s0/summary.json").stat().st_mtime_ns
    assert sweep.main([str(path)]) == 0
    assert (out / "runs/fixed-s0/summary.json").stat().st_mtime_ns == before, "made twice"
    assert saved != "step00000069"
    for (row, seed), line in table(tmp_path).items():
        said = json.loads((out / f"runs/{row}-s{seed}/summary.json").read_text())
        evaluated = (out / f"runs/{row}-s{seed}/evaluation.jsonl").read_text().splitlines()
        assert [json.loads(text)["epoch"] for text in evaluated] == [1, 2, 3]
        assert float(line["student_patch_knn"]) == said["student_patch_knn"] == json.loads(evaluated[-1])["patch_knn"]
        assert float(line["flops"]) == sum(said["flops"].values())
    knn = [100 * float(line["student_patch_knn"]) for (row, _), line in table(tmp_path).items() if row == "leap"]
    assert cells(tmp_path, "leap")[2] == f"{statistics.mean(knn):.2f} ± {statistics.stdev(knn):.2f}"


TOGETHER = {
    "low": ["curriculum.threshold=0.7"],
    "high": ["curriculum.threshold=0.9", "student.kwargs.depth=3"],
    "other_data": ["data.global_batch=32"],
}


@pytest.mark.seconds
def test_rows_that_may_share_a_pass_do_and_say_so(tmp_path: Path) -> None:
    """Per seed one process for two rows; the third has another batch, so it is made alone."""
    path = write_sweep(tmp_path, TOGETHER, seeds=[0, 1], together=True)
    assert sweep.main([str(path)]) == 0
    out = tmp_path / "out"
    passes = sorted(path.name for path in (out / "passes").iterdir() if path.is_dir())
    assert [name[:2] for name in passes] == ["s0", "s1"]
    for seed, name in enumerate(passes):
        assert {path.name for path in (out / "passes" / name).iterdir() if path.is_dir()} == {
            f"low-s{seed}", f"high-s{seed}"
        }  # fmt: skip
    assert {path.name for path in (out / "runs").iterdir() if path.is_dir()} == {"other_data-s0", "other_data-s1"}
    results = (out / "results.md").read_text()
    assert "shared one pass" in results and f"- {passes[0]}: low-s0, high-s0" in results
    lines = table(tmp_path)
    assert lines["low", "0"]["status"] == "done" and lines["low", "0"]["train_seconds"] == ""
    assert float(lines["other_data", "0"]["train_seconds"]) > 0
    began = len((out / "passes" / "started").read_text().splitlines())
    assert sweep.main([str(path)]) == 0
    assert len((out / "passes" / "started").read_text().splitlines()) == began, "what has finished stays"


def test_a_row_shares_a_pass_with_one_that_has_arguments_of_another_model(tmp_path: Path) -> None:
    """null takes an argument of the first row's model away: a convolutional student has no depth."""
    rows = {"vit": ["student.kwargs.depth=3"], "conv": ["student.model=test_convnext"]}
    plan = read_plan(write_sweep(tmp_path, rows, seeds=[0], together=True), None, [])
    plan = in_company(plan, plan.runs)
    (unit,) = units(plan).values()
    assert [run.name for run in unit.runs] == ["vit-s0", "conv-s0"]
    config = unit.config(plan)
    for run in unit.runs:
        found = members(config)[run.name]
        assert found.output == str(run.folder) and replace(found, output="") == replace(run.config, output="")
    assert members(config)["conv-s0"].student.kwargs == {}


@pytest.mark.seconds
def test_a_row_that_fails_in_a_pass_is_made_anew_alone(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, {"low": [], "wild": ["optim.lr=5"]}, seeds=[0], together=True)
    assert sweep.main([str(path)]) == 1
    assert sweep.main([str(path)]) == 0
    assert (tmp_path / "out" / "runs" / "wild-s0" / "summary.json").is_file()
