"""Run by test_mutations.py on every rank: each mutation of a run folder in turn, and what its readers make of it.

Prints one line 'OUTCOMES [...]' of JSON: for each mutation its file, kind and outcome. refused: one line, the same on
all ranks. passed over: an older checkpoint, whole, and a line that says so. mended: the run goes on without what is
gone, and a line says so. harmless: all that was read is what it was. silent: none of these.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import sys
from pathlib import Path
from typing import Any

import torch

from leap_dist.config import Config, load
from leap_dist.curriculum.ledger import LEDGER, known_lines
from leap_dist.errors import UserError
from leap_dist.models import load_student
from leap_dist.monitoring import comparison
from leap_dist.runtime.checkpoint import find_resume
from leap_dist.runtime.checkpoint_folder import read_run
from leap_dist.runtime.distributed import World, barrier, gather_objects, initialise, shutdown
from mutate import Mutation, mutated


class Said(logging.Handler):
    """The warnings of leap_dist."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def plain(value: Any) -> Any:
    """What a pickle of it is a function of."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().contiguous().view(-1).numpy().tobytes()
    if isinstance(value, dict):
        return [(str(key), plain(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return (type(value).__name__, plain(vars(value))) if hasattr(value, "__dict__") else repr(value)


def digest(value: Any) -> str:
    return hashlib.sha256(pickle.dumps(plain(value))).hexdigest()


def read_back(config: Config, world: World) -> dict[str, str]:
    """Everything that a resumed run, a table or a figure takes from the folder, each as its digest."""
    path = find_resume(config, world)
    assert path is not None
    states = [torch.load(file, map_location="cpu", weights_only=False) for file in sorted(path.glob("*_states.pt"))]
    client = next(state for state in states if "leap" in state)["leap"]
    run = Path(config.output)
    lines = known_lines(run / LEDGER, client["ledger_lines"], client["ledger_mark"])
    decided, summary = comparison.read_ledger(run), comparison.read_summary(run / comparison.SUMMARY)
    if not summary:
        logging.getLogger("leap_dist").warning("summary.json is missing")  # tools/plot_run.py says that
    return {
        "checkpoint": path.name,
        "state": digest(states),
        "position": digest({key: value for key, value in read_run(path).items() if key != "files"}),
        "ledger": digest([line.decode() for line in lines]),
        "student": digest(load_student(run).state_dict()),
        "results": digest([decided, summary]),
    }


def outcome(config: Config, world: World, whole: dict[str, str], said: Said) -> str:
    """Of reading the folder as it is now, the same on all ranks. whole: what is in it unless it is mutated."""
    said.lines.clear()
    try:
        found, fault = read_back(config, world), ""
    except (UserError, FileNotFoundError) as error:  # the latter of `load_student`, in its words
        found, fault = {}, str(error)
    except Exception as error:
        found, fault = {}, f"\n{type(error).__name__}: {error}"  # a traceback
    every = gather_objects((found, fault, list(said.lines)), world)
    faults = {fault for _, fault, _ in every}
    if faults != {""}:
        (fault, *more) = faults
        return "refused" if not more and "\n" not in fault and len(fault) < 2000 else f"badly refused: {faults}"
    lines = [line for _, _, told in every for line in told]
    changes = {key for found, _, _ in every for key in whole if found[key] != whole[key]}
    if not changes:
        return "harmless"
    if "checkpoint" in changes and any("goes on from" in line for line in lines):
        return "passed over"
    if changes <= {"ledger", "results"} and any("is missing" in line for line in lines):
        return "mended"
    return f"silent: {changes}"


def main(run: Path, task: Path) -> None:
    world, said = initialise(), Said()
    logging.getLogger("leap_dist").addHandler(said)
    auto = load(run / "config.yaml", ["resume=auto"], check=False)
    latest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    exact = load(run / "config.yaml", [f"resume={latest}"], check=False)
    whole, outcomes = read_back(auto, world), []
    for number, fields in enumerate(json.loads(task.read_text())):
        mutation = Mutation(*fields)
        if world.is_main:
            change = mutated(mutation)
            change.__enter__()
        barrier(world)
        outcomes.append((mutation.file, mutation.kind, outcome(exact if number % 3 == 0 else auto, world, whole, said)))
        barrier(world)
        if world.is_main:
            change.__exit__(None, None, None)
    if world.is_main:
        print(f"OUTCOMES {json.dumps(outcomes)}", flush=True)
    shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
