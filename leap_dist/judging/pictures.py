"""What tools/evaluate.py draws: tokens as colours, nearest neighbours, images found by retrieval. All on rank 0."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from leap_dist.analysis import Subject
from leap_dist.analysis.album import as_pixels, token_sheet
from leap_dist.analysis.colours import TokenMap
from leap_dist.analysis.sheets import NEITHER, RIGHT, WRONG, Cell, contact_sheet, save_sheet
from leap_dist.data.crops import decode
from leap_dist.data.sources.walk import walk
from leap_dist.data.specimens import specimens
from leap_dist.errors import UserError
from leap_dist.evaluation import FeatureSet
from leap_dist.evaluation.knn import nearest
from leap_dist.evaluation.retrieval import Truth
from leap_dist.runtime.distributed import World

FOLDER = "pictures"  # in the folder of results
MOST_IMAGES = 16  # whose tokens are drawn
QUERIES, NEIGHBOURS = 8, 8
PHOTO = 256  # pixels of a side
THUMBNAIL = 112
log = logging.getLogger(__name__)


class Portrait(NamedTuple):
    """What one model makes of the images: its tokens of each."""

    name: str
    maps: list[TokenMap]


def image_paths(asked: Sequence[Path]) -> list[Path]:
    """The files named, and all images of the folders named and below, in order; at most MOST_IMAGES.

    UserError for what is not there, or a folder without images.
    """
    paths: list[Path] = []
    for place in asked:
        found = [Path(name) for name, _ in walk(place).files] if place.is_dir() else [place]
        if not found or not (place.is_dir() or place.is_file()):
            raise UserError(f"--images {place}: {'holds no images' if place.is_dir() else 'no such file or folder'}")
        paths += found
    if len(paths) > MOST_IMAGES:
        log.warning("--images: of %d images the first %d are drawn", len(paths), MOST_IMAGES)
    return paths[:MOST_IMAGES]


def opened(paths: Sequence[Path]) -> list[Tensor]:
    """The middle square of each image, (3, s, s) uint8. UserError for one that cannot be read."""
    squares = []
    for path in paths:
        try:
            pixels = decode(path.read_bytes())
        except Exception as error:  # PIL raises anything
            raise UserError(f"{path}: no readable image ({type(error).__name__})") from None
        squares.append(V.center_crop(pixels, [min(pixels.shape[-2:])] * 2))
    return squares


def portrait(subject: Subject, squares: Sequence[Tensor], world: World) -> Portrait:
    """The subject's patch tokens of each square, at its own size and normalisation, so that all see the same."""
    side, expected = [subject.image_size] * 2, subject.preprocessing
    maps = []
    for square in squares:
        image = V.to_dtype(V.resize(square, side, interpolation=V.InterpolationMode.BICUBIC), torch.float32, scale=True)
        seen = V.normalize(image, list(expected.mean), list(expected.std))[None].to(world.device)
        maps.append(TokenMap(subject.final(seen).patch[0].float().cpu(), subject.grid))
    return Portrait(subject.name, maps)


def draw_tokens(
    out: Path, squares: Sequence[Tensor], portraits: Sequence[Portrait], reference: int, foreground: Optional[float]
) -> None:
    """A row for each image, a column for each model, in the colours of the model number `reference`."""
    photos = [as_pixels(V.resize(square, [PHOTO, PHOTO]) / 255) for square in squares]
    headings = ("image", *(one.name for one in portraits))
    sheet = token_sheet(photos, [one.maps for one in portraits], headings, foreground, reference)
    save_sheet(sheet, out / FOLDER / "tokens.png")


class Shelf(NamedTuple):
    """A set as pictures take it: its store, and its features, whose rows are of the store's samples."""

    store: Any
    features: FeatureSet


def draw_neighbours(path: Path, asked: Shelf, known: Shelf, names: Mapping[int, str], device: torch.device) -> None:
    """A row for each of QUERIES samples of `asked`, of different classes: itself, then its nearest ones of `known`.

    Their frames say whether they are of its class. names: of classes, by the labels of `known`.
    """
    ids = asked.features.ids.tolist()
    rows = [ids.index(one.id) for one in specimens(asked.store, QUERIES) if one.id in ids]
    found = nearest(known.features, asked.features.features[rows], NEIGHBOURS, device)
    sheet = []
    for row, neighbours in zip(rows, found.tolist(), strict=True):
        label = int(asked.features.labels[row])
        cells = [Cell(_photo(asked.store, ids[row]), words=names.get(label, str(label)))]
        for neighbour in neighbours:
            other = int(known.features.labels[neighbour])
            frame = RIGHT if other == label else WRONG
            photo = _photo(known.store, int(known.features.ids[neighbour]))
            cells.append(Cell(photo, frame=frame, words=names.get(other, str(other))))
        sheet.append(cells)
    if sheet:
        headings = ("query", "nearest", *[""] * (NEIGHBOURS - 1))
        save_sheet(contact_sheet(sheet, headings, THUMBNAIL), path)


def draw_retrieved(path: Path, queries: Any, database: Any, ranked: NDArray[np.int64], truths: Sequence[Truth]) -> None:
    """A row for each of the first QUERIES queries of a store: itself, then the first images of its ranking (Q, N)."""
    sheet = []
    for query, (ranking, truth) in enumerate(zip(ranked[:QUERIES], truths, strict=False)):
        cells = [Cell(_photo(queries, query))]
        for image in ranking[:NEIGHBOURS].tolist():
            kind = next((name for name, numbers in truth._asdict().items() if image in numbers), "")
            frame = {"easy": RIGHT, "hard": RIGHT, "junk": NEITHER}.get(kind, WRONG)
            cells.append(Cell(_photo(database, image), frame=frame, words=kind or "wrong"))
        sheet.append(cells)
    headings = ("query", "best", *[""] * (NEIGHBOURS - 1))
    save_sheet(contact_sheet(sheet, headings, THUMBNAIL), path)


def file_name(*words: str) -> str:
    """A name of a PNG file made of whatever models and sets are called."""
    return re.sub(r"[^\w.-]+", "-", "_".join(words)) + ".png"


def _photo(store: Any, sample_id: int) -> NDArray[np.uint8]:
    """A sample as a thumbnail (h, w, 3). UserError if it cannot be read any more."""
    try:
        pixels = decode(store.read(sample_id)["image"])
    except UserError:
        raise
    except Exception as error:  # readers and PIL raise anything
        raise UserError(
            f"{store.source}: {store.shard_name(sample_id)} cannot be read ({type(error).__name__})"
        ) from None
    scale = 2 * THUMBNAIL / max(pixels.shape[-2:])
    if scale < 1:
        pixels = V.resize(pixels, [max(1, round(length * scale)) for length in pixels.shape[-2:]])
    return pixels.permute(1, 2, 0).contiguous().numpy()
