"""A distilled student as a module of plain tensors, with the transform that its images need."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import pil_to_tensor

from leap_dist.models.export import AVERAGED, STUDENT, load_student
from leap_dist.models.records import ImageSpec, image_spec, read_record
from leap_dist.models.student import Student
from leap_dist.runtime.integrity import FILE, SEAL, record_of

TEACHER, WEIGHTS = "teacher.safetensors", "model.safetensors"  # of tools/train_teacher.py; of an exported hub folder


class Outputs(NamedTuple):
    """What a student makes of B images.

    tokens: (B, N, C) patch tokens, row by row; cls: (B, D) class token, or what stands for it; pooled: (B, C) mean
    patch token, by which runs are judged; logits: (B, classes), None where the student has no classifier.
    """

    tokens: Tensor
    cls: Tensor
    pooled: Tensor
    logits: Optional[Tensor]


class Distilled(nn.Module):
    """A student in eval mode.

    record: its `student.json`. spec: what that says of images. preprocess: a PIL image, or uint8 tensors
    (..., 3, H, W), to what `forward` takes. classes: of its classifier, 0 without one.
    """

    def __init__(self, student: Student, record: dict[str, Any], spec: ImageSpec) -> None:
        super().__init__()
        self.student = student
        self.record, self.spec = record, spec
        self.preprocess = preprocessing(spec)
        self.classes: int = student.recipe.mean_head or student.recipe.kwargs.get("num_classes", 0)
        self.eval()

    def forward(self, images: Tensor) -> Outputs:
        """Images (B, 3, S, S), as `preprocess` makes them, S = spec.image_size."""
        features = self.student(images)
        logits = self.student.classify(features) if self.classes else None
        return Outputs(features.patch, features.cls, features.patch.mean(1), logits)


def preprocessing(spec: ImageSpec) -> v2.Transform:
    """The evaluation transform of the run: shorter side to image_size / crop_pct, centre crop, normalise."""
    size, kind = spec.image_size, InterpolationMode(spec.interpolation)
    return v2.Compose(
        [
            as_pixels,
            v2.Resize(round(size / spec.crop_pct), interpolation=kind),
            v2.CenterCrop(size),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(spec.mean, spec.std),
        ]
    )


def as_pixels(image: Any) -> Tensor:
    """(3, H, W) uint8 of an image of PIL's in any mode, as in training; a tensor as it is."""
    from leap_dist.data.pixels import rgb  # its room takes a second

    return image if isinstance(image, Tensor) else pil_to_tensor(rgb(image))


def weights_file(path: str | Path, ema: bool = False) -> Path:
    """The file of weights that `path`, a folder or that file, stands for. FileNotFoundError if there is none."""
    path = Path(path)
    if path.is_file() and not ema:
        return path
    folder = path if path.is_dir() else path.parent
    names = (AVERAGED,) if ema else (STUDENT, WEIGHTS, TEACHER)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    below = sorted(str(found.parent) for found in folder.glob(f"*/{names[0]}"))  # of a run with several students
    hint = f"did you mean {' or '.join(below[:3])}?" if below else "the end of a run writes its student's"
    raise FileNotFoundError(f"{path}: no {' or '.join(names)} there; {hint}")


def load_distilled(
    path: str | Path, *, ema: bool = False, device: str | torch.device = "cpu", own: Optional[str] = None
) -> Distilled:
    """See `leap_dist.load`."""
    weights = weights_file(path, ema)
    noted = weights.with_name("student.json") if weights.name == WEIGHTS else None  # of a hub folder
    student = load_student(weights, device, own=own, record=noted)
    beside = noted or record_of(weights)
    record = {key: value for key, value in read_record(beside).items() if key not in (SEAL, FILE)}
    return Distilled(student, record, image_spec(record, beside)).to(device)
