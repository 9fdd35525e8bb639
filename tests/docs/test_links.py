"""Every link within the documentation leads somewhere, and every page is in the site."""

from __future__ import annotations

import runpy
from fnmatch import fnmatch
from pathlib import Path

import pytest

from pages import PAGES, ROOT, anchors, commands, links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    broken = []
    for link in links(page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    assert broken == []


def test_every_page_is_in_the_sites_contents() -> None:
    contents = runpy.run_path(str(ROOT / "docs" / "site" / "conf.py"))["CONTENTS"]
    listed = [page for pages in contents.values() for page in pages]
    patterns = [page[1:] if page.startswith("/") else f"docs/{page}" for page in listed]
    names = [str(page.relative_to(ROOT).with_suffix("")) for page in PAGES]
    unlisted = [name for name in names if not any(fnmatch(name, pattern) for pattern in patterns)]
    assert unlisted == ["README"]  # the first page, which holds the contents
    assert [pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in names)] == []


def test_the_reader_of_these_tests_finds_links_anchors_and_commands() -> None:
    page = """# One & two: `three`

See [a](b.md#c), ![p](q.png) and [w](https://x.org), not `[code](z.md)`.

    python tools/x.py --a 1 \\
        --b        a remark
    OMP_NUM_THREADS=1 make bench   # another

## Twice
## Twice

```
deepspeed --num_gpus 2 leap_dist/train.py a.b=c && tensorboard --logdir runs &
[no](link.md)
```

Or `make test`, or `python leap_dist/train.py
--help`.
"""
    assert links(page) == ["b.md#c", "q.png"]
    assert anchors(page) == {"one--two-three"}
    found = commands("page", page)
    assert [(" ".join(command.words), command.in_block) for command in found] == [
        ("deepspeed --num_gpus 2 leap_dist/train.py a.b=c", True),
        ("python tools/x.py --a 1 --b", True),
        ("make bench", True),
        ("make test", False),
        ("python leap_dist/train.py --help", False),
    ]
    assert (found[1].script, found[1].arguments, found[1].value("--a")) == ("tools/x.py", ["--a", "1", "--b"], "1")
    assert found[0].value("a.b") == "c" and found[0].value("--a") is None
