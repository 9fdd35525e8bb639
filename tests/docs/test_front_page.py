"""README is short and its config is one; every path and option that a page names is there.

Commands and links have tests of their own beside this one.
"""

from __future__ import annotations

import re
from pathlib import Path

import timm
import torch

from leap_dist.config import Config, load_without_files
from leap_dist.config.loading import option_fields

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
SECTIONS = "|".join(sorted({name.split(".")[0] for name in option_fields(Config) if "." in name}))


def test_the_first_command_comes_soon() -> None:
    """130 lines, and 120 words before the first command: what a reader gives a page before leaving it."""
    text = README.read_text()
    assert text.count("\n") <= 130
    before = re.sub(r"!\[[^]]*\]\([^)]*\)", "", text[: text.index("\n    make demo")])
    assert 0 < len([word for word in before.split() if re.search(r"\w", word)]) <= 120


def test_the_minimal_config_is_accepted(tmp_path: Path) -> None:
    """A teacher, a student and images of one's own; and the last block is reached whatever the scores."""
    (config,) = re.findall(r"```yaml\n(.*?)```", README.read_text(), re.S)
    assert config.count("\n") <= 9
    (tmp_path / "mine.yaml").write_text(config)
    loaded = load_without_files(tmp_path / "mine.yaml")
    with torch.device("meta"):
        blocks = len(timm.create_model(loaded.teacher.model).blocks)
    epochs = (blocks - 1) * loaded.curriculum.max_epochs_per_block
    assert epochs < loaded.epochs
    assert f"# {blocks} blocks are climbed in at most {epochs} epochs" in config


def test_paths_in_the_text_are_there() -> None:
    """Files and folders of the repository. A star stands for any part of a name."""
    named = {
        (page.name, path)
        for page in PAGES
        for path in re.findall(
            r"(?<![\w/.-])(?:leap_dist|launch_configs|tools|tests|kernels)/[\w./*-]*", page.read_text()
        )
    }
    assert {page for page, _ in named} >= {"README.md", "running.md", "imagenet.md", "design.md"}
    assert [(page, path) for page, path in sorted(named) if not list(ROOT.glob(path.rstrip("./")))] == []


def test_options_have_the_names_they_are_given() -> None:
    """`section.key=value` wherever it is written, and `section.key` alone where that can be nothing but an option."""
    files = r"(?!safetensors|jsonl?\b|png|yaml)"
    named = set()
    for page in PAGES:
        text = page.read_text()
        named |= {(page.name, key) for key in re.findall(rf"(?<![\w.])((?:{SECTIONS})\.\w+)[\w.]*=", text)}
        if page.name in ("README.md", "running.md", "imagenet.md", "configuration.md"):
            named |= {(page.name, key) for key in re.findall(rf"`((?:{SECTIONS})\.{files}\w+)[\w.]*`", text)}
    assert {page for page, _ in named} >= {"README.md", "running.md", "imagenet.md", "data.md", "scaling.md"}
    known = option_fields(Config)
    assert [(page, key) for page, key in sorted(named) if key not in known] == []
