"""README, CHANGELOG and docs/ as readers meet them: links, headings, and the commands they are told to type."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCED = re.compile(r"^( *)(```|~~~).*?^\1\2[^\n]*$", re.M | re.S)
_INDENTED = re.compile(r"(?:\A|\n\n)((?:    [^\n]*(?:\n|\Z)|\n(?=    ))+)")
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_PROGRAMS = ("python", "deepspeed", "torchrun", "make")


def prose(text: str) -> str:
    """A page without its code: what may hold links and headings."""
    return _SPAN.sub("", _INDENTED.sub("\n\n", _FENCED.sub("", text)))


def links(text: str) -> list[str]:
    """Targets of all links and pictures within the repository."""
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)", prose(text)) + re.findall(r'(?:src|href)="([^"]+)"', prose(text))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """What a link to a heading of the page may name, as GitHub makes it; a heading that comes twice has none."""
    headings = re.findall(r"^#{1,6} +(.+?)(?: +#+)?$", _FENCED.sub("", text), re.M)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", heading) for heading in headings]
    names = [re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in plain]
    return {name for name in names if names.count(name) == 1}


@dataclass(frozen=True)
class Command:
    """One program and its arguments, as a page shows them."""

    page: str
    words: tuple[str, ...]
    in_block: bool  # to be typed, and not a name within a sentence

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"

    @property
    def script(self) -> str | None:
        """The Python file of this repository that it starts, if any."""
        return next((word for word in self.words if re.fullmatch(r"(?:leap_dist|tools|tests)/[\w/]+\.py", word)), None)

    @property
    def arguments(self) -> list[str]:
        """What the script is given."""
        return list(self.words[self.words.index(self.script) + 1 :]) if self.script else list(self.words[1:])

    def value(self, option: str) -> str | None:
        """The word after ``--option``, or what stands behind ``option=``."""
        for word, following in zip(self.words, (*self.words[1:], ""), strict=True):
            if word == option:
                return following
            if word.startswith(f"{option}="):
                return word.removeprefix(f"{option}=")
        return None


def commands(page: str, text: str) -> list[Command]:
    """Every command for Python, its launchers or make, in blocks of code and in spans within a sentence.

    In a block what follows two spaces or more is a remark, and a backslash at the end goes on in the next line.
    """
    found = []
    blocks = [match.group(0) for match in _FENCED.finditer(text)] + _INDENTED.findall(_FENCED.sub("", text))
    for block in blocks:
        lines = [re.split(r"\s{2,}(?!\\$)", line.strip())[0] for line in block.splitlines()]
        found += _parsed(page, re.sub(r" *\\\n", " ", "\n".join(lines)).splitlines(), True)
    spans = _SPAN.findall(_INDENTED.sub("\n\n", _FENCED.sub("", text)))
    return found + _parsed(page, [" ".join(span.split()) for span in spans], False)


def _parsed(page: str, lines: list[str], in_block: bool) -> list[Command]:
    found = []
    for line in lines:
        for part in re.split(r"&&|[&|;]", re.sub(r"(^|\s)#.*", "", line)):
            try:
                words = shlex.split(part)
            except ValueError:  # prose with an apostrophe, or code in another language
                continue
            while words and (re.fullmatch(r"[A-Z_]+=\S*", words[0]) or words[0] in ("env", "nice")):
                words.pop(0)
            if len(words) > 1 and words[0] in _PROGRAMS:
                found.append(Command(page, tuple(word for word in words if word != "..."), in_block))
    return found


def documented() -> list[Command]:
    """The commands of all pages, in reading order, each once a page."""
    every = [command for page in PAGES for command in commands(str(page.relative_to(ROOT)), page.read_text())]
    return list(dict.fromkeys(every))
