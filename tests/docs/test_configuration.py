"""docs/configuration.md says what options.py says."""

from __future__ import annotations

import re
from pathlib import Path

import describe_options
import pytest

from leap_dist.config import option_fields
from pages import ROOT

PAGE = ROOT / "docs" / "configuration.md"


def test_the_page_is_what_the_command_writes(tmp_path: Path) -> None:
    """Stale? python tools/describe_options.py --write docs/configuration.md"""
    copy = tmp_path / "configuration.md"
    copy.write_text(PAGE.read_text().replace("`data.train`", "`data.trian`"))
    assert describe_options.main(["--write", str(copy)]) == 0
    assert copy.read_text() == PAGE.read_text()


def test_every_option_has_one_row_with_its_help() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| `([^`]*)` \| (.+?) \| (.+) \|$", PAGE.read_text(), re.M)
    assert [key for key, *_ in rows] == list(option_fields())
    told = {key: (default, allowed, doc) for key, default, allowed, doc in rows}
    assert told["data.crop_scale"][0] == "[0.14, 1.0]"
    assert told["teacher.model"][0] == "(required)"
    assert told["teacher.stages"][:2] == ("null", "a whole number, at least 1, at most 65,536, or null")
    assert told["curriculum.metric"][1] == "one of 'cka', 'cosine'"
    assert told["curriculum.ema_alpha"][1] == "a number, above 0, at most 1"
    assert told["teacher.weights"][2] == r"hub \| random \| demo \| path of a .safetensors/.pth state dict"


def test_a_page_without_the_heading_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Another page\n")
    assert describe_options.main(["--write", str(page)]) == 2
    assert page.read_text() == "# Another page\n"
    assert "describe_options: error:" in capsys.readouterr().err
