"""Semantic segmentation by a linear head on frozen tokens: ADE20K and Pascal VOC 2012, as downloaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as V
from tqdm import tqdm

from leap_dist.analysis import Subject
from leap_dist.analysis.sheets import Cell, contact_sheet, save_sheet
from leap_dist.data.crops import decode
from leap_dist.errors import UserError
from leap_dist.evaluation.segmentation import IGNORED, Head, confusion, miou, segment
from leap_dist.judging.kept_head import KeptHead
from leap_dist.runtime.distributed import World, sum_over_ranks
from leap_dist.runtime.running_stats import running_stats

BATCH = 16  # crops a step, over all ranks
RATE, DECAY = 1e-3, 1e-4
KEPT_EVERY = 500  # steps that a kill may cost
VERSION = 1  # to be raised when the same call trains another head
DRAWN, PHOTO = 6, 256  # images of a picture, and pixels of their longer side


class HeadOptions(NamedTuple):
    """blocks: the last ones, whose tokens the head sees; workers: loader processes; cache: folder for unfinished heads,
    seen by all ranks.
    """

    blocks: int
    steps: int
    workers: int
    cache: Path


class Pair(NamedTuple):
    """An image and its mask."""

    image: Path
    mask: Path


@dataclass(frozen=True)
class MaskedSet:
    """name: ade20k or voc2012; classes: how many; first: the label of class 0; train, val: images with masks."""

    name: str
    classes: int
    first: int
    train: list[Pair]
    val: list[Pair]

    def mask(self, path: Path) -> Tensor:
        """Classes (h, w) of a mask's pixels, uint8, IGNORED where none counts. UserError for a label out of range."""
        try:
            with Image.open(path) as image:
                labels = np.asarray(image).astype(np.int64)
        except Exception as error:  # PIL raises anything
            raise UserError(f"{path}: no readable mask ({type(error).__name__})") from None
        if labels.ndim != 2:
            raise UserError(f"{path}: a mask of one channel is expected, this one has the shape {labels.shape}")
        classes = np.where(labels < self.first, IGNORED, labels - self.first)
        classes[labels == IGNORED] = IGNORED
        if ((classes >= self.classes) & (classes != IGNORED)).any():
            raise UserError(f"{path}: label {labels.max()} is out of range; {self.name} has {self.classes} classes")
        return torch.from_numpy(classes.astype(np.uint8))


def open_masked(folder: Path) -> MaskedSet:
    """ADE20K (images/ and annotations/, each with training/ and validation/) or VOC 2012 (ImageSets/Segmentation/).

    UserError for any other folder, or a file that is missing.
    """
    inside = folder / "VOCdevkit" / "VOC2012"
    voc = inside if inside.is_dir() else folder
    if (voc / "ImageSets" / "Segmentation").is_dir():
        return MaskedSet("voc2012", 21, 0, _voc(voc, "train"), _voc(voc, "val"))
    if (folder / "annotations").is_dir() and (folder / "images").is_dir():
        return MaskedSet("ade20k", 150, 1, _ade(folder, "training"), _ade(folder, "validation"))
    raise UserError(f"{folder}: neither ADE20K (images/, annotations/) nor VOC 2012 (ImageSets/Segmentation/)")


def _voc(folder: Path, split: str) -> list[Pair]:
    listed = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
    names = listed.read_text().split() if listed.is_file() else []
    if any(Path(name).name != name for name in names):
        raise UserError(f"{listed}: names of images are expected, not paths")
    images, masks = folder / "JPEGImages", folder / "SegmentationClass"
    return _checked([Pair(images / f"{name}.jpg", masks / f"{name}.png") for name in names], listed)


def _ade(folder: Path, split: str) -> list[Pair]:
    images, masks = folder / "images" / split, folder / "annotations" / split
    return _checked([Pair(path, masks / f"{path.stem}.png") for path in sorted(images.glob("*.jpg"))], images)


def _checked(pairs: list[Pair], source: Path) -> list[Pair]:
    if not pairs:
        raise UserError(f"{source}: names no images")
    for path in (path for pair in pairs for path in pair):
        if not path.is_file():
            raise UserError(f"{path} is missing")
    return pairs


class _Crops(Dataset):
    """The training crops of one rank, each a function of its number: image, flip and place."""

    def __init__(self, of: MaskedSet, subject: Subject, numbers: range) -> None:
        self._of, self._subject, self._numbers = of, subject, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        random = np.random.default_rng(self._numbers[index])
        pair = self._of.train[random.integers(len(self._of.train))]
        image, mask = seen(pair.image, self._subject), self._of.mask(pair.mask)[None]
        mask = V.resize(mask, list(image.shape[-2:]), interpolation=V.InterpolationMode.NEAREST)
        side = self._subject.image_size
        top, left = (int(random.integers(length - side + 1)) for length in image.shape[-2:])
        image, mask = (part[..., top : top + side, left : left + side] for part in (image, mask))
        if random.random() < 0.5:
            image, mask = image.flip(-1), mask.flip(-1)
        return image, mask[0].long()


def seen(path: Path, subject: Subject) -> Tensor:
    """An image (3, H, W) as `subject` takes it, the shorter side of its size. UserError if it cannot be read."""
    try:
        pixels = decode(path.read_bytes())
    except Exception as error:  # PIL raises anything
        raise UserError(f"{path}: no readable image ({type(error).__name__})") from None
    pixels = V.resize(pixels, [subject.image_size], interpolation=V.InterpolationMode.BICUBIC)
    expected = subject.preprocessing
    return V.normalize(V.to_dtype(pixels, torch.float32, scale=True), list(expected.mean), list(expected.std))


