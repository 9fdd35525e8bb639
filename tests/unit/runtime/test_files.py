"""A file is put in the place of a file, and of nothing else."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from leap_dist.errors import UserError
from leap_dist.runtime.files import write_text


def test_a_file_takes_the_place_of_a_file_only(tmp_path: Path) -> None:
    """A rename onto a device would take it away: /dev/null, to whoever is root."""
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("new", "file", "link"):
        write_text(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"
    for name, words in (("folder", "a folder"), ("pipe", "no regular file")):
        with pytest.raises(UserError, match=f"^{tmp_path / name}: there is {words}; name a file$"):
            write_text(tmp_path / name, "text")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert len(list(tmp_path.iterdir())) == 5  # no partial file is left
