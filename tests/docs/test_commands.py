"""What a reader is told to type: it names what exists, and what the documentation shows of the demo runs as shown."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from leap_dist.config import load
from pages import ROOT, Command, commands, documented
from runs import environment

DOCUMENTED = documented()
REQUIRED = ("data.train=digits", "teacher.model=of_the_yaml", "student.model=of_the_yaml")  # where a YAML has none
SHARED = ("leap_dist", "leap_kernels", "kernels", "tools", "launch_configs", "Makefile", "setup.py", "pyproject.toml")


def _remarks() -> list[Command]:
    """Commands in the tools' own help and in the launch configs' comments."""
    texts = {path: ast.get_docstring(ast.parse(path.read_text())) or "" for path in (ROOT / "tools").rglob("*.py")}
    for path in (ROOT / "launch_configs").rglob("*.yaml"):
        texts[path] = "\n".join(line[1:] for line in path.read_text().splitlines() if line.startswith("#"))
    return [
        command
        for path, text in sorted(texts.items())
        for command in commands(str(path.relative_to(ROOT)), f"```\n{text}\n```")
    ]


@cache
def _help(script: str, subcommand: str | None) -> str:
    """What the script says to ``--help``, without a process of its own."""
    name = "leap_dist.train" if script == "leap_dist/train.py" else script[6:-3].replace("/", ".")
    said, before = io.StringIO(), sys.argv
    sys.argv = [script, *([subcommand] if subcommand else []), "--help"]
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            importlib.import_module(name).main()
    finally:
        sys.argv = before
    return said.getvalue()


@pytest.mark.parametrize("command", [*DOCUMENTED, *_remarks()], ids=str)
def test_a_command_names_what_exists(command: Command) -> None:
    """Its script, the files of the repository among its arguments, its options, or its target of make."""
    ours = re.compile(r"(?:leap_dist|tools|tests|launch_configs|kernels)/.*")
    assert [word for word in command.words if ours.fullmatch(word) and not (ROOT / word).exists()] == []
    if command.words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert [word for word in command.words[1:] if "=" not in word and word not in targets] == []
    if command.script is None or command.script.startswith("tests/"):
        return
    subcommands = re.search(r"^positional arguments:\n +\{([\w,]+)\}", _help(command.script, None), re.M)
    first = command.arguments[0] if command.arguments else None
    if subcommands and first != "--help":
        assert first in subcommands[1].split(",")
    known = _help(command.script, first if subcommands and first != "--help" else None)
    options = [word for word in command.arguments if word.startswith("--")]
    assert [option for option in options if not re.search(rf"{option}\b(?!-)", known)] == []
    overrides = [word for word in command.arguments if re.match(r"[a-z_.]+=", word)]
    if "section.key=value" in known:
        config = ROOT / (command.value("--config") or "launch_configs/demo.yaml")
        load(config if config.is_file() else None, [*REQUIRED, *overrides], check=False)
    elif "KEY=VALUE" in known:
        assert [word for word in overrides if f"\n  {word.partition('=')[0]}=" not in known] == []


# What makes a run small, where a command has a flag for it.
SMALLER = {
    "leap_dist/train.py": ["epochs=1", "evaluation.probe_epochs=2", "evaluation.teacher=false"],
    "tools/sweep.py": ["--jobs=1", "epochs=1", "evaluation.probe_epochs=2", "evaluation.teacher=false", "--seeds=0"],
    "tools/analyze.py": ["--images", "16", "--pairs", "2"],
    "tools/profile_skip.py": ["--blocks", "1", "--rounds", "1", "--steps", "1", "--batch", "8"],
    "tools/train_teacher.py": ["--epochs", "1"],
}
FOREIGN = re.compile(r"/data/|://|\b[A-Z]{2,}\b|launch_configs/(?!demo\.yaml|sweeps/demo)|mine\.yaml|_dinov2|--help")


def _folder(path: str) -> str:
    """The run's folder that `path` lies in: runs/leap of runs/leap/student.safetensors."""
    return "/".join(path.split("/")[:2])


def _of_the_demo(shown: list[Command]) -> list[Command]:
    """Those of `shown` that a reader can type with nothing but the demo: what they read is there or was made before."""
    made, found = {"runs/demo", "runs/demo-teacher"}, []
    for command in shown:
        text = " ".join(command.words)
        if not command.in_block or FOREIGN.search(text) or command.words in (before.words for before in found):
            continue
        output = _folder(command.value("--out") or command.value("output") or "runs/demo")
        inputs = {_folder(word) for word in command.words if word.startswith("runs/")} - {output}
        sign = re.search(r"demo|digits|leap_dist/train\.py", text)
        if (sign or inputs) and inputs <= made and not (command.script or "").startswith("tests/"):
            found.append(command)
            made.add(output)
    return found


DEMO = _of_the_demo([*DOCUMENTED, *_remarks()])


def test_the_demo_is_shown() -> None:
    """So that the slow test below cannot run out of commands unseen."""
    assert any(command.words == ("make", "demo") for command in DEMO)
    assert {command.script for command in DEMO} >= {*SMALLER, None, "tools/plot_run.py"}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a fresh checkout with this interpreter as its .venv; `make demo` has run in it."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in SHARED:
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    _run(folder, ["make", "-o", ".venv/.installed", "demo"])
    return folder


def _run(folder: Path, words: list[str]) -> None:
    done = subprocess.run(
        words, cwd=folder, env={**environment(), "PYTHONPATH": str(ROOT)}, timeout=800, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-6000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in DEMO if command.words != ("make", "demo")], ids=str)
def test_what_is_shown_of_the_demo_runs(command: Command, scratch: Path) -> None:
    """In reading order, in one folder, as small as its options allow. A folder of the same name goes first."""
    made = command.value("--out") or (command.value("output") if command.script == "leap_dist/train.py" else None)
    if made and (scratch / made).is_dir():
        shutil.rmtree(scratch / made)
    words = list(command.words)
    if words[0] == "python":
        words[0] = sys.executable
    _run(scratch, [*words, *SMALLER.get(command.script or "", [])])
    if made:
        assert (scratch / made).exists()
