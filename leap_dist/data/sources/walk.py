"""Images below a class folder: what is taken, and what is left out and why, by count."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

MORE = (".jfif", ".jpe", ".avif", ".gif", ".jp2", ".j2k", ".apng", ".dib", ".pbm", ".pnm")
EXTENSIONS = frozenset((*IMG_EXTENSIONS, *MORE))
# Thumbnails and dustbins of NAS systems, archivers and Windows; and whatever begins with a dot.
SYSTEM_FOLDERS = frozenset(("@eaDir", "#recycle", "#snapshot", "__MACOSX", "$RECYCLE.BIN", "System Volume Information"))
HIDDEN, LINKS, NO_EXTENSION = "hidden", "links to folders that are read anyway", "without an extension"
SPECIAL = "devices, pipes or sockets"  # by a link or not; reading one may never end


@dataclass
class Found:
    """files: (path, size) in order. left_out: reason -> files."""

    files: list[tuple[str, int]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def is_hidden(name: str) -> bool:
    """Whether nobody means a file or folder of that name by 'the images in here'."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def sort_out(folder: str | Path, names: Iterable[str]) -> tuple[list[str], Counter[str]]:
    """Of names of files in `folder`, those of images, sorted; and why the others are left out -> how many."""
    images, left_out = [], Counter()
    for name in names:
        extension = os.path.splitext(name)[1].lower()
        if is_hidden(name):
            left_out[HIDDEN] += 1
        elif extension not in EXTENSIONS:
            left_out[extension or NO_EXTENSION] += 1
        elif _is_special(os.path.join(folder, name)):
            left_out[SPECIAL] += 1
        else:
            images.append(name)
    return sorted(images), left_out


def _is_special(path: str) -> bool:
    """Whether something is there, behind links too, that is no file; a link to nothing is told when it is read."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def size_of(path: str | Path) -> int:
    """Bytes of a file; 0 for a link to nothing: reading will tell."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def visible_folders(folder: Path) -> list[str]:
    """Names of the folders in `folder`, sorted, without those that are hidden."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if _is_folder(entry) and not is_hidden(entry.name))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or leads to one; a link that leads to itself does not."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def holds_images(folder: Path) -> bool:
    """Whether an image lies in `folder` or anywhere below; links to folders are not followed."""
    return any(sort_out(path, names)[0] for path, _, names in os.walk(folder))


def walk(folder: Path, taken: Collection[str] = ()) -> Found:
    """All images in `folder` and below, each once, ordered as torchvision's ImageFolder orders them.

    Links to folders are followed, but for those that lead to a folder above or into `taken`: real paths of folders that
    are read for themselves. No folder is read twice.
    """
    found = Found()
    kept = {os.path.realpath(folder), *taken}
    for path, names in sorted(_folders(str(folder), kept, set(), found.left_out)):
        images, left_out = sort_out(path, names)
        found.left_out += left_out
        for name in images:
            whole = os.path.join(path, name)
            found.files.append((whole, size_of(whole)))
    return found


def _folders(
    folder: str, kept: set[str], seen: set[tuple[int, int]], left_out: Counter[str]
) -> Iterator[tuple[str, list[str]]]:
    """(path, names of its files) of `folder` and of all below that are to be read; `seen` grows by their inodes."""
    about = os.stat(folder)
    if (about.st_dev, about.st_ino) in seen:
        left_out[LINKS] += 1
        return
    seen.add((about.st_dev, about.st_ino))
    files = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):  # what is read first must not be chance
        if not _is_folder(entry):
            files.append(entry.name)
        elif is_hidden(entry.name):
            left_out[HIDDEN] += sum(len(names) for _, _, names in os.walk(entry.path))
        elif entry.is_symlink() and leads_back(os.path.realpath(entry.path), kept):
            left_out[LINKS] += 1
        else:
            yield from _folders(entry.path, kept, seen, left_out)
    yield folder, files


def leads_back(target: str, kept: Iterable[str]) -> bool:
    """Whether the folder `target` lies in one of those that are read anyway, or holds one; all are real paths."""
    return any(folder == target or _inside(target, folder) or _inside(folder, target) for folder in kept)


def _inside(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip(os.sep) + os.sep)
