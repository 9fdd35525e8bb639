"""Pictures in rows and columns, with words above them and frames around them, as one image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from leap_dist.runtime.files import write_whole

Colour = tuple[int, int, int]
RIGHT, WRONG, NEITHER = (0, 158, 115), (213, 94, 0), (140, 140, 140)  # Okabe and Ito: told apart by every eye
PAPER, INK = (255, 255, 255), (40, 40, 40)
GAP, FRAME, LINE, LETTERS = 6, 5, 16, 11  # pixels


class Cell(NamedTuple):
    """One picture of a sheet.

    pixels: (H, W, 3) uint8; smooth: how it is resized, else every pixel stays a square; frame: its colour, if it has
    one; words: a line below it.
    """

    pixels: NDArray[np.uint8]
    smooth: bool = True
    frame: Optional[Colour] = None
    words: str = ""


def contact_sheet(rows: Sequence[Sequence[Cell]], headings: Sequence[str], side: int) -> Image.Image:
    """Cells of `side` pixels, each picture as large as its proportions allow. headings: a line above each column."""
    room = side + 2 * FRAME
    below = LINE if any(cell.words for row in rows for cell in row) else 0
    columns = max([len(headings), *(len(row) for row in rows)])
    size = (GAP + columns * (room + GAP), 2 * GAP + LINE + len(rows) * (room + below + GAP))
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, words in enumerate(headings):
        _write(pen, (GAP + FRAME + column * (room + GAP), GAP), words, side)
    for index, row in enumerate(rows):
        top = GAP + LINE + GAP + index * (room + below + GAP)
        for column, cell in enumerate(row):
            left = GAP + column * (room + GAP)
            if cell.frame is not None:
                pen.rectangle((left, top, left + room - 1, top + room - 1), fill=cell.frame)
                pen.rectangle((left + FRAME, top + FRAME, left + room - 1 - FRAME, top + room - 1 - FRAME), fill=PAPER)
            picture = _fitted(cell, side)
            sheet.paste(picture, (left + (room - picture.width) // 2, top + (room - picture.height) // 2))
            _write(pen, (left + FRAME, top + room), cell.words, side)
    return sheet


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """As PNG, whole or not at all. UserError if the disk refuses it."""
    write_whole(path, lambda partial: sheet.save(partial, format="PNG"))


def _fitted(cell: Cell, side: int) -> Image.Image:
    picture = Image.fromarray(cell.pixels)
    scale = side / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.BICUBIC if cell.smooth else Image.Resampling.NEAREST)


def _write(pen: ImageDraw.ImageDraw, place: tuple[int, int], words: str, width: int) -> None:
    """One line, cut to `width` pixels. PIL's own font knows Latin letters alone."""
    text, font = words.encode("latin-1", "replace").decode("latin-1"), ImageFont.load_default(LETTERS)
    while text and font.getlength(text) > width:
        text = text[:-1]
    pen.text(place, text, INK, font)
