"""A browser shows what the summary says, asks nobody for anything, and has nothing to complain of."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from leap_dist.report import write_report
from made_run import SUMMARY, Page, make_pictures, make_run

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
OFFLINE = ("--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking", "--disable-component-update",
           "--disable-sync", "--disable-default-apps", "--no-first-run")  # fmt: skip
ITS_OWN = (".googleapis.com", ".google.com", ".gstatic.com")  # which the browser asks for itself, whatever it shows

pytestmark = [
    pytest.mark.seconds,
    pytest.mark.skipif(BROWSER is None, reason=f"no browser here: none of {', '.join(NAMES)}"),
]


def opened(page: Path, width: int = 500) -> tuple[Path, list[str], list[str]]:
    """The page as a browser has it, what it said on its console, and the addresses that were asked for."""
    folder = page.parent / "browser"
    folder.mkdir()
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", *OFFLINE, "--enable-logging=stderr",
             f"--user-data-dir={folder}/profile", f"--log-net-log={folder}/net.json", f"--window-size={width},900",
             "--virtual-time-budget=2000", "--dump-dom", page.as_uri()]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=True)
    (folder / "dom.html").write_text(done.stdout)
    asked = set(re.findall(r'"url":"(https?://([^/":]+)[^"]*)"', (folder / "net.json").read_text()))
    said = [line for line in done.stderr.splitlines() if ":CONSOLE:" in line]
    return folder / "dom.html", said, sorted(url for url, host in asked if not host.endswith(ITS_OWN))


def test_figures_in_the_browser_are_the_summarys_and_nothing_is_fetched(tmp_path: Path) -> None:
    """On a screen as narrow as a phone's nothing but wide tables scrolls sideways, as a script in a copy measures."""
    folder = make_run(tmp_path / "made")
    make_pictures(folder, range(10, 30, 10))
    page = write_report(folder)
    measure = "<script>document.title = document.documentElement.scrollWidth - window.innerWidth</script></body>"
    page.write_text(page.read_text().replace("</body>", measure))
    dom, said, asked = opened(page)
    assert (said, asked) == ([], [])
    shown = Page(dom)
    assert len(shown.figures) > 40
    for key, values in shown.figures.items():
        assert set(values) == {SUMMARY[key]}, key
    for key in ("student_cls_probe", "teacher_patch_knn"):
        assert set(shown.shown[key]) == {f"{SUMMARY[key]:.1%}"}
    assert len(shown.all("svg")) == 7 and len(shown.all("img")) == 3
    assert int(re.search(r"<title>(-?\d+)</title>", dom.read_text())[1]) <= 0


def test_these_tests_would_notice(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text('<html><body><img src="http://x.invalid/a.png"><script>nowhere()</script></body></html>')
    _, said, asked = opened(page)
    assert asked == ["http://x.invalid/a.png"] and len(said) == 1 and "nowhere" in said[0]