@torch.no_grad()
def _tokens(subject: Subject, images: Tensor, blocks: int) -> Tensor:
    """Patch tokens of the last `blocks` blocks side by side, (B, blocks x D, rows, columns)."""
    layers = [subject.final(images).patch.float()] if blocks == 1 else subject.layers(images)[-blocks:]
    return torch.cat(layers, -1).transpose(1, 2).unflatten(2, subject.grid)


def judge_segmentation(
    subject: Subject, of: MaskedSet, options: HeadOptions, world: World, picture: Optional[Path] = None
) -> Optional[dict[str, float]]:
    """Train the head on all ranks and give mIoU and pixel accuracy, 0 to 1, on rank 0. Collective.

    picture: of the first validation images, to be written by rank 0.
    """
    head = _trained(subject, of, options, world).eval()
    side = subject.image_size

    def logits(part: Tensor) -> Tensor:
        tokens = _tokens(subject, part, options.blocks)
        return F.interpolate(head(tokens), (side, side), mode="bilinear", align_corners=False)

    def predicted(pair: Pair, truth: Tensor) -> Tensor:
        return segment(seen(pair.image, subject).to(world.device), truth.shape, side, of.classes, logits).cpu()

    matrix = torch.zeros(of.classes, of.classes, dtype=torch.int64)
    mine = of.val[world.rank :: world.size]
    for pair in tqdm(mine, f"{subject.name}: {of.name}, images", disable=not world.is_main, leave=False):
        truth = of.mask(pair.mask)
        matrix += confusion(predicted(pair, truth), truth, of.classes)
    matrix = sum_over_ranks(matrix.to(world.device)).cpu()
    if not int(matrix.sum()):
        raise UserError(f"{of.name}: no pixel of its validation masks counts")
    if not world.is_main:
        return None
    if picture is not None:
        draw_masks(picture, of, predicted)
    return {"miou": miou(matrix), "pixels": (matrix.diagonal().sum() / matrix.sum()).item()}


def draw_masks(path: Path, of: MaskedSet, predicted: Callable[[Pair, Tensor], Tensor]) -> None:
    """A row for each of the first validation images: itself, then truth and prediction laid over it."""
    rows, colours = [], palette(of.first + of.classes)[of.first :]
    for pair in of.val[:DRAWN]:
        truth = of.mask(pair.mask)
        photo = V.resize(decode(pair.image.read_bytes()), list(truth.shape)).permute(1, 2, 0)
        found = (photo, *(_laid_over(photo, mask, colours) for mask in (truth, predicted(pair, truth))))
        rows.append([Cell(one.numpy()) for one in found])
    save_sheet(contact_sheet(rows, ("image", "truth", "prediction"), PHOTO), path)


def palette(count: int) -> Tensor:
    """The colours of labels 0 to `count` - 1 in Pascal VOC's masks: (count, 3) uint8."""
    labels = torch.arange(count)
    channels = [sum((labels >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)) for channel in range(3)]
    return torch.stack(channels, 1).to(torch.uint8)


def _laid_over(photo: Tensor, mask: Tensor, colours: Tensor) -> Tensor:
    """The photo (h, w, 3), tinted where the mask (h, w) counts."""
    counts = mask != IGNORED
    tinted = photo.clone()
    tinted[counts] = (0.35 * photo[counts] + 0.65 * colours[mask[counts].long()]).round().to(torch.uint8)
    return tinted


def _trained(subject: Subject, of: MaskedSet, options: HeadOptions, world: World) -> Head:
    """The head, alike on all ranks. A step's crops are shared among them; BatchNorm sees a rank's own.

    It goes on where an earlier call with the same model, images, options and ranks has left it.
    """
    share, steps = -(-BATCH // world.size), options.steps
    blank = torch.zeros(1, 3, subject.image_size, subject.image_size, device=world.device)
    head = Head(_tokens(subject, blank, options.blocks).shape[1], of.classes).to(world.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    kept = KeptHead(_kept_at(subject, of, options, world), head, (optimizer, schedule), world)
    done = kept.restore()
    numbers = range((world.rank * steps + done) * share, (world.rank + 1) * steps * share)
    loader = DataLoader(_Crops(of, subject, numbers), share, num_workers=options.workers)
    words = f"{subject.name}: {of.name}, head"
    shown = tqdm(loader, words, total=steps, initial=done, disable=not world.is_main, leave=False)
    for step, (images, masks) in enumerate(shown, done + 1):
        tokens = _tokens(subject, images.to(world.device), options.blocks)
        large = F.interpolate(head(tokens), masks.shape[1:], mode="bilinear", align_corners=False)
        known = (masks != IGNORED).sum().clamp(min=1)
        loss = F.cross_entropy(large, masks.to(world.device), ignore_index=IGNORED, reduction="sum") / known
        optimizer.zero_grad()
        loss.backward()
        for parameter in head.parameters():
            sum_over_ranks(parameter.grad).div_(world.size)
        optimizer.step()
        schedule.step()
        if step % KEPT_EVERY == 0 or step == steps:
            kept.save(step)
    for buffer in running_stats(head).values():
        sum_over_ranks(buffer).div_(world.size)
    return head


def _kept_at(subject: Subject, of: MaskedSet, options: HeadOptions, world: World) -> Path:
    """A file whose name tells all that the trained head follows from."""
    images = [(pair.image.name, pair.image.stat().st_size, pair.mask.stat().st_size) for pair in of.train]
    seen = [subject.mark, subject.image_size, asdict(subject.preprocessing), of.name, images]
    told = json.dumps([VERSION, *seen, options.blocks, options.steps, world.size])
    return options.cache / f"head-{hashlib.blake2s(told.encode(), digest_size=12).hexdigest()}.pt"
