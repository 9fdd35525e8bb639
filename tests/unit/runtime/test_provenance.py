"""What made a file: libraries by version, and the commit of this package's code, where git knows it."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import timm
import torch

from leap_dist.runtime import provenance as made


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, "-C", str(folder), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package in a repository with one commit."""
    folder = tmp_path / "checkout" / "package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    git(tmp_path, "init", "-q", "checkout")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "one")
    return folder


def test_a_commit_and_whether_the_code_differs_from_it(package: Path) -> None:
    commit = git(package, "rev-parse", "HEAD")
    assert made.git_state(package) == {"commit": commit, "changed": False}
    (package.parent / "notes.txt").write_text("beside the code")
    assert made.git_state(package) == {"commit": commit, "changed": False}
    (package / "new.py").write_text("")
    assert made.git_state(package) == {"commit": commit, "changed": True}


def test_the_variables_of_a_hook_of_another_repository_do_not_lead_there(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "init", "-q", "other")
    expected = made.git_state(package)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    assert made.git_state(package) == expected is not None


def test_a_package_installed_within_somebodys_repository_is_not_of_its_commit(package: Path) -> None:
    installed = package.parent / ".venv" / "lib" / "package"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    (package.parent / ".gitignore").write_text(".venv\n")
    assert made.git_state(installed) is None


def test_without_git_or_a_repository_there_is_none(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "__init__.py").write_text("")
    assert made.git_state(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert made.git_state(package) is None


def test_versions_are_those_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    found = made.provenance.__wrapped__()["versions"]
    assert found["torch"] == torch.__version__ and found["timm"] == timm.__version__

    def unknown(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(made, "version", unknown)
    assert made.provenance.__wrapped__()["versions"] == found | {"leap_dist": None}
