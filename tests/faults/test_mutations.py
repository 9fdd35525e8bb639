"""Files of a run that are not what was written: one line, or no difference to anything that is read of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mutate import Mutation, drawn, mutated, tell
from runs import finish, fork, launch, run_ok, write_config

WORKER = Path(__file__).with_name("mutation_worker.py")
ABOUT = {"checkpoint": {"every_steps": 10, "keep": 3}}
SEED = 22


def finished_run(folder: Path, stage: int, ranks: int, seed: int = 0) -> Path:
    folder.mkdir()
    config = write_config(folder, **ABOUT, engine={"zero_stage": stage}, seed=seed)
    run_ok(config, processes=ranks)
    return folder / "run"


def files_of(run: Path, other: Path) -> dict[str, str]:
    """What is read back of a run folder and its newest checkpoint, each with its counterpart of another run."""
    newest = Path("checkpoints") / (run / "checkpoints" / "latest").read_text().strip()
    names = [file.relative_to(run) for file in (run / newest).iterdir()]
    names += map(
        Path, ("checkpoints/latest", "curriculum.jsonl", "student.json", "student.safetensors", "summary.json")
    )
    return {str(run / name): str(other / name) for name in [*names, Path("config.yaml")]}


def tried(run: Path, mutations: list[Mutation], ranks: int, task: Path) -> list[str]:
    """The outcome of each, as `mutation_worker` says it; fails where one is silent or ends in a traceback."""
    task.write_text(json.dumps(mutations))
    done = finish(fork(WORKER, str(run), str(task), processes=ranks))
    assert done.returncode == 0, done.stdout[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("OUTCOMES ")]
    found = json.loads(line.removeprefix("OUTCOMES "))
    assert len(found) == len(mutations)
    bad = [entry for entry in found if entry[2] not in ("refused", "passed over", "mended", "harmless")]
    assert not bad, bad[:5]
    return [entry[2] for entry in found]


def test_two_dozen_mutations_are_each_one_line_or_harmless(tmp_path: Path) -> None:
    """Files are swapped with those of an older checkpoint of the same run, which is the hardest to tell."""
    run = finished_run(tmp_path / "a", 2, 2)
    files = {name: name.replace("step00000023", "step00000010") for name in files_of(run, run)}
    outcomes = tried(run, drawn(files, 24, SEED), 2, tmp_path / "task.json")
    print(tell("ZeRO 2, 2 ranks", outcomes))
    assert outcomes.count("refused") + outcomes.count("passed over") >= 12, outcomes


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (0, 2), (2, 1), (2, 2)])
def test_hundreds_of_mutations_are_each_one_line_or_harmless(stage: int, ranks: int, tmp_path: Path) -> None:
    run, other = (finished_run(tmp_path / name, stage, ranks, seed) for seed, name in enumerate("ab"))
    outcomes = tried(run, drawn(files_of(run, other), 200, SEED + stage), ranks, tmp_path / "task.json")
    print(tell(f"ZeRO {stage}, {ranks} ranks", outcomes))


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (2, 2)])
def test_whole_runs_over_mutated_folders_end_in_one_line_or_the_same_student(
    stage: int, ranks: int, tmp_path: Path
) -> None:
    """From the middle of the run, so that what is read is trained on."""
    run, other = (finished_run(tmp_path / name, stage, ranks, seed) for seed, name in enumerate("ab"))
    student = (run / "student.safetensors").read_bytes()
    for folder in (run, other):
        (folder / "checkpoints" / "latest").write_text("step00000020")
    kept, outcomes = tmp_path / "kept", []
    shutil.copytree(run, kept)
    for mutation in drawn(files_of(run, other), 12, SEED):
        shutil.rmtree(run)
        shutil.copytree(kept, run)
        with mutated(mutation):
            done = launch(tmp_path / "a" / "config.yaml", f"engine.zero_stage={stage}", "resume=auto", processes=ranks)
            assert "Traceback" not in done.stdout, (mutation, done.stdout[-3000:])
            complaints = {line.split("]", 1)[1] for line in done.stdout.splitlines() if "]: error: " in line}
            assert (done.returncode != 0) == bool(complaints) and len(complaints) <= 1, (mutation, done.stdout[-2000:])
            if not done.returncode:
                assert (run / "student.safetensors").read_bytes() == student, mutation
            outcomes.append("refused" if done.returncode else "harmless")
    print(tell(f"whole runs, ZeRO {stage}, {ranks} ranks", outcomes))
