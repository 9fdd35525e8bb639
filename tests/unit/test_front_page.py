"""README and the pages an operator reads: short enough, and every path, option and config they name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch

from leap_dist.config import Config, load_without_files
from leap_dist.config.loading import option_fields

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, *(ROOT / "docs" / f"{name}.md" for name in ("running", "imagenet", "settings", "design"))]
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    """Files and folders in commands, code and links. A star stands for any rest of a name."""
    text = page.read_text()
    named = set(re.findall(r"(?<![\w/.-])(?:leap_dist|launch_configs|tools|tests|kernels)/[\w./*-]*", text))
    assert named
    assert [path for path in named if not list(ROOT.glob(path.rstrip("./")))] == []
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", [*PAGES[:4], *(ROOT / "docs").glob("*.md")], ids=lambda page: page.name)
def test_options_have_the_names_they_are_given(page: Path) -> None:
    """Wherever `section.key=value` is written, and on the pages for users wherever `section.key` is code."""
    text = page.read_text()
    named = set(re.findall(rf"(?<![\w.])((?:{SECTIONS})\.\w+)[\w.]*=", text))
    if page in PAGES[:4]:
        files = r"(?!safetensors|jsonl?\b|png|yaml)"
        named |= set(re.findall(rf"`((?:{SECTIONS})\.{files}\w+)[\w.]*[`=]", text))
        assert named
    assert named - set(option_fields(Config)) == set()
